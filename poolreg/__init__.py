"""poolreg: a model-pool registry that answers what training on a data mixture would give.

    from poolreg import Pool
    pool = Pool.open("pool")
    for row in pool.ask("python+cpp", on=["wiki"]):
        print(row.evalset, row.bits_per_byte)

Importing poolreg, and every call that needs no tensors, imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from poolreg import autoload
from poolreg.errors import PoolregError

if TYPE_CHECKING:
    from poolreg.models.folders import merge_folders
    from poolreg.pool import Pool

__all__ = ["Pool", "PoolregError", "__version__", "merge_folders"]
__version__ = "0.1.0"

autoload.install()  # transformers will know our compressed models, once it is imported

_LAZY = {"Pool": "poolreg.pool", "merge_folders": "poolreg.models.folders"}


def __getattr__(name: str) -> Any:
    # The names stand in modules that import numpy or DuckDB; a bare `import poolreg` does not.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'poolreg' has no attribute {name!r}")
