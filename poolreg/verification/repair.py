"""Repair: put out of the way what verification found damaged, and bring it back where possible.

Nothing is deleted: whatever is replaced or taken out lies in quarantine/ afterwards. What holds
the pool together is mended first, then objects come back from text, recipes and known places, then
records from there. Killed anywhere, running it again finishes. The result is the verdict of a
second verification.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from poolreg.errors import PoolregError
from poolreg.progress import SILENT, Progress
from poolreg.sharing.goods import Wish
from poolreg.sharing.pull import pull
from poolreg.sharing.refetch import known_place
from poolreg.store.registry import Registry
from poolreg.upkeep.census import Census
from poolreg.verification import mend, quarantine
from poolreg.verification.findings import Finding, Mended, Verdict
from poolreg.verification.hashing import problems_of
from poolreg.verification.lines import read_journal
from poolreg.verification.remake import Made, remake
from poolreg.verification.verify import Depth, Suspects, verify


def repair(
    registry: Registry, depth: Depth | None = None, *, progress: Progress = SILENT
) -> Verdict:
    """Verify, mend what is found, and verify that again.

    Raises `Locked` while another process writes to the pool, `StorageError` where the pool cannot
    be written to.
    """
    depth = depth or Depth()
    with registry.alone():
        mended = [*mend.mend_folders(registry), *mend.mend_marker(registry)]
    before = verify(registry, depth, progress=progress)
    if before.findings:
        with registry.alone():
            mended += _mend(registry, before.findings)
    bad = frozenset(finding.key for finding in before.findings if finding.kind == "object")
    problems: list[str] = []
    if bad:
        made = _bring_back(registry, bad, progress)
        mended, problems = mended + made.mended, made.problems
    if mend.records_lost(registry):
        mended += _pull(registry, problems, progress)
    if not mended and not bad:
        return replace(before, remarks=(*before.remarks, *problems))
    shallow = replace(depth, full=False, headers=depth.headers or depth.full, resume=False)
    after = verify(registry, shallow, suspects=Suspects(bad, bad), progress=progress)
    return _joined(before, after, mended, problems)


def _joined(
    before: Verdict, after: Verdict, mended: Collection[Mended], problems: Collection[str]
) -> Verdict:
    # Merges were made again, and what was hashed was hashed, before the repair.
    merges = tuple(finding for finding in before.findings if finding.kind in ("merge", "record"))
    return replace(
        after, findings=(*after.findings, *merges), hashed=before.hashed,
        hashed_bytes=before.hashed_bytes, merges=before.merges, catalog=before.catalog,
        remarks=(*after.remarks, *problems), unchecked=before.unchecked, mended=tuple(mended),
    )  # fmt: skip


def _mend(registry: Registry, findings: Collection[Finding]) -> list[Mended]:
    """Change what is to be changed while nobody else writes."""
    kinds = {finding.kind for finding in findings}
    mended: list[Mended] = []
    for finding in findings:
        if finding.kind == "segment":
            mend.note_lost(registry)
            mended.append(Mended(finding.what, f"{finding.problem}: what it held is lost here"))
    if "line" in kinds:
        mended += mend.mend_segments(registry)
    if kinds & {"line", "segment", "catalog"}:
        mended += mend.mend_catalog(registry)
    for digest in [finding.key for finding in findings if finding.kind == "object"]:
        mended += _put_away(registry, digest)
    return mended


def _put_away(registry: Registry, digest: str) -> list[Mended]:
    """Move an object to quarantine if it is still not what its name says."""
    if not registry.objects.has(digest) or not problems_of(registry, [digest]):
        return []
    kept = quarantine.move(registry, registry.objects.path(digest), digest)
    return [Mended(f"object {digest}", "put away", kept)]


def _bring_back(registry: Registry, bad: frozenset[str], progress: Progress) -> Made:
    census = _census(registry, progress)
    missing = {
        digest: size
        for digest in sorted(bad)
        if (size := census.size(bytes.fromhex(digest))) is not None
        and not registry.objects.has(digest)
    }
    return remake(registry, census, missing, progress)


def _census(registry: Registry, progress: Progress) -> Census:
    """Take the census, with the places that only the old catalog knew."""
    found = read_journal(registry, {}, progress).census
    known = {place[1:] for place in found.places}
    more = [place for place in mend.noted_places(registry) if place[1:] not in known]
    return replace(found, places=(*found.places, *more))


def _pull(registry: Registry, problems: list[str], progress: Progress) -> list[Mended]:
    """Bring records back from known places."""
    census = _census(registry, progress)
    mended = []
    reached = not census.places
    for known in census.places:
        # What was left there on purpose is not wanted now, either.
        wish = Wish(weights=not census.left)
        try:
            place = known_place(known.place, known.repo_type, known.revision)
            done = pull(registry, place, wish, progress=progress)
        except PoolregError as error:
            problems.append(f"{known.place}: {error.message}")
            continue
        reached = True
        if done.records or done.objects:
            mended.append(Mended("journal/", f"{done.records:,} records and {done.objects:,} "
                                 f"objects came from {known.place}"))  # fmt: skip
    if reached:
        mend.forget_lost(registry)
    return mended
