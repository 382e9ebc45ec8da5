"""What compression costs in time and memory, and what it buys in throughput.

    python tests/benchmarks/compression_speed.py [--hidden 1024] [--layers 24] [--tokens 16384]

makes a Llama with random weights (about 300 million parameters by default; for time, random ones
serve), compresses it by 30% and prints seconds by stage beside the factorisations that no method
of this kind avoids, the largest memory, and tokens a second of the dense model and its variant in
runs that alternate. With --device cuda all of it runs there.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from poolreg import Pool
from poolreg.compress import variants, workshop
from poolreg.models.loading import load_model, pick_device
from poolreg.text.demo_text import write_demo_text
from poolreg.training.tokens import train_tokenizer


class Stages:
    """A progress that keeps the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self.since = "", 0.0

    def start(self, what: str, total: int, unit: str) -> None:  # noqa: ARG002
        """End one stage and begin another."""
        self.stop()
        self.name, self.since = what, time.perf_counter()

    def stop(self) -> None:
        """End the stage."""
        if self.name:
            spent = time.perf_counter() - self.since
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent
        self.name = ""

    def advance(self, amount: int) -> None:
        """Ignore the advance."""

    def note(self, text: str) -> None:
        """Ignore the note."""


def build(folder: Path, given: argparse.Namespace) -> Path:
    """Write the random model with a tokenizer, and return its text."""
    text = write_demo_text(folder / "text", partition_bytes=2_000_000).partitions["code"]
    documents = [line for line in text.read_text().splitlines() if line]
    train_tokenizer(documents, 4096, folder / "model", model_type="llama")
    config = AutoConfig.for_model(
        "llama", vocab_size=32_000, hidden_size=given.hidden, num_hidden_layers=given.layers,
        intermediate_size=given.width, num_attention_heads=given.hidden // 64,
        num_key_value_heads=max(1, given.hidden // 256), max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, given.dtype))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    model.save_pretrained(folder / "model")
    return text


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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = pick_device(given.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = build(folder, given)
        with Pool.create(folder / "pool") as pool:
            pool.add_evalset("text", [text])
            pool.add_model(folder / "model", name="dense", role="other")
            stages = Stages()
            how = workshop.Compression(
                "text", tokens=given.tokens, dtype=given.dtype, device=given.device, max_length=512
            )
            started = time.perf_counter()
            subject = pool.resolve("dense")
            with workshop.opened(pool.registry, subject, how, stages) as bench:
                stages.stop()
                plan = variants.plan(bench, 0.3)
                made = variants.make(bench, plan, name="small", progress=stages)
                stages.stop()
            print(f"\nremoved {plan.achieved:.1%}; {time.perf_counter() - started:.0f} s in all")
            print("| stage | seconds |\n|---|---|")
            for name, seconds in stages.seconds.items():
                print(f"| {name} | {seconds:.1f} |")
            least = floor(given.width, given.hidden, given.layers, device)
            print(f"| (Cholesky factors and inverses of these sizes alone) | {least:.1f} |")
            print(
                f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
            )
            if device.type == "cuda":
                print(
                    f"largest memory of the device {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
                )
            pool.export_model("small", folder / "small")
            print(
                f"variant {made.label}: {made.bytes / 1e6:,.0f} MB of {plan.bytes[0] / 1e6:,.0f} MB"
            )
        dense = load_model(folder / "model", dtype=given.dtype, device=device)
        small = load_model(folder / "small", dtype=given.dtype, device=device)
        print("\n| tokens a second | dense | variant | ratio |\n|---|---|---|---|")
        for name, one, other in throughput(dense, small):
            print(f"| {name} | {one:,.1f} | {other:,.1f} | {other / one:.2f} |")


if __name__ == "__main__":
    main()
