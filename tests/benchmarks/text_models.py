"""Small models of three families, trained on real text for the compression benchmark.

    python tests/benchmarks/text_models.py DIR [FAMILY…]

makes a pool in DIR/pool with a seed model for each family (llama with grouped key/value heads,
opt, qwen2) and three evalsets: `calibration` (text that they were trained on), `python` (held
out) and `prose` (another kind of text). It downloads nothing: the text is the standard library of
this Python and the C++ headers of torch. About 20 minutes a model on one core.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from poolreg import Pool
from poolreg.text.demo_text import write_demo_text
from poolreg.training.recipe import load_recipe

RECIPE = """
[model]
{model}
tie_word_embeddings = true
[tokenizer]
vocab_size = 2048
[training]
context = 128
batch = 16
steps = 2400
lr = 3e-3
schedule = "cosine"
warmup = 100
"""

MODELS = {
    "llama": """model_type = "llama"
hidden_size = 192
intermediate_size = 512
num_hidden_layers = 6
num_attention_heads = 6
num_key_value_heads = 2
head_dim = 32""",
    "opt": """model_type = "opt"
hidden_size = 192
word_embed_proj_dim = 192
ffn_dim = 768
num_hidden_layers = 6
num_attention_heads = 6""",
    "qwen2": """model_type = "qwen2"
hidden_size = 192
intermediate_size = 512
num_hidden_layers = 6
num_attention_heads = 6
num_key_value_heads = 2""",
}


def main(folder: Path, families: list[str]) -> None:
    """Make the pool, or what is missing of it."""
    root = folder / "pool"
    with Pool.open(root) if root.exists() else Pool.create(root) as pool:
        have = pool.registry.names("evalset")
        if "prose" not in have:
            _add_text(pool, folder)
        for family in families or list(MODELS):
            if family in pool.registry.names("model"):
                continue
            path = folder / f"{family}.toml"
            path.write_text(RECIPE.format(model=MODELS[family]))
            made = pool.train_seed(load_recipe(path), name=family)
            print(f"{family}: {made}", flush=True)


def _add_text(pool: Pool, folder: Path) -> None:
    train, held_out = {}, []
    for kind, files in (("python", _python()), ("cpp", _headers())):
        texts = [path.read_text(errors="ignore") for path in files]
        held_out += texts[::12] if kind == "python" else []
        train[kind] = [text for place, text in enumerate(texts) if place % 12]
        pool.add_partition(kind, [_write(folder / f"{kind}.jsonl", train[kind], 8_000_000)])
    calibration = [text for texts in train.values() for text in texts[5::40]]
    demo = write_demo_text(folder / "demo")
    pool.add_evalset("calibration", [_write(folder / "calibration.jsonl", calibration, 400_000)])
    pool.add_evalset("python", [_write(folder / "held_out.jsonl", held_out, 200_000)])
    pool.add_evalset("prose", [demo.evalsets["prose"]])


def _python() -> Iterator[Path]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"site-packages", "test", "lib2to3", "idlelib"} & set(path.parts):
            yield path


def _headers() -> Iterator[Path]:
    yield from sorted((Path(torch.__file__).parent / "include").rglob("*.h"))


def _write(path: Path, texts: list[str], limit: int) -> Path:
    """Write documents of at most 20,000 characters, in all about `limit` characters."""
    total = 0
    with path.open("w") as file:
        for text in texts:
            piece = text[:20_000]
            if total < limit and piece.strip():
                file.write(json.dumps({"text": piece}) + "\n")
                total += len(piece)
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
