"""What measuring needs of a pool, on machines that see its folder and on such that do not."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
from pools import contents

from poolreg import Pool
from poolreg.errors import Damage, NotFound, Refused, UsageError
from poolreg.evaluation import materials as module
from poolreg.evaluation.evaluate import Settings, family_of
from poolreg.evaluation.materials import Materials
from poolreg.evaluation.measure import Bench, Family, Target
from poolreg.evaluation.protocol import Protocol
from poolreg.sharing.published_objects import ObjectsAt
from poolreg.text.partitions import evalset_documents

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def away(tmp_path, monkeypatch) -> Path:
    """The temporary folder of a machine."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(place))
    return place


@pytest.fixture
def made(pool) -> Materials:
    """Of two models and an evalset, as another process gets them."""
    models = [digest for digest, _ in pool.resolve("alpha+gamma/2").integer_weights]
    evalset = pool.registry.resolve("evalset", "alpha")
    travelling = pickle.dumps(Materials.of(pool.registry, models, [evalset]))
    return pickle.loads(travelling)  # noqa: S301


def moved(made: Materials, place: str | None) -> Materials:
    published = ObjectsAt(place) if place else None
    return dataclasses.replace(made, root=Path("/not/here"), published=published)


def scored(pool: Pool, made: Materials) -> float:
    """Measure alpha+gamma/2 on alpha, by materials alone."""
    subject = pool.resolve("alpha+gamma/2")
    (evalset,) = made.texts
    tokenizer = pool.registry.one("model", digest=subject.components[0][0])["tokenizer"]
    family = Family(tuple(made.models), Protocol(16, tokenizer))
    target = Target(subject.digest, "it", family_of(subject), subject.integer_weights, (evalset,))
    bench = Bench(made, {target.family: family}, Settings(device="cpu"))
    ((row,),) = bench([target])
    return row.nll


def test_where_the_folder_is_seen(pool, made, away):
    assert made.here().root == pool.root
    (evalset,) = made.texts
    assert made.documents(evalset) == evalset_documents(pool.registry, evalset)
    assert made.texts[evalset].bytes == sum(len(d.encode()) for d in made.documents(evalset))
    before = contents(pool.root)
    nll = scored(pool, made)
    assert contents(pool.root) == before  # measuring writes nothing
    assert list((pool.root / "tmp").iterdir()) == list(away.iterdir()) == []
    assert pool.evaluate(["alpha+gamma/2"], ["alpha"])[0].nll == nll
    # Another pool at the same place is not this one.
    with pytest.raises(Refused, match=r"is not seen on .*\n.*--objects URL"):
        dataclasses.replace(made, pool="another").here()


def test_where_objects_are_fetched(pool, made, away, tmp_path, monkeypatch):
    place = f"file://{tmp_path}/place"
    pool.push(place)
    fetched: list[str] = []
    real = ObjectsAt.fetch

    def fetch(self, digest: str, target: Path) -> None:
        fetched.append(digest)
        real(self, digest, target)

    monkeypatch.setattr(ObjectsAt, "fetch", fetch)
    nll = scored(pool, made)
    assert not fetched
    assert scored(pool, moved(made, place)) == nll
    files = [file for files in made.models.values() for file in files]
    assert {file.object for file in files if file.role == "weights"} < set(fetched)
    assert len(fetched) == len(set(fetched))
    again = len(fetched)
    assert scored(pool, moved(made, place)) == nll
    assert len(fetched) == again  # they were kept
    (kept,) = away.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o700
    assert not [p for p in (kept / "tmp").iterdir() if p.suffix != ".lock"]


def test_what_is_not_at_the_place(pool, made, away, tmp_path):
    with pytest.raises(Refused, match=r"/not/here is not seen"):
        moved(made, None).here()
    with pytest.raises(UsageError, match=r"'you/pool' is not a URL"):
        ObjectsAt("you/pool")
    pool.push(f"file://{tmp_path}/place", results_only=True)
    with pytest.raises(NotFound, match=r"object .* is not at file:.*\n.*poolreg push file:"):
        scored(pool, moved(made, f"file://{tmp_path}/place"))


def test_bytes_that_are_not_the_object(pool, made, away, tmp_path):
    pool.push(f"file://{tmp_path}/place")
    (evalset,) = made.texts
    digest = made.texts[evalset].object
    published = tmp_path / "place" / "objects" / digest[:2] / digest[2:]
    published.chmod(0o644)
    published.write_bytes(b"[" + published.read_bytes()[1:-1] + b" ")
    with pytest.raises(Damage, match=r"the bytes of .* changed"):
        moved(made, f"file://{tmp_path}/place").here().documents(evalset)
    (kept,) = away.iterdir()
    assert not [p for p in kept.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_folder_that_somebody_else_made(made, away, monkeypatch):
    (away / "elsewhere").mkdir()
    name = f"poolreg-{module.os.getuid()}-{made.pool}"
    (away / name).symlink_to(away / "elsewhere")
    with pytest.raises(Refused, match=r"is not this user's own folder"):
        moved(made, "file:///place").here()
    (away / name).unlink()
    (away / name).mkdir()
    monkeypatch.setattr(module.os, "getuid", lambda: 12345)
    (away / name).rename(away / f"poolreg-12345-{made.pool}")
    with pytest.raises(Refused, match=r"is not this user's own folder"):
        moved(made, "file:///place").here()
