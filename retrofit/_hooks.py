"""Makes transformers know retrofit's folders without importing transformers.

    import retrofit                                     →  nothing is imported
    from transformers import AutoModelForCausalLM       →  retrofit.saving registers its loader

``AutoModelForCausalLM.from_pretrained`` of a converted folder needs retrofit's loader registered, while
``retrofit --help`` must not wait seconds for torch and transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

WATCHED = "transformers.modeling_utils"


class _Finder(MetaPathFinder):
    """Finds the watched module as everybody else does, and adds the registration to the end of its loading."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of the watched module, None for any other."""
        if fullname != WATCHED or self.searching:
            return None
        self.searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            vars(spec.loader)["exec_module"] = execute_and_register
        return spec


def install() -> None:
    """Registers retrofit with transformers, now or as soon as models are imported from it."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # Registers when it is imported; where its own import has led here, it does so when that ends.
    import_module("retrofit.saving")
