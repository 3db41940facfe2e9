"""Which attention a transformer takes: the fastest that is right here, found once and kept for later starts.

Candidates are tried in another process (`kernels/attention_trials.py`). What came of a trial is kept in the user's
cache folder under everything that it depends on: device, driver, libraries, our kernels, shape and dtype. From the
second start on the decision is therefore the same for every process of the machine, so that ranks agree, and it is
taken without a trial. Deleting the folder has everything tried again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from liverelay.engine.cache_folder import Cache
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.version import __version__
from liverelay.kernels import attention_backends, dispatch, torch_ops
from liverelay.kernels.attention_backends import Attention, Trial, candidates, fastest, fp8_candidates, named
from liverelay.kernels.attention_trials import Setting, try_apart

Say = Callable[[str], None]
DRIVER = Path("/proc/driver/nvidia/version")
LIBRARIES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")

_known: dict[str, Trial] = {}  # what this process found out, for a user without a cache folder
_lock = threading.Lock()  # one trial at a time: they would disturb each other's times


def choose_attention(dit: DiT, geometry: Geometry, say: Say) -> None:
    """Take the fastest attention that is right on this device and resolution (on a CPU there is one).

    Where every candidate has a lasting fault, plain PyTorch computes; where no trial was possible, the backend's own.
    """
    device, config = dit.device, dit.config
    works = dispatch.available("triton", device).works

    def fastest_of(
        factory: Callable[[torch.device, bool], dict[str, Attention]], rows: int, what: str, *, fp8: bool = False,
        q_factor: bool = False,
    ) -> Attention | None:
        found = factory(device, works)
        if len(found) < 2:
            return None
        shape = (geometry.block_tokens, rows, config.num_heads, config.head_dim)
        trials = []
        for trial, kept in tried(list(found), Setting(factory, works, shape, device, dit.dtype, fp8, q_factor)):
            say(f"{what} {trial.name}: {verdict(trial, kept)}")
            trials.append(trial)
        best = fastest(trials)
        if best is None and all(trial.lasting for trial in trials):
            say(f"{what}: none is right, plain PyTorch's is taken")
            return torch_ops.attention
        if best is None:
            return None
        say(f"{what}: {best.name} is taken")
        return found[best.name]

    if dit.fp8_attention:
        ours = fastest_of(fp8_candidates, geometry.arena_tokens, "attention in FP8", fp8=True)
        dit.attention_fp8 = ours or dit.attention_fp8
    else:
        dit.attention = fastest_of(candidates, geometry.arena_tokens, "attention") or dit.attention
    # The text's queries have a factor each, which our kernels apply on the way and a library in one more pass.
    of_text = fastest_of(candidates, config.text_len, "attention to the text", q_factor=True)
    dit.text_attention = of_text or dit.text_attention


def force_attention(dit: DiT, name: str | None) -> None:
    """Take the attention of this name; in FP8, too, where there is one of that name. ValueError as for `named`."""
    dit.attention = dit.text_attention = named(name, dit.device) or dit.attention
    ours = fp8_candidates(dit.device, dispatch.available("triton", dit.device).works)
    dit.attention_fp8 = ours.get(name or "", dit.attention_fp8)


def verdict(trial: Trial, kept: bool) -> str:
    """A trial in words."""
    told = trial.fault or f"{1e3 * trial.seconds:.2f} ms, error {trial.error:.1e}"
    return f"{told} (kept from an earlier trial)" if kept else told


def tried(names: list[str], setting: Setting) -> Iterator[tuple[Trial, bool]]:
    """The trial of every candidate, and whether it was kept from an earlier one: those first, the new as they end."""
    cache, keys = Cache("verdicts", entries=512, nbytes=1 << 20), {name: key_of(name, setting) for name in names}
    with _lock:
        left = []
        for name, key in keys.items():
            trial = _known.get(key) or parsed(name, cache.get(key))
            if trial is None:
                left.append(name)
            else:
                yield trial, True
        for trial in try_apart(left, setting):
            if trial.lasting:
                _known[keys[trial.name]] = trial
                cache.put(keys[trial.name], json.dumps(asdict(trial)).encode())
            yield trial, False


def parsed(name: str, kept: bytes | None) -> Trial | None:
    """A kept trial; None where there is none, or none that can be understood."""
    try:
        fields = json.loads(kept or b"")
        trial = Trial(name, float(fields["seconds"]), float(fields["error"]), fields["fault"])
    except (ValueError, TypeError, KeyError):
        return None
    usable = isinstance(trial.fault, str) and fields.get("name") == name and trial.seconds > 0
    return trial if usable else None


def key_of(name: str, setting: Setting) -> str:
    """Everything that a verdict depends on."""
    factory = f"{setting.factory.__module__}:{setting.factory.__qualname__}"
    return json.dumps(
        {"name": name, "factory": factory, "shape": setting.shape, "dtype": str(setting.dtype), "fp8": setting.fp8,
         "q_factor": setting.q_factor}
        | machine(setting.device) | {"kernels": kernels_version()}
    )  # fmt: skip


def machine(device: torch.device) -> dict[str, str]:
    """Device, driver and libraries."""
    found = {"device": "cpu", "torch": torch.__version__, "driver": ""}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        try:
            found["driver"] = DRIVER.read_text().splitlines()[0]
        except (OSError, IndexError):
            found["driver"] = str(getattr(torch._C, "_cuda_getDriverVersion", int)())
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def kernels_version() -> str:
    """Changes with any of the kernels' sources."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(Path(attention_backends.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
