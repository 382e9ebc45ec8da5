"""Training: a plain loop over shuffled blocks of tokens, from new weights or from a folder.

Promises: the same start, data and settings on one thread give the same weights bit for bit,
however often the run was interrupted and resumed. All randomness is derived from the seed and
the number of the step, so there is no generator state to save. The output folder is whole or
absent, and nothing is printed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from poolreg.canonical import canonical_json
from poolreg.errors import ConfigError, Conflict, Incompatible, StorageError
from poolreg.files import staged_folder, storage_errors, sync_file, sync_folder
from poolreg.models.loading import load_model, load_tokenizer, pick_device, quiet_transformers
from poolreg.training.build import build_model
from poolreg.training.recipe import Hyperparameters
from poolreg.training.tokens import (
    BatchPlan,
    Source,
    SourceShare,
    plan_batches,
    seed_of,
)

CHECKPOINT = "checkpoint.safetensors"

# The files that make up a tokenizer folder of any kind.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip

# Whatever tokenizers differ in: contractions, digits, accents, line ends, runs of spaces.
_PROBE = "Don't say 12345 nai\u0308ve \u00e9t\u00e9s\r\n\tx = [3.14]  # \u4f60\u597d \U0001f600\n\n"


@dataclass(frozen=True)
class Resume:
    """Where a training is kept while it runs, and the digest that says whose it is.

    The caller removes the folder when the model is safe elsewhere.
    """

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
    that is not finite, `Conflict` if `out` exists, `UsageError` for too little text,
    `Incompatible` for tokens that the model does not know, and what `load_model` raises.
    """
    if out.exists():
        raise Conflict(f"{out} exists already", hint="choose another place or remove it first")
    plan = plan_batches(sources, settings)
    where = pick_device(device)
    with quiet_transformers(), _threads(threads), _own_randomness(where), _enough_memory(where):
        run = _Run(_model(start, tokenizer, settings), settings, where)
        _check_ids(run.model, sources)
        if resume:
            run.restore(resume)
        tokens = {source.key: source.tokens for source in sources}
        arrays = [tokens[share.key] for share in plan.shares]
        _loop(run, plan.order, arrays, resume=resume, progress=progress, stop=stop_requested)
        _save(run.model, settings.dtype, tokenizer, out)
    return _result(run, plan)


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
        torch.manual_seed(seed_of("step", self.settings.seed, number) % 2**63)  # for dropout
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, number)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(input_ids=blocks[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), blocks[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
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
        target = resume.folder / CHECKPOINT
        temporary = target.with_suffix(".tmp")
        with _writing(f"the checkpoint {target}"):
            resume.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"poolreg": about})
            sync_file(temporary)
            temporary.replace(target)
            sync_folder(resume.folder)

    def restore(self, resume: Resume) -> None:
        """Go on from the checkpoint, if there is one and it has this training's key."""
        path = resume.folder / CHECKPOINT
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("poolreg", "{}"))
                if about.get("key") != resume.key:
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return  # a checkpoint only saves time: without a readable one training starts anew
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
    order: NDArray[np.int32],
    arrays: Sequence[NDArray[Any]],
    *,
    resume: Resume | None,
    progress: Callable[[TrainProgress], None] | None,
    stop: Callable[[], bool],
) -> None:
    width, per_step = run.settings.context, run.settings.batch * run.settings.context
    first, before = len(run.losses), run.seconds
    began = saved = time.monotonic()
    with _interrupts() as interrupted:
        for step in range(first, len(order)):
            places = order[step].tolist()  # Python numbers: 32 bits overflow in a large corpus
            blocks = np.stack([arrays[s][b * width : (b + 1) * width + 1] for s, b in places])
            loss = run.step(torch.from_numpy(blocks.astype(np.int64)).to(run.device))
            run.losses.append(loss)
            done, now = step + 1, time.monotonic()
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


def _result(run: _Run, plan: BatchPlan) -> TrainResult:
    losses, steps = np.array(run.losses), len(run.losses)
    ends = np.unique(np.linspace(0, steps, min(200, steps) + 1).astype(int))
    pairs = itertools.pairwise(ends)
    return TrainResult(
        steps=steps,
        tokens=run.settings.tokens,
        seconds=run.seconds,
        final_loss=float(losses[-math.ceil(steps / 20) :].mean()),
        curve=tuple((int(stop), float(losses[start:stop].mean())) for start, stop in pairs),
        shares=plan.shares,
        device=str(run.device),
    )


# ---------------------------------------------------------------------------------- models


def _model(start: Path | Mapping[str, Any], folder: Path, settings: Hyperparameters) -> Any:
    """Return the model to train, in float32 on the CPU."""
    if isinstance(start, Path):
        model = load_model(start).requires_grad_(True)
    else:
        torch.manual_seed(seed_of("weights", settings.seed) % 2**63)
        model = build_model(start, load_tokenizer(folder), settings.context)
    _check_tokenizer(model, folder)
    longest = getattr(model.config, "max_position_embeddings", None) or settings.context
    if settings.context > longest:
        words = f"a context of {settings.context} tokens is longer than the model's {longest}"
        hint = "lower context in the recipe, or give the seed's [model] max_position_embeddings"
        raise ConfigError(words, hint=hint, key="context")
    return model


def _check_tokenizer(model: Any, folder: Path) -> None:
    # Beside a config.json of some model types AutoTokenizer rebuilds the tokenizer after its own
    # pattern, so that text would be cut otherwise in scoring than it was in training.
    with tempfile.TemporaryDirectory() as beside:
        _copy_tokenizer(folder, Path(beside))
        model.config.save_pretrained(beside)
        alone, within = load_tokenizer(folder), load_tokenizer(Path(beside))
    if alone(_PROBE)["input_ids"] != within(_PROBE)["input_ids"]:
        kind = model.config.model_type
        words = f"transformers reads the tokenizer in {folder} differently in a {kind} model"
        hint = "choose another model_type, or a tokenizer folder made for this one"
        raise ConfigError(words, hint=hint, table="model", key="model_type")
    if len(alone) > (rows := model.get_input_embeddings().num_embeddings):
        words = f"the tokenizer in {folder} has {len(alone)} tokens, the model only {rows}"
        hint = "use the model's own tokenizer, or leave vocab_size out of [model]"
        raise Incompatible(words, hint=hint)


def _check_ids(model: Any, sources: Sequence[Source]) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    for source in sources:
        if int(source.tokens.max()) >= vocabulary:
            words = f"source {source.key} has token {source.tokens.max()}"
            hint = "encode the text with the tokenizer that the model was trained with"
            raise Incompatible(f"{words}, but the model knows {vocabulary} tokens", hint=hint)


def _save(model: Any, dtype: str, tokenizer: Path, out: Path) -> None:
    model.to(getattr(torch, dtype))
    with _writing(f"the model {out}"), staged_folder(out) as staging:
        model.save_pretrained(staging)
        _copy_tokenizer(tokenizer, staging)


def _copy_tokenizer(folder: Path, to: Path) -> None:
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, to / name)


# ------------------------------------------------------------------------- the surroundings


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    with storage_errors(f"writing {what}"):
        try:
            yield
        except SafetensorError as error:  # its writer's only error: the disk
            raise StorageError(f"writing {what}: {error}", hint="free some disk space") from error


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    # The caller's random numbers must not depend on whether a training came between.
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        hint = "lower batch or context in the recipe, or train on the cpu"
        raise ConfigError(f"{device} has too little memory for this model", hint=hint) from error


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the step in work is whole; a second Ctrl-C does not wait.

    A caller's own handler stays in place, and threads other than the main one get no Ctrl-C.
    """
    seen: list[int] = []

    def note(number: int, _frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
