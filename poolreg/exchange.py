"""The half of a Pool that travels: to and from the Hub, other storage, and single files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poolreg.analysis import PathLike, listed
from poolreg.errors import NotFound, UsageError
from poolreg.progress import SILENT, Progress
from poolreg.sharing.where import place_at
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from poolreg.sharing.hub import HubPlace
    from poolreg.sharing.places import Place
    from poolreg.sharing.pull import Pulled
    from poolreg.sharing.push import Pushed


class Exchange:
    """What moves a pool's records and objects between machines; `Pool` is made of it."""

    registry: Registry

    def push(
        self, where: str | None = None, *, repo_type: str | None = None,
        revision: str | None = None, tag: str | None = None, private: bool = False,
        only: Sequence[str] = (), results_only: bool = False, merges: bool = False,
        dry_run: bool = False, origin: str | None = None, progress: Progress = SILENT,
    ) -> Pushed:  # fmt: skip
        """Publish what a place lacks: a Hub repository OWNER/NAME, or a URL.

        Default: where the pool was last pushed to. `only` limits the weights to those that
        expressions need, `results_only` sends none; a dataset repository takes none.
        """
        from poolreg.sharing.push import Sending, push

        where, repo_type, revision = self._where(["push"], where, repo_type, revision)
        place = place_at(where, repo_type=repo_type, revision=revision, private=private)
        if tag:
            _on_hub(place).check_tag(tag)
        if private and not dry_run:
            place.create()  # which refuses one that is public
        weights = not results_only and repo_type != "dataset"
        sending = Sending(tuple(listed(only)), weights, merges, dry_run)
        done = push(self.registry, place, sending, origin=origin, progress=progress)
        if tag and not dry_run:
            _on_hub(place).tag(tag, done.version)
        return done

    def pull(
        self, where: str | None = None, *, repo_type: str | None = None,
        revision: str | None = None, only: Sequence[str] = (), results_only: bool = False,
        trust_code: bool = False, origin: str | None = None, progress: Progress = SILENT,
    ) -> Pulled:  # fmt: skip
        """Bring what a place holds and the pool lacks; names that are taken get an origin.

        Default: where the pool was last pushed to or pulled from. `only` limits the weights to
        those that expressions need, `results_only` brings none; both can be brought later.
        """
        from poolreg.sharing.goods import Wish
        from poolreg.sharing.pull import pull

        where, repo_type, revision = self._where(["push", "pull"], where, repo_type, revision)
        place = place_at(where, repo_type=repo_type, revision=revision)
        wish = Wish(tuple(listed(only)), not results_only, trust_code)
        return pull(self.registry, place, wish, origin=origin, progress=progress)

    def _where(
        self, directions: list[str], where: str | None, repo_type: str | None, revision: str | None
    ) -> tuple[str, str, str | None]:
        if where:
            return where, repo_type or "model", revision
        for row in self.registry.select("last_transfer", directions=directions):
            return (
                row["place"],
                repo_type or row["repo_type"] or "model",
                revision or row["revision"],
            )
        raise NotFound(
            f"this pool was not {' or '.join(f'{word}ed' for word in directions)} yet",
            hint="name a repository OWNER/NAME or a URL",
        )

    def create_bundle(
        self, file: PathLike, *, only: Sequence[str] = (), results_only: bool = False,
        merges: bool = False, force: bool = False, progress: Progress = SILENT,
    ) -> Pushed:  # fmt: skip
        """Write the pool, or the part that a push would send, to one tar file."""
        from poolreg.sharing.push import Sending, bundle

        sending = Sending(tuple(listed(only)), not results_only, merges)
        return bundle(self.registry, Path(file), sending, force=force, progress=progress)

    def apply_bundle(
        self, file: PathLike, *, only: Sequence[str] = (), results_only: bool = False,
        trust_code: bool = False, origin: str | None = None, progress: Progress = SILENT,
    ) -> Pulled:  # fmt: skip
        """Bring what a bundle holds and the pool lacks, as `pull` does."""
        from poolreg.sharing.bundles import BundlePlace
        from poolreg.sharing.goods import Wish
        from poolreg.sharing.pull import pull

        wish = Wish(tuple(listed(only)), not results_only, trust_code)
        place = BundlePlace(Path(file))
        return pull(self.registry, place, wish, origin=origin, progress=progress)


def _on_hub(place: Place) -> HubPlace:
    from poolreg.sharing.hub import HubPlace

    if not isinstance(place, HubPlace):
        raise UsageError("only the Hub has tags", hint="leave --tag out")
    return place
