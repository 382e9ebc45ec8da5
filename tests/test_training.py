"""Training: the loop learns, repeats itself bit for bit, resumes, and leaves no halves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from poolreg.errors import (
    ConfigError,
    Conflict,
    Incompatible,
    NotFound,
    Refused,
    StorageError,
    UsageError,
)
from poolreg.training.loop import CHECKPOINT, Resume, learning_rate, train
from poolreg.training.recipe import Hyperparameters
from poolreg.training.tokens import Source, encode_stream, plan_batches, train_tokenizer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# Dropout is on by default here, so a resumed run shows whether its randomness came back.
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24}
HOW = Hyperparameters(context=8, batch=2, steps=6, lr=1e-2, schedule="cosine", warmup=2)
TEXT = ["the cat sat on the mat and the dog sat on the log\n"] * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    assert train_tokenizer([*TEXT, Path(__file__).read_text()], 300, folder) == 300
    return folder


@pytest.fixture(scope="module")
def sources(tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    other = ["x = [1, 2, 3]\n"] * 30
    return [
        Source("a", encode_stream(TEXT, loaded)),
        Source("b", encode_stream(other, loaded), weight=2),
    ]


@pytest.fixture
def run(tokenizer, sources):
    def go(out, start=LLAMA, how=HOW, data=sources, **options):
        return train(start, data, how, tokenizer=tokenizer, out=out, device="cpu", **options)

    return go


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


class StopAfter:
    """Asks to stop after so many steps."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left <= 0


# ------------------------------------------------------------------------------ what it gives


def test_the_loss_falls_on_text_that_repeats(run, sources, tmp_path):
    how = Hyperparameters(context=16, batch=4, steps=60, lr=1e-2)
    result = run(tmp_path / "out", how=how, data=sources[:1])
    assert result.curve[0][1] == pytest.approx(math.log(300), rel=0.1)  # knows nothing at first
    assert result.final_loss < 0.5 * result.curve[0][1]


def test_the_folder_is_a_whole_hugging_face_model(run, tokenizer, tmp_path):
    run(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.config.vocab_size == 300
    assert model.config.max_position_embeddings == HOW.context
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 0)
    assert model.config.pad_token_id is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer / name).read_bytes()
    text = "don't stop — naïve 123\n"
    beside = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert beside(text) == AutoTokenizer.from_pretrained(tokenizer)(text)


def test_the_result_says_what_was_done(run, sources, tmp_path):
    seen = []
    result = run(tmp_path / "out", progress=seen.append)
    assert (result.steps, result.tokens, result.device) == (6, 6 * 2 * 8, "cpu")
    assert [share.blocks for share in result.shares] == [4, 8]
    assert result.shares == plan_batches(sources, HOW).shares
    assert [each.step for each in seen] == [1, 2, 3, 4, 5, 6]
    assert {each.steps for each in seen} == {6}
    assert seen[-1].tokens == result.tokens
    assert all(each.tokens_per_second > 0 for each in seen)
    assert result.curve == tuple((each.step, each.loss) for each in seen)
    assert result.final_loss == seen[-1].loss
    assert result.seconds > 0


def test_long_curves_are_sampled_as_means(run, tmp_path):
    seen = []
    how = dataclasses.replace(HOW, steps=230, batch=1, context=2)
    result = run(tmp_path / "out", how=how, progress=seen.append)
    losses = [each.loss for each in seen]
    assert len(result.curve) == 200
    assert result.curve[-1][0] == 230
    start = 0
    for stop, mean in result.curve:
        assert mean == pytest.approx(np.mean(losses[start:stop]))
        start = stop
    assert result.final_loss == pytest.approx(np.mean(losses[-12:]))


def test_units_start_from_the_seed(run, tmp_path):
    run(tmp_path / "seed")
    still = dataclasses.replace(HOW, steps=1, lr=1e-30, weight_decay=0.0, warmup=0)
    run(tmp_path / "same", start=tmp_path / "seed", how=still)
    assert weights(tmp_path / "same") == weights(tmp_path / "seed")
    run(tmp_path / "unit", start=tmp_path / "seed")
    assert weights(tmp_path / "unit") != weights(tmp_path / "seed")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("seed", "unit")]
    assert configs[0] == configs[1]


def test_dropout_is_on_in_training(run, tmp_path):
    run(tmp_path / "on", start=GPT2)
    run(tmp_path / "off", start={**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    assert weights(tmp_path / "on") != weights(tmp_path / "off")
    run(tmp_path / "unit", start=tmp_path / "on")  # loading leaves a model in evaluation mode
    config = tmp_path / "on" / "config.json"
    config.write_text(config.read_text().replace('pdrop": 0.1', 'pdrop": 0.0'))
    run(tmp_path / "unit off", start=tmp_path / "on")
    assert weights(tmp_path / "unit") != weights(tmp_path / "unit off")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_saved_in_the_recipes_dtype(run, tmp_path, dtype):
    run(tmp_path / "full")
    run(tmp_path / "half", how=dataclasses.replace(HOW, dtype=dtype))
    full, half = (load_file(tmp_path / n / "model.safetensors") for n in ("full", "half"))
    kind = getattr(torch, dtype)
    assert all(torch.equal(full[name].to(kind), half[name]) for name in full)
    # A unit of a half-precision seed trains in float32 all the same.
    run(tmp_path / "unit", start=tmp_path / "half")
    unit = load_file(tmp_path / "unit" / "model.safetensors")
    assert {tensor.dtype for tensor in unit.values()} == {torch.float32}


def test_steps_are_adamw_on_the_mean_loss(run, sources, tmp_path):
    how = dataclasses.replace(HOW, steps=4, warmup=1, clip=1.3, weight_decay=0.2, betas=(0.8, 0.9))
    run(tmp_path / "start", data=sources[:1])
    run(tmp_path / "out", start=tmp_path / "start", how=how, data=sources[:1])

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start").double()
    parameters = dict(model.named_parameters())
    mean, square = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
    sure = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    norms = []
    for step, batch in enumerate(plan_batches(sources[:1], how).order.tolist()):
        blocks = [sources[0].tokens[b * 8 : b * 8 + 9].astype(np.int64) for _, b in batch]
        ids = torch.tensor(np.array(blocks))
        chances = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
        model.zero_grad()
        (-chances.mean()).backward()
        norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in parameters.values())))
        lr = learning_rate(how, step)
        for name, p in parameters.items():
            gradient = p.grad * min(1.0, how.clip / norms[-1])
            mean[name] = 0.8 * mean[name] + 0.2 * gradient
            square[name] = 0.9 * square[name] + 0.1 * gradient**2
            change = (mean[name] / (1 - 0.8 ** (step + 1))) / (
                (square[name] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8
            )
            with torch.no_grad():
                p.mul_(1 - lr * (0.2 if p.ndim > 1 else 0.0)).sub_(lr * change)
            sure[name] &= gradient.abs() > 1e-5  # below it float32 may choose another sign
    assert min(norms) < how.clip < max(norms)  # clipping took part, but not always
    trained = load_file(tmp_path / "out" / "model.safetensors")
    for name, p in parameters.items():
        assert sure[name].any()
        assert torch.allclose(p[sure[name]].float(), trained[name][sure[name]], atol=1e-4), name


# -------------------------------------------------------------------------------- bit for bit


def test_same_recipe_same_data_same_bits(run, sources, tmp_path):
    run(tmp_path / "one")
    torch.rand(3)  # the caller's randomness plays no part
    run(tmp_path / "two", data=sources[::-1])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    run(tmp_path / "other", how=dataclasses.replace(HOW, seed=1))
    assert weights(tmp_path / "other") != weights(tmp_path / "one")


def test_the_surroundings_stay_as_they_were(run, tmp_path):
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(tmp_path / "out", threads=threads + 1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_stopped_run_ends_with_the_same_bits(run, tmp_path, model, steps):
    whole = run(tmp_path / "whole", start=model)
    resume = Resume(tmp_path / "resume", "key")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", start=model, resume=resume, stop_requested=StopAfter(steps))
    assert not (tmp_path / "out").exists()
    assert [path.name for path in resume.folder.iterdir()] == [CHECKPOINT]
    seen = []
    result = run(tmp_path / "out", start=model, resume=resume, progress=seen.append)
    assert [each.step for each in seen] == list(range(steps + 1, 7))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert (result.curve, result.final_loss) == (whole.curve, whole.final_loss)
    again = []  # the checkpoint stays until the caller has the model in a safe place
    run(tmp_path / "again", start=model, resume=resume, progress=again.append)
    assert [each.step for each in again] == [each.step for each in seen]


def test_an_error_between_checkpoints_loses_only_what_came_after(run, tmp_path):
    run(tmp_path / "whole")
    resume = Resume(tmp_path / "resume", "key", every=0.0)

    def fail(progress):
        if progress.step == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", resume=resume, progress=fail)
    seen = []
    run(tmp_path / "out", resume=resume, progress=seen.append)
    assert seen[0].step == 4
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_checkpoints_come_when_they_are_due(run, tmp_path):
    late, soon = (Resume(tmp_path / str(every), "key", every=every) for every in (3600.0, 0.0))
    count = {late.folder: set(), soon.folder: set()}

    def look(resume):
        def note(_progress):
            path = resume.folder / CHECKPOINT
            if path.exists():
                count[resume.folder].add(path.stat().st_ino)

        return note

    run(tmp_path / "a", resume=late, progress=look(late))
    run(tmp_path / "b", resume=soon, progress=look(soon))
    assert not count[late.folder]
    assert len(count[soon.folder]) > 1  # replaced, not rewritten


@pytest.mark.parametrize("damage", ["key", "bytes", "none"])
def test_foreign_and_damaged_checkpoints_are_ignored(run, tmp_path, damage):
    run(tmp_path / "whole")
    resume = Resume(tmp_path / "resume", "key")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", resume=resume, stop_requested=StopAfter(2))
    path = resume.folder / CHECKPOINT
    if damage == "key":
        resume = dataclasses.replace(resume, key="of another recipe")
    elif damage == "bytes":
        path.write_bytes(path.read_bytes()[:-5])
    else:  # a file of someone else
        save_file({"x": torch.zeros(2)}, path)
    seen = []
    run(tmp_path / "out", resume=resume, progress=seen.append)
    assert seen[0].step == 1
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_checkpoints_hold_tensors_and_json_only(run, tmp_path):
    resume = Resume(tmp_path / "resume", "key")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", resume=resume, stop_requested=StopAfter(3))
    with safe_open(resume.folder / CHECKPOINT, "np") as file:
        assert '"key":"key"' in file.metadata()["poolreg"]
        assert file.get_tensor("losses").shape == (3,)
        names = set(file.keys())
    assert {"model.model.norm.weight", "optimizer.0.exp_avg", "optimizer.0.step"} <= names


def test_ctrl_c_waits_for_the_step_and_leaves_a_checkpoint(run, tmp_path):
    run(tmp_path / "whole")
    resume = Resume(tmp_path / "resume", "key")

    def press(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", resume=resume, progress=press)
    seen = []
    run(tmp_path / "out", resume=resume, progress=seen.append)
    assert seen[0].step == 4
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait(run, tmp_path):
    def press(progress):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    resume = Resume(tmp_path / "resume", "key")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", resume=resume, progress=press)
    assert not resume.folder.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


KILLED = """
    import json, sys
    from pathlib import Path
    import numpy as np
    from poolreg.training.recipe import Hyperparameters
    from poolreg.training.tokens import Source
    from poolreg.training.loop import Resume, train

    folder, tokenizer = map(Path, sys.argv[1:3])
    model, how, weights = json.loads(sys.argv[3])
    data = [Source(key, np.load(folder / f"{key}.npy"), weights[key]) for key in weights]
    resume = Resume(folder / "resume", "key", every=0.0)

    def tell(progress):
        print(progress.step, flush=True)
        sys.stdin.readline()

    train(model, data, Hyperparameters(**how), tokenizer=tokenizer, out=folder / "out",
          resume=resume, progress=tell, device="cpu")
"""


@pytest.mark.slow
def test_kill_9_and_resume_gives_the_same_bits(run, sources, tokenizer, tmp_path):
    run(tmp_path / "whole")
    for source in sources:
        np.save(tmp_path / f"{source.key}.npy", source.tokens)
    shares = {source.key: source.weight for source in sources}
    about = json.dumps([LLAMA, HOW.as_record(), shares])
    code = textwrap.dedent(KILLED)
    command = [sys.executable, "-c", code, str(tmp_path), str(tokenizer), about]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as child:
        for step in (1, 2, 3):
            child.stdin.write("\n" if step > 1 else "")
            child.stdin.flush()
            assert child.stdout.readline() == f"{step}\n"
        child.kill()  # after step 3, before its checkpoint
    assert not (tmp_path / "out").exists()
    seen = []
    run(tmp_path / "out", resume=Resume(tmp_path / "resume", "key"), progress=seen.append)
    assert seen[0].step == 3
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


# ------------------------------------------------------------------------------- learning rate


def test_schedules_against_their_definitions():
    how = Hyperparameters(steps=10, warmup=4, lr=1.0)
    rising = [0.2, 0.4, 0.6, 0.8]
    rates = {
        name: [learning_rate(dataclasses.replace(how, schedule=name), step) for step in range(10)]
        for name in ("constant", "linear", "cosine")
    }
    assert all(each[:4] == pytest.approx(rising) for each in rates.values())
    assert rates["constant"][4:] == [1.0] * 6
    assert rates["linear"][4:] == pytest.approx([1 - k / 6 for k in range(6)])
    assert rates["cosine"][4:] == pytest.approx(
        [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    )
    assert all(rate > 0 for each in rates.values() for rate in each)


# -------------------------------------------------------------------------------- refusals


def refused(run, tmp_path, kind, words, **options):
    with pytest.raises(kind, match=words) as caught:
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    return caught.value


def test_a_diverging_loss_ends_in_an_error_and_no_folder(run, tmp_path):
    how = dataclasses.replace(HOW, lr=1e25, clip=0.0, steps=50, warmup=0)
    error = refused(run, tmp_path, ConfigError, "training diverged at step", how=how)
    assert "lower lr" in error.hint


@pytest.mark.parametrize(
    ("change", "words", "hint"),
    [
        ({"hiden_size": 16}, "llama has no key hiden_size", "did you mean hidden_size"),
        ({"model_type": "lama"}, "model_type lama is no causal", "did you mean llama"),
        ({"model_type": "vit"}, "model_type vit is no causal", "valid here"),
        ({"model_type": "bert"}, "bert has no key", "valid here"),
        ({"hidden_size": 15}, "gives no llama model", "check the sizes"),
        ({"hidden_size": "16"}, "gives no llama model", "check the sizes"),
        ({"hidden_act": "nope"}, "gives no llama model", "check the sizes"),
        ({"vocab_size": 299}, "has 300 tokens, the model only 299", "vocab_size"),
        ({"max_position_embeddings": 4}, "context of 8 tokens is longer", "lower context"),
    ],
)
def test_models_that_cannot_be(run, tmp_path, change, words, hint):
    kind = (ConfigError, Incompatible)
    assert hint in refused(run, tmp_path, kind, words, start={**LLAMA, **change}).hint


def test_an_encoder_is_refused_because_it_sees_what_it_predicts(run, tmp_path):
    bert = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    error = refused(run, tmp_path, ConfigError, "sees the tokens", start=bert)
    assert "is_decoder" in error.hint
    run(tmp_path / "out", start={**bert, "is_decoder": True})


def test_a_model_type_that_would_read_the_tokenizer_differently(run, tmp_path):
    qwen = {**LLAMA, "model_type": "qwen2"}
    refused(run, tmp_path, ConfigError, "reads the tokenizer in .* differently", start=qwen)


def test_places_and_starts(run, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(Conflict, match="exists already"):
        run(tmp_path / "taken")
    refused(run, tmp_path, NotFound, "absent", start=tmp_path / "absent")
    run(tmp_path / "seed")
    path = tmp_path / "seed" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    refused(run, tmp_path, Refused, "model.norm.weight", start=tmp_path / "seed")


def test_a_seed_with_a_shorter_context_than_the_unit(run, tmp_path):
    run(tmp_path / "seed")
    longer = dataclasses.replace(HOW, context=9)
    error = refused(run, tmp_path, ConfigError, "longer", start=tmp_path / "seed", how=longer)
    assert error.data["key"] == "context"


def test_text_of_another_tokenizer(run, tmp_path):
    data = [Source("a", np.full(100, 300))]
    refused(run, tmp_path, Incompatible, "has token 300, but the model knows 300", data=data)


def test_too_little_text(run, tmp_path):
    refused(run, tmp_path, UsageError, "too few", data=[Source("a", np.zeros(8, np.uint16))])


def test_a_gradient_that_is_not_finite_is_not_applied(run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    refused(run, tmp_path, ConfigError, "diverged at step 1: .* gradient inf")


def test_a_full_disk_keeps_the_checkpoint(run, tmp_path, monkeypatch):
    resume = Resume(tmp_path / "resume", "key", every=0.0)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("poolreg.training.loop._copy_tokenizer", full_after_start(full))
    error = refused(run, tmp_path, StorageError, "No space left", resume=resume)
    assert "free some disk space" in error.hint
    monkeypatch.undo()
    seen = []
    run(tmp_path / "out", resume=resume, progress=seen.append)
    assert seen == []  # all steps were in the checkpoint


def full_after_start(fail):
    from poolreg.training.loop import _copy_tokenizer

    def copy(folder, to):
        return fail() if to.name.startswith(".out") else _copy_tokenizer(folder, to)

    return copy


def test_silence(run, tmp_path, capfd):
    run(tmp_path / "seed")
    run(tmp_path / "unit", start=tmp_path / "seed")
    assert capfd.readouterr() == ("", "")
