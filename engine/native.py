"""The compiled module `_C`, or its Python twin where it was not built."""

from __future__ import annotations

import importlib
import platform
from types import ModuleType

from liverelay.engine.errors import LiveRelayError
from liverelay.engine.version import __version__


def module() -> ModuleType | None:
    """`liverelay.engine._C`, or None where it was not built."""
    try:
        return importlib.import_module("liverelay.engine._C")
    except ImportError:
        return None


def check(feature: str, name: str) -> None:
    """LiveRelayError unless the module is there and holds `name`, which a module built earlier may lack."""
    if not hasattr(module(), name):
        why = "which was not built: that needs a C++ compiler and cmake"
        raise LiveRelayError(f"{feature} needs the compiled module, {why}")


def build_info() -> dict[str, str]:
    """Facts about how the engine was built: 'kind' is 'native' or 'python'."""
    native = module()
    if native is not None:
        return {"kind": "native", **native.build_info()}
    return {"kind": "python", "version": __version__, "compiler": "none", "python": platform.python_version()}
