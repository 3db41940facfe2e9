"""`python -m bench.ceilings`: what the machine can do at best, and the machine's description; the last line is JSON.

Rates are measured in the same run as what is held against them. Within the GPU suite they are measured once, and the
file that the environment names in LIVERELAY_CEILINGS has them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.timing import measure, one_line

KEPT = "LIVERELAY_CEILINGS"
# m, k, n; the second is the model's largest linear layer.
GPU_SHAPES = ((8192, 8192, 8192), (3168, 5120, 13824), (4096, 4096, 4096), (16384, 8192, 8192))
CPU_SHAPES = ((1024, 1024, 1024),)
# Bytes that are copied. All are several times the L2 cache (50 MB on an H100, 60 on an H200), which holds nothing of
# the last copy when the next one begins: a quarter of a GiB is twice that, read and written.
GPU_SIZES = (1 << 28, 1 << 29, 1 << 30, 1 << 31)
CPU_SIZES = (1 << 26,)


@dataclass(frozen=True)
class Ceilings:
    """Rates measured here: copy in bytes/s, read and written; matmul and fp8 in FLOP/s (fp8 0 where there is none).

    copy_by: what copied fastest; copies: bytes/s of every way to copy; clocks: what the GPU did meanwhile.
    """

    copy: float
    matmul: float
    fp8: float
    matmul_dtype: str
    notes: tuple[str, ...] = ()
    copy_by: str = ""
    copies: dict[str, float] = field(default_factory=dict)
    clocks: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, kept: dict[str, Any]) -> Ceilings:
        """From a result's JSON."""
        return cls(**kept | {"notes": tuple(kept["notes"])})

    @property
    def text(self) -> str:
        by = f" ({self.copy_by})" if self.copy_by else ""
        fp8 = f", fp8 {self.fp8 / 1e12:.0f} TFLOP/s" if self.fp8 else ""
        matmul = f"{self.matmul / 1e12:.0f} TFLOP/s" if self.matmul > 1e13 else f"{self.matmul / 1e9:.0f} GFLOP/s"
        return f"copy {self.copy / 1e9:.0f} GB/s{by}, matmul {matmul} ({self.matmul_dtype}){fp8}"


def ceilings(device: torch.device, seconds: float = 0.2) -> Ceilings:
    """The best copy of several ways and sizes and the best matrix product of some shapes, of random numbers."""
    if (kept := os.environ.get(KEPT)) and Path(kept).is_file():
        return Ceilings.read(json.loads(Path(kept).read_text())["ceilings"])
    gpu = device.type == "cuda"
    with timing.watched(device) as clocks:
        copies, notes = copy_rates(device, seconds / 4)
        dtype = torch.bfloat16 if gpu else torch.float32
        best, fp8 = 0.0, 0.0
        for shape in GPU_SHAPES if gpu else CPU_SHAPES:
            m, k, n = shape
            a, b = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))
            out = torch.empty(m, n, device=device, dtype=dtype)
            took = measure(lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out), device=device, seconds=seconds)
            best = max(best, 2.0 * m * k * n / took.seconds)
            if gpu:
                try:
                    fp8 = max(fp8, 2.0 * m * k * n / _scaled_mm_seconds(a, b, device, seconds))
                except Exception as error:  # no FP8 on this GPU, or another signature
                    notes.append(f"fp8 {shape}: {one_line(error)}")
    by = max(copies, key=lambda name: copies[name])
    return Ceilings(
        copies[by], best, fp8, str(dtype).removeprefix("torch."), tuple(dict.fromkeys(notes)), by, copies, clocks
    )


def copy_rates(device: torch.device, seconds: float) -> tuple[dict[str, float], list[str]]:
    """Bytes/s, read and written, of each way, size and kind of timing; and why some could not be measured."""
    gpu = device.type == "cuda"
    sizes = GPU_SIZES if gpu else CPU_SIZES
    source = torch.empty(max(sizes) // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    rates, notes = dict[str, float](), list[str]()
    for name, copy in _ways(gpu, notes).items():
        for size in sizes:
            one, other = source[: size // 4], target[: size // 4]
            for graph in (True, False) if gpu else (False,):
                try:
                    took = measure(
                        lambda one=one, other=other, copy=copy: copy(one, other), device=device, seconds=seconds,
                        graph=graph, cold=False,
                    )  # fmt: skip
                except Exception as error:
                    notes.append(f"{name}: {one_line(error)}")
                    continue
                rates[f"{name}, {size / 2**30:.2g} GiB, {took.how}"] = 2 * size / took.seconds
    del source, target
    if gpu:
        torch.cuda.empty_cache()
    return rates, notes


def _ways(gpu: bool, notes: list[str]) -> dict[str, Callable[[Tensor, Tensor], object]]:
    if gpu:
        try:
            from bench import copies

            return copies.ways()
        except ImportError as error:
            notes.append(f"own kernel: {one_line(error)}")
    return {"copy_": lambda source, target: target.copy_(source)}


def _scaled_mm_seconds(a: Tensor, b: Tensor, device: torch.device, seconds: float) -> float:
    one = torch.ones((), device=device)
    a8, b8 = (part.to(torch.float8_e4m3fn) for part in (a, b))

    def product() -> Tensor:
        out: Tensor = torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out

    return measure(product, device=device, seconds=seconds).seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=0.2, help="of each matrix product; a copy takes a quarter")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(argv)
    device = timing.pick_device(options.device)
    found = ceilings(device, options.seconds)
    result = {"machine": timing.machine(device), "ceilings": asdict(found), "headline": found.text}
    timing.save(options.json, result)
    for name, rate in sorted(found.copies.items(), key=lambda pair: -pair[1]):
        print(f"{rate / 1e9:6.0f} GB/s  {name}")
    print(*found.notes, sep="\n", end="\n" if found.notes else "")
    print(found.text)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
