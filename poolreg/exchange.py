"""The half of a Pool that travels: to and from the Hub, other storage, and single files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poolreg.analysis import PathLike, listed
from poolreg.errors import NotFound, UsageError
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from poolreg.sharing.places import Place
    from poolreg.sharing.pull import Pulled
    from poolreg.sharing.push import Pushed


def place_at(
    where: str, *, repo_type: str = "model", revision: str | None = None, private: bool = False
) -> Place:
    """Return the place that a repository name OWNER/NAME or a URL stands for."""
    if "://" in where:
        from poolreg.sharing.trees import TreePlace

        if revision or private or repo_type != "model":
            raise UsageError(
                f"{where} is no repository of the Hub",
                hint="revisions, tags, private and dataset repositories are the Hub's only",
            )
        return TreePlace(where)
    from poolreg.sharing.hub import HubPlace

    return HubPlace(where, repo_type=repo_type, revision=revision, private=private)


class Exchange:
    """What moves a pool's records and objects between machines; `Pool` is made of it."""

    registry: Registry

    def push(
        self, where: str | None = None, *, repo_type: str = "model", revision: str | None = None,
        tag: str | None = None, private: bool = False, only: Sequence[str] = (),
        results_only: bool = False, merges: bool = False, dry_run: bool = False,
        origin: str | None = None, progress: Progress = SILENT,
    ) -> Pushed:  # fmt: skip
        """Publish what a place lacks: a Hub repository OWNER/NAME, or a URL.

        Default: where the pool was last pushed to or pulled from. `only` limits the weights to
        those that expressions need, `results_only` sends none; a dataset repository takes none.
        """
        from poolreg.sharing.push import Sending, push

        where, repo_type, revision = self._where(where, repo_type, revision)
        place = place_at(where, repo_type=repo_type, revision=revision, private=private)
        if private and not dry_run:
            place.create()  # which refuses one that is public
        weights = not results_only and repo_type != "dataset"
        sending = Sending(tuple(listed(only)), weights, merges, dry_run)
        done = push(self.registry, place, sending, origin=origin, progress=progress)
        if tag and not dry_run:
            from poolreg.sharing.hub import HubPlace

            if not isinstance(place, HubPlace):
                raise UsageError("only the Hub has tags", hint="leave --tag out")
            place.tag(tag, done.version)
        return done

    def pull(
        self, where: str | None = None, *, repo_type: str = "model", revision: str | None = None,
        only: Sequence[str] = (), results_only: bool = False, trust_code: bool = False,
        origin: str | None = None, progress: Progress = SILENT,
    ) -> Pulled:  # fmt: skip
        """Bring what a place holds and the pool lacks; names that are taken get an origin.

        Default: where the pool was last pushed to or pulled from. `only` limits the weights to
        those that expressions need, `results_only` brings none; both can be brought later.
        """
        from poolreg.sharing.pull import Wish, pull

        where, repo_type, revision = self._where(where, repo_type, revision)
        place = place_at(where, repo_type=repo_type, revision=revision)
        wish = Wish(tuple(listed(only)), not results_only, trust_code)
        return pull(self.registry, place, wish, origin=origin, progress=progress)

    def _where(
        self, where: str | None, repo_type: str, revision: str | None
    ) -> tuple[str, str, str | None]:
        if where:
            return where, repo_type, revision
        for row in self.registry.select("last_transfer"):
            return row["place"], row["repo_type"] or "model", revision or row["revision"]
        raise NotFound(
            "this pool was not pushed or pulled yet", hint="name a repository OWNER/NAME or a URL"
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
        from poolreg.sharing.pull import Wish, pull

        wish = Wish(tuple(listed(only)), not results_only, trust_code)
        place = BundlePlace(Path(file))
        return pull(self.registry, place, wish, origin=origin, progress=progress)
