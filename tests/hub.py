"""A small Hugging Face Hub on the loopback interface, for tests with the real client.

It speaks the requests of huggingface_hub 2.4 that push, pull and read use; see `_Handler`. A
repository is a line of commits like git's: each has an id, a parent and a whole tree, so reading
at an id stays the same while a branch moves on. Large files lie in a folder, and only the bytes
that their sha256 promises are taken. It keeps a log of every request with its bytes, fails on
demand (`Fault`), and serves what an honest Hub never would (`Hub.commit_files` checks nothing).

With `xet` the client's hf_xet moves large files past this server, through a store in the folder:
they are not in the log, and what was uploaded is read from the store when a commit names it.

Not spoken: pull requests, multipart uploads, buckets, redirects of large files to another host.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import struct
import threading
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

TOKEN, USER, PAGE, LARGE = "hf_for_tests", "tester", 1000, 10_000_000
REPO, REVISION, ENTRY = "RepoNotFound", "RevisionNotFound", "EntryNotFound"
TRACKED = "7z arrow bin ckpt gz h5 jpg model npy npz onnx parquet pt safetensors tar zip zst png"
ATTRIBUTES = "".join(f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in TRACKED.split())


@dataclass
class Request:
    """One request: the bytes of its body that came, and of the answer's body that went out."""

    method: str
    path: str
    status: int = 0
    received: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path?query" contains the pattern `match`.

    kind: "status" answers with `status` and X-Error-Code `code`; "drop" hangs up at once; "cut"
    hangs up after `after` bytes of a GET's answer or of another request's body; "lost" does what
    was asked and hangs up unanswered. The first `skip` requests pass, then `times` fail (None: all).
    """

    match: str
    kind: str = "status"
    status: int = 503
    code: str | None = None
    after: int = 0
    times: int | None = 1
    skip: int = 0


@dataclass(frozen=True)
class Blob:
    """A large file to serve, with the sha256 and the size that the Hub claims for it."""

    data: bytes
    lfs_sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Entry:
    """A file in a tree: `oid` is git's name for it (for a large file, for its pointer)."""

    size: int
    oid: str
    sha256: str | None = None
    pointer: int = 0
    xet: str | None = None
    content: bytes | mmap = field(default=b"", repr=False)


@dataclass(frozen=True)
class Commit:
    """A commit, and the whole tree at it."""

    id: str
    parent: str | None
    tree: Mapping[str, Entry]
    message: str
    date: str


class Refusal(Exception):
    """An error answer: its status, message, X-Error-Code and further headers or members."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


def _regular(data: bytes) -> Entry:
    return Entry(len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), content=data)


def _large(sha256: str, size: int, content: bytes | mmap) -> Entry:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, _regular(pointer.encode()).oid, sha256, len(pointer), content=content)


@lru_cache
def _rules(attributes: bytes) -> tuple[dict[str, tuple[int, bool]], list[str]]:
    """Return which pattern turns LFS on or off in which line, and the patterns that are globs."""
    lines = [line.split() for line in attributes.decode().splitlines()]
    rules = {w[0]: (at, "filter=lfs" in w) for at, w in enumerate(lines) if "filter" in str(w[1:])}
    return rules, [pattern for pattern in rules if {*"*?["} & {*pattern}]


def _is_tracked(tree: Mapping[str, Entry], path: str) -> bool:
    attributes, name = tree.get(".gitattributes"), path.rpartition("/")[2]
    rules, globs = _rules(attributes.content[:] if attributes else b"")
    hits = [one for one in globs if fnmatchcase(path if "/" in one else name, one)]
    return max((rules[one] for one in (path, name, *hits) if one in rules), default=(0, False))[1]


def _is_large(tree: Mapping[str, Entry], path: str, size: int, sample: bytes) -> bool:
    """Tell whether a new file must go through LFS: as attributes say, or as large, or as binary."""
    try:
        binary = "\0" in getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        binary = True
    return size > 0 and (size > LARGE or binary or _is_tracked(tree, path))


class Repo:
    """One repository; branches and tags name commits, `uploads` the large files it was sent."""

    def __init__(self, type: str, id: str, private: bool = False) -> None:
        self.type, self.id, self.private, self.gated = type, id, private, False
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.uploads: dict[str, mmap] = {}
        self.xet: dict[str, str] = {}
        self.commit("main", {".gitattributes": _regular(ATTRIBUTES.encode())}, "initial commit")

    def copy(self) -> Repo:
        """Return a repository of its own with the same history and files."""
        made = copy.copy(self)
        for name, value in vars(self).items():
            setattr(made, name, dict(value) if isinstance(value, dict) else value)
        return made

    def at(self, revision: str) -> Commit:
        """Return the commit that a branch, a tag or (the start of) an id names."""
        name = re.sub("^refs/(heads|tags)/", "", revision)
        found = self.branches.get(name) or self.tags.get(name)
        if not found and re.fullmatch("[0-9a-f]{5,40}", revision):
            found = next((one for one in self.commits if one.startswith(revision)), None)
        if not found:
            raise Refusal(404, f"Invalid rev id: {revision}", REVISION)
        return self.commits[found]

    def commit(self, branch: str, tree: Mapping[str, Entry], message: str) -> str:
        """Put a commit with this whole tree on a branch; new large files are tracked from now on."""
        parent = self.branches.get(branch)
        old = self.commits[parent].tree if parent else {}
        new = [path for path, entry in tree.items() if entry.sha256 and entry is not old.get(path)]
        new = [path.replace(" ", "?") for path in new if not _is_tracked(tree, path)]
        if new:
            known = tree.get(".gitattributes", _regular(b"")).content[:]
            lines = "".join(f"{path} filter=lfs diff=lfs merge=lfs -text\n" for path in new)
            tree = {**tree, ".gitattributes": _regular(known + lines.encode())}
        oids = sorted(entry.oid for entry in tree.values())
        named = [self.type, self.id, len(self.commits), parent, message, oids]
        id = hashlib.sha1(json.dumps(named).encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[id], self.branches[branch] = Commit(id, parent, tree, message, date), id
        return id

    def changed(self, head: str, operations: Iterable[Mapping[str, Any]]) -> dict[str, Entry]:
        """Return the tree after the operations of a commit request."""
        new = dict(self.commits[head].tree)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"].rstrip("/")
            if {"", ".", "..", ".git"} & {*path.split("/")}:
                raise Refusal(400, f"Invalid path: {path}")
            if key == "file":
                new[path] = _regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                new[path] = self._uploaded(path, value["oid"], value.get("size"))
            elif key in ("deletedFile", "deletedFolder"):
                file = key == "deletedFile"
                gone = [n for n in new if (n == path if file else n.startswith(path + "/"))]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", ENTRY)
                for name in gone:
                    del new[name]
            else:
                raise Refusal(400, f"Unknown operation: {key}")
        return new

    def _uploaded(self, path: str, oid: str, size: int | None) -> Entry:
        blob = self.uploads.get(oid)
        if blob is None or size not in (None, len(blob)):
            raise Refusal(400, f"The LFS pointer of {path} names a file that was not uploaded")
        return replace(_large(oid, len(blob), blob), xet=self.xet.get(oid))


class Hub:
    """The server, running within `with`; `folder` keeps the large files and the clients' caches."""

    def __init__(self, folder: Path | str, xet: bool = False) -> None:
        self.folder, self.xet = Path(folder).absolute(), xet
        (self.folder / "lfs").mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.before_commit: Callable[[Hub], object] | None = None
        self.lock = threading.RLock()
        self.closed = False
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Return what a child process needs in its environment, over the parent's, to come here."""
        home = str(self.folder / "home")
        values = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": home}
        values |= {
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }
        for name in ("XET", "TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS"):
            values[f"HF_HUB_DISABLE_{name}"] = "0" if name == "XET" and self.xet else "1"
        return values | {"NO_PROXY": "127.0.0.1"}

    def adopt(self, monkeypatch: Any) -> None:
        """Point the client of this very process here too: it reads its environment at import."""
        from huggingface_hub import constants, hf_api

        home, file = str(self.folder / "home"), "/{repo_id}/resolve/{revision}/{filename}"
        values: dict[str, object] = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + file,
        }
        values |= {"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_TOKEN_PATH": f"{home}/token"}
        values |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": not self.xet}
        values |= {"HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"}}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        for name, text in self.environment().items():
            monkeypatch.setenv(name, text)

    def clear(self) -> None:
        """Forget the log."""
        self.requests.clear()

    def fail(self, fault: Fault) -> None:
        """Let a fault happen from now on; `faults.clear()` ends them all."""
        self.faults.append(replace(fault))

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """Return a repository, whose `private` and `gated` may be set."""
        return self.repos[repo_type, repo_id]

    def head(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> str:
        return self.repo(repo_id, repo_type).at(revision).id

    def tree(
        self, repo_id: str, revision: str = "main", repo_type: str = "model"
    ) -> dict[str, Entry]:
        return dict(self.repo(repo_id, repo_type).at(revision).tree)

    def content(
        self, repo_id: str, path: str, revision: str = "main", repo_type: str = "model"
    ) -> bytes:
        return self.tree(repo_id, revision, repo_type)[path].content[:]

    def commit_files(
        self, repo_id: str, files: Mapping[str, bytes | Blob | None], *,
        repo_type: str = "model", revision: str = "main", message: str = "direct",
    ) -> str:  # fmt: skip
        """Put a commit without the client and return its id; None deletes, and no path is checked."""
        with self.lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_type, repo_id))
            repo.branches.setdefault(revision, repo.branches["main"])
            tree = dict(repo.at(revision).tree)
            for path, data in files.items():
                tree.pop(path, None)
                if isinstance(data, bytes) and not _is_large(tree, path, len(data), data[:512]):
                    tree[path] = _regular(data)
                elif data is not None:
                    tree[path] = self._stored(repo, data if isinstance(data, Blob) else Blob(data))
            return repo.commit(revision, tree, message)

    def _stored(self, repo: Repo, blob: Blob) -> Entry:
        sha256 = hashlib.sha256(blob.data).hexdigest()
        claimed = blob.lfs_sha256 or sha256, len(blob.data) if blob.size is None else blob.size
        if claimed == (sha256, len(blob.data)) and blob.data:
            return _large(*claimed, self.store(repo, sha256, [blob.data]))
        return _large(*claimed, blob.data)

    def store(self, repo: Repo, sha256: str, pieces: Iterable[bytes]) -> mmap:
        """Keep a large file on disk if it has the sha256 that it was announced with."""
        part, digest = self.folder / "lfs" / f"{threading.get_ident()}.part", hashlib.sha256()
        try:
            with part.open("wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != sha256:
                raise Refusal(422, f"The bytes sent have sha256 {digest.hexdigest()}, not {sha256}")
            with part.replace(self.folder / "lfs" / sha256).open("rb") as file:
                repo.uploads[sha256] = mmap(file.fileno(), 0, access=ACCESS_READ)
        finally:
            part.unlink(missing_ok=True)
        return repo.uploads[sha256]

    def fetch(self, repo: Repo, sha256: str) -> None:
        """Take over a large file that hf_xet brought into its store, if it did."""
        at = next((at for at in _xet_files(self.folder) if at[0] == sha256), None)
        if at is None or sha256 in repo.uploads:
            return
        import hf_xet  # type: ignore[import-untyped]

        path = self.folder / f"{threading.get_ident()}.xet"
        with hf_xet.XetSession().new_file_download_group(
            endpoint=self.store_url, token="t", token_expiry_unix_secs=2**32
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(at[1], at[2]), str(path))
        self.store(repo, sha256, [path.read_bytes()])
        path.unlink()
        repo.xet[sha256] = at[1]

    @property
    def store_url(self) -> str:
        """Where hf_xet keeps its chunks."""
        return f"local://{self.folder / 'cas'}"

    def _fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times == 0 or not re.search(fault.match, request):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times = None if fault.times is None else fault.times - 1
                return fault
        return None

    def _announce_commit(self) -> None:
        hook, self.before_commit = self.before_commit, None
        if hook:
            hook(self)


class _Server(ThreadingHTTPServer):
    hub: Hub
    request_queue_size = 128


class _Hangup(Exception):
    """The connection ends here."""


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None], bool]] = []
_API = r"/api/(?P<type>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
_WEB = r"/((?P<type>datasets|spaces)/)?(?P<id>[^/]+/[^/]+?)"


def _route(methods: str, pattern: str, write: bool = False) -> Callable[..., Any]:
    def note(function: Callable[..., None]) -> Callable[..., None]:
        _ROUTES.append((methods, re.compile(pattern), function, write))
        return function

    return note


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Keep still: the log is `Hub.requests`."""

    def _serve(self) -> None:
        self.hub = self.server.hub
        self.note = Request(self.command, self.path)
        # The client may ask for this once a process, or not, by what else it finds in its environment
        if self.path != "/api/agent-harnesses":
            self.hub.requests.append(self.note)
        self.fault, self.body = self.hub._fault(f"{self.command} {self.path}"), self._body()
        try:
            if self.hub.closed or (self.fault and self.fault.kind == "drop"):
                raise _Hangup
            try:
                if self.fault and self.fault.kind == "status":
                    raise Refusal(self.fault.status, "Made to fail", self.fault.code)
                self._dispatch()
            except Refusal as no:
                headers = {"X-Error-Code": no.code, "X-Error-Message": no.message, **no.more}
                value = {"error": no.message, **no.more}
                self._reply(value, no.status, **headers)
        except (_Hangup, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.known = "Authorization" in self.headers
        for methods, pattern, function, write in _ROUTES:
            if self.command in methods.split("|") and (match := pattern.fullmatch(url.path)):
                words = {name: unquote(value or "") for name, value in match.groupdict().items()}
                repo = self._repo(words.pop("type"), words.pop("id")) if "id" in words else None
                if write and not self.known:
                    raise Refusal(401, "Invalid username or password.", REPO if repo else None)
                return function(self, *([repo] if repo else []), **words)
        raise Refusal(404, f"This Hub does not speak {self.command} {url.path}")

    def _repo(self, types: str, id: str) -> Repo:
        repo = self.hub.repos.get(((types or "models")[:-1], id))
        if repo is None or (repo.private and not (self.known or self.command == "PUT")):
            raise Refusal(404 if self.known else 401, "Repository not found", REPO)
        return repo

    def _body(self) -> Iterator[bytes]:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            yield from self._take(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield from self._take(size)
            self.rfile.readline()
        self.rfile.readline()

    def _take(self, length: int) -> Iterator[bytes]:
        cut = self._cut(self.command != "GET")
        while length:
            room = length if cut is None else cut - self.note.received
            piece = self.rfile.read(min(length, room, 1 << 16))
            if not piece:
                raise _Hangup
            self.note.received += len(piece)
            length -= len(piece)
            yield piece

    def _cut(self, here: bool) -> int | None:
        return self.fault.after if here and self.fault and self.fault.kind == "cut" else None

    def _json(self) -> Any:
        return json.loads(b"".join(self.body) or b"{}")

    def _reply(self, value: object, status: int = 200, **headers: str | None) -> None:
        body = json.dumps(value).encode()
        known = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._send(status, [body], known | headers)

    def _send(
        self, status: int, pieces: Iterable[bytes], headers: Mapping[str, str | None]
    ) -> None:
        for _ in self.body:
            pass
        if self.fault and self.fault.kind == "lost":
            raise _Hangup
        cut = self._cut(self.command == "GET")
        self.note.status = status
        self.send_response(status)
        for name, text in headers.items():
            if text:
                self.send_header(name, text)
        self.end_headers()
        for piece in pieces if self.command != "HEAD" else ():
            part = piece if cut is None else piece[: cut - self.note.sent]
            self.note.sent += len(part)
            self.wfile.write(part)
            if cut == self.note.sent:
                raise _Hangup

    @_route("GET", "/api/whoami-v2")
    def _whoami(self) -> None:
        if not self.known:
            raise Refusal(401, "Invalid username or password.")
        access = {"displayName": "tests", "role": "write"}
        self._reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": access}})

    @_route("POST", "/api/repos/create", write=True)
    def _create(self) -> None:
        asked = self._json()
        type, owner = asked.get("type", "model"), asked.get("organization") or USER
        id = f"{owner}/{asked['name']}"
        private = asked.get("visibility", "public") == "private"
        url = self.hub.endpoint + _web(type, id)
        with self.hub.lock:
            if (type, id) in self.hub.repos:
                raise Refusal(409, f"You already created this {type} repo: {id}", url=url)
            self.hub.repos[type, id] = Repo(type, id, private)
        self._reply({"url": url, "name": id})

    @_route("POST", "/api/validate-yaml")
    def _validate(self) -> None:
        found = {k: [{"message": m} for m in v] for k, v in _judge(self._json()["content"]).items()}
        self._reply(found, 400 if found["errors"] else 200)

    @_route("GET", _API + "(/revision/(?P<revision>[^/]+))?")
    def _info(self, repo: Repo, revision: str) -> None:
        commit = repo.at(revision or "main")
        blobs = self.query.get("blobs") == "true"
        files = [
            {"rfilename": path, **(_blob(e) if blobs else {})}
            for path, e in sorted(commit.tree.items())
        ]
        dates = {"createdAt": next(iter(repo.commits.values())).date, "lastModified": commit.date}
        named = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.id, "tags": []}
        state = {"private": repo.private, "gated": repo.gated, "disabled": False}
        whole = {**named, **state, **dates, "siblings": files}
        wanted = parse_qs(urlsplit(self.path).query).get("expand")
        self._reply({k: v for k, v in whole.items() if not wanted or k in ("id", *wanted)})

    @_route("GET", _API + "/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def _tree(self, repo: Repo, revision: str, folder: str) -> None:
        recursive = self.query.get("recursive") == "true"
        found = _listing(repo.at(revision).tree, folder, recursive)
        rest = [one for one in found if one["path"] > self.query.get("cursor", "")]
        page, link = rest[:PAGE], None
        if len(rest) > PAGE:
            query = urlencode({"recursive": str(recursive).lower(), "cursor": page[-1]["path"]})
            link = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{query}>; rel="next"'
        self._reply(page, Link=link)

    @_route("POST", _API + "/paths-info/(?P<revision>[^/]+)")
    def _paths_info(self, repo: Repo, revision: str) -> None:
        asked = parse_qs(b"".join(self.body).decode()).get("paths", [])
        if len(asked) > PAGE:
            raise Refusal(413, "too many parameters")
        tree = repo.at(revision).tree
        known = {one["path"]: one for one in _listing(tree, "", True)}
        self._reply([known[path] for path in asked if path in known])

    @_route("POST", _API + "/preupload/(?P<revision>[^/]+)", write=True)
    def _preupload(self, repo: Repo, revision: str) -> None:
        tree, answers = repo.at(revision).tree, []
        for file in self._json()["files"]:
            path, old = file["path"], tree.get(file["path"])
            large = _is_large(tree, path, file["size"], base64.b64decode(file["sample"]))
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            answers.append(
                {**answer, "shouldIgnore": False, "oid": old and (old.sha256 or old.oid)}
            )
        self._reply({"files": answers, "commitOid": repo.at(revision).id})

    @_route("POST", _WEB + r"\.git/info/lfs/objects/batch", write=True)
    def _batch(self, repo: Repo) -> None:
        root, objects = self.hub.endpoint + _web(repo.type, repo.id), []
        for one in self._json()["objects"]:
            upload, verify = f"{root}/lfs/{one['oid']}", f"{root}.git/info/lfs/objects/verify"
            actions = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(one if one["oid"] in repo.uploads else {**one, "actions": actions})
        self._reply({"transfer": "basic", "objects": objects})

    @_route("PUT", _WEB + "/lfs/(?P<oid>[0-9a-f]{64})")
    def _upload(self, repo: Repo, oid: str) -> None:
        self.hub.store(repo, oid, self.body)
        self._reply({})

    @_route("POST", _WEB + r"\.git/info/lfs/objects/verify", write=True)
    def _verify(self, repo: Repo) -> None:
        asked = self._json()
        if len(repo.uploads.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, f"No such object: {asked['oid']}")
        self._reply({})

    @_route("POST", _API + "/commit/(?P<revision>[^/]+)", write=True)
    def _commit(self, repo: Repo, revision: str) -> None:
        header, *operations = [json.loads(line) for line in b"".join(self.body).splitlines()]
        if self.query.get("create_pr"):
            raise Refusal(501, "This Hub has no pull requests")
        self.hub._announce_commit()
        with self.hub.lock:
            for operation in operations if self.hub.xet else ():
                self.hub.fetch(repo, operation["value"].get("oid", ""))
            head = repo.branches.get(revision)
            if head is None:
                raise Refusal(404, f"Invalid rev id: {revision}", REVISION)
            if not head.startswith(header["value"].get("parentCommit", "")):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            tree = repo.changed(head, operations)
            id = repo.commit(revision, tree, header["value"]["summary"])
        url = f"{self.hub.endpoint}{_web(repo.type, repo.id)}/commit/{id}"
        self._reply({"success": True, "commitOid": id, "commitUrl": url, "hookOutput": ""})

    @_route("GET", _API + "/refs")
    def _refs(self, repo: Repo) -> None:
        def named(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
            pairs = names.items()
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": id} for n, id in pairs]

        heads, tags = named("heads", repo.branches), named("tags", repo.tags)
        self._reply({"branches": heads, "tags": tags, "converts": [], "pullRequests": []})

    @_route("POST", _API + "/branch/(?P<name>[^/]+)", write=True)
    def _branch(self, repo: Repo, name: str) -> None:
        self._name(repo, repo.branches, name, self._json().get("startingPoint", "main"))

    @_route("POST", _API + "/tag/(?P<revision>[^/]+)", write=True)
    def _tag(self, repo: Repo, revision: str) -> None:
        self._name(repo, repo.tags, self._json()["tag"], revision)

    def _name(self, repo: Repo, names: dict[str, str], name: str, revision: str) -> None:
        with self.hub.lock:
            if name in names:
                raise Refusal(409, f"Reference already exists: {name}")
            names[name] = repo.at(revision).id
        self._reply({})

    @_route("DELETE", _API + "/(?P<kind>branch|tag)/(?P<name>[^/]+)", write=True)
    def _unname(self, repo: Repo, kind: str, name: str) -> None:
        if (repo.branches if kind == "branch" else repo.tags).pop(name, None) is None:
            raise Refusal(404, f"Reference not found: {name}", REVISION)
        self._reply({})

    @_route("GET", _API + "/xet-(?P<kind>read|write)-token/(?P<revision>[^/]+)")
    def _xet_token(self, repo: Repo, kind: str, revision: str) -> None:
        if kind == "write" and not self.known:
            raise Refusal(401, "Invalid username or password.", REPO)
        if not self.hub.xet:
            raise Refusal(404, "This Hub has no Xet store")
        url, until, at = self.hub.store_url, 2**32, repo.at(revision).id
        names = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": at}
        headers = {**names, "X-Xet-Token-Expiration": str(until)}
        self._reply({"accessToken": at, "exp": until, "casUrl": url}, 200, **headers)

    @_route("GET|HEAD", _WEB + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        if repo.gated:
            raise Refusal(403, f"Access to {repo.type} {repo.id} is restricted", "GatedRepo")
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.id}
        entry = commit.tree.get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", ENTRY, **headers)
        headers |= {"ETag": f'"{entry.sha256 or entry.oid}"', "Accept-Ranges": "bytes"}
        if entry.sha256:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        if entry.xet:
            token = f"{self.hub.endpoint}/api/{repo.type}s/{repo.id}/xet-read-token/{commit.id}"
            headers |= {"X-Xet-Hash": entry.xet, "Link": f'<{token}>; rel="xet-auth"'}
        status, first, end, length = 200, 0, len(entry.content), len(entry.content)
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            status, (start, last) = 206, match.groups()
            first = int(start) if start else max(0, length - int(last))
            end = min(int(last) + 1, length) if start and last else length
            if first >= length:
                raise Refusal(416, f"The file has {length} bytes")
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{length}"
        pieces = (entry.content[at : min(at + (1 << 20), end)] for at in range(first, end, 1 << 20))
        self._send(status, pieces, {**headers, "Content-Length": str(end - first)})


def _web(type: str, id: str) -> str:
    return f"/{id}" if type == "model" else f"/{type}s/{id}"


def _blob(entry: Entry) -> dict[str, Any]:
    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer}
    return {"size": entry.size, "blobId": entry.oid, **({"lfs": lfs} if entry.sha256 else {})}


def _file(path: str, entry: Entry) -> dict[str, Any]:
    lfs = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer}
    plain = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    more = {"lfs": lfs if entry.sha256 else None, "xetHash": entry.xet}
    return plain | {key: value for key, value in more.items() if value}


def _xet_files(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield sha256, Xet hash and size of the files in hf_xet's store.

    A shard is a row of 48 byte records: a header; for each file its hash, flags and the number
    of its segments, these, as many again if bit 31 is set, and the sha256 if bit 30 is set; an end
    of ones. Hashes are four little-endian words.
    """
    for shard in folder.glob("cas/xet/xorbs/shards/*.mdb"):
        data, at = shard.read_bytes(), 48
        while data[at : at + 32] != b"\xff" * 32:
            *words, flags, count = struct.unpack_from("<4QII", data, at)
            ends = range(at + 84, at + 84 + 48 * count, 48)
            size = sum(struct.unpack_from("<I", data, end)[0] for end in ends)
            at += 48 * (1 + count * (2 if flags >> 31 else 1))
            if flags >> 30 & 1:
                sha256 = struct.unpack_from("<4Q", data, at)
                yield *("".join(f"{w:016x}" for w in part) for part in (sha256, words)), size
                at += 48


def _listing(tree: Mapping[str, Entry], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return what lies in a folder, by path; folders too, and all below if recursive."""
    start, found = f"{folder}/" if folder else "", {}
    for path, entry in tree.items():
        if path.startswith(start):
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = start + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                found[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
            if recursive or len(parts) == 1:
                found[path] = _file(path, entry)
    if folder and not found:
        raise Refusal(404, f"{folder} does not exist", ENTRY)
    return [found[name] for name in sorted(found) if name]


def _judge(content: str) -> dict[str, list[str]]:
    """Return errors and warnings about a card's metadata (the client itself brings PyYAML)."""
    import yaml

    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if not match:
        return {"errors": [], "warnings": ["empty or missing yaml metadata in repo card"]}
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {"errors": [f"YAML: {error}"], "warnings": []}
    if not isinstance(data, dict):
        return {"errors": ["The metadata must be a mapping"], "warnings": []}
    errors = []
    for key in ("library_name", "pipeline_tag", "tags", "datasets", "license", "base_model"):
        given = data.get(key, [])
        if not all(isinstance(one, str) for one in (given if isinstance(given, list) else [given])):
            errors.append(f'"{key}" must be a string or a list of strings')
    for model in data.get("model-index") or []:
        errors += [f'"model-index": no "{key}"' for key in ("name", "results") if key not in model]
    return {"errors": errors, "warnings": []}
