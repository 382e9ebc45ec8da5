"""Results in the pool: objects before records, few flushes, nothing lost that was taken."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import pytest

from poolreg.canonical import sha256
from poolreg.errors import StorageError
from poolreg.evaluation import recording
from poolreg.evaluation.measure import Measured
from poolreg.evaluation.protocol import Protocol, evaluation_id
from poolreg.evaluation.recording import Recorder
from poolreg.store.registry import Registry

PROTOCOL = Protocol(16, "ab" * 32)
SUBJECTS = [f"{n:x}" * 64 for n in range(6)]


@pytest.fixture
def registry(tmp_path) -> Iterator[Registry]:
    made = Registry.create(tmp_path / "pool")
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which passes when the test says so."""
    now = [100.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: now[0])
    return now


def result(subject: str, evalset: str = "e" * 64, *, tokens: bool = False) -> Measured:
    return Measured(
        subject, evalset, 1.5, 3, 4, 1, 0.1, "cpu", f"documents {subject}".encode(),
        b"tokens" if tokens else None,
    )  # fmt: skip


def recorder(registry: Registry) -> Recorder:
    return Recorder(registry, dict.fromkeys(SUBJECTS, PROTOCOL))


def lines(registry: Registry) -> list[dict]:
    segments = sorted((registry.root / "journal").iterdir())
    found = [line for path in segments for line in path.read_bytes().splitlines()]
    return [json.loads(line.split(b" ", 1)[1]) for line in found]


def kinds(registry: Registry) -> list[str]:
    return [record["kind"] for record in lines(registry)]


def test_fast_results_wait_for_each_other(registry, clock):
    with recorder(registry) as taken:
        taken.add([result(SUBJECTS[0])])
        clock[0] += recording.PATIENCE / 2
        taken.add([result(SUBJECTS[1])])
        assert kinds(registry) == []
        clock[0] += recording.PATIENCE / 2
        taken.add([result(SUBJECTS[2])])
        assert kinds(registry) == ["protocol", *["evaluation"] * 3]
        taken.add([result(SUBJECTS[3])])
        clock[0] += recording.PATIENCE
        taken.add([result(SUBJECTS[4])])  # a slow one is recorded at once
        assert kinds(registry) == ["protocol", *["evaluation"] * 5]
        taken.add([result(SUBJECTS[5])])
    assert kinds(registry) == ["protocol", *["evaluation"] * 6]
    assert len(list((registry.root / "journal").iterdir())) == 1
    assert list((registry.root / "tmp").iterdir()) == []


def test_what_took_long_does_not_wait(registry, clock):
    """The next result may be as long in coming, and a kill would lose both."""
    with recorder(registry) as taken:
        taken.add([dataclasses.replace(result(SUBJECTS[0]), seconds=600.0)])
        assert kinds(registry) == ["protocol", "evaluation"]
        for subject in SUBJECTS[1:4]:
            taken.add([dataclasses.replace(result(subject), seconds=recording.COSTLY / 3)])
            clock[0] += 0.1
        assert kinds(registry) == ["protocol", *["evaluation"] * 4]


def test_what_was_taken_is_recorded_after_an_error(registry, clock):
    with contextlib.suppress(KeyboardInterrupt), recorder(registry) as taken:
        taken.add([result(SUBJECTS[0]), result(SUBJECTS[0], "f" * 64)])
        raise KeyboardInterrupt
    assert kinds(registry) == ["protocol", "evaluation", "evaluation"]


def test_what_a_record_says(registry):
    with recorder(registry) as taken:
        taken.add([result(SUBJECTS[1], tokens=True), result(SUBJECTS[1], "f" * 64)])
    protocol, one, other = lines(registry)
    assert Protocol.from_record(protocol["body"]) == PROTOCOL
    documents = sha256(f"documents {SUBJECTS[1]}".encode())
    assert one["id"] == evaluation_id(SUBJECTS[1], "e" * 64, PROTOCOL.digest)
    assert one["body"] == {
        "subject": SUBJECTS[1], "evalset": "e" * 64, "protocol": PROTOCOL.digest, "nll": 1.5,
        "tokens": 3, "bytes": 4, "documents": 1, "seconds": 0.1, "device": "cpu",
        "document_scores": documents, "token_scores": sha256(b"tokens"),
    }  # fmt: skip
    assert one["objects"] == {documents: len(f"documents {SUBJECTS[1]}"), sha256(b"tokens"): 6}
    assert other["body"]["token_scores"] is None
    assert other["objects"] == {documents: len(f"documents {SUBJECTS[1]}")}
    for digest in one["objects"]:
        registry.objects.check(digest)


def test_objects_come_first(registry, monkeypatch):
    """A disk that is full in the middle leaves objects that nothing names, never the reverse."""

    def full(*records: object) -> None:
        raise StorageError("writing the journal: no space")

    monkeypatch.setattr(registry, "record", full)
    with pytest.raises(StorageError, match="no space"), recorder(registry) as taken:
        taken.add([result(SUBJECTS[0])])
    assert kinds(registry) == []
    assert registry.objects.has(sha256(f"documents {SUBJECTS[0]}".encode()))

    monkeypatch.undo()
    put = registry.objects.put

    def fails(data: bytes) -> str:
        if data == b"tokens":
            raise StorageError("writing an object: no space")
        return put(data)

    monkeypatch.setattr(registry.objects, "put", fails)
    with pytest.raises(StorageError, match="writing an object"), recorder(registry) as taken:
        taken.add([result(SUBJECTS[0]), result(SUBJECTS[1], tokens=True)])
    assert kinds(registry) == []
