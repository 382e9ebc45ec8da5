"""What compression costs in time and memory, and what it buys in throughput.

    python tests/benchmarks/compression_speed.py [--hidden 1024] [--layers 20] [--tokens 16384]
    python tests/benchmarks/compression_speed.py --hidden 2048 --width 5632 --layers 22 \\
        --stored bfloat16 --tokens 8192 --pairs 0 --method modegpt     # a billion parameters

makes a Llama with random weights (about 300 million parameters by default; for time, random ones
serve) and prints

1. the calibration beside the forward pass that it observes, in `--pairs` pairs that alternate:
   the pass of the layers alone, the same with its Gram matrices added up, the whole calibration
   (which also judges and stores them), and the floor, which is the pass and half of a plain
   product in float32 for each Gram matrix (half: they are symmetric);
2. seconds and the largest anonymous memory of each stage of a compression by each of `--ratios`
   (one calibration serves all), beside the factorisations that no method of this kind avoids;
3. tokens a second of the dense model and its variant in runs that alternate.

`--only 1` stops after the first; on a busy machine OMP_NUM_THREADS=1 and `--cpu-seconds` keep the
others' work out of it. With --device cuda all of it runs there.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from poolreg import Pool
from poolreg.compress import calibrations, variants, workshop
from poolreg.compress.architectures import family
from poolreg.compress.calibrate import BATCH_TOKENS, Sample, choose_windows, gather
from poolreg.evaluation.protocol import Protocol
from poolreg.evaluation.scoring import TokenisedSet, batches, tokenise
from poolreg.models.loading import load_model, pick_device
from poolreg.progress import SILENT
from poolreg.tensors import write_file
from poolreg.text.demo_text import write_demo_text
from poolreg.text.partitions import evalset_documents
from poolreg.training.tokens import train_tokenizer

LENGTH = 512  # tokens in a window


class Stages:
    """A progress that keeps the seconds and the largest anonymous memory of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.name, self.since = "loading", time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            now = anonymous_memory()
            self.memory[self.name] = max(now, self.memory.get(self.name, 0))
            time.sleep(0.1)

    def start(self, what: str, total: int, unit: str) -> None:  # noqa: ARG002
        """End one stage and begin another."""
        spent = time.perf_counter() - self.since
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent
        self.name, self.since = what, time.perf_counter()

    def advance(self, amount: int) -> None:
        """Ignore the advance."""

    def note(self, text: str) -> None:
        """Ignore the note."""


def anonymous_memory() -> int:
    """Return the bytes of this process that are not pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def build(folder: Path, given: argparse.Namespace) -> Path:
    """Write the random model, a layer at a time, with a tokenizer, and return its text."""
    text = write_demo_text(folder / "text", partition_bytes=2_000_000).partitions["code"]
    documents = [line for line in text.read_text().splitlines() if line]
    train_tokenizer(documents, 4096, folder / "model", model_type="llama")
    config = AutoConfig.for_model(
        "llama", vocab_size=32_000, hidden_size=given.hidden, num_hidden_layers=given.layers,
        intermediate_size=given.width, num_attention_heads=given.hidden // 64,
        num_key_value_heads=max(1, given.hidden // 256), max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder / "model")
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    shards: dict[str, list[str]] = {}
    for name in tensors:
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    places, total = {}, 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {n: _random(tensors[n].shape, given.stored) for n in names}
        write_file(folder / "model" / file, arrays, {"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(array.nbytes for _, array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{sum(t.numel() for t in tensors.values()):,} parameters in {given.stored}", flush=True)
    return text


def _random(shape: torch.Size, dtype: str) -> tuple[str, Any]:
    values = torch.randn(shape) * 0.02 if len(shape) > 1 else torch.ones(shape)
    if dtype == "bfloat16":
        return "BF16", values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return "F32", values.numpy()


# -- calibration and the forward pass --------------------------------------------------------


def calibration_table(pool: Pool, folder: Path, given: argparse.Namespace) -> None:
    """Print the calibration beside the forward pass that it observes."""
    device = pick_device(given.device)
    model = load_model(folder, dtype=given.dtype, device=device)
    names, subject = family(model.config.model_type), pool.resolve("dense")
    row = pool.registry.one("model", digest=subject.components[0][0])
    protocol = Protocol(LENGTH, row["tokenizer"], given.dtype)
    text = calibrations.find_text(pool.registry, "text")
    tokens = tokenise(evalset_documents(pool.registry, text.digest), folder, protocol)
    sample = choose_windows(tokens, given.tokens)
    limits = iter(range(given.tokens, given.tokens + given.pairs))  # each makes another calibration

    def calibrate(limit: int) -> Any:
        return calibrations.calibrate(
            pool.registry, model, names, subject=subject.digest, folder=folder, text=text,
            protocol=protocol, tokens=limit, progress=SILENT,
        )  # fmt: skip

    runs: dict[str, Callable[[], Any]] = {
        "forward pass": lambda: forward(model, tokens, sample),
        "with Gram matrices": lambda: sum(1 for _ in gather(model, names, tokens, sample=sample)),
        "floor": lambda: forward(model, tokens, sample) + grams(model, sample.tokens),
        "calibration": lambda: calibrate(next(limits)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.process_time if given.cpu_seconds else time.perf_counter
    forward(model, tokens, sample)
    for _ in range(given.pairs):
        for name, run in runs.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    print(f"\n{sample.tokens:,} tokens in Gram matrices, {sample.held_out_tokens:,} held out")
    print("| | seconds | of the forward pass |\n|---|---|---|")
    for name, values in seconds.items():
        pairs = zip(values, seconds["forward pass"], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        print(f"| {name} | {statistics.median(values):.1f} | {ratio:.2f} × |")
    started = time.perf_counter()
    assert calibrate(given.tokens).memoised
    print(f"the same calibration again, from the pool: {time.perf_counter() - started:.3f} s")


@torch.inference_mode()
def forward(model: Any, tokens: TokenisedSet, sample: Sample) -> int:
    """Send the windows of a calibration through the layers, batched alike."""
    stream = torch.from_numpy(tokens.stream).to(model.device, torch.int64)
    for windows in (sample.held_out, sample.windows):
        for rows in batches(windows, BATCH_TOKENS.get(model.device.type, 16384)):
            starts, stops = windows[rows, 0], windows[rows, 1]
            places = starts[:, None] + np.arange(int((stops - starts).max()))
            real = torch.from_numpy(places < stops[:, None]).to(model.device)
            ids = stream[torch.from_numpy(np.minimum(places, len(stream) - 1)).to(model.device)]
            mask = None if real.all() else real.long()
            last = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            last.last_hidden_state.sum().item()
    return 0


def grams(model: Any, tokens: int) -> int:
    """Multiply half of the Gram matrices of all layers, in float32 and batches as they come."""
    config, batch = model.config, BATCH_TOKENS.get(model.device.type, 16384)
    for width in (config.intermediate_size, config.hidden_size):
        rows = torch.randn(batch, width, device=model.device)
        for _ in range(-(-tokens // batch) * config.num_hidden_layers):
            (rows[:, : width // 2].mT @ rows).sum().item()
    return 0


# -- all stages ------------------------------------------------------------------------------


def floor(width: int, hidden: int, layers: int, device: torch.device) -> float:
    """Return the seconds of the factorisations of all layers: per layer a Cholesky factor with
    inverse of the MLP's Gram matrix, one more of what is kept, and two of the hidden size."""
    sizes = [width, int(0.7 * width), hidden, hidden]
    total = 0.0
    for size in sizes:
        x = torch.randn(size, size, dtype=torch.float64, device=device)
        gram = x @ x.mT + size * torch.eye(size, dtype=torch.float64, device=device)
        started = time.perf_counter()
        torch.cholesky_inverse(torch.linalg.cholesky(gram)).sum().item()
        total += time.perf_counter() - started
    return layers * total


def throughput(dense: Any, small: Any, *, pairs: int = 5) -> list[tuple[str, float, float]]:
    """Return (what, dense, variant) in tokens a second: medians of alternating runs."""
    ids = torch.randint(0, 1000, (1, 512), device=dense.device)
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}

    def forward(model: Any) -> float:
        model(input_ids=ids, use_cache=False).logits.sum().item()
        return ids.numel()

    def generate(model: Any) -> float:
        model.generate(ids[:, :16], **options)
        return 32

    rows = []
    for name, run in (("forward", forward), ("generate", generate)):
        speeds: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(pairs):
            for which, model in enumerate((dense, small)):
                started = time.perf_counter()
                with torch.inference_mode():
                    count = run(model)
                speeds[which].append(count / (time.perf_counter() - started))
        rows.append((name, *(statistics.median(speeds[which][1:]) for which in (0, 1))))
    return rows


def stages_table(pool: Pool, folder: Path, given: argparse.Namespace) -> None:
    """Compress by each ratio and print what each stage took; exports the last variant."""
    how = workshop.Compression(
        "text", tokens=given.tokens, dtype=given.dtype, device=given.device, max_length=LENGTH,
        method=given.method,
    )  # fmt: skip
    ratios = [float(ratio) for ratio in given.ratios.split(",")]
    stages, started = Stages(), time.perf_counter()
    with workshop.opened(pool.registry, pool.resolve("dense"), how, stages) as bench:
        for ratio in ratios:
            stages.start(f"planning {ratio:.0%}", 1, "")
            plan = variants.plan(bench, ratio)
            stages.start(f"loading for {ratio:.0%}", 1, "")
            made = variants.make(bench, plan, name="small", replace=True, progress=stages)
            stages.start("end", 1, "")
            print(
                f"removed {plan.achieved:.1%}: {made.bytes / 1e6:,.0f} of {plan.bytes[0] / 1e6:,.0f} MB",
                flush=True,
            )
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    print("| stage | seconds | anonymous memory, GB |\n|---|---|---|")
    for name, seconds in stages.seconds.items():
        print(f"| {name} | {seconds:.1f} | {stages.memory.get(name, 0) / 1e9:.2f} |")
    device = pick_device(given.device)
    least = floor(given.width, given.hidden, given.layers, device)
    print(f"| (Cholesky factors and inverses of these sizes alone) | {least:.1f} | |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"largest memory with mapped files {peak * 1024 / 1e9:.2f} GB")
    if device.type == "cuda":
        print(f"largest memory of the device {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    pool.export_model("small", folder / "small")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--stored", default="float32", help="dtype of the files")
    parser.add_argument("--dtype", default="float32", help="dtype to compute in")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--method", default="poolreg")
    parser.add_argument("--ratios", default="0.3")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cpu-seconds", action="store_true", help="in table 1, on a busy machine")
    parser.add_argument("--only", type=int, default=3, help="stop after this table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = build(folder, given)
        with Pool.create(folder / "pool") as pool:
            pool.add_evalset("text", [text])
            pool.add_model(folder / "model", name="dense", role="other")
            if given.pairs:
                calibration_table(pool, folder / "model", given)
            if given.only < 2:
                return
            stages_table(pool, folder, given)
        if given.only < 3:
            return
        device = pick_device(given.device)
        dense = load_model(folder / "model", dtype=given.dtype, device=device)
        small = load_model(folder / "small", dtype=given.dtype, device=device)
        print("\n| tokens a second | dense | variant | ratio |\n|---|---|---|---|")
        for name, one, other in throughput(dense, small):
            print(f"| {name} | {one:,.1f} | {other:,.1f} | {other / one:.2f} |")


if __name__ == "__main__":
    main()
