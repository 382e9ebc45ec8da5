"""Makes transformers know poolreg's compressed models, without importing it for that.

After `import poolreg`, AutoConfig, AutoModelForCausalLM and AutoTokenizer load a folder with a
`model_type` of ours ("poolreg_llama") like any other. To register the models at once would import
torch and transformers, which takes seconds and is not needed by most commands. So a finder on
`sys.meta_path` waits for the modules of transformers that no model can be loaded without: when
somebody imports one, it lets the usual machinery load it and registers our models right after. Any
other import it leaves alone, and once the models are registered it is gone.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

CONFIGURATION = "transformers.models.auto.configuration_auto"
MODELING = "transformers.models.auto.modeling_auto"
OURS = "poolreg.models.modeling_poolreg"


class _Waiting:
    """Finds modules as usual, and registers our models when one it waits for has been executed."""

    def __init__(self) -> None:
        self.under_way = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _waited_for(name):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                # These modules import each other, and ours needs them whole: only the one that
                # was asked for first is followed by ours.
                depth = getattr(self.under_way, "depth", 0)
                self.under_way.depth = depth + 1
                try:
                    execute(module)
                finally:
                    self.under_way.depth = depth
                if depth == 0:
                    _register()

            # On this one loader: it stays of its own class, which inspect and others ask for.
            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _waited_for(name: str) -> bool:
    """Say whether this is modeling_auto or any configuration: those import modeling_auto."""
    return name.startswith("transformers.models.") and (
        name == MODELING or ".configuration_" in name
    )


_waiting = _Waiting()


def install() -> None:
    """Register the models when transformers can load models, which may be now."""
    if CONFIGURATION in sys.modules:
        _register()
    elif _waiting not in sys.meta_path:
        sys.meta_path.insert(0, _waiting)


def _register() -> None:
    if _waiting in sys.meta_path:
        sys.meta_path.remove(_waiting)
    try:
        importlib.import_module(OURS)
    except (ImportError, AttributeError, ValueError) as error:
        # Whoever imports transformers, perhaps for another purpose, must not fail because of us.
        warnings.warn(f"poolreg's compressed models are not available: {error}", stacklevel=2)
