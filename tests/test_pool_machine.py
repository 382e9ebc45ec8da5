"""Any sequence of commands, failing disks among them, against a plain model of what a pool holds.

The model knows names, things, tombstones and evaluations as sets and dicts. Each rule says what it
changes there. One that a fault cuts short has either changed nothing or all of it, and the pool
says the same as the model after every rule, with every object that something needs intact.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from collecting import journal, stored
from faulty import PROTOCOL, add_evaluation
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from poolreg import Pool, faults
from poolreg.errors import Conflict, NotFound, StorageError
from poolreg.evaluation.protocol import evaluation_id

Spot = tuple[str, str]  # (space, name)

TEXTS = ("the cat and the hat", "def f(x): return x", "the cat and the hat in the rain")
SPACES = ("partition", "evalset", "model")
OTHER = {"partition": "model", "model": "partition"}  # they share their names
NAMES = st.sampled_from(["a", "b", "c"])
ITEMS = st.integers(0, 2)
NOW, LONG = timedelta(0), timedelta(days=14)
STEPS = [
    "journal.*", "journal.flushed", "journal.adopted", "journal.drop", "object.*", "file.*",
    "index.*", "index.commit", "index.replaced", "gc.*", "compact.*", "pull.*", "pull.note",
]  # fmt: skip
FAULTS = st.tuples(st.just("*"), st.integers(1, 8)) | st.tuples(st.sampled_from(STEPS), st.just(1))


@dataclass(frozen=True)
class World:
    """What the machines share: sources to add, the digests they have, and a friend's pool."""

    empty: Path
    sources: dict[tuple[str, int], Path]
    digests: dict[tuple[str, int], str]
    friend: str
    gift: Known


@dataclass
class Known:
    """What a pool says, as plain data."""

    names: dict[Spot, str] = field(default_factory=dict)  # the latest, also of removed things
    things: dict[str, str] = field(default_factory=dict)  # kinds by digest
    removed: set[str] = field(default_factory=set)
    evaluations: set[str] = field(default_factory=set)

    def seen(self) -> dict[Spot, str]:
        """The names that mean something now."""
        return {spot: of for spot, of in self.names.items() if of not in self.removed}

    def said(self) -> tuple[Any, ...]:
        """All that can be asked for."""
        return self.seen(), self.things, self.removed, self.evaluations

    def may_be(self, spot: Spot, target: str) -> bool:
        """Tell whether a name is free for something."""
        space, name = spot
        seen = self.seen()
        return (OTHER.get(space), name) not in seen and seen.get(spot, target) == target


def add(pool: Pool, world: World, kind: str, item: int, name: str, replace: bool = False) -> Any:
    source = world.sources[kind, item]
    if kind == "model":
        return pool.add_model(source, name=name, replace=replace)
    return getattr(pool, f"add_{kind}")(name, [source], replace=replace)


def observed(pool: Pool) -> tuple[Any, ...]:
    """What a pool answers: names, things, tombstones, evaluations."""
    names = {
        (space, name): target
        for space in SPACES
        for name, target in pool.registry.names(space).items()
    }
    lines = journal(pool.root)
    return (
        names,
        {line["id"]: line["kind"] for line in lines if line["kind"] in SPACES},
        {item.digest for item in pool.removed()},
        {line["id"] for line in lines if line["kind"] == "evaluation"},
    )


class AnyCommands(RuleBasedStateMachine):
    """Commands in any order, of which some fail."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.place = world, tempfile.TemporaryDirectory(prefix="poolreg-machine")
        root = shutil.copytree(world.empty, Path(self.place.name) / "pool")
        self.pool, self.known = Pool.open(root), Known()
        self.objects: dict[str, dict[str, int]] = {}  # of each record, since it was first seen
        self.published = f"file://{self.place.name}/published"
        self.pushed: Known | None = None
        self.fault: str | None = None

    # -- how a rule runs ---------------------------------------------------------------------

    def run(
        self, operation: Callable[[], Any], change: Callable[[Known], Any] = lambda _: None, *,
        refused: type[Exception] | None = None,
    ) -> Any:  # fmt: skip
        """Run an operation, on a failing disk if it is time, and change the model alike.

        Returns what the operation does, or None where the fault was in the way.
        """
        after = deepcopy(self.known)
        if not refused:
            change(after)
        fault = faults._Fault.parse(f"{self.fault}=EIO") if self.fault else None
        self.fault, faults._fault = None, fault
        try:
            done = operation()
        except (StorageError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            assert fault
            assert fault.countdown <= 0
            assert cause is not None
            assert cause.errno == errno.EIO
            faults._fault = None
            if observed(self.pool) == after.said():
                self.known = after
            return None
        except Exception as error:
            if refused is None or not isinstance(error, refused):
                raise
            return None
        finally:
            faults._fault = None
        assert refused is None, "this was to be refused"
        self.known = after
        return done

    # -- rules -------------------------------------------------------------------------------

    @rule(where=FAULTS)
    def the_disk_fails_next(self, where: tuple[str, int]) -> None:
        self.fault = "{}@{}".format(*where)

    @rule(kind=st.sampled_from(SPACES), item=ITEMS, name=NAMES, replace=st.booleans())
    def add(self, kind: str, item: int, name: str, replace: bool) -> None:
        target, spot = self.world.digests[kind, item], (kind, name)
        present, seen = self.known.seen().get(spot, target), self.known.seen()
        taken = (OTHER.get(kind), name) in seen or (present != target and not replace)

        def change(known: Known) -> None:
            known.names[spot] = target
            known.things[target] = kind
            known.removed.discard(target)

        own = [spot for spot, of in self.known.names.items() if of == target]
        # Whatever it was called before comes back with it.
        taken = taken or any((OTHER.get(kind), old) in seen for _, old in own)
        self.run(
            lambda: add(self.pool, self.world, kind, item, name, replace), change,
            refused=Conflict if taken else None,
        )  # fmt: skip

    @rule(data=st.data())
    def name_again(self, data) -> None:
        """Give something a further name, or move one."""
        if seen := self.known.seen():
            (kind, _), target = data.draw(st.sampled_from(sorted(seen.items())))
            name = data.draw(NAMES)
            if (OTHER.get(kind), name) not in seen:
                self.run(
                    lambda: self.pool.registry.record(
                        self.pool.registry.naming(kind, name, target)
                    ),
                    lambda known: known.names.update({(kind, name): target}),
                )

    @rule(data=st.data())
    def rm(self, data) -> None:
        if seen := self.known.seen():
            kind = data.draw(st.sampled_from(sorted({kind for kind, _ in seen})))
            names = sorted(name for space, name in seen if space == kind)
            chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
            targets = {seen[kind, name] for name in chosen}
            self.run(
                lambda: self.pool.rm(chosen, kind=kind),
                lambda known: known.removed.update(targets),
            )

    @rule(data=st.data(), name=st.none() | NAMES)
    def restore(self, data, name: str | None) -> None:
        if not self.known.removed:
            return
        target = data.draw(st.sampled_from(sorted(self.known.removed)))
        kind = self.known.things[target]
        own = [spot for spot, of in self.known.names.items() if of == target]
        wanted = own + ([(kind, name)] if name else [])
        nameless = not wanted and kind != "model"
        clash = nameless or not all(self.known.may_be(spot, target) for spot in wanted)
        gone = not self.objects[target].keys() <= stored(self.pool.root).keys()

        def change(known: Known) -> None:
            known.removed.discard(target)
            known.names |= dict.fromkeys(wanted, target)

        self.run(
            lambda: self.pool.restore([target], kind=kind, name=name), change,
            refused=Conflict if clash else NotFound if gone else None,
        )  # fmt: skip

    @rule(data=st.data())
    def evaluate(self, data) -> None:
        seen = self.known.seen()
        models = sorted({of for (kind, _), of in seen.items() if kind == "model"})
        evalsets = sorted({of for (kind, _), of in seen.items() if kind == "evalset"})
        if models and evalsets:
            pair = data.draw(st.tuples(st.sampled_from(models), st.sampled_from(evalsets)))
            key = evaluation_id(*pair, PROTOCOL.digest)
            self.run(
                lambda: add_evaluation(self.pool, *pair), lambda known: known.evaluations.add(key)
            )

    @rule(content=st.binary(max_size=2))
    def a_writer_is_killed(self, content: bytes) -> None:
        self.run(lambda: self.pool.registry.objects.put(content))

    @rule()
    def gc(self) -> None:
        if self.run(lambda: self.pool.gc(grace=NOW)):
            assert stored(self.pool.root).keys() == self.live().keys()

    @rule(grace=st.sampled_from([NOW, LONG]), dry_run=st.booleans())
    def gc_that_deletes_nothing(self, grace: timedelta, dry_run: bool) -> None:
        if grace or dry_run:
            before = stored(self.pool.root)
            self.run(lambda: self.pool.gc(grace=grace, dry_run=dry_run))
            assert stored(self.pool.root) == before

    @rule()
    def compact(self) -> None:
        if self.run(self.pool.compact):
            assert len(self.pool.segments()) <= 1

    @rule(repair=st.booleans())
    def verify(self, repair: bool) -> None:
        if done := self.run(lambda: self.pool.verify(full=repair, repair=repair)):
            assert done.findings == ()
            assert {item.what for item in done.mended} <= {"catalog.duckdb"}

    @rule()
    def push(self) -> None:
        if self.run(lambda: self.pool.push(self.published)):
            self.pushed = deepcopy(self.known)

    @rule()
    @precondition(lambda self: self.pushed)
    def pull(self) -> None:
        self.run(lambda: self.pool.pull(self.published))

    @rule()
    def pull_from_a_friend(self) -> None:
        gift = self.world.gift

        def change(known: Known) -> None:
            if ("evalset", "gift-a") not in known.names:  # else all is known here, and ours
                known.names |= gift.names
            known.things |= gift.things
            known.evaluations |= gift.evaluations

        self.run(lambda: self.pool.pull(self.world.friend), change)

    @rule(what=st.sampled_from(["nothing", "gone", "damaged"]))
    def open_again(self, what: str) -> None:
        self.pool.registry.close()
        catalog = self.pool.root / "catalog.duckdb"
        if what != "nothing":
            catalog.unlink(missing_ok=True)
        if what == "damaged":
            catalog.write_bytes(b"no catalog" * 1000)
        self.pool = Pool.open(self.pool.root)

    # -- what always holds -------------------------------------------------------------------

    def live(self) -> dict[str, int]:
        """The objects that something needs, by the model, with their sizes."""
        needed = (self.known.things.keys() - self.known.removed) | self.known.evaluations
        return {
            digest: size for one in sorted(needed) for digest, size in self.objects[one].items()
        }

    @invariant()
    def the_pool_says_what_the_model_says(self) -> None:
        fault, self.fault = self.fault, None
        assert observed(self.pool) == self.known.said()
        self.fault = fault
        spaces = [{name for space, name in self.known.seen() if space == one} for one in OTHER]
        assert not set.intersection(*spaces), "a name means a partition and a model"

    @invariant()
    def what_is_needed_is_intact(self) -> None:
        for line in journal(self.pool.root):
            assert self.objects.setdefault(line["id"], line["objects"]) == line["objects"]
        files = stored(self.pool.root)
        for digest, size in self.live().items():
            content = files[digest].read_bytes()
            assert len(content) == size
            assert hashlib.sha256(content).hexdigest() == digest

    def teardown(self) -> None:
        faults._fault = None
        assert self.pool.verify(full=True).findings == ()
        assert self.pool.registry.catalog.differences() == {}
        self.pool.close()
        if self.pushed:
            self.a_new_pool_gets_what_was_pushed(self.pushed)
        self.place.cleanup()

    def a_new_pool_gets_what_was_pushed(self, pushed: Known) -> None:
        with Pool.create(Path(self.place.name) / "copy") as pool:
            pool.pull(self.published)
            names, things, _, evaluations = observed(pool)
            assert (things, evaluations) == (pushed.things, pushed.evaluations)
            for (space, name), target in pushed.seen().items():
                # What was published is not removed there by us, so its name may be taken.
                if (OTHER.get(space), name) not in self.known.names:
                    assert names[space, name] == target
            assert pool.verify(full=True).findings == ()


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> World:
    place = tmp_path_factory.mktemp("world")
    sources = {("model", 0): tiny.seed, ("model", 1): tiny.units["alpha", 1]}
    sources["model", 2] = tiny.units["beta", 1]
    for number, text in enumerate(TEXTS):
        for kind in ("partition", "evalset"):
            sources[kind, number] = place / f"{kind}-{number}.txt"
            sources[kind, number].write_text(text)
    with Pool.create(place / "empty") as pool:
        pool.registry.catalog.refresh()
    made = World(place / "empty", sources, {}, f"file://{place}/friend", Known())
    with Pool.create(place / "all") as pool:
        for kind, item in sources:
            made.digests[kind, item] = add(pool, made, kind, item, f"{kind}-{item}").digest
    with Pool.create(place / "friend-pool") as pool:
        for kind in SPACES:
            add(pool, made, kind, 0, "gift-m" if kind == "model" else "gift-a")
        model, evalset = made.digests["model", 0], made.digests["evalset", 0]
        add_evaluation(pool, model, evalset)
        pool.push(made.friend)
        made.gift.names, made.gift.things, _, made.gift.evaluations = observed(pool)
    return made


def machine(world: World, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: AnyCommands(world),
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_a_name_that_comes_back_is_not_taken(world, tmp_path):
    with Pool.open(shutil.copytree(world.empty, tmp_path / "pool")) as pool:
        add(pool, world, "partition", 0, "a")
        pool.rm(["a"], kind="partition")
        add(pool, world, "model", 0, "a")
        with pytest.raises(Conflict):
            add(pool, world, "partition", 0, "b")
        assert not pool.registry.names("partition").keys() & pool.registry.names("model").keys()


def test_any_commands(world):
    machine(world, 3, 10)


@pytest.mark.campaign
def test_very_many_commands(world):
    machine(world, int(os.environ.get("POOLREG_EXAMPLES", "200")), 40)
