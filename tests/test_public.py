"""What poolreg promises to the outside: names, exit codes, packages, light imports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import poolreg
from poolreg import errors

ROOT = Path(__file__).parents[1]


def test_the_public_surface_is_exact():
    assert poolreg.__all__ == sorted(poolreg.__all__)
    assert poolreg.__all__ == ["Pool", "PoolregError", "__version__", "merge_folders"]
    for name in poolreg.__all__:
        assert getattr(poolreg, name) is not None


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == poolreg.__version__


def test_the_drawn_error_tree_is_the_real_one():
    drawn = {
        name: (len(indent) // 4, int(code))
        for indent, name, code in re.findall(
            r"^    ([│├└─ ]*)(\w+) +(\d+)(?:  |$)", errors.__doc__ or "", re.MULTILINE
        )
    }
    real = {}
    todo = [(errors.PoolregError, 0)]
    while todo:
        kind, depth = todo.pop()
        real[kind.__name__] = (depth, kind.exit_code)
        todo += [(below, depth + 1) for below in kind.__subclasses__()]
    assert drawn == real


def test_every_error_of_the_tree_says_the_way_out():
    error = errors.Drift("it changed", hint="restore it", path="x")
    assert str(error) == "it changed\nrestore it"
    assert error.data == {"path": "x"}
    assert str(errors.Drift("it changed")) == "it changed"


def test_all_packages_are_listed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "poolreg").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setup["packages"]) == found | {"poolreg.cli", "poolreg.schema"}


def test_importing_poolreg_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'duckdb', 'numpy', 'pyarrow', 'tokenizers', 'rich'}"
    code = f"import sys, poolreg; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_floors_of_the_pool_import_no_torch():
    code = "import sys, poolreg.pool; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
