"""The half of a Pool that asks what its measurements come to: decisions, pages, SQL.

Nothing here changes a pool but measuring what an answer lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from poolreg.decisions.attribution import Attribution
    from poolreg.decisions.predict import NextReference
    from poolreg.decisions.trust import TrustReport
    from poolreg.evaluation.evaluate import Settings
    from poolreg.report.draw import Chart
    from poolreg.schema import Statement
    from poolreg.store.sandbox import Table
    from poolreg.suggest.answer import Suggestions
    from poolreg.suggest.request import SuggestPlan

PathLike = str | Path


def listed(texts: Sequence[str] | str) -> list[str]:
    """Return a list also for a single string, which is a sequence of letters otherwise."""
    return [texts] if isinstance(texts, str) else list(texts)


class Analysis:
    """What can be asked of the measurements in a registry; `Pool` is made of it."""

    registry: Registry

    # -- decisions ---------------------------------------------------------------------------

    def proxy_report(self, on: Sequence[str] = (), **options: Any) -> TrustReport:
        """Compare every kind of proxy with the references; see `poolreg.decisions.trust`.

        Options: `seed`, `settings`, `run_missing`, `progress`.
        """
        from poolreg.decisions.trust import proxy_report

        return proxy_report(self.registry, listed(on), **options)

    def next_references(self, on: Sequence[str] = (), **options: Any) -> list[NextReference]:
        """Rank measured mixtures without a reference by how much one would help, best first.

        Options: `seed`, `settings`, `budget` of `poolreg.decisions.predict.next_references`.
        """
        from poolreg.decisions.predict import next_references

        return next_references(self.registry, listed(on), **options)

    def attribution(self, on: Sequence[str] = (), **options: Any) -> Attribution:
        """Split what all partitions give among them; see `poolreg.decisions.attribution`.

        Options: `among`, `scheme`, `seed`, `settings`, `permutations`, `run_missing`, `progress`.
        """
        from poolreg.decisions.attribution import attribute

        return attribute(self.registry, listed(on), **options)

    def plan_suggest(
        self, target: Mapping[str, float] | None = None, *, worst_group: bool = False,
        on: Sequence[str] = (), among: str = "all", budget: int = 0, seed: str | None = None,
        settings: Settings | None = None, **limits: Any,
    ) -> SuggestPlan:  # fmt: skip
        """Plan the search for the best mixture for a target: {"wiki": 0.7, "code": 0.3}.

        `limits` are the fields of `poolreg.suggest.constraints.Limits`. Measures nothing.
        """
        from poolreg.suggest.constraints import Limits
        from poolreg.suggest.request import Request, plan_suggestions

        asked = Request(
            target or {}, worst_group, tuple(listed(on)), among, Limits(**limits), budget
        )  # fmt: skip
        return plan_suggestions(self.registry, asked, seed=seed, settings=settings)

    def suggest(
        self, planned: SuggestPlan, *, output: PathLike | None = None, force: bool = False,
        progress: Progress = SILENT,
    ) -> Suggestions:  # fmt: skip
        """Search as planned and return ranked mixtures with baselines; `output` is a weights file.

        See `poolreg.suggest.answer` and `poolreg.suggest.weight_files`.
        """
        from poolreg.suggest.answer import suggest
        from poolreg.suggest.weight_files import check_output, write_output

        if output is not None:
            check_output(Path(output), force=force)
        found = suggest(planned, progress=progress)
        if output is not None:
            write_output(Path(output), planned, found, force=force)
        return found

    # -- looking -----------------------------------------------------------------------------

    def report(
        self, out: PathLike, on: Sequence[str] = (), *, force: bool = False,
        progress: Progress = SILENT,
    ) -> Path:  # fmt: skip
        """Write the report, one self-contained HTML page, and return where; measures nothing."""
        from poolreg.report.page import write_report

        return write_report(
            self.registry, Path(out), listed(on), force=force, progress=progress
        )  # fmt: skip

    def report_page(self, on: Sequence[str] = (), *, progress: Progress = SILENT) -> str:
        """Return the report as HTML."""
        from poolreg.report.page import report

        return report(self.registry, listed(on), progress=progress)

    def plot(
        self, name: str, out: PathLike, on: Sequence[str] = (), *, dpi: int = 150,
        force: bool = False,
    ) -> Chart:  # fmt: skip
        """Write one figure of the report as an .svg or .png file and return what it shows."""
        from poolreg.report.draw import write_chart
        from poolreg.report.figures import chart

        made = chart(self.registry, name, listed(on))
        write_chart(made, Path(out), dpi=dpi, force=force)
        return made

    @staticmethod
    def figures() -> dict[str, str]:
        """Return the names of the figures of `plot` and what each shows."""
        from poolreg.report.figures import FIGURES

        return {name: shows for name, (shows, _) in FIGURES.items()}

    # -- SQL -------------------------------------------------------------------------------

    def sql(self, text: str, parameters: Sequence[Any] = (), *, seconds: float = 60.0) -> Table:
        """Run SQL over the catalog, read-only and sandboxed; raises `QueryError`."""
        self.registry.catalog.refresh()
        return self.registry.catalog.sandbox(text, parameters=parameters, seconds=seconds)

    @staticmethod
    def queries() -> list[Statement]:
        """Return the named queries with their descriptions."""
        from poolreg.schema import statements

        return list(statements("queries.sql").values())

    @staticmethod
    def named_query(name: str) -> str:
        """Return the SQL of a named query of `schema/queries.sql`; raises `NotFound`."""
        from poolreg.schema import statements
        from poolreg.store.registry import unknown_name

        known = statements("queries.sql")
        if name not in known:
            raise unknown_name("query", name, known)
        return known[name].sql

    def query(self, name: str) -> Table:
        """Run a named query of `schema/queries.sql`; raises `NotFound`."""
        return self.sql(self.named_query(name))
