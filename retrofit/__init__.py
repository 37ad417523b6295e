"""retrofit: rewrites a trained model's attention into hierarchical attention.

    import retrofit
    report = retrofit.convert(model, retrofit.HSAConfig())

Public names are imported on first use, so that ``import retrofit`` and ``retrofit --help`` stay light.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from retrofit import _hooks

if TYPE_CHECKING:
    from retrofit.api import convert as convert
    from retrofit.api import dense as dense
    from retrofit.api import inspect as inspect
    from retrofit.api import revert as revert
    from retrofit.api import sites as sites
    from retrofit.bench import benchmark as benchmark
    from retrofit.bench import tune as tune
    from retrofit.cache import RetrofitCache as RetrofitCache
    from retrofit.configs import DenseConfig as DenseConfig
    from retrofit.configs import HSAConfig as HSAConfig
    from retrofit.configs import MAHAConfig as MAHAConfig
    from retrofit.distill import DistillConfig as DistillConfig
    from retrofit.distill import distill as distill
    from retrofit.errors import RetrofitError as RetrofitError
    from retrofit.evaluate import evaluate as evaluate
    from retrofit.evaluate.passkey import passkey as passkey
    from retrofit.loading import load_model as load_model
    from retrofit.onnx import export_onnx as export_onnx
    from retrofit.report import report as report
    from retrofit.saving import from_pretrained as from_pretrained
    from retrofit.saving import save_pretrained as save_pretrained

_HOME = {
    "convert": "api",
    "dense": "api",
    "inspect": "api",
    "revert": "api",
    "sites": "api",
    "benchmark": "bench",
    "tune": "bench",
    "RetrofitCache": "cache",
    "DenseConfig": "configs",
    "HSAConfig": "configs",
    "MAHAConfig": "configs",
    "DistillConfig": "distill",
    "distill": "distill",
    "RetrofitError": "errors",
    "evaluate": "evaluate",
    "passkey": "evaluate",
    "load_model": "loading",
    "export_onnx": "onnx",
    "report": "report",
    "from_pretrained": "saving",
    "save_pretrained": "saving",
}

__all__ = sorted(_HOME)


class _Package(ModuleType):
    """Keeps ``retrofit.distill`` the function after something has imported the module of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'retrofit' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"retrofit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


sys.modules[__name__].__class__ = _Package
_hooks.install()
