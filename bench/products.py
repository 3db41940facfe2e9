"""`python -m bench.products`: the transformer's matrix products by shape, in the working dtype and in FP8.

FP8 products have one scale for each row and each output channel, as the engine's, with the tensor cores' fast
accumulation and without. Rows: tokens of a block and of a sink. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.ceilings import Ceilings, ceilings
from bench.timing import one_line

# Rows: of a block and of a sink at 704x384. Columns and depth: query and key at once, one of width to width, the
# feed-forward's two.
PRESETS = {
    "14b": ((3168, 2640), ((10240, 5120), (5120, 5120), (13824, 5120), (5120, 13824))),
    "tiny": ((48, 40), ((256, 128), (128, 256))),
}
WAYS = {"working dtype": None, "fp8": False, "fp8 fast": True}  # and whether sums are the fast ones
HEAD = ("product, M x N x K", "way", "us", "TFLOP/s", "% of ceiling")


def make_product(way: str, shape: tuple[int, int, int], device: torch.device) -> Callable[[], Tensor]:
    """A product with random numbers: x [M, K] times weight [N, K] transposed, plus bias."""
    m, n, k = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight, bias = (torch.randn(*size, device=device, dtype=dtype) for size in ((m, k), (n, k), (n,)))
    if WAYS[way] is None:
        return lambda: torch.nn.functional.linear(x, weight, bias)
    codes, channels = (part.to(torch.float8_e4m3fn) for part in (x, weight))
    rows, columns = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)

    def product() -> Tensor:
        out: Tensor = torch._scaled_mm(
            codes, channels.t(), scale_a=rows, scale_b=columns, bias=bias.bfloat16(), out_dtype=torch.bfloat16,
            use_fast_accum=bool(WAYS[way]),
        )
        return out

    return product


def measure(preset: str, device: torch.device, limits: Ceilings, seconds: float) -> dict[str, Any]:
    """One row for each shape and way; a way that this device lacks has a note with the reason."""
    rows, notes = [], dict[str, str]()
    tokens, shapes = PRESETS[preset]
    for m in tokens:
        for n, k in shapes:
            for way, fast in WAYS.items():
                try:
                    took = timing.measure(make_product(way, (m, n, k), device), device=device, seconds=seconds)
                except Exception as error:
                    notes[way] = one_line(error)
                    continue
                rate = 2.0 * m * n * k / took.seconds
                limit = limits.matmul if fast is None else limits.fp8
                rows.append({
                    "m": m, "n": n, "k": k, "way": way, "s": took.seconds, "spread": took.spread, "flops": rate,
                    "of_ceiling": rate / limit if limit else 0.0, "clocks": took.clocks,
                })  # fmt: skip
    return {"rows": rows, "notes": notes}


def tera(rate: float) -> str:
    """A rate of operations a second in tera."""
    return f"{rate / 1e12:.0f}" if rate >= 1e14 else f"{rate / 1e12:.3g}"


def report(result: dict[str, Any]) -> str:
    rows = [
        (f"{r['m']} x {r['n']} x {r['k']}", r["way"], f"{1e6 * r['s']:.0f}", tera(r["flops"]),
         f"{100 * r['of_ceiling']:.0f}" if r["of_ceiling"] else "-")
        for r in result["rows"]
    ]  # fmt: skip
    return "\n".join([timing.table(HEAD, rows), *(f"{way}: {note}" for way, note in result["notes"].items())])


def headline(result: dict[str, Any]) -> str:
    """The run in one line."""
    texts = []
    for way in WAYS:
        rates = [row["flops"] for row in result["rows"] if row["way"] == way]
        texts += [f"{way} {tera(min(rates))} to {tera(max(rates))} TFLOP/s"] if rates else []
    return ", ".join(texts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.products", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: 14b on a GPU, else tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=0.15, help="of each measurement")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(argv)
    device = timing.pick_device(options.device)
    gpu = device.type == "cuda"
    limits = ceilings(device, min(0.2, options.seconds))
    result: dict[str, Any] = {"machine": timing.machine(device), "ceilings": asdict(limits)}
    with torch.inference_mode():
        preset = options.preset or ("14b" if gpu else "tiny")
        result["products"] = measure(preset, device, limits, options.seconds)
    result["headline"] = headline(result["products"])
    timing.save(options.json, result)
    print(report(result["products"]))
    print(result["headline"])
    print(json.dumps(result))
    missing = {"working dtype"} if not gpu else set(WAYS)
    return 1 if missing & set(result["products"]["notes"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
