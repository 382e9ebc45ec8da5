"""What a user says of where a pool lies."""

from __future__ import annotations

import pytest

from poolreg.errors import UsageError
from poolreg.sharing.hub import HubPlace
from poolreg.sharing.trees import TreePlace
from poolreg.sharing.where import place_at


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of the user, with folders and files that may be meant."""
    monkeypatch.chdir(tmp_path)
    for folder in ("share", "you/pool", "you/published", "a b"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("you/published/poolreg.json", "notes", "bundle.tar"):
        (tmp_path / file).write_text("{}")
    return tmp_path


@pytest.mark.parametrize("where", ["you/pool", "pool", "you/my.pool-2", "me/share"])
def test_repositories(where):
    """Whatever is called like one, also where a folder happens to have the same name."""
    place = place_at(where, repo_type="dataset", revision="v1", private=True)
    assert isinstance(place, HubPlace)
    assert (place.url, place.repo_type, place.revision, place.private) == (
        where, "dataset", "v1", True,
    )  # fmt: skip


def test_addresses(here):
    place = place_at(f"file://{here}/share")
    assert isinstance(place, TreePlace)
    assert place.url == f"file://{here}/share"


@pytest.mark.parametrize(
    "options", [{"repo_type": "dataset"}, {"revision": "main"}, {"private": True}]
)
def test_what_only_the_hub_has(options):
    with pytest.raises(UsageError, match="memory://b/pool is no repository") as caught:
        place_at("memory://me:secret@b/pool", **options)
    assert "Hub" in caught.value.hint


@pytest.mark.parametrize("where", ["bundle.tar", "./bundle.tar", "notes", "no/such.tar"])
def test_files(where):
    with pytest.raises(UsageError, match="is a file") as caught:
        place_at(where)
    assert f"poolreg bundle apply {where}" in caught.value.hint


@pytest.mark.parametrize(
    ("where", "folder"),
    [
        ("share", "share"), ("./share", "share"), ("share/", "share"), ("you/../share", "share"),
        ("./you/pool", "you/pool"), ("you/published", "you/published"), ("a b", "a b"), (".", "."),
    ],
)  # fmt: skip
def test_folders(here, where, folder):
    with pytest.raises(UsageError, match="is a folder") as caught:
        place_at(where)
    address = f"file://{(here / folder).resolve()}"
    assert f"write {address}, or" in caught.value.hint
    assert place_at(address).url == address
    with pytest.raises(UsageError, match="is a folder"):
        place_at(str(here / folder))


@pytest.mark.parametrize("where", ["", "a/b/c", "/data/pool", "ü/pool", "x" * 5000, "a\0b", "~"])
def test_what_is_neither(where):
    with pytest.raises(UsageError, match="not the name of a repository") as caught:
        place_at(where)
    assert "OWNER/NAME" in caught.value.hint
