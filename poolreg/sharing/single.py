"""Single models on the Hub: a merge, a compressed variant or a stored model as a repository.

Such a repository is a model like any other there: weights, configuration, tokenizer, and a card
with lineage and scores. A push is one commit, which also deletes model files that an earlier push
left and the new model lacks, such as old shards; where nothing changed there is no commit.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from poolreg.errors import Conflict, UsageError
from poolreg.files import write_atomic
from poolreg.models.folders import Merged, merge_folders, merge_subject
from poolreg.models.resolve import Subject
from poolreg.models.stored import export_model
from poolreg.progress import SILENT, Progress
from poolreg.sharing.hub import HubPlace
from poolreg.sharing.markup import plain
from poolreg.sharing.places import Moved, Outgoing, Snapshot
from poolreg.sharing.single_card import ModelFacts, model_card
from poolreg.sharing.single_facts import folder_facts, merge_facts, stored_facts
from poolreg.store.registry import Registry
from poolreg.store.staging import working_folder

ATTEMPTS = 5  # when others commit in the meantime

# What an earlier push may have left at the top of the repository. Anything else there is not ours.
_LEFT = re.compile(
    r"[^/]+\.safetensors(\.index\.json)?|(generation_)?config\.json|modeling_poolreg\.py"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
    r"|vocab\.(json|txt)|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|tekken\.json"
    r"|[^/]+\.tiktoken|poolreg\.json"
)


def model_repository(repo: str, *, private: bool = False, revision: str | None = None) -> HubPlace:
    """Return a repository that a model can be pushed to, which is made if it is not there.

    Raises what pushing raises, before a model is made for it: `Conflict` for a repository that
    holds a pool, or that is public and should be private.
    """
    target = HubPlace(repo, revision=revision, private=private)
    target.create()
    _look(target)
    return target


def push_merge(
    registry: Registry, subject: Subject, repo: str, *, out: Path | None = None,
    dtype: str | None = None, private: bool = False, revision: str | None = None,
    progress: Progress = SILENT, **options: Any,
) -> tuple[Merged, str]:  # fmt: skip
    """Write the average that stands for a mixture to a model repository; returns it and the URL.

    The folder is `out`, or lies in the pool until it is published. Other options are those of
    `merge_subject`. Raises what `model_repository` raises; nothing is merged then.
    """
    target = model_repository(repo, private=private, revision=revision)
    with _place(out, registry.root / "tmp") as folder:
        merged = merge_subject(registry, subject, folder, dtype=dtype, progress=progress, **options)
        facts = merge_facts(registry, subject, merged, repo=target.url, dtype=dtype)
        url = _publish(target, folder, facts, progress=progress)
    return merged, url


def push_folders(
    folders: Sequence[str | Path], repo: str, *, out: Path | None = None,
    dtype: str | None = None, private: bool = False, revision: str | None = None,
    progress: Progress = SILENT, **options: Any,
) -> tuple[Merged, str]:  # fmt: skip
    """Write the average of model folders to a model repository; returns it and the URL.

    Where the folders lie is nobody's business: what is published names them by their last part.
    Other options are those of `merge_folders`.
    """
    target = model_repository(repo, private=private, revision=revision)
    with _place(out, None) as folder:
        merged = merge_folders(folders, folder, dtype=dtype, progress=progress, **options)
        recipe = json.loads((folder / "poolreg.json").read_text(encoding="utf-8"))
        labels = [Path(label).absolute().name for label in recipe["labels"]]
        text = json.dumps({**recipe, "labels": labels}, indent=2) + "\n"
        write_atomic(folder / "poolreg.json", text.encode())
        facts = folder_facts(folders, labels, merged, repo=target.url, dtype=dtype)
        url = _publish(target, folder, facts, progress=progress)
    return merged, url


def push_variant(
    registry: Registry, digest: str, repo: str, *, private: bool = False,
    revision: str | None = None, progress: Progress = SILENT,
) -> str:  # fmt: skip
    """Write a compressed variant, or any stored model, to a model repository; returns the URL."""
    target = model_repository(repo, private=private, revision=revision)
    known = {
        row["name"]: row["object"]
        for row in registry.select("model_files", model=digest)
        if row["role"] == "weights"
    }
    with _place(None, registry.root / "tmp") as folder:
        export_model(registry, digest, folder)
        facts = stored_facts(registry, digest, repo=target.url)
        return _publish(target, folder, facts, known=known, progress=progress)


def push_model(
    target: HubPlace, folder: Path, *, card: str, known: Mapping[str, str] | None = None,
    message: str, progress: Progress = SILENT,
) -> str:  # fmt: skip
    """Write a model's folder with `card` as its README.md to a repository; returns the URL.

    `known` gives the sha256 of files by name, as far as they need not be hashed. The URL is that
    of the commit, or of the present one where nothing changed. Raises `Conflict` when others
    commit all the time.
    """
    write_atomic(folder / "README.md", card.encode())
    files = _outgoing(folder, known or {}, progress)
    for _ in range(ATTEMPTS):
        snapshot = _look(target)
        new = [file for file in files if not file.is_at(snapshot.files.get(file.path))]
        names = {file.path for file in files}
        stale = [path for path in sorted(snapshot.files) if _LEFT.fullmatch(path)]
        stale = [path for path in stale if path not in names]
        if not new and not stale:
            return _commit_url(target, snapshot.version)
        progress.start("uploading", sum(file.size for file in new), "bytes")
        try:
            version = target.publish(
                snapshot, [], new, stale, message=message, progress=progress.advance
            )
        except Moved:
            continue
        return _commit_url(target, version)
    raise Conflict(
        f"{target.url} changed {ATTEMPTS} times while it was pushed to", hint="push again"
    )


def variant_repositories(repo: str, ratios: Sequence[float]) -> list[str]:
    """Return the repository of each ratio's variant: `repo`, or REPO-10, REPO-20, … of several.

    Raises `UsageError` for a ratio that stands there twice, and for one outside (0, 1).
    """
    from poolreg.compress.variants import check_ratios

    names = [str(name) for name in check_ratios(ratios, repo)]
    if len(set(ratios)) < len(ratios):
        raise UsageError(
            f"{repo} would get one variant twice", hint="give each ratio once with --push"
        )
    return names


# -- one folder, one commit -------------------------------------------------------------------


def _look(target: HubPlace) -> Snapshot:
    """Return what is there, unless it is a pool, whose poolreg.json a model's would replace."""
    snapshot = target.look()
    if snapshot.segments() or snapshot.objects():
        raise Conflict(
            f"{target.url} holds a published pool",
            hint="push the model to a repository of its own",
        )
    return snapshot


@contextlib.contextmanager
def _place(out: Path | None, temporary: Path | None) -> Iterator[Path]:
    """Give the folder to write to: the user's, or one that is gone after the block."""
    if out is not None:
        yield out
        return
    with working_folder(temporary or Path(tempfile.gettempdir()), prefix="push.") as folder:
        yield folder / "model"


def _publish(
    target: HubPlace, folder: Path, facts: ModelFacts, *,
    known: Mapping[str, str] | None = None, progress: Progress,
) -> str:  # fmt: skip
    _complete(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    card = model_card(replace(facts, custom_code="auto_map" in config))
    return push_model(
        target, folder, card=card, known=known, message=f"{plain(facts.title)}, with poolreg",
        progress=progress,
    )  # fmt: skip


def _complete(folder: Path) -> None:
    """Add the code to a compressed model that was merged, so that it loads without poolreg."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (
        config["model_type"].startswith("poolreg_")
        and not (folder / "modeling_poolreg.py").exists()
    ):
        from poolreg.models import modeling_poolreg

        config |= modeling_poolreg.config_entries(config["model_type"])
        write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        shutil.copy(modeling_poolreg.__file__, folder / "modeling_poolreg.py")


def _outgoing(folder: Path, known: Mapping[str, str], progress: Progress) -> list[Outgoing]:
    """Return the files of a folder with their digests; each is read once unless it is known."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    sizes = {path: path.stat().st_size for path in paths}
    progress.start("hashing", sum(s for p, s in sizes.items() if p.name not in known), "bytes")
    files = []
    for path, size in sizes.items():
        if path.name in known:
            files.append(Outgoing(path.name, path, known[path.name], size))
        else:
            files.append(Outgoing.of(path.name, path))
            progress.advance(size)
    return files


def _commit_url(target: HubPlace, version: str) -> str:
    return f"{target.api.endpoint}/{target.url}/commit/{version}"
