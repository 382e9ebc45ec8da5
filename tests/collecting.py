"""Small pools without tensors whose records name objects, and a plain reckoning of their garbage.

Used by test_gc.py and by the script reliability/collector.py.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

from poolreg.canonical import digest_of
from poolreg.store import records
from poolreg.store.registry import Registry
from poolreg.text import partitions as data

GRACE = timedelta(days=14)
MORTAL = ("partition", "model", "evalset")


def journal(root: Path) -> list[dict]:
    """All whole records, as plain JSON."""
    lines = b"".join(p.read_bytes() + b"\n" for p in sorted((root / "journal").glob("*.jsonl")))
    found = []
    for line in lines.splitlines():
        try:
            found.append(json.loads(line[9:]))
        except ValueError:
            continue
    return found


def stored(root: Path) -> dict[str, Path]:
    """The objects in the folder, by digest."""
    return {p.parent.name + p.name: p for p in (root / "objects").glob("??/*")}


def live_objects(root: Path) -> set[str]:
    """The objects that records of what is not removed name."""
    said = journal(root)
    removed = set()
    for record in sorted(said, key=lambda r: (r["at"], r["id"])):
        if record["kind"] == "removal":
            body = record["body"]
            spot = (body["kind"], body["target"])
            removed.add(spot) if body["removed"] else removed.discard(spot)
    live = set()
    for record in said:
        if not needs(record) & removed:
            live |= record["objects"].keys()
    return live


def needs(record: dict) -> set[tuple[str, str]]:
    """What a record is of no use without."""
    body = record["body"]
    if record["kind"] == "calibration":
        return {("model", body["subject"]), (body["text_kind"], body["text"])}
    return {(record["kind"], record["id"])} if record["kind"] in MORTAL else set()


def garbage(root: Path, *, grace: timedelta, now: datetime | None = None) -> set[str]:
    """What a collection may delete under objects/: dead, and old enough in every way."""
    at = now or datetime.now(UTC)
    text = "".join(p.read_text() for p in sorted((root / "journal").glob("*.jsonl")))
    torn = set(re.findall("[0-9a-f]{64}", text.rpartition("\n")[2]))
    gone: dict[str, list[str]] = defaultdict(list)
    tombstones = {}
    for record in sorted(journal(root), key=lambda r: (r["at"], r["id"])):
        if record["kind"] == "removal":
            body = record["body"]
            tombstones[body["kind"], body["target"]] = record["at"]
    for record in journal(root):
        since = [tombstones[thing] for thing in needs(record) if thing in tombstones]
        for digest in record["objects"] if since else ():
            gone[digest].append(min(since))
    found = set()
    for digest, path in stored(root).items():
        times = [datetime.fromtimestamp(max(path.stat().st_mtime, path.stat().st_ctime), UTC)]
        times += [datetime.fromisoformat(died) for died in gone[digest]]
        old = max((at - max(times)), timedelta(0)) >= grace
        if digest not in live_objects(root) | torn and old:
            found.add(digest)
    return found


def add_evalset(registry: Registry, name: str, text: str) -> str:
    """Add an evalset of one document and return its digest."""
    path = registry.root.parent / f"{name}.{abs(hash(text))}.txt"
    path.write_text(text)
    return data.add_evalset(registry, name, [path], replace=True).digest


def add_model(registry: Registry, name: str, *contents: bytes) -> str:
    """Record a model of so many weights files, which are no real ones, and return its digest."""
    digest = digest_of([content.hex() for content in contents])
    objects: dict[str, int] = {}
    with registry.writing():
        files = [
            {"role": "weights", "name": f"model-{number}.safetensors",
             "object": registry.put(content, objects), "bytes": len(content)}
            for number, content in enumerate(contents)
        ]  # fmt: skip
        body = {
            "model_type": "llama", "parameters": 1, "bytes": 1, "dtype": "F32", "tokenizer": None,
            "context_length": 1, "vocab_size": 1, "trusted_code": False, "files": files,
            "tensors": [],
        }  # fmt: skip
        registry.record(
            records.keyed("model", digest, body, objects),
            records.name("model", name, digest),
            registry.removal("model", digest, removed=False),
        )
    return digest


def add_evaluation(registry: Registry, subject: str, evalset: str, scores: bytes) -> str:
    """Record an evaluation with its scores and return its digest."""
    objects: dict[str, int] = {}
    with registry.writing():
        body = {
            "subject": subject, "evalset": evalset, "protocol": "p", "nll": 1.5, "tokens": 1,
            "bytes": 1, "documents": 1, "seconds": 0.0, "device": "cpu",
            "document_scores": registry.put(scores, objects), "token_scores": None,
        }  # fmt: skip
        key = digest_of([subject, evalset])
        registry.record(records.keyed("evaluation", key, body, objects))
    return key


def add_calibration(
    registry: Registry, subject: str, text: str, kind: str, layers: list[bytes]
) -> str:
    """Record a calibration of a model on a text and return its digest."""
    objects: dict[str, int] = {}
    with registry.writing():
        digests = [registry.put(layer, objects) for layer in layers]
        body = {
            "subject": subject, "text": text, "text_kind": kind, "protocol": "p",
            "token_limit": 1, "tokens": 1, "held_out_tokens": 1, "largest": 1, "condition": None,
            "windows": digests[0], "layers": digests, "seconds": 0.0,
        }  # fmt: skip
        key = digest_of([subject, text])
        registry.record(records.keyed("calibration", key, body, objects))
    return key
