"""Merging beside its peers and the physical floor, every figure from one run.

    python tests/benchmarks/merging.py [--mergekit PATH] [--millions 317] [--models 2,4,8]
        [--dtypes bf16,fp32] [--rounds 3] [--keep DIR] [--json FILE]

makes random checkpoints shaped like Llama in a temporary folder (or in DIR, where they stay) and
averages them. The first table is the merge itself, in one process: a chunked float64 loop that
checks, hashes and flushes nothing; the same with its file flushed to the disk and hashed once
more (`safe`); poolreg's merge, which checks, hashes, writes the whole folder, flushes and
publishes it; torch with all models loaded; and the floor, the time that this machine needs to
copy k*S bytes from the page cache, write S bytes and hash S bytes once, by all threads, and the
same with the S bytes on the disk. The ratios are of runs that followed each other.
The second table is the whole process on warm files, `poolreg merge` beside `mergekit-yaml`, with
the memory that is not of files. poolreg hashes its parents as well, to name them in the recipe,
but not `again`, when they are as they were: on Btrfs, ext4 or XFS, and a minute old.
The methods take turns; figures are medians of the rounds, or with `--best`, for a machine that
others use too, minima; `cpu` is seconds of all cores together. The output is compared, byte for
byte, with a plain float64 reference.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from poolreg.models.folders import Component, write_merge
from poolreg.tensors import read_header, write_file
from poolreg.weights import known
from poolreg.weights.checkpoint import fingerprint, read_checkpoint

DTYPES = {"bf16": ("BF16", "bfloat16", 2), "fp32": ("F32", "float32", 4)}
CHUNK = 1 << 18  # elements, as in the loop that the figures are compared with


@dataclass(frozen=True)
class Taken:
    """What one run took: seconds by the clock, of all cores together, and MB of memory."""

    seconds: float
    cpu: float
    mb: float = 0.0


# -- checkpoints ---------------------------------------------------------------------------------


def shapes(millions: float) -> dict[str, tuple[int, ...]]:
    """Return tensors of a Llama of about so many parameters: 21 layers, 300 h² in all."""
    h = max(16, round((millions * 1e6 / 300) ** 0.5 / 16) * 16)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32 * h, h)}
    for layer in range(21):
        at = f"model.layers.{layer}."
        found |= {f"{at}self_attn.{n}_proj.weight": (h, h) for n in "qo"}
        found |= {f"{at}self_attn.{n}_proj.weight": (h // 2, h) for n in "kv"}
        found |= {f"{at}mlp.{n}_proj.weight": (11 * h // 4, h) for n in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (h, 11 * h // 4)
        found |= {f"{at}{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (h,), "lm_head.weight": (32 * h, h)}


def write_checkpoint(folder: Path, millions: float, dtype: str, *, seed: int) -> None:
    """Write a model folder of random weights, unless it is there."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    sizes = shapes(millions)
    arrays: dict[str, tuple[str, Any]] = {}
    for name, shape in sizes.items():
        values = draw.standard_normal(shape, np.float32) * np.float32(0.02)
        short = (values.view(np.uint32) >> 16).astype(np.uint16)
        arrays[name] = (DTYPES[dtype][0], values if dtype == "fp32" else short)
    h = sizes["model.norm.weight"][0]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h,
        "intermediate_size": 11 * h // 4, "num_hidden_layers": 21, "num_attention_heads": h // 8,
        "num_key_value_heads": h // 16, "vocab_size": 32 * h, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "dtype": DTYPES[dtype][1],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", arrays, {"format": "pt"})


# -- the merge itself ----------------------------------------------------------------------------


def loop_float64(sources: Sequence[Path], out: Path, dtype: str, *, threads: int) -> None:
    """Chunked preadv and pwrite with float64 sums, of files with equal headers; checks nothing."""
    import torch

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    width = DTYPES[dtype][2]
    first = min(info.start for info in read_header(sources[0]).tensors.values())
    size = sources[0].stat().st_size
    files = [os.open(source, os.O_RDONLY) for source in sources]
    made = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(made, 0, size)
    os.pwrite(made, os.pread(files[0], first, 0), 0)
    starts, lock = iter(range(first, size, CHUNK * width)), threading.Lock()

    def work() -> None:
        raw = torch.empty(CHUNK, dtype=kind)
        acc = torch.empty(CHUNK, dtype=torch.float64)
        view = memoryview(raw.view(torch.uint8).numpy())
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            length = min(CHUNK * width, size - start)
            part, total = raw[: length // width], acc[: length // width]
            total.zero_()
            for file in files:
                os.preadv(file, [view[:length]], start)
                total += part
            part.copy_(total.div_(len(files)))
            os.pwrite(made, view[:length], start)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    for file in (*files, made):
        os.close(file)


def loop_and_hash(sources: Sequence[Path], out: Path, dtype: str, *, threads: int) -> None:
    """The loop, what it wrote flushed to the disk and hashed."""
    loop_float64(sources, out, dtype, threads=threads)
    with open(out, "rb") as file:
        os.fsync(file.fileno())
        hashlib.file_digest(file, "sha256")


def load_all(sources: Sequence[Path], out: Path) -> None:
    """Load all models with torch, average tensor by tensor in float64, save."""
    import torch
    from safetensors.torch import load_file, save_file

    models = [load_file(source) for source in sources]
    averaged = {
        name: (sum(model[name].double() for model in models) / len(models)).to(first.dtype)
        for name, first in models[0].items()
    }
    assert all(isinstance(tensor, torch.Tensor) for tensor in averaged.values())
    save_file(averaged, out, {"format": "pt"})


def component(folder: Path, count: int) -> Component:
    """Return a parent as a pool knows it: its digest is known."""
    checkpoint = read_checkpoint(folder)
    digest = fingerprint(checkpoint).digest
    return Component(digest, Fraction(1, count), folder.name, checkpoint.tensors)


def copying(sources: Sequence[Path], out: Path, threads: int) -> tuple[float, float, float]:
    """Return this machine's bytes a second: from the page cache, to the page cache, to the disk."""
    size = sources[0].stat().st_size
    buffers = [bytearray(1 << 20) for _ in range(threads)]

    def spread(work: Callable[[int, int], None]) -> float:
        begun = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads), [size * i // threads for i in range(threads)]))
        return time.perf_counter() - begun

    with open(sources[0], "rb") as source, open(out, "wb") as made:
        os.posix_fallocate(made.fileno(), 0, size)

        def read(number: int, start: int) -> None:
            for at in range(start, start + size // threads, 1 << 20):
                os.preadv(source.fileno(), [buffers[number]], at)

        def write(number: int, start: int) -> None:
            for at in range(start, start + size // threads, 1 << 20):
                os.pwrite(made.fileno(), buffers[number], at)

        reading, writing = spread(read), spread(write)
        begun = time.perf_counter()
        os.fsync(made.fileno())
        flushing = time.perf_counter() - begun
    return size / reading, size / writing, size / (writing + flushing)


def hashing(threads: int) -> float:
    """Return the bytes that sha256 takes a second, in all threads together."""
    data, times = bytes(1 << 18), 400

    def work(_: int) -> None:
        made = hashlib.sha256()
        for _ in range(times):
            made.update(data)

    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return threads * times * len(data) / (time.perf_counter() - begun)


# -- the whole process ---------------------------------------------------------------------------


def run(command: Sequence[str], cache: Path | str = "") -> Taken:
    """Run a command; return what it took, its peak of anonymous memory among it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "POOLREG_CACHE": str(cache)}
    begun, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        while True:
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            with contextlib.suppress(OSError, IndexError):
                text = Path(f"/proc/{child.pid}/status").read_text()
                peak = max(peak, int(text.split("RssAnon:")[1].split()[0]))
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
        if status:
            said.seek(0)
            sys.exit(f"{command[0]} failed:\n{said.read().decode()[-2000:]}")
    return Taken(seconds, used.ru_utime + used.ru_stime, peak / 1e3)


def mergekit_config(folders: Sequence[Path], path: Path, dtype: str) -> Path:
    """Write a recipe for mergekit: the linear average with equal weights."""
    models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders]
    path.write_text(
        json.dumps({"merge_method": "linear", "models": models, "dtype": DTYPES[dtype][1]})
    )
    return path


# -- exactness -----------------------------------------------------------------------------------


def differing(sources: Sequence[Path], out: Path, dtype: str) -> int:
    """Count the elements of `out` that are not the float64 average, rounded once."""
    headers = [read_header(source).tensors for source in sources]
    made, bad = read_header(out).tensors, 0
    word = np.uint16 if dtype == "bf16" else np.uint32
    for name, info in made.items():
        for at in range(0, info.elements, 1 << 22):
            count = min(1 << 22, info.elements - at)

            def words(path: Path, start: int, at: int = at, count: int = count) -> Any:
                return np.fromfile(path, word, count, offset=start + at * word().itemsize)

            total = np.zeros(count)
            for source, header in zip(sources, headers, strict=True):
                raw = words(source, header[name].start).astype(np.uint32)
                total += (raw << (16 if dtype == "bf16" else 0)).view(np.float32)
            total /= len(sources)
            if dtype == "bf16":  # eight significant bits, ties to even
                mantissa, exponent = np.frexp(total)
                total = np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)
            wanted = total.astype(np.float32).view(np.uint32) >> (16 if dtype == "bf16" else 0)
            bad += int(np.count_nonzero(wanted != words(out, info.start)))
    return bad


# -- the tables ----------------------------------------------------------------------------------


def turns(methods: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Call the methods in turn, one round to warm up; return what they gave in each round."""
    found: dict[str, list[Any]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            value = method()
            if number:
                found[name].append(value)
    return found


def timed(method: Callable[[], Any], out: Path) -> Callable[[], Taken]:
    """Return a call that times the method and takes its output away first."""

    def call() -> Taken:
        remove(out)
        begun, used = time.perf_counter(), time.process_time()
        method()
        return Taken(time.perf_counter() - begun, time.process_time() - used)

    return call


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def inside(folders: Sequence[Path], place: Path, dtype: str, options: Any) -> dict[str, Any]:
    """Time the merge itself; return seconds by method."""
    sources = [folder / "model.safetensors" for folder in folders]
    parents = sorted((component(f, len(folders)) for f in folders), key=lambda p: p.digest)
    out, threads = place / "out", options.threads
    ours = functools.partial(write_merge, parents, folders[0], out, title="merge", threads=threads)
    methods = {
        "loop": timed(lambda: loop_float64(sources, out, dtype, threads=threads), out),
        "safe": timed(lambda: loop_and_hash(sources, out, dtype, threads=threads), out),
        "poolreg": timed(ours, out),
        "machine": lambda: (*copying(sources, place / "raw", threads), hashing(threads)),
    }
    if not options.no_load_all:
        methods["load all"] = timed(lambda: load_all(sources, out), out)
    found = turns(methods, options.rounds)
    read, write, disk, hashed = map(statistics.median, zip(*found.pop("machine"), strict=True))
    size = sources[0].stat().st_size
    row = figures(found, options.best)
    for key in ("seconds", "cpu"):
        row |= {f"{key}/{n}": ratio(found["poolreg"], found[n], key) for n in ("loop", "safe")}
    row["floor"] = len(folders) * size / read + size / write + size / hashed
    row["on disk"] = len(folders) * size / read + size / disk + size / hashed
    remove(out)
    remove(place / "raw")
    return row


def outside(folders: Sequence[Path], place: Path, dtype: str, options: Any) -> dict[str, Any]:
    """Time the whole process and compare the bytes; return seconds and megabytes."""
    out, peer = place / "out", place / "peer"
    script = Path(sys.executable).with_name("poolreg")

    def ours(cache: Path | str) -> Taken:
        remove(out)
        return run([str(script), "merge", *map(str, folders), "-o", str(out)], cache)

    methods: dict[str, Callable[[], Any]] = {
        "poolreg": functools.partial(ours, ""),
        "again": functools.partial(ours, place / "cache"),
    }
    if options.mergekit:
        config = mergekit_config(folders, place / "config.yml", dtype)

        def mergekit() -> Taken:
            remove(peer)
            return run([options.mergekit, str(config), str(peer), "--quiet"])

        methods["mergekit"] = mergekit
    newest = max(path.stat().st_ctime for path in weights(folders))
    time.sleep(max(0.0, newest + known.REST - time.time()))
    found = turns(methods, options.rounds)
    row = figures(found, options.best)
    row |= {f"{name} MB": max(taken.mb for taken in got) for name, got in found.items()}
    if options.mergekit:
        row["faster"] = ratio(found["mergekit"], found["poolreg"])
        row["faster again"] = ratio(found["mergekit"], found["again"])
        row["mergekit differs"] = differing(weights(folders), peer / "model.safetensors", dtype)
    row["differs"] = differing(weights(folders), out / "model.safetensors", dtype)
    remove(out)
    remove(peer)
    return row


def weights(folders: Sequence[Path]) -> list[Path]:
    """Return the weights file of each folder."""
    return [folder / "model.safetensors" for folder in folders]


def figures(found: dict[str, list[Taken]], best: bool) -> dict[str, Any]:
    """Return the medians, or minima, by method: seconds, then those of all cores together."""
    middle: Callable[[Any], float] = min if best else statistics.median
    row = {name: middle(t.seconds for t in taken) for name, taken in found.items()}
    return row | {f"{name} cpu": middle(t.cpu for t in taken) for name, taken in found.items()}


def ratio(ours: Sequence[Taken], other: Sequence[Taken], key: str = "seconds") -> float:
    """Return the median of the ratios of runs that were made one after the other."""
    pairs = zip(ours, other, strict=True)
    return statistics.median(getattr(a, key) / getattr(b, key) for a, b in pairs)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
        print(f"| {' | '.join(cells)} |", flush=True)


@contextlib.contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """Yield the folder to work in."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def main() -> None:
    """Make the checkpoints and print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=float, default=317, help="parameters of a model")
    parser.add_argument("--models", default="2,4,8", help="how many are averaged")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--mergekit", help="the executable mergekit-yaml")
    parser.add_argument("--best", action="store_true", help="print minima, not medians")
    parser.add_argument("--no-load-all", action="store_true", help="skip the loop over all models")
    parser.add_argument("--only", choices=["inside", "outside"], help="print one table")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and keep the models")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    tables: dict[str, list[dict[str, Any]]] = {"inside": [], "outside": []}
    with workplace(options.keep) as place:
        for dtype in options.dtypes.split(","):
            for count in map(int, options.models.split(",")):
                folders = [place / f"{dtype}-{number}" for number in range(count)]
                for seed, folder in enumerate(folders):
                    write_checkpoint(folder, options.millions, dtype, seed=seed)
                size = weights(folders)[0].stat().st_size
                row = {"dtype": dtype, "k": count, "S MB": round(size / 1e6)}
                for name, measure in (("inside", inside), ("outside", outside)):
                    if options.only in (None, name):
                        found = measure(folders, place, dtype, options)
                        tables[name].append(row | found)
                        print(row | found, file=sys.stderr, flush=True)
    if tables["inside"]:
        show("The merge itself, in one process (seconds)", tables["inside"])
    if tables["outside"]:
        show("The whole process (seconds; MB not of files)", tables["outside"])
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
