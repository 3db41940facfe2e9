"""`python -m bench.kernel_table [--write]`: docs/kernels.md, made from the registry and the ahead-of-time table.

Besides one row a kernel it counts what fusion is for: how often activations of the model's width are read and
written in one transformer layer, by the plain module version (counted while it runs) and by the fused kernels, and
the time that their bytes would take at an H100's usual rates. Predictions, not measurements.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.plain_dit import Layer
from liverelay.engine.config import DiTConfig
from liverelay.kernels.registry import KERNELS
from liverelay.kernels.spec import KernelSpec

BANDWIDTH, MATMUL = 3.0e12, 800e12  # bytes/s and bf16 FLOP/s of an H100, as commonly measured
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
PRODUCTS = ("mm", "addmm", "bmm", "linear", "attention", "convolution")
VIEWS = ("view", "expand", "transpose", "split", "slice", "select", "unsqueeze", "squeeze", "permute", "detach", "t.")
# Element-wise kernels of one layer without audio: (reads, writes) of [tokens, width].
FUSED = {
    "gate_norm_affine": (2, 1), "residual2_norm_modulate": (3, 1), "residual3_norm_modulate": (4, 2),
    "qk_norm_rope": (2, 2), "inverse_rms": (1, 0),
}  # fmt: skip


class Passes(TorchDispatchMode):
    """Counts reads and writes of tensors as large as the activations, matrix products and attention left out."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.reads, self.writes = elements, 0.0, 0.0

    def _width(self, value: Any) -> float:
        large = isinstance(value, Tensor) and value.numel() >= self.elements
        return value.numel() / self.elements if large else 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), str(func)
        if not any(part in name for part in (*PRODUCTS, *VIEWS)) and "alias" not in name:
            self.reads += sum(self._width(value) for value in tree_leaves((args, kwargs)))
            self.writes += sum(self._width(value) for value in tree_leaves(out))
        return out


@torch.inference_mode()
def plain_passes() -> tuple[float, float]:
    """Reads and writes of [tokens, width] in one plain layer, its own keys alone (no cached ones to concatenate)."""
    tokens = 64
    config = DiTConfig(dim=128, ffn_dim=128, num_heads=2, num_layers=1, audio_inject_layers=())
    layer = Layer(config).bfloat16()
    x, text = torch.randn(tokens, 128).bfloat16(), torch.randn(16, 128).bfloat16()
    table = torch.ones(tokens, 1, config.head_dim // 2, dtype=torch.complex128)
    with Passes(tokens * 128) as passes:
        layer(x, torch.randn(6, 128).bfloat16(), text, table, [])
    return passes.reads, passes.writes


def figures() -> dict[str, Any]:
    """The counts and the predicted times of one block-step, 14B, 704x384, 40 layers."""
    reads, writes = plain_passes()
    fused = tuple(sum(column) for column in zip(*FUSED.values(), strict=True))
    elements = 3168 * 5120
    by_name = {spec.name: spec for spec in KERNELS}
    names = [*FUSED, "gelu"]
    moved = 40 * sum(by_name[name].cost(next(iter(by_name[name].production.values())), torch.bfloat16).bytes
                     for name in names)  # fmt: skip
    return {
        "plain_reads": round(reads), "plain_writes": round(writes), "fused_reads": fused[0], "fused_writes": fused[1],
        "elements": elements, "fused_bytes": moved, "fused_ms": 1e3 * moved / BANDWIDTH,
    }  # fmt: skip


def row(spec: KernelSpec, compiled: dict[tuple[str, str], dict[str, Any]]) -> str:
    dims_name, dims = next(iter(spec.production.items()))
    cost = spec.cost(dims, torch.bfloat16)
    time_us = 1e6 * max(cost.bytes / BANDWIDTH, cost.flops / MATMUL if spec.dot else 0)
    built = compiled.get((spec.name, dims_name))
    registers = f"{built['registers']} / {built['shared'] // 1024} KiB" if built else "-"
    return (
        f"| `{spec.name}` | {spec.summary} | {dims_name} | {cost.bytes / 1e6:.0f} | {cost.flops / 1e9:.0f} "
        f"| {time_us:.0f} | {registers} |"
    )


def document() -> str:
    """The whole page."""
    table = json.loads(Path(__file__).with_name("aot_table.json").read_text())["rows"]
    compiled = {(r["kernel"], r["dims"]): r for r in table if r["arch"] == 90 and r["dtype"] == "bfloat16"}
    f = figures()
    lines = [
        "# Kernels", "",
        "Made by `python -m bench.kernel_table --write` from `kernels/registry.py`. Times are predictions at 3.0 TB/s",
        "and 800 TFLOP/s (an H100's usual rates), not measurements; registers and shared memory are those of the",
        "compiler for sm_90 (`python -m bench.aot`), with no spills anywhere. The same gate compiles them for sm_80,",
        "sm_89, sm_100 and, but for FP8, descriptors and Gluon, for AMD's gfx942, where none has run yet.", "",
        "| kernel | what | dims | MB | GFLOP | predicted us | registers / shared memory, sm_90 |",
        "| --- | --- | --- | --- | --- | --- | --- |", *(row(spec, compiled) for spec in KERNELS), "",
        "## What fusion saves", "",
        f"One transformer layer reads and writes activations of the model's width {f['plain_reads']} and "
        f"{f['plain_writes']} times in the plain module version", "(counted, without matrix products and attention, "
        f"RoPE in complex128 counted once), {f['fused_reads']} and {f['fused_writes']} times with the fused kernels.",
        f"Those are {len(FUSED)} sweeps, each of several tensors of that width: the residual, the products' outputs, q "
        "and k. Fewer reads", "would need epilogues in the matrix products, which are the library's.",
        f"All of a block-step's element-wise kernels together (14B, 704x384, 40 layers, without audio) move "
        f"{f['fused_bytes'] / 1e9:.1f} GB:", f"{f['fused_ms']:.1f} ms at 3.0 TB/s, against a budget of 10 ms.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_table", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    page = document()
    if parser.parse_args().write:
        DOCUMENT.write_text(page)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
