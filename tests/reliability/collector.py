"""Collections beside writers, readers and kills: does anything that lives ever go?

    python tests/reliability/collector.py --minutes 5

Writers add, measure, remove and restore; readers resolve every name and hash every object of what
lives; collectors delete with no grace at all and compact the journal. All of them are killed all
the time, at random and at named steps, and started again. In the end, and by every reader on its
way, three things are counted that must not be: records that were acknowledged and are gone, names
that do not resolve, and objects of what lives that are missing or changed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from collecting import (
    add_evalset,
    add_evaluation,
    add_model,
    journal,
    live_objects,
    stored,
)

from poolreg import faults
from poolreg.canonical import sha256
from poolreg.errors import Conflict, Locked, NotFound, UsageError
from poolreg.store.registry import Registry
from poolreg.upkeep.collection import collect
from poolreg.upkeep.compact import compact
from poolreg.upkeep.removal import remove, removed_things, restore

GRACELESS = timedelta(0)
ROLES = {"writer": 3, "reader": 1, "collector": 2}
STEPS = (
    "file.*", "journal.*", "index.*", "gc.delete", "gc.flush", "compact.*", "journal.drop",
)  # fmt: skip
SPACES = ("partition", "evalset", "model")


# -- what the processes do -------------------------------------------------------------------------


def say(**facts: object) -> None:
    """Acknowledge on stdout, which is a file; a kill may cut the last line."""
    os.write(1, (json.dumps(facts) + "\n").encode())


def write(registry: Registry, draw: random.Random) -> None:
    """One thing that a user does."""
    number = draw.randrange(12)
    action = draw.choices(["evalset", "model", "evaluation", "rm", "restore"], [3, 3, 3, 3, 2])[0]
    before = time.time()
    ids: list[str] = []
    if action == "evalset":
        ids = [add_evalset(registry, f"text-{os.getpid()}", f"text {draw.randrange(40)}")]
    elif action == "model":
        parts = [random.Random(draw.randrange(40)).randbytes(draw.choice([10, 4000, 90_000]))
                 for _ in range(2)]  # fmt: skip
        ids = [add_model(registry, f"model-{number}", *parts)]
    elif action == "evaluation":
        models, texts = registry.names("model"), registry.names("evalset")
        if models and texts:
            model, text = draw.choice(list(models.values())), draw.choice(list(texts.values()))
            ids = [add_evaluation(registry, model, text, draw.randbytes(300))]
    elif action == "rm":
        names = [(s, n) for s in SPACES for n in registry.names(s)]
        if names:
            space, name = draw.choice(names)
            ids = [item.digest for item in remove(registry, [name], kind=space)]
    else:
        gone = removed_things(registry)
        if gone:
            ids = [item.digest for item in restore(registry, [draw.choice(gone).digest])]
    say(action=action, ids=ids, seconds=time.time() - before)
    time.sleep(draw.random() * 0.02)


def read(registry: Registry, _: random.Random) -> None:
    """Look at all that is said to be here, while nothing is collected."""
    with registry.steady():
        found = broken(registry)
    say(action="read", **found)
    time.sleep(0.2)


def broken(registry: Registry) -> dict[str, object]:
    """Return what is wrong: objects of what lives, names."""
    missing, changed, names = [], [], []
    live = live_objects(registry.root)
    here = stored(registry.root)  # after the records: writers go on
    for digest in live:
        if digest not in here:
            missing.append(digest)
        elif sha256(here[digest].read_bytes()) != digest:
            changed.append(digest)
    for space in SPACES:
        for name in registry.names(space):
            try:
                registry.resolve(space, name)
            except NotFound as error:
                if "was removed" not in error.message:  # meanwhile
                    names.append(name)
    return {"objects": len(live), "missing": missing, "changed": changed, "names": names}


def clean(registry: Registry, draw: random.Random) -> None:
    """Collect with no grace, or compact."""
    if draw.random() < 0.2:
        before = len(registry.journal.segments())
        compact(registry)
        say(action="compact", segments=before)
    else:
        plan = collect(registry, grace=GRACELESS)
        say(action="gc", objects=len(plan.garbage), bytes=plan.bytes)
    time.sleep(draw.random() * 0.5)


def work(role: str, root: Path, seed: str) -> None:
    """Do one role's work until killed."""
    draw = random.Random(seed)
    registry = Registry.open(root)
    act = {"writer": write, "reader": read, "collector": clean}[role]
    while True:
        try:
            act(registry, draw)
        except (Conflict, Locked, NotFound, UsageError) as error:
            say(action="refused", why=type(error).__name__, what=error.message)


# -- the campaign ----------------------------------------------------------------------------------


class Campaign:
    """Starts, kills and counts."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.place = root.parent / "said"
        self.place.mkdir()
        self.started = 0
        self.kills: Counter[str] = Counter()
        self.failed: list[str] = []

    def start(self, role: str) -> tuple[str, int]:
        """Start a process, often one that dies at a step of its own accord; return its id.

        It is forked, for speed: this process has opened no pool.
        """
        self.started += 1
        fault = f"{self.draw.choice(STEPS)}@{self.draw.randint(1, 40)}=kill"
        fault = fault if self.draw.random() < 0.4 else ""
        pid = os.fork()
        if pid:
            return role, pid
        try:
            output = self.place / f"{role}-{self.started}"
            for number, path in ((1, output), (2, output.with_suffix(".err"))):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            faults._fault = faults._Fault.parse(fault) if fault else None  # as at import
            work(role, self.root, str(self.started))
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def ended(self, role: str, status: int) -> None:
        """Count how a process ended."""
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            self.kills[role] += 1
        else:
            self.failed.append(f"{role} ended with {code}: see {self.place}")

    def run(self, seconds: float) -> None:
        """Keep all roles going, and kill one of them every so often."""
        running = [self.start(role) for role, count in ROLES.items() for _ in range(count)]
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.failed:
            time.sleep(self.draw.random())
            if self.draw.random() < 0.7:
                os.kill(self.draw.choice(running)[1], signal.SIGKILL)
            for number, (role, pid) in enumerate(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.ended(role, status)
                    running[number] = self.start(role)
        for role, pid in running:
            os.kill(pid, signal.SIGKILL)
            self.ended(role, os.waitpid(pid, 0)[1])

    def said(self) -> list[dict]:
        """Return what was acknowledged."""
        found = []
        for path in sorted(self.place.glob("*")):
            if not path.suffix:
                for line in path.read_text().splitlines():
                    try:
                        found.append(json.loads(line))
                    except ValueError:
                        continue  # cut by a kill
        return found


def report(campaign: Campaign, seconds: float) -> int:
    """Check everything once more, print the table, and return the number of faults found."""
    registry = Registry.open(campaign.root)
    said = campaign.said()
    ids = {record["id"] for record in journal(campaign.root)}
    last = broken(registry)
    reads = [item for item in said if item["action"] == "read"] + [last]
    lost = [i for item in said for i in item.get("ids", ()) if i not in ids]
    differing = registry.catalog.differences()
    collect(registry, grace=GRACELESS)
    after = broken(registry)
    wrong = {
        "acknowledged records lost": len(lost),
        "objects of what lives missing": sum(len(r["missing"]) for r in (*reads, after)),
        "objects changed": sum(len(r["changed"]) for r in (*reads, after)),
        "names that do not resolve": sum(len(r["names"]) for r in (*reads, after)),
        "tables of the catalog that differ": len(differing),
        "processes that failed": len(campaign.failed),
    }
    actions = Counter(item["action"] for item in said)
    collections = [item for item in said if item["action"] == "gc"]
    refused = Counter(item["why"] for item in said if item["action"] == "refused")
    rows = {
        "seconds": round(seconds),
        "kills": sum(campaign.kills.values()),
        **{f"… of {role}s": count for role, count in sorted(campaign.kills.items())},
        "acknowledged writes": sum(actions[a] for a in ("evalset", "model", "evaluation")),
        "removals": actions["rm"],
        "restorations": actions["restore"],
        "collections finished": len(collections),
        "… that deleted something": sum(item["objects"] > 0 for item in collections),
        "… files deleted by them": sum(item["objects"] for item in collections),
        "compactions finished": actions["compact"],
        "whole readings of the pool": len(reads),
        "… objects hashed by them": sum(item["objects"] for item in reads),
        "refused (a lock, a name, data collected)": ", ".join(
            f"{count} {why}" for why, count in sorted(refused.items())
        ),
        "records in the journal": len(ids),
        **wrong,
    }
    width = max(map(len, rows))
    for key, value in rows.items():
        print(
            f"{key:<{width}}  {value:,}" if isinstance(value, int) else f"{key:<{width}}  {value}"
        )
    for trouble in campaign.failed:
        print(trouble)
    registry.close()
    return sum(wrong.values())


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", default="0")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="collector-"))
    Registry.create(folder / "pool").close()
    campaign = Campaign(folder / "pool", int(given.seed))
    campaign.run(given.minutes * 60)
    found = report(campaign, given.minutes * 60)
    print(f"{'FAILED: see' if found else 'the pool was'} {folder}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
