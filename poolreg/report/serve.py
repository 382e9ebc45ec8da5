"""Shows one page to the browser of this machine, and to nobody else."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from poolreg.errors import UsageError

HOST = "127.0.0.1"


def server(page: bytes, port: int) -> ThreadingHTTPServer:
    """Return a server of one page on 127.0.0.1; port 0 takes a free one.

    Raises `UsageError` for a port that is taken.
    """
    try:
        return ThreadingHTTPServer((HOST, port), _handler(page))
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"port {port} cannot be used: {error}",
            hint="choose another, or --port 0 for a free one",
        ) from error


def serve(page: bytes, port: int, *, ready: Callable[[str], None]) -> None:
    """Serve a page until Ctrl-C; `ready` is told the address."""
    with server(page, port) as running:
        try:
            ready(f"http://{HOST}:{running.server_port}/")
            running.serve_forever()
        except KeyboardInterrupt:
            return


def _handler(page: bytes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page from elsewhere may lead its own name here; it must not read the answer.
            host = self.headers.get("Host", "").rpartition(":")[0]
            known = host in (HOST, "localhost") and self.path == "/"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page) if known else 0))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if known:
                self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            """Say nothing: one page has no log."""

    return Handler
