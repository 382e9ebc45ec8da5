"""What one more mixture costs in a sweep, beside the forward pass alone and the naive way.

    python tests/benchmarks/sweeping.py [--parameters 1,10,100] [--evalset-tokens 8192]
                                        [--subsets 255 | --models 64 --dirichlet 10]
                                        [--threads 1] [--dtype float32] [--clock cpu]
                                        [--workers 1,2 [--engine ray]]

makes, for each size in millions of parameters, a pool of a Llama with random weights as the seed
and 8 unit models near it (for time, random ones serve), sweeps the unions of the 8, or random
mixtures of all, on one evalset of that many tokens, and prints a line a size, in seconds a
mixture:

    forward   the model's forward pass over the evalset alone, the same batches, to the logits; run
              after each mixture is scored, so that both see the machine as it is then
    + loss    the same pass with `labels=`, which gives the library's mean loss and nothing else
              (every fourth mixture)
    sweep     all of the sweep: averaging, scoring, recording; without what is done once (loading
              torch and the models, tokenising, the catalog)
    average   of it, taking on the next average's weights
    scoring   of it, from tokens to sums, with the forward pass
    the rest  of it, in the mean: records, flushes to the disk, book-keeping
    over      how much more the sweep takes than the forward pass, and than that with the loss
    naive     merge to a folder (in this process), load the folder, score, for three mixtures
    plan      milliseconds a mixture to resolve it and to look into the memo
    kept      kilobytes a mixture in the pool afterwards: journal and objects

All are medians but the rest; ratios are medians over mixtures, each measured beside its own pass.
With --workers 1,2 (and --engine ray) it prints instead, for each number of workers, the wall
seconds to the first result, those a mixture from then on, and the processor time a mixture that
this process spends on handing out, taking in and recording.

With --clock cpu it is processor time that is counted, on a machine that others use, too; waiting
for the disk is not in it then.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from poolreg import Pool
from poolreg.evaluation import live, scoring
from poolreg.evaluation.evaluate import Settings, measure
from poolreg.evaluation.protocol import Protocol
from poolreg.evaluation.sweep import choose_dirichlet, choose_subsets, plan_sweep
from poolreg.mixture import Mixture
from poolreg.models.loading import load_model, pick_device, quiet_transformers
from poolreg.text.demo_text import write_demo_text
from poolreg.text.partitions import evalset_documents
from poolreg.training.tokens import train_tokenizer

CONTEXT = 1024
VOCABULARY = 4096
NAIVE = 3  # mixtures that are merged, loaded and scored one by one

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

# millions of parameters: hidden size, width of the MLP, layers
SHAPES = {
    1: (128, 256, 3), 3: (192, 512, 5), 10: (320, 864, 7), 30: (512, 1408, 9),
    100: (768, 2048, 14), 300: (1024, 2816, 23),
}  # fmt: skip


def documents(folder: Path, tokens: int) -> list[str]:
    """Write a tokenizer to `folder` and return documents of about so many tokens by it."""
    text = write_demo_text(folder.parent / "text", evalset_bytes=2_000_000)
    rows = [
        json.loads(line)["text"]
        for file in (*text.evalsets.values(), *text.partitions.values())
        for line in file.read_text().splitlines()
    ]
    train_tokenizer(rows[:400], VOCABULARY, folder, model_type="llama")
    chosen, total = [], 0
    lengths = scoring.tokenise(rows[400:], folder, Protocol(CONTEXT, "any")).tokens.tolist()
    for row, length in zip(rows[400:], lengths, strict=True):
        if total + length <= tokens:
            chosen.append(row)
            total += length
    return chosen


def build(folder: Path, millions: int, given: argparse.Namespace) -> Pool:
    """Make the pool: a random seed model, 8 copies with noise, and the evalset."""
    hidden, width, layers = SHAPES[millions]
    seed = folder / "seed"
    texts = documents(seed, given.evalset_tokens)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=width,
        num_hidden_layers=layers, num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64), max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, given.stored))
    pool = Pool.create(folder / "pool")
    evalset = folder / "evalset.jsonl"
    evalset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pool.add_evalset("text", [evalset])
    with quiet_transformers():
        model.save_pretrained(seed)
    pool.add_model(seed, name="base", role="seed")
    for number in range(given.models):
        unit = folder / "unit"
        shutil.copytree(seed, unit)
        with torch.no_grad(), quiet_transformers():
            for weight in model.parameters():
                weight.add_(0.001 * torch.randn_like(weight))
            model.save_pretrained(unit)
        (folder / f"p{number}.txt").write_text(f"text of partition {number}")
        pool.add_partition(f"p{number}", [folder / f"p{number}.txt"])
        pool.add_model(unit, role="unit", partition=f"p{number}", seed="base")
        shutil.rmtree(unit)
    return pool


@torch.inference_mode()
def forward(model: Any, tokens: scoring.TokenisedSet, batch_tokens: int, *, loss: bool) -> None:
    """Run the model over the batches that scoring makes, and look at nothing."""
    stream = torch.from_numpy(tokens.stream).to(model.device, torch.int64)
    for rows in scoring.batches(tokens.windows, batch_tokens):
        starts, stops, _ = tokens.windows[rows].T
        places = starts[:, None] + np.arange(int((stops - starts).max()))
        real = places < stops[:, None]
        inputs = stream[torch.from_numpy(np.where(real, places, 0)).to(model.device)]
        mask = None if real.all() else torch.from_numpy(real).to(model.device, torch.int64)
        labels = inputs if loss else None
        model(input_ids=inputs, attention_mask=mask, labels=labels, use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Costs:
    """Seconds of one mixture; `forward` and `loss` are passes beside it."""

    rest: float = 0.0  # since the mixture before
    average: float = 0.0
    scoring: float = 0.0
    forward: float = 0.0
    loss: float | None = None


class Stopwatch:
    """Times what a sweep does for each mixture, and the forward passes that it runs beside."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.mixtures: list[Costs] = []
        self._clock = clock
        self._ended = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Time a live model's loading and scoring; run the forward pass after each scoring."""
        load, score = live.LiveModel.load, scoring.score

        def loading(*args: Any, **options: Any) -> Any:
            now = Costs(rest=self._clock() - self._ended if self._ended else 0.0)
            self.mixtures.append(now)
            result, now.average = self._timed(lambda: load(*args, **options))
            return result

        def scored(model: Any, tokens: Any, **options: Any) -> Any:
            now = self.mixtures[-1]
            result, now.scoring = self._timed(lambda: score(model, tokens, **options))
            batch = options.get("batch_tokens") or (1024 if model.device.type == "cpu" else 16384)
            _, now.forward = self._timed(lambda: forward(model, tokens, batch, loss=False))
            if len(self.mixtures) % 4 == 2:
                _, now.loss = self._timed(lambda: forward(model, tokens, batch, loss=True))
            self._ended = self._clock()
            return result

        live.LiveModel.load, scoring.score = loading, scored  # type: ignore[method-assign]
        try:
            yield
        finally:
            live.LiveModel.load, scoring.score = load, score  # type: ignore[method-assign]

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        started = self._clock()
        return call(), self._clock() - started

    def cells(self) -> list[str]:
        """Return the figures of a line of the table; the first mixture warms up."""
        rows = self.mixtures[1:]
        with_loss = [row for row in rows if row.loss]
        rest = statistics.mean(row.rest for row in rows)
        spent = [row.average + row.scoring + rest for row in rows]
        over = statistics.median(s / row.forward for s, row in zip(spent, rows, strict=True)) - 1
        beside = statistics.median(
            (row.average + row.scoring + rest) / (row.loss or 1.0) for row in with_loss
        )
        seconds = [
            statistics.median(row.forward for row in rows),
            statistics.median(row.loss or 0.0 for row in with_loss),
            statistics.median(spent),
            statistics.median(row.average for row in rows),
            statistics.median(row.scoring for row in rows),
            rest,
        ]
        return [*(f"{value:.4f}" for value in seconds), f"{over:.1%}", f"{beside - 1:.1%}"]


def crew(pool: Pool, workers: int, given: argparse.Namespace) -> str:
    """Sweep a copy of the pool by several workers and return a line about it."""
    shutil.copytree(pool.root, copy := pool.root.with_name(f"copy{workers}"))
    settings = Settings(
        threads=given.threads, dtype=given.dtype, device=given.device, workers=workers,
        engine=given.engine,
    )  # fmt: skip
    with Pool.open(copy) as other:
        planned = plan_sweep(other.registry, chosen(other, given), settings=settings)
        results = []
        started, cpu = time.perf_counter(), time.process_time()
        for _ in measure(other.registry, planned.work, settings):
            results.append(time.perf_counter())
        cpu = time.process_time() - cpu
    shutil.rmtree(copy)
    each = (results[-1] - results[0]) / (len(results) - 1)
    cells = [str(workers), str(len(results)), f"{results[0] - started:.1f}", f"{each:.4f}"]
    return f"| {' | '.join([*cells, f'{1e3 * cpu / len(results):.2f}'])} |"


def naive(pool: Pool, folder: Path, settings: Settings, clock: Callable[[], float]) -> float:
    """Return the median seconds of merging to a folder, loading it and scoring."""
    evalset = pool.registry.resolve("evalset", "text")
    seconds = []
    for pair in itertools.islice(itertools.combinations(range(4), 2), NAIVE):
        out = folder / "merged"
        started = clock()
        pool.merge("+".join(f"p{number}" for number in pair), out)
        model = load_model(out, dtype=settings.dtype, device=pick_device(settings.device))
        texts = evalset_documents(pool.registry, evalset)
        tokens = scoring.tokenise(texts, out, Protocol(CONTEXT, "any"))
        scoring.score(model, tokens)
        seconds.append(clock() - started)
        shutil.rmtree(out)
    return statistics.median(seconds)


def line(millions: int, given: argparse.Namespace) -> str:
    """Measure one size and return its line of the table."""
    settings = Settings(threads=given.threads, dtype=given.dtype, device=given.device)
    with tempfile.TemporaryDirectory(dir=given.dir) as scratch:
        pool = build(Path(scratch), millions, given)
        with pool:
            if given.workers:
                return "\n".join(crew(pool, int(n), given) for n in given.workers.split(","))
            before = size(pool.root)
            clock = Stopwatch(CLOCKS[given.clock])
            started = CLOCKS[given.clock]()
            planned = plan_sweep(pool.registry, chosen(pool, given), settings=settings)
            planning = CLOCKS[given.clock]() - started
            with clock.watching():
                pool.sweep(planned)
            kept = size(pool.root) - before
            peer = naive(pool, Path(scratch), settings, CLOCKS[given.clock])
            tokens = pool.sql("SELECT max(tokens) FROM evaluations").rows[0][0]
            parameters = pool.sql("SELECT max(parameters) FROM models").rows[0][0]
    count = len(clock.mixtures)
    what = [f"{parameters / 1e6:.1f} M", f"{tokens:,}", f"{count}"]
    last = [f"{peer:.3f}", f"{1e3 * planning / count:.2f}", f"{kept / 1e3 / count:.1f}"]
    return f"| {' | '.join([*what, *clock.cells(), *last])} |"


def chosen(pool: Pool, given: argparse.Namespace) -> list[Mixture]:
    """Return the mixtures to sweep."""
    if given.dirichlet:
        return choose_dirichlet(pool.registry, given.dirichlet)
    limit = None if given.subsets >= 2**given.models - 1 else given.subsets
    return choose_subsets(pool.registry, limit=limit)


def size(root: Path) -> int:
    """Return the bytes of a pool's journal and objects."""
    files = [p for name in ("journal", "objects") for p in (root / name).rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", default="1,10,100", help="in millions, with commas")
    parser.add_argument("--evalset-tokens", type=int, default=8192)
    parser.add_argument("--subsets", type=int, default=255, help="at most so many, at random")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--dirichlet", type=int, help="so many random mixtures of all models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="to compute in")
    parser.add_argument("--stored", default="float32", help="dtype of the stored models")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", help="how many, with commas: see above")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--dir", help="where to make the pools (default: the temporary folder)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cuda = pick_device(given.device).type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores"
    print(f"{where}, {given.threads} threads of torch, computed in {given.dtype}, stored in")
    print(f"{given.stored}; {given.clock} seconds a mixture\n")
    names = ["model", "tokens", "mixtures", "forward", "+ loss", "sweep", "average", "scoring",
             "the rest", "over forward", "over + loss", "naive", "plan, ms", "kept, kB"]  # fmt: skip
    if given.workers:
        names = ["workers", "mixtures", "first result", "a mixture", "of this process, ms"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for millions in map(int, given.parameters.split(",")):
        print(line(millions, given), flush=True)


if __name__ == "__main__":
    main()
