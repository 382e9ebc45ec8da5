"""What a published pool shows to those without poolreg: tables, card, and models that load.

All of it is made anew from the pool as it will be there, and none of it is read back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of
from poolreg.files import write_atomic
from poolreg.models.stored import check_file_name
from poolreg.sharing.cards import pool_card
from poolreg.sharing.places import MARK, MARKER, Outgoing, Place
from poolreg.sharing.tables import export_tables
from poolreg.store.registry import Registry

FOLDERS = ("models/", "tables/")  # whatever else is in them, is left over and goes


def showcase(
    registry: Registry, folder: Path, place: Place, there: Set[str], segments: Iterable[str]
) -> list[Outgoing]:
    """Return all files of the showcase; those that are made are written into `folder`.

    `there` are the objects that the place will hold; only models that are complete are shown.
    `segments` are those of its journal, of which `stamp` makes a file name.
    """
    # Only the Hub keeps bytes that stand at two places once.
    shows = place.repo_type == "model"
    models = list(_models(registry, folder / "models", there)) if shows else []
    made = {f"tables/{file.name}": file for file in _tables(registry, folder)}
    made[stamp(segments)] = folder / "stamp"
    write_atomic(folder / "stamp", b"The name of this file says which journal these tables show.\n")
    card, pictures = pool_card(
        registry, url=place.url, repo_type=place.repo_type or "model",
        files=[*made, *(item.path for item in models)],
    )  # fmt: skip
    for name, data in {"README.md": card.encode(), MARKER: MARK, **pictures}.items():
        write_atomic(folder / name, data)
        made[name] = folder / name
    shown = [Outgoing.of(path, file) for path, file in sorted(made.items())]
    return [*models, *shown]


def stamp(segments: Iterable[str]) -> str:
    """Return the path that tells of which segments a showcase was made."""
    return f"tables/of-{digest_of(sorted(segments))[:16]}.txt"


def _tables(registry: Registry, folder: Path) -> list[Path]:
    (folder / "tables").mkdir()
    registry.catalog.refresh()
    return export_tables(registry.catalog, folder / "tables")


def model_folders(registry: Registry) -> dict[str, str]:
    """Return the folder below models/ of each model by digest: its name, or what it is called."""
    folders: dict[str, str] = {}
    for row in registry.select("model_list"):
        parts = [re.sub(r"[^\w.+-]+", "-", part).strip("-.") for part in row["name"].split("/")]
        name = "/".join(part or "model" for part in parts)
        folders[row["digest"]] = f"{name}-{row['digest'][:8]}" if name in folders.values() else name
    return folders


def _models(registry: Registry, folder: Path, there: Set[str]) -> Iterator[Outgoing]:
    for model, name in model_folders(registry).items():
        rows = registry.select("model_files", model=model)
        if {row["object"] for row in rows} <= there:
            files = {
                row["name"]: Outgoing(
                    f"models/{name}/{check_file_name(row['name'])}",
                    registry.objects.path(row["object"]), row["object"], row["bytes"],
                )
                for row in rows
            }  # fmt: skip
            yield from (files | _loading_code(registry, model, rows, folder, name)).values()


def _loading_code(
    registry: Registry, model: str, rows: list[dict[str, Any]], folder: Path, name: str
) -> dict[str, Outgoing]:
    """Return what loads a compressed variant where poolreg is not installed."""
    kind = registry.one("model", digest=model)["model_type"]
    config = next((row["object"] for row in rows if row["name"] == "config.json"), "")
    if not kind.startswith("poolreg_") or not registry.objects.has(config):
        return {}
    from poolreg.models import modeling_poolreg

    entries = json.loads(registry.objects.read(config)) | modeling_poolreg.config_entries(kind)
    folder.mkdir(exist_ok=True)
    written = folder / f"{model}.json"
    write_atomic(written, (json.dumps(entries, indent=2) + "\n").encode())
    code = Path(modeling_poolreg.__file__)
    return {
        "config.json": Outgoing.of(f"models/{name}/config.json", written),
        code.name: Outgoing.of(f"models/{name}/{code.name}", code),
    }
