"""`liverelay golden COMPONENT DIR`: run one component of the engine on given tensors and write what it computes.

Reads only the given files of DIR and goes through the very code that `liverelay generate` uses, so that anybody can
compare the engine with tensors of the published model. Names of files and results: the docstring of each component.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from liverelay.engine.devices import check_device
from liverelay.engine.errors import InputError, LiveRelayError
from liverelay.engine.launch import LineOptions

COMPONENTS = ("dit", "tpp", "lora", "vae", "audio", "text", "image")
GIVEN = ("config.json", "meta.json", "cases.json", "inputs.safetensors", "weights.safetensors", "lora.safetensors")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GoldenOptions:
    """What the command line chose: working dtype, another weights file (or None), kernel backend (or None: default).

    line: of `tpp`, which may run on several devices or processes (None: on `device`).
    """

    dtype: torch.dtype = torch.float32
    weights: Path | None = None
    backend: str | None = None
    device: str = "cpu"
    line: LineOptions | None = None


def read_json(path: Path) -> Any:
    """The content of a json file of the given folder; InputError when it is missing or not json."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as json: {error}") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file of the given folder; InputError when it is missing or broken."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from None


def given(mapping: dict[str, Any], key: str, where: Path) -> Any:
    """mapping[key], with an InputError that names the file when it is absent."""
    if key not in mapping:
        raise InputError(f"{where} lacks '{key}'")
    return mapping[key]


def run(component: str, folder: Path, options: GoldenOptions) -> dict[str, torch.Tensor] | None:
    """Named results of one component on the given files of `folder`; None in a process that does not lead.

    Each component is `run(folder, options)` in the module of its name, imported only when asked for.
    """
    if component not in COMPONENTS:
        raise InputError(f"unknown component '{component}'; choose one of {', '.join(COMPONENTS)}")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    check_device(options.device)
    module = importlib.import_module(f"liverelay.engine.golden.{component}")
    try:
        results: dict[str, torch.Tensor] | None = module.run(folder, options)
    except (LiveRelayError, torch.OutOfMemoryError):
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        if "memory" in str(error):
            raise
        # Values and shapes of the given files have no schema: what does not fit shows where it is used.
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"{component} cannot be computed from the files of {folder}: {line}") from error
    if results is not None and not results:
        raise InputError(f"the files of {folder} ask for nothing")
    return results
