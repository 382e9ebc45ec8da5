"""Training: a tokenizer from text, text to tokens, the order of the data, and a plain loop.

Promises: the same start, data and settings on one thread give the same weights bit for bit,
however often the run was interrupted and resumed. All randomness is derived from (seed, step)
or (seed, epoch, source), so there is no generator state to save. Text of several sources is
shuffled as one. The output folder is whole or absent, and nothing is printed.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from poolreg.canonical import canonical_json, digest_of
from poolreg.errors import ConfigError, Conflict, Incompatible, Refused, StorageError, UsageError
from poolreg.files import storage_errors, sync_folder
from poolreg.recipe import Hyperparameters, nearest

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip

# -------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Resume:
    """Where an unfinished training is kept, and the digest that says whose it is."""

    folder: Path
    key: str  # of start, data and settings: a checkpoint with another key is ignored
    every: float = 30.0  # seconds between checkpoints


@dataclass(frozen=True)
class TrainProgress:
    """One finished step."""

    step: int
    steps: int
    loss: float  # nats per token, of this step
    tokens: int  # predicted so far, an earlier interrupted run included
    tokens_per_second: float  # of this run


@dataclass(frozen=True)
class TrainResult:
    """A finished training; losses are in nats per token."""

    steps: int
    tokens: int
    seconds: float  # in the loop, earlier interrupted runs included
    final_loss: float  # mean of the last twentieth of the steps
    curve: tuple[tuple[int, float], ...]  # (last step, mean loss) of at most 200 equal stretches
    shares: tuple[SourceShare, ...]
    device: str


def train(
    start: Path | Mapping[str, Any],
    sources: Sequence[Source],
    settings: Hyperparameters,
    *,
    tokenizer: Path,
    out: Path,
    device: str = "auto",
    threads: int = 1,
    resume: Resume | None = None,
    progress: Callable[[TrainProgress], None] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train a model on the sources and save it, with its tokenizer, as the new folder `out`.

    `start` is a Hugging Face folder, or the `[model]` settings of a recipe for a model with new
    weights. `device` is auto, cpu or cuda. When `stop_requested` says so, and on Ctrl-C, the
    training leaves a checkpoint in `resume` after the step in work and raises
    `KeyboardInterrupt`. Raises `ConfigError` for settings that give no model and for a loss
    that is not finite, `Conflict` if `out` exists, `UsageError`, `Refused`, `Incompatible`.
    """
    if out.exists():
        raise Conflict(f"{out} exists already", hint="choose another place or remove it first")
    plan = plan_batches(sources, settings)
    where = _device(device)
    with _quiet(), _threads(threads), _own_randomness(where):
        run = _Run(_model(start, load_tokenizer(tokenizer), settings), settings, where)
        _check_ids(run.model, sources)
        if resume:
            run.restore(resume)
        by_key = {source.key: source.tokens for source in sources}
        arrays = [by_key[share.key] for share in plan.shares]
        _loop(run, plan.order, arrays, resume=resume, progress=progress, stop=stop_requested)
        _save(run.model, settings.dtype, tokenizer, out)
    if resume:
        resume.folder.joinpath(_CHECKPOINT).unlink(missing_ok=True)
    return _result(run, plan, where)


_CHECKPOINT = "checkpoint.safetensors"


@dataclass
class _Run:
    """The state of a training: everything that changes from step to step."""

    model: Any
    settings: Hyperparameters
    device: torch.device
    optimizer: torch.optim.AdamW = field(init=False)
    losses: list[float] = field(default_factory=list)  # one per finished step
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.model.to(self.device).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim >= 2]
        rest = [p for p in parameters if p.ndim < 2]  # norms and biases do not decay
        groups = [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=self.settings.betas, fused=True)

    def step(self, blocks: Tensor) -> float:
        """Train on blocks, [batch, context + 1] token ids; return the mean loss before it."""
        number = len(self.losses)
        torch.manual_seed(_seed("step", self.settings.seed, number) % 2**63)  # for dropout
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, number)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(input_ids=blocks[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), blocks[:, 1:].flatten()
        )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        limit = self.settings.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            words = f"training diverged at step {number + 1}: loss {value}, gradient {norm.item()}"
            hint = "lower lr, add warmup steps, or lower clip in the recipe"
            raise ConfigError(words, hint=hint, step=number + 1)
        self.optimizer.step()
        return value

    def save(self, resume: Resume) -> None:
        """Replace the checkpoint by the present state, in one rename."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        about = canonical_json({"key": resume.key, "seconds": self.seconds}).decode()
        target = resume.folder / _CHECKPOINT
        temporary = target.with_suffix(".tmp")
        with _writing(f"the checkpoint {target}"):
            resume.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"poolreg": about})
            _sync_file(temporary)
            temporary.replace(target)
            sync_folder(resume.folder)

    def restore(self, resume: Resume) -> None:
        """Go on from the checkpoint, if there is one and it has this training's key."""
        path = resume.folder / _CHECKPOINT
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("poolreg", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return  # a checkpoint only saves time: without a readable one training starts anew
        if about.get("key") != resume.key:
            return
        state: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, index, entry = name.split(".")
            state.setdefault(int(index), {})[entry] = tensors[name]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        self.losses = tensors["losses"].tolist()
        self.seconds = about["seconds"]


def learning_rate(settings: Hyperparameters, step: int) -> float:
    """Return the learning rate of a step (from 0): a linear warmup, then the schedule to 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    part = (step - settings.warmup) / (settings.steps - settings.warmup)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - part,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * part)),
    }
    return settings.lr * shape[settings.schedule]


def _loop(
    run: _Run,
    order: npt.NDArray[np.int32],
    arrays: Sequence[npt.NDArray[Any]],
    *,
    resume: Resume | None,
    progress: Callable[[TrainProgress], None] | None,
    stop: Callable[[], bool],
) -> None:
    width, per_step = run.settings.context, run.settings.batch * run.settings.context
    first, before = len(run.losses), run.seconds
    began = saved = time.monotonic()
    with _interrupts() as interrupted:
        for done, batch in enumerate(order[first:].tolist(), first + 1):
            blocks = np.stack([arrays[s][b * width : (b + 1) * width + 1] for s, b in batch])
            loss = run.step(torch.from_numpy(blocks.astype(np.int64)).to(run.device))
            run.losses.append(loss)
            now = time.monotonic()
            run.seconds = before + now - began
            if progress:
                speed = (done - first) * per_step / max(now - began, 1e-9)
                progress(TrainProgress(done, len(order), loss, done * per_step, speed))
            stopping = interrupted() or stop()
            if resume and (stopping or now - saved >= resume.every):
                run.save(resume)
                saved = time.monotonic()
            if stopping:
                raise KeyboardInterrupt


def _result(run: _Run, plan: BatchPlan, device: torch.device) -> TrainResult:
    losses, steps = np.array(run.losses), len(run.losses)
    ends = np.unique(np.linspace(0, steps, min(200, steps) + 1).astype(int))
    pairs = zip(ends, ends[1:], strict=False)
    return TrainResult(
        steps=steps,
        tokens=run.settings.tokens,
        seconds=run.seconds,
        final_loss=float(losses[-math.ceil(steps / 20) :].mean()),
        curve=tuple((int(stop), float(losses[start:stop].mean())) for start, stop in pairs),
        shares=plan.shares,
        device=str(device),
    )


# ---------------------------------------------------------------------------------- models


def _model(start: Path | Mapping[str, Any], tokenizer: Any, settings: Hyperparameters) -> Any:
    """Return the model to train, in float32 on the CPU."""
    if isinstance(start, Path):
        model = _load(start)
    else:
        torch.manual_seed(_seed("weights", settings.seed) % 2**63)
        model = _build(start, tokenizer, settings.context)
    longest = getattr(model.config, "max_position_embeddings", None) or settings.context
    if settings.context > longest:
        words = f"a context of {settings.context} tokens is longer than the model's {longest}"
        hint = "lower context in the recipe, or build the seed with max_position_embeddings"
        raise ConfigError(words, hint=hint, key="context")
    return model


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise Refused(f"the model in {folder} cannot be loaded: {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            words = f"the model in {folder} has {kind.replace('_', ' ')}: {sorted(report[kind])}"
            raise Refused(words, hint="its config and its weights do not belong together")
    return model


def _build(given: Mapping[str, Any], tokenizer: Any, context: int) -> Any:
    """Return a model with new weights, sized for the tokenizer and the context."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, sizes = given["model_type"], {k: v for k, v in given.items() if k != "model_type"}
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(f"[model] model_type {kind} is no causal language model", hint=hint)
    plain = AutoConfig.for_model(kind)
    valid = plain.to_dict().keys() | plain.attribute_map.keys()
    for key in sizes.keys() - valid:  # transformers would keep and ignore it
        hint = nearest(key, valid)
        raise ConfigError(f"[model] {kind} has no key {key}", hint=hint, table="model", key=key)
    # No padding token: some models would never train its embedding, which may be that of the end.
    fill = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "max_position_embeddings": context,
    }
    fill = {k: v for k, v in fill.items() if k in valid and plain.attribute_map.get(k) not in sizes}
    try:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **{**fill, **sizes}), dtype=torch.float32
        )
    except _BUILD_ERRORS as error:
        words = f"[model] gives no {kind} model: {str(error).strip().splitlines()[-1]}"
        raise ConfigError(words, hint="check the sizes in [model]", table="model") from error
    _check_causal(model.eval(), kind)
    return model
