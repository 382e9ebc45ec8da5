"""The check-up: every line, where it is well and where it is not; nothing of the pool changes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from poolreg import Pool
from poolreg.doctor import environment, filesystem, holders
from poolreg.doctor import examination as check_up
from poolreg.doctor.checks import Check
from poolreg.doctor.examination import doctor
from poolreg.doctor.holders import Line
from poolreg.errors import NoPool
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.staging import working_folder

MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 27 0:50 / /data rw shared:1 master:2 - nfs4 host:/x rw
31 27 0:51 / /data/a\040pool rw - fuse.sshfs you@host rw
32 27 0:52 / /data/a\040pool rw - xfs /dev/vdb rw
a torn line
"""
LOCKS = """1: FLOCK  ADVISORY  WRITE 7551 fe:00:2146711 0 EOF
1: -> FLOCK  ADVISORY  READ  7592 fe:00:2146711 0 EOF
2: POSIX  ADVISORY  WRITE 1 00:1a:5 0 EOF
3: FLOCK  ADVISORY  READ  0 08:1f:12 0 EOF
4: OFDLCK ADVISORY  READ  -1 00:05:77 0 EOF

"""


def by_name(checks: list[Check]) -> dict[str, Check]:
    found = {check.check: check for check in checks}
    assert len(found) == len(checks)
    return found


def looked(folder: Path) -> dict[str, Check]:
    return by_name(doctor(folder))


def state(root: Path) -> dict[str, tuple[int, int, int]]:
    """All of a pool's files, as they are."""
    return {
        str(path): (status.st_ino, status.st_size, status.st_mtime_ns)
        for path in root.rglob("*") if (status := path.stat()) and path.is_file()
    }  # fmt: skip


@pytest.fixture
def small(tmp_path) -> Path:
    """A pool of a few records, at rest."""
    with Pool.create(tmp_path / "pool") as pool:
        pool.registry.record(records.name("evalset", "one", "a" * 64))
    return tmp_path / "pool"


# -- all is well -----------------------------------------------------------------------------


def test_a_pool_that_is_well(small):
    before = state(small)
    found = looked(small)
    assert state(small) == before
    bad = {name for name, check in found.items() if check.status in ("failed", "warning")}
    assert not bad - {"file system", "disk space"}  # of the machine that the test runs on
    assert found["pool"].found == str(small)
    assert found["catalog"].found == "up to date"
    assert found["gpu"].found == "not looked"
    for name in ("writable", "rename", "fsync", "flock", "one file system", "tmp", "clock"):
        assert found[name].status == "ok", name
    with Pool.open(small) as pool:
        assert by_name(pool.doctor()).keys() == found.keys()


def test_without_a_pool_only_the_environment(tmp_path, monkeypatch, cli_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POOLREG_POOL", raising=False)
    found = by_name(doctor())
    assert found["python"].status == "ok"
    assert (found["pool"].status, "catalog" in found) == ("unknown", False)
    assert "none here" in cli_run("doctor").stdout
    with pytest.raises(NoPool):
        doctor(tmp_path)
    monkeypatch.setenv("POOLREG_POOL", str(tmp_path))
    with pytest.raises(NoPool):
        doctor()
    cli_run("doctor", "--pool", tmp_path, code=10)


def test_a_pool_of_another_format(small):
    (small / "FORMAT").write_text('{"format": 99, "id": "x"}')
    found = looked(small)
    assert found["pool"].status == "failed"
    assert "99" in found["pool"].found
    assert found["python"].status == "ok"


# -- environment -----------------------------------------------------------------------------


class Installed:
    """What importlib.metadata might say."""

    def __init__(self, versions: dict[str, str], needs: list[str], python: str = ">=3.11") -> None:
        self.versions, self.needs, self.python = versions, needs, python

    def adopt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def version(name: str) -> str:
            if name not in self.versions:
                raise metadata.PackageNotFoundError(name)
            return self.versions[name]

        about = metadata.metadata("poolreg")
        about.replace_header("Requires-Python", self.python)  # type: ignore[attr-defined]
        for extra in ("s3", "dev"):
            if extra not in (about.get_all("Provides-Extra") or ()):
                about["Provides-Extra"] = extra  # type: ignore[index]
        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "metadata", lambda _: about)
        monkeypatch.setattr(metadata, "requires", lambda _: self.needs)


def test_packages_against_what_is_needed(monkeypatch):
    needs = ["good>=1.2", "old>=2", "gone>=3", "pre>=1.0", 'windows>=1; sys_platform == "win32"',
             's3fs>=2024; extra == "s3"', 'more; extra == "s3"', 'ruff; extra == "dev"']  # fmt: skip
    Installed({"good": "1.10", "old": "1.9.9", "pre": "2.0rc1"}, needs).adopt(monkeypatch)
    found = by_name(environment.environment())
    assert {name: found[name].status for name in ("good", "old", "gone", "pre")} == {
        "good": "ok", "old": "failed", "gone": "failed", "pre": "ok",
    }  # fmt: skip
    assert found["old"] == Check("old", "failed", "1.9.9 (needs >=2)", 'pip install "old>=2"')
    assert "windows" not in found
    assert found["extra s3"] == Check(
        "extra s3", "ok", "not installed", 'pip install "poolreg[s3]"'
    )
    assert "extra dev" not in found
    Installed({"s3fs": "2023", "more": "1"}, needs, ">=99").adopt(monkeypatch)
    found = by_name(environment.environment())
    assert found["python"].status == "failed"
    assert found["extra s3"].status == "warning"
    Installed({"s3fs": "2025", "more": "1"}, needs).adopt(monkeypatch)
    assert by_name(environment.environment())["extra s3"].found.startswith("s3fs 2025")


def test_poolreg_itself(monkeypatch):
    assert by_name(environment.environment())["poolreg"].status == "ok"
    monkeypatch.setattr("poolreg.__version__", "99.0")
    assert by_name(environment.environment())["poolreg"].status == "warning"

    def absent(_: str) -> None:
        raise metadata.PackageNotFoundError("poolreg")

    monkeypatch.setattr(metadata, "metadata", absent)
    assert by_name(environment.environment())["poolreg"].status == "unknown"


def test_the_hub_and_no_secret(monkeypatch, tmp_path, cli_run):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:password@hub.example/path")
    monkeypatch.chdir(tmp_path)
    said = cli_run("doctor").output
    assert "there is one" in said
    assert "https://hub.example/path" in said
    assert "secret" not in said
    assert "password" not in said
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = by_name(environment.environment())
    assert found["hub token"].found.startswith("none")
    assert found["hub endpoint"].found == "https://huggingface.co"


def test_torch_is_started_only_when_asked(monkeypatch, small):
    code = "import sys; from poolreg.doctor.examination import doctor; doctor(sys.argv[1]); print('torch' in sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, small], capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "False"
    cuda = SimpleNamespace(
        is_available=lambda: False, device_count=lambda: 2, get_device_name="card {}".format
    )  # fmt: skip
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert "CPU" in by_name(doctor(small, torch=True))["gpu"].found
    cuda.is_available = lambda: True
    found = by_name(doctor(small, torch=True))["gpu"]
    assert found == Check("gpu", "ok", "CUDA 13.0: card 0, card 1")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert by_name(doctor(small, torch=True))["gpu"].status == "failed"


# -- file system -----------------------------------------------------------------------------


def mount(*words: object) -> None:
    """Run mount, or skip where this machine does not let us."""
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")


@pytest.fixture
def mounts():
    """Mount things that are gone after the test."""
    places: list[Path] = []

    def added(place: Path, *words: object) -> None:
        mount(*words, place)
        places.append(place)

    yield added
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_pool(small, mounts, cli_run):
    mounts(small, "--bind", small)
    mount("-o", "remount,ro,bind", small)
    before = state(small)
    found = looked(small)
    assert found["writable"].status == "warning"
    assert "read-only" in found["writable"].found
    assert not {"rename", "fsync", "flock"} & found.keys()  # could not be tried
    assert found["catalog"].found == "up to date"
    assert "failed" not in {check.status for check in found.values()}
    assert "read-only" in cli_run("doctor", "--pool", small).stdout
    assert state(small) == before


def test_a_read_only_pool_whose_catalog_is_behind(small, mounts):
    with contextlib.closing(Pool.open(small).registry) as registry:
        registry.record(records.name("evalset", "two", "b" * 64))
    assert looked(small)["catalog"].status == "ok"
    mounts(small, "--bind", small)
    mount("-o", "remount,ro,bind", small)
    found = looked(small)["catalog"]
    assert found.status == "warning"
    assert "cannot be written to" in found.found


def test_a_folder_of_the_pool_on_another_file_system(small, mounts):
    mounts(small / "objects", "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    found = looked(small)["one file system"]
    assert (found.status, found.found) == ("failed", "objects/ on another than the pool")


def test_a_bind_mount_is_another_file_system_to_a_rename(small, mounts):
    mounts(small / "journal", "--bind", small / "journal")
    (small / "tmp" / "x").touch()
    with pytest.raises(OSError, match="cross-device"):
        (small / "tmp" / "x").rename(small / "journal" / "x")
    assert looked(small)["one file system"].found == "journal/ on another than the pool"


def test_a_missing_folder(small):
    (small / "objects").rmdir()
    assert looked(small)["one file system"].found == "objects/ is missing"


def test_a_full_disk_and_a_disk_in_memory(tmp_path, mounts):
    place = tmp_path / "disk"
    place.mkdir()
    mounts(place, "-t", "tmpfs", "-o", "size=8m", "tmpfs")
    Pool.create(place / "pool").close()
    found = looked(place / "pool")
    assert "machine stops" in found["file system"].found
    assert found["disk space"].status == "warning"
    assert "a little room" in found["disk space"].found


def test_room_for_the_largest_model(small):
    body = {
        "model_type": "llama", "parameters": 1, "bytes": 10**18, "dtype": "F32", "tokenizer": "t",
        "context_length": 16, "vocab_size": 1, "trusted_code": False, "files": [], "tensors": [],
    }  # fmt: skip
    with Pool.open(small) as pool:
        pool.registry.record(records.keyed("model", "c" * 64, body))
    found = looked(small)["disk space"]
    assert (found.status, "2,000,000,000.0 GB" in found.found) == ("warning", True)
    assert "twice the largest model" in found.found


@pytest.mark.parametrize(
    ("path", "kind", "device"),
    [
        ("/home/pool", "ext4", (254, 0)),
        ("/data/pool", "nfs4", (0, 50)),
        ("/data/a pool", "xfs", (0, 52)),  # mounted over the other one
        ("/data/a pool/deep", "xfs", (0, 52)),
        ("/database", "ext4", (254, 0)),
    ],
)
def test_mounts(path, kind, device):
    found = filesystem.mount_of(Path(path), MOUNTINFO)
    assert found
    assert (found.kind, found.device) == (kind, device)


def test_file_systems_whose_locks_may_be_local(monkeypatch, tmp_path):
    for kind in ("nfs", "nfs4", "cifs", "9p", "lustre", "fuse.sshfs", "virtiofs"):
        assert filesystem._kind(filesystem.Mount(kind, "/", (0, 1))).status == "warning", kind
    for kind in ("ext4", "xfs", "btrfs", "zfs", "overlay", "fuseblk", "apfs"):
        assert filesystem._kind(filesystem.Mount(kind, "/", (0, 1))).status == "ok", kind
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "nothing")
    assert filesystem._kind(filesystem.mounted(tmp_path)).status == "unknown"
    assert filesystem.mount_of(Path("/x"), "nonsense\n") is None


def test_a_file_system_that_does_not_do_what_it_should(monkeypatch, small):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    found = looked(small)["flock"]
    assert (found.status, "two at once" in found.found) == ("failed", True)

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(os, "fsync", unsupported)
    monkeypatch.setattr(os, "link", unsupported)
    found = looked(small)
    assert found["flock"].found.endswith("Operation not supported")
    assert found["fsync"].status == "failed"
    assert found["hard links"] == Check("hard links", "ok", "no (none are needed)")


# -- locks -----------------------------------------------------------------------------------

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
print("started", flush=True)
fcntl.flock(file, fcntl.LOCK_SH if sys.argv[2] == "shared" else fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold():
    """Start processes that hold a lock or wait for it."""
    with contextlib.ExitStack() as stack:

        def started(path: Path, how: str, *, waits: bool = False) -> int:
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True
            ))  # fmt: skip
            stack.callback(process.kill)
            assert process.stdout
            assert process.stdout.readline() == "started\n"
            if not waits:
                assert process.stdout.readline() == "held\n"
            return process.pid

        yield started


def seen(root: Path, number: int) -> list[holders.Holder]:
    """The holders, once there are so many."""
    deadline = time.monotonic() + 20
    while len(found := holders.holders(root) or []) < number:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def test_who_holds_and_who_waits(small, hold):
    if not holders.LOCKS.exists():
        pytest.skip("this system does not tell who holds a lock")
    assert holders.holders(small) == []
    readers = sorted(hold(small / "locks" / "writers", "shared") for _ in range(2))
    found = looked(small)["locks"]
    assert found.status == "ok"
    assert all(f"process {pid} shares writers" in found.found for pid in readers)
    assert sys.executable in found.found
    (small / "tmp" / "train-abc").mkdir()
    trainer = hold(small / "tmp" / "train-abc" / "lock", "alone")
    waiting = hold(small / "locks" / "writers", "alone", waits=True)
    told = [(h.lock, h.process, h.exclusive, h.waiting) for h in seen(small, 4)]
    assert told == [
        ("tmp/train-abc", trainer, True, False),
        *(("writers", pid, False, False) for pid in readers),
        ("writers", waiting, True, True),
    ]
    found = looked(small)["locks"]
    assert (found.status, f"process {waiting} waits for writers" in found.found) == (
        "warning",
        True,
    )
    assert f"process {trainer} holds tmp/train-abc" in found.found
    # Work that goes on is no leftover, whatever the times of its files say.
    for path in (small / "tmp" / "train-abc" / "lock", small / "tmp" / "train-abc"):
        os.utime(path, (0, 0))
    assert looked(small)["tmp"] == Check("tmp", "ok", "nothing left over")


def test_a_working_folder_is_in_use(small):
    if not holders.LOCKS.exists():
        pytest.skip("this system does not tell who holds a lock")
    with working_folder(small / "tmp") as folder:
        assert [(h.lock, h.process) for h in seen(small, 1)] == [
            (f"tmp/{folder.name}", os.getpid())
        ]
        assert looked(small)["tmp"].found == "nothing left over"


def test_lines_of_proc_locks(monkeypatch, tmp_path, small):
    assert holders.lines(LOCKS) == [
        Line(7551, True, False, (0xFE, 0), 2146711),
        Line(7592, False, True, (0xFE, 0), 2146711),
        Line(0, False, False, (8, 0x1F), 12),
    ]
    monkeypatch.setattr(holders, "LOCKS", tmp_path / "nothing")
    assert looked(small)["locks"].status == "unknown"
    assert check_up._locks([holders.Holder("writers", 0, True, False, "")]).found == (
        "process 0 holds writers (of another container or user)"
    )


def test_a_long_command_line_is_cut():
    words = [sys.executable, "-c", "import sys; sys.stdin.read()", "x" * 500]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 20
        while not (found := holders._command(process.pid)):  # not yet another program
            assert time.monotonic() < deadline
    assert found.startswith(sys.executable)
    assert len(found) == 100
    assert holders._command(2**22 + 5) == ""


# -- what was left, clock, catalog, journal -------------------------------------------------------


def test_leftovers(small):
    fresh = small / "tmp" / "object.1.aa.tmp"
    fresh.write_bytes(bytes(1000))
    found = looked(small)["tmp"]
    assert found.status == "ok"
    assert "object.1.aa.tmp" in found.found
    old = small / "tmp" / "train-abc"
    (old / "deep").mkdir(parents=True)
    (old / "deep" / "state").write_bytes(bytes(5000))
    then = time.time() - 3 * 86400
    for path in (old / "deep" / "state", old / "deep", old):
        os.utime(path, (then, then))
    found = looked(small)["tmp"]
    assert found.status == "warning"
    assert "2 in 6,000 bytes: train-abc (3 days old, 5,000 bytes), object.1.aa.tmp" in found.found
    assert "poolreg gc" in found.way_out
    # What goes on is no leftover, however old the folder is.
    os.utime(old / "deep" / "state")
    assert looked(small)["tmp"].status == "ok"
    for number in range(5):
        (small / "tmp" / f"more-{number}").touch()
    assert "and 4 more" in looked(small)["tmp"].found


def said_at(at: datetime) -> Record:
    stamp = at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    body = {"space": "evalset", "name": "later", "target": "a" * 64, "parent": None}
    return Record("name", stamp.encode().hex().ljust(64, "0"), body, {}, stamp)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_clock_that_jumped(small, indexed):
    def record(ahead: timedelta) -> None:
        with contextlib.closing(Pool.open(small).registry) as registry:
            registry.record(said_at(datetime.now(UTC) + ahead))
            if indexed:
                registry.catalog.refresh()

    record(timedelta(seconds=30))  # another machine's clock
    assert looked(small)["clock"].status == "ok"
    record(timedelta(days=400))
    record(timedelta(days=-400))
    found = looked(small)["clock"]
    assert found.status == "warning"
    assert (datetime.now(UTC) + timedelta(days=400)).strftime("%Y-%m-%d") in found.found


def test_a_time_that_is_none(small):
    with contextlib.closing(Pool.open(small).registry) as registry:
        registry.record(Record("later kind", "b" * 64, {}, {}, "zzz"))
    assert looked(small)["clock"].status == "warning"


def test_catalogs(small):
    path = small / "catalog.duckdb"
    whole = path.read_bytes()
    with contextlib.closing(Pool.open(small).registry) as registry:
        registry.record(records.name("evalset", "two", "b" * 64))
    found = looked(small)["catalog"]
    assert (found.status, "bytes of the journal are not in it yet" in found.found) == ("ok", True)
    path.unlink()
    assert looked(small)["catalog"] == Check("catalog", "warning", "not there", check_up._NEXT)
    assert not path.exists()
    path.write_bytes(whole[:5000])
    found = looked(small)["catalog"]
    assert (found.status, "cannot be read" in found.found) == ("warning", True)
    assert path.read_bytes() == whole[:5000]
    assert looked(small)["clock"].status == "ok"


def test_a_catalog_of_another_version(small, monkeypatch):
    monkeypatch.setattr(check_up, "SCHEMA_VERSION", 999)
    found = looked(small)["catalog"]
    assert (found.status, "999" in found.found) == ("warning", True)


def test_a_journal_that_lost_records_or_is_damaged(small, cli_run):
    (segment,) = (small / "journal").iterdir()
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-10])
    found = looked(small)["catalog"]
    assert (found.status, segment.name in found.found) == ("failed", True)
    assert cli_run("doctor", "--pool", small, code=3).stderr.count("1 check failed") == 1
    segment.write_bytes(whole + whole[:-5] + b"xxxx\n")
    found = looked(small)
    assert found["clock"].status == "failed"
    assert "checksum" in found["clock"].found


def test_many_segments(small, monkeypatch):
    assert looked(small)["journal"].status == "ok"
    line = next((small / "journal").iterdir()).read_bytes()
    for number in range(1000):
        (small / "journal" / f"{number}.jsonl").write_bytes(line)
    found = looked(small)["journal"]
    assert (found.status, found.way_out) == ("warning", "poolreg journal compact")
    monkeypatch.setattr(check_up, "_READ_AT_MOST", 10)
    assert looked(small)["clock"].status == "unknown"


def test_an_empty_pool(tmp_path):
    Pool.create(tmp_path / "pool").close()
    assert looked(tmp_path / "pool")["clock"].found == "no records yet"


# -- the command -------------------------------------------------------------------------------


def test_the_command(small, cli_run):
    rows = json.loads(cli_run("doctor", "--pool", small, "--json").stdout)
    assert all(list(row) == ["check", "status", "found", "way_out"] for row in rows)
    assert [row["check"] for row in rows] == list(looked(small))
    said = cli_run("doctor", "--pool", small)
    assert said.stdout.splitlines()[0].split() == ["check", "status", "found"]
    assert "nothing failed" in said.stderr
    assert "poolreg doctor --torch" in said.stdout
    assert cli_run("--pool", small, "doctor", "--format", "quiet").stdout.split("\n")[0] == "python"
    (small / "objects").rmdir()
    failed = cli_run("doctor", "--pool", small, "--json", code=3)
    assert "failed" in {row["status"] for row in json.loads(failed.stdout)}
