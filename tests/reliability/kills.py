"""Kill processes that write to a pool, again and again, and count what is lost.

    python tests/reliability/kills.py [--kills 500]

Two processes at a time store objects, record evaluations and names, add, remove and restore
evalsets, index, pull, collect garbage without any grace, and compact the journal, each telling
what was acknowledged. Half of them are killed at a random moment, the other half at a random
named step (`poolreg.faults`). After each pair the journal is read by the plain reader below, which
shares no code with the project, and every acknowledged record, every name and every object that a
living record names is looked for.
"""

from __future__ import annotations

import argparse
import binascii
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poolreg import Pool
from poolreg.store.registry import Registry

PLACES = 6
PATIENCE = 120.0  # seconds after which a process that should go on is taken for hung

# argv: folder, the writer's number.
WRITER = """
import json, random, sys
from datetime import timedelta
from pathlib import Path
from poolreg import Pool
from poolreg.canonical import digest_of
from poolreg.errors import Locked, NotFound
from poolreg.store import records
from poolreg.upkeep.collection import collect

base, writer = Path(sys.argv[1]), sys.argv[2]
draw = random.Random(writer)
pool = Pool.open(base / "pool")
registry = pool.registry
mine = {}

def tell(ids=(), names=None):
    print(json.dumps({"ids": list(ids), "names": names or {}}), flush=True)

def measure(number):
    label, objects = f"w{writer}-{number}", {}
    content = draw.randbytes(draw.choice([10, 3000, 100_000]))
    with registry.writing():
        if draw.random() < 0.5:
            source = base / f"source-{writer}"
            source.write_bytes(content)
            stored = registry.objects.put_file(source)
            objects[stored] = len(content)
        else:
            stored = registry.put(content, objects)
        body = {
            "subject": label, "evalset": "e", "protocol": "p", "nll": 1.5, "tokens": 1, "bytes": 1,
            "documents": 1, "seconds": 0.0, "device": "cpu", "document_scores": stored,
            "token_scores": None,
        }
        record = records.keyed("evaluation", digest_of({"of": label}), body, objects)
        registry.record(record)
    tell([["evaluation", record.id]])

def add(number):
    file = base / f"text-{writer}.txt"
    file.write_text(f"{writer} {number} " + draw.randbytes(20).hex())
    label = f"e{writer}-{number}"
    added = pool.add_evalset(label, [file])
    mine[label] = added.digest
    tell([["evalset", added.digest]], {label: added.digest})

def remove(number):
    label = draw.choice([*mine] or [None])
    if label is None:
        return
    try:
        (pool.remove if draw.random() < 0.6 else lambda space, name: pool.restore([name]))("evalset", label)
    except NotFound:
        pass
    except Exception as error:
        if type(error).__name__ not in ("Refused", "Conflict", "UsageError"):
            raise

def pull(number):
    try:
        pool.pull((base / f"place-{draw.randrange(%d)}").as_uri())
    except Locked:
        pass

def gather(number):
    try:
        collect(registry, grace=timedelta(0)) if draw.random() < 0.5 else pool.compact()
    except Locked:
        pass

jobs = [measure] * 8 + [add] * 4 + [remove] * 3 + [lambda _: registry.catalog.refresh()] * 2 + [gather] * 3 + [pull]
print(json.dumps({"ids": [], "names": {}}), flush=True)
number = 0
while True:
    draw.choice(jobs)(number)
    number += 1
""" % PLACES  # fmt: skip # noqa: UP031


@dataclass
class Count:
    """What was done and what was found."""

    kills: int = 0
    at_steps: int = 0
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)


# -- a reader of its own -----------------------------------------------------------------------


def journal(root: Path) -> list[dict[str, Any]]:
    """Return all records; fails at a bad line that is not a torn end."""
    found = []
    for path in sorted((root / "journal").iterdir()):
        *lines, _torn = path.read_bytes().split(b"\n")
        for line in lines:
            assert binascii.crc32(line[9:]) == int(line[:8], 16), path
            found.append(json.loads(line[9:]))
    return found


def living(records: list[dict[str, Any]]) -> tuple[dict[str, int], set[str]]:
    """Return the objects that records of nothing removed name, and what is removed."""
    removals: dict[str, tuple[str, str, bool]] = {}
    for record in records:
        if record["kind"] == "removal":
            said = (record["at"], record["id"], record["body"]["removed"])
            target = record["body"]["target"]
            removals[target] = max(removals.get(target, ("", "", False)), said)
    removed = {target for target, (_, _, gone) in removals.items() if gone}
    mortal = {"partition", "evalset", "model"}
    objects: dict[str, int] = {}
    for record in records:
        if record["kind"] not in mortal or record["id"] not in removed:
            objects |= record["objects"]
    return objects, removed


def check(root: Path, acks: list[dict[str, Any]], count: Count, *, hashed: bool) -> None:
    """Look for everything that was acknowledged, and for everything that is named."""
    records = journal(root)
    ids = {(record["kind"], record["id"]) for record in records}
    objects, removed = living(records)
    for ack in acks:
        count.lost += [f"{kind} {key}" for kind, key in ack["ids"] if (kind, key) not in ids]
    for digest, size in objects.items():
        path = root / "objects" / digest[:2] / digest[2:]
        if not path.is_file() or path.stat().st_size != size:
            count.dangling.append(f"object {digest}")
        elif hashed and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            count.dangling.append(f"changed object {digest}")
    with contextlib.closing(Registry.open(root)) as registry:
        names = registry.names("evalset")
        for ack in acks:
            for label, target in ack["names"].items():
                if names.get(label) != target and target not in removed:
                    count.lost.append(f"name {label}")
        known = {key for kind, key in ids if kind == "evalset"}
        count.dangling += [f"name {label}" for label, t in names.items() if t not in known]
        for kind, table, key in (("evaluation", "evaluations", "digest"),
                                 ("evalset", "evalsets", "digest"),
                                 ("name", "names", "record")):  # fmt: skip
            rows = registry.catalog.sandbox(f"SELECT {key} FROM {table}").rows
            times = Counter(row[0] for row in rows)
            count.duplicated += [f"{kind} {key}" for key, n in times.items() if n > 1]
            expected = {key for of, key in ids if of == kind}
            count.lost += [f"row of {kind} {key}" for key in expected - times.keys()]


# -- the killing -------------------------------------------------------------------------------


def start(base: Path, writer: int, fault: str | None) -> subprocess.Popen[bytes]:
    """Start a writer; what it acknowledges goes to a file, so it never waits for us."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | (
        {"POOLREG_FAULT": fault} if fault else {}
    )
    with open(base / f"acks-{writer}", "wb") as out, open(base / f"err-{writer}", "wb") as err:
        words = [sys.executable, "-c", WRITER, str(base), str(writer)]
        return subprocess.Popen(words, stdout=out, stderr=err, env=environment)


def told(base: Path, writer: int) -> list[dict[str, Any]]:
    """Return what a writer acknowledged; a torn last line is nothing."""
    whole, _, _ = (base / f"acks-{writer}").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def pair(base: Path, number: int, draw: random.Random, count: Count) -> list[dict[str, Any]]:
    """Run two writers until both are killed; return what they had acknowledged."""
    writers = [number, number + 1]
    faults = [None if draw.random() < 0.5 else f"*@{draw.randrange(1, 400)}=kill" for _ in writers]
    running = [start(base, w, fault) for w, fault in zip(writers, faults, strict=True)]
    deadline = time.monotonic() + PATIENCE
    while not all(
        told(base, w) or r.poll() is not None for w, r in zip(writers, running, strict=True)
    ):
        assert time.monotonic() < deadline, "hung at the start"
        time.sleep(0.01)
    until = time.monotonic() + draw.uniform(0.0, 1.5)
    while any(r.poll() is None for r in running):
        assert time.monotonic() < deadline, "hung"
        time.sleep(0.005)
        for process, fault in zip(running, faults, strict=True):
            if fault is None and time.monotonic() > until and process.poll() is None:
                process.kill()
    for writer, process, fault in zip(writers, running, faults, strict=True):
        error = (base / f"err-{writer}").read_text()
        assert process.returncode == -signal.SIGKILL, error
        count.kills += 1
        count.at_steps += fault is not None
    return [ack for writer in writers for ack in told(base, writer)]


def places(base: Path) -> None:
    """Publish a few small pools to pull from."""
    for number in range(PLACES):
        with Pool.create(base / f"source-pool-{number}") as pool:
            for text in range(4):
                file = base / "text.txt"
                file.write_text(f"published {number} {text}")
                pool.add_evalset(f"p{number}-{text}", [file])
            pool.push((base / f"place-{number}").as_uri())


def main() -> None:
    """Kill, look, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    draw, count, acks = random.Random(arguments.seed), Count(), []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        places(base)
        Pool.create(base / "pool").close()
        while count.kills < arguments.kills:
            acks += pair(base, count.kills, draw, count)
            check(base / "pool", acks, count, hashed=count.kills % 20 == 0)
            if count.lost or count.duplicated or count.dangling:
                break
        check(base / "pool", acks, count, hashed=True)
        with Pool.open(base / "pool") as pool:
            pool.compact()
            lines = Counter((record["kind"], record["id"]) for record in journal(base / "pool"))
            count.duplicated += [
                f"{kind} {key}"
                for (kind, key), n in lines.items()
                if n > 1 and kind == "evaluation"
            ]
            different = pool.registry.catalog.differences()
    count.acknowledged = sum(len(ack["ids"]) for ack in acks)
    print(f"kills {count.kills} ({count.at_steps} at named steps), acknowledged records "
          f"{count.acknowledged:,}, lost {len(count.lost)}, duplicated {len(count.duplicated)}, "
          f"dangling {len(count.dangling)}, catalog differs in {len(different)} tables, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    for what in [*count.lost, *count.duplicated, *count.dangling][:20]:
        print(what)
    sys.exit(bool(count.lost or count.duplicated or count.dangling or different))


if __name__ == "__main__":
    main()
