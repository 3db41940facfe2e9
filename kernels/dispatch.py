"""The one seam between the engine and its operators: a backend is a module that holds every function of `Ops`.

The engine asks once, at start, for a backend by name and calls its functions on static buffers. `torch` (plain
PyTorch, any device) is always there.
"""

from __future__ import annotations

import importlib
from types import ModuleType

BACKENDS = {"torch": "liverelay.kernels.torch_ops"}
DEFAULT = "torch"


def get(name: str | None = None) -> ModuleType:
    """The backend called `name` (None: the default). ValueError names what there is."""
    module = BACKENDS.get(name or DEFAULT)
    if module is None:
        raise ValueError(f"unknown kernel backend '{name}'; there is: {', '.join(sorted(BACKENDS))}")
    return importlib.import_module(module)
