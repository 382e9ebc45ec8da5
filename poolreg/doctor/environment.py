"""The environment that poolreg runs in: Python, packages, the GPU, the Hub.

Versions come from what is installed, not from importing it, and bounds from the metadata of
poolreg itself. Nothing here needs a pool.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import poolreg
from poolreg.doctor.checks import Check

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_DEVELOPMENT = "dev"  # an extra for work on poolreg itself


def environment(*, torch: bool = False) -> list[Check]:
    """Check versions and what the environment says of the Hub; `torch` also looks for a GPU."""
    checks = list(_versions())
    checks.append(_gpu() if torch else Check(
        "gpu", "unknown", "not looked", "poolreg doctor --torch (starts torch, which takes seconds)"
    ))  # fmt: skip
    return [*checks, *_hub()]


def _versions() -> Iterator[Check]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata.metadata("poolreg")
    except metadata.PackageNotFoundError:
        yield Check("poolreg", "unknown", f"{poolreg.__version__}, used without being installed",
                    "install it, so that versions of packages can be checked")  # fmt: skip
        return
    python, needs = platform.python_version(), about["Requires-Python"] or ""
    yield (
        Check("python", "ok", f"{python} (needs {needs})")
        if SpecifierSet(needs).contains(python, prereleases=True)
        else Check("python", "failed", f"{python} (needs {needs})", "use a newer Python")
    )
    yield _own_version(about["Version"])
    wanted = [Requirement(line) for line in metadata.requires("poolreg") or ()]
    for need in wanted:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield _package(need)
    for extra in about.get_all("Provides-Extra") or ():
        if extra != _DEVELOPMENT:
            yield _extra(extra, [n for n in wanted if n.marker and _only_with(n, extra)])


def _only_with(need: Requirement, extra: str) -> bool:
    marker = need.marker
    return bool(marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}))


def _own_version(installed: str) -> Check:
    if installed == poolreg.__version__:
        return Check("poolreg", "ok", installed)
    return Check("poolreg", "warning", f"{poolreg.__version__} runs, {installed} is installed",
                 "another copy comes first on the path: see PYTHONPATH")  # fmt: skip


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(need: Requirement) -> Check:
    found = _installed(need.name)
    way_out = f'pip install "{need.name}{need.specifier}"'
    if found is None:
        return Check(need.name, "failed", f"not installed (needs {need.specifier})", way_out)
    text = f"{found} (needs {need.specifier})"
    if need.specifier.contains(found, prereleases=True):
        return Check(need.name, "ok", text)
    return Check(need.name, "failed", text, way_out)


def _extra(extra: str, needs: list[Requirement]) -> Check:
    checks = [_package(need) for need in needs]
    name, way_out = f"extra {extra}", f'pip install "poolreg[{extra}]"'
    installed = [check for check in checks if "not installed" not in check.found]
    if not installed:
        return Check(name, "ok", "not installed", way_out)
    found = ", ".join(f"{check.check} {check.found}" for check in checks)
    bad = any(check.status != "ok" for check in checks)
    return Check(name, "warning", found, way_out) if bad else Check(name, "ok", found)


def _gpu() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("gpu", "failed", f"torch cannot be imported: {error}", "install torch again")
    if not torch.cuda.is_available():
        return Check("gpu", "ok", "none that torch can use: all work runs on the CPU")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Check("gpu", "ok", f"CUDA {torch.version.cuda}: {', '.join(names)}")


def _hub() -> Iterator[Check]:
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        yield Check("hub token", "unknown", f"huggingface_hub cannot be imported: {error}")
    else:
        yield (
            Check("hub token", "ok", "there is one")
            if get_token()
            else Check("hub token", "ok", "none: public repositories only, and no push",
                       "hf auth login, or HF_TOKEN")
        )  # fmt: skip
    endpoint = os.environ.get("HF_ENDPOINT")
    place = urlsplit(endpoint or "https://huggingface.co")
    where = f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}"  # no password
    yield Check("hub endpoint", "ok", f"{where} (HF_ENDPOINT)" if endpoint else where)
