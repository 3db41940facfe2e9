"""Figures of a suite's results by name, what they could be at best, and what they were before on the same card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.timing import table

RESULTS = Path(__file__).resolve().parent / "results"
WORSE = 0.03  # than the last time by more than this share is red
HEAD = ("value", "now", "unit", "ceiling", "% of it", "before", "change %", "")


@dataclass(frozen=True)
class Value:
    """A figure. higher: is better; ceiling: what the machine would allow, None where nobody knows."""

    name: str
    value: float
    unit: str
    higher: bool = False
    ceiling: float | None = None


def card(machine: Mapping[str, Any]) -> str:
    """`h100` for "NVIDIA H100 80GB HBM3": what its results are called; empty on a CPU."""
    found = re.search(r"\b([A-Z]+\d+\w*)\b", str(machine.get("gpu", "")).removeprefix("NVIDIA"))
    return found[1].lower() if found else ""


def newest(name: str, folder: Path = RESULTS) -> Path | None:
    """The last results of a card: files are called CARD-YYYY-MM-DD.json."""
    return max(folder.glob(f"{name}-*.json"), default=None) if name else None


def precision(result: Mapping[str, Any]) -> str:
    return f"FP8 {result['fp8']}" if result.get("fp8") else "bf16"


# -- of each kind of result --------------------------------------------------------------------------------------------


def _of_ceilings(result: Mapping[str, Any]) -> Iterator[Value]:
    limits = result["ceilings"]
    yield Value("copy", limits["copy"] / 1e9, "GB/s", True)
    yield Value("matrix products", limits["matmul"] / 1e12, "TFLOP/s", True)
    if limits["fp8"]:
        yield Value("matrix products, FP8", limits["fp8"] / 1e12, "TFLOP/s", True)


def _of_rows(result: Mapping[str, Any]) -> Iterator[Value]:
    """bench.micro: our kernels."""
    limits = result["ceilings"]
    for row in result["rows"]:
        if (took := row["seconds"].get("kernel")) is None:
            continue
        rate = limits["fp8"] if "attention_fp8" in row["kernel"] and limits["fp8"] else limits["matmul"]
        least = max(row["bytes"] / limits["copy"], row["flops"] / rate)
        yield Value(f"{row['kernel']} [{row['dims']}]", 1e6 * took, "us", ceiling=1e6 * least)


def _of_backends(result: Mapping[str, Any]) -> Iterator[Value]:
    """bench.stage_14b: the fastest backend and its parts."""
    found, what, floors = result["backends"].get("fastest", {}), precision(result), result["floor_s"]
    if took := found.get("graph_s") or found.get("eager_s"):
        yield Value(f"block-step, {what}", 1e3 * took, "ms", ceiling=1e3 * sum(floors))
    for (part, seconds), floor in zip(list(found.get("parts_s", {}).items())[:3], floors, strict=False):
        yield Value(f"block-step, {what}: {part}", 1e3 * seconds, "ms", ceiling=1e3 * floor)


def _of_line(result: Mapping[str, Any]) -> Iterator[Value]:
    """bench.line_14b."""
    parts, what = result["parts"], precision(result)
    if one := parts.get("stage", {}).get("captured"):
        yield Value(f"stage captured, {what}", 1e3 * one["s"], "ms")
    for name in ("line", "apart"):
        if "steady_fps" not in (line := parts.get(name, {})):
            continue
        plan = f"line {line.get('plan', '0+1+2+3+vae')}, {what}"
        yield Value(plan, line["steady_fps"], "FPS", True)
        yield Value(f"{plan}: first frame, encoded", 1e3 * line["first_frame_s"], "ms")
        if "memory_bytes" in line:
            yield Value(f"{plan}: memory", line["memory_bytes"] / 2**30, "GiB")
        if name == "line":
            yield Value(f"VAE, captured, beside {what}", 1e3 * line["vae"]["captured_s"], "ms")
    if fps := parts.get("loop", {}).get("NCCL to itself", {}).get("steady_fps"):
        yield Value(f"line 0+1,2+3,vae over NCCL to itself, {what}", fps, "FPS", True)


def _of_vae(result: Mapping[str, Any]) -> Iterator[Value]:
    found = result["vae"]
    least = 1e3 * found["flops"] / result["ceilings"]["matmul"]
    yield Value("VAE, 12 frames", 1e3 * found["captured_s"], "ms", ceiling=least)


def _of_products(result: Mapping[str, Any]) -> Iterator[Value]:
    limits = result["ceilings"]
    for row in result["products"]["rows"]:
        limit = limits["matmul"] if row["way"] == "working dtype" else limits["fp8"]
        name = f"product {row['m']} x {row['n']} x {row['k']}, {row['way']}"
        yield Value(name, row["flops"] / 1e12, "TFLOP/s", True, limit / 1e12 if limit else None)


def _of_opening(result: Mapping[str, Any]) -> Iterator[Value]:
    found = result["opening"]
    for name, seconds in found.get("parts_s", {}).items():
        yield Value(f"opening: {name.removesuffix('_s').replace('_', ' ')}", 1e3 * seconds, "ms")
    for state in ("warm", "cold"):
        if first := found.get(state, {}).get("first_frames_s"):
            yield Value(f"opening: first frames, {state} line", 1e3 * first, "ms")
        if first := found.get(state, {}).get("after_encoding_s"):
            yield Value(f"opening: first frames once encoded, {state} line", 1e3 * first, "ms")
    for name, what in (("beside_median_s", "median"), ("beside_max_s", "longest")):
        if gap := found.get("gaps", {}).get(name):
            yield Value(f"gap between blocks while another opens, {what}", 1e3 * gap, "ms")


KINDS = {
    "rows": _of_rows, "backends": _of_backends, "parts": _of_line, "vae": _of_vae, "products": _of_products,
    "opening": _of_opening,
}  # fmt: skip


def values(suite: Mapping[str, Any]) -> dict[str, Value]:
    """Of a suite's JSON; a part's kind is seen from what its result holds. The first of two with the same name counts:
    parts that come later measure it by the way."""
    found: dict[str, Value] = {}
    for part in suite["parts"]:
        if not isinstance(result := part.get("result"), dict):
            continue
        kind = next((name for name in KINDS if name in result), None)
        made = KINDS[kind](result) if kind else _of_ceilings(result) if "ceilings" in result else ()
        for value in made:
            found.setdefault(value.name, value)
    return found


# -- the table ---------------------------------------------------------------------------------------------------------


def is_worse(now: Value, before: Value) -> bool:
    """By more than WORSE."""
    return now.value < before.value * (1 - WORSE) if now.higher else now.value > before.value * (1 + WORSE)


def worse(now: Mapping[str, Value], before: Mapping[str, Value]) -> list[str]:
    """Names of the values that have become worse."""
    return [name for name, value in now.items() if name in before and is_worse(value, before[name])]


def _rows(now: Iterable[Value], before: Mapping[str, Value]) -> Iterator[Sequence[str]]:
    for value in now:
        limit, old = value.ceiling, before.get(value.name)
        share = (value.value / limit if value.higher else limit / value.value) if limit and value.value else None
        yield (
            value.name, f"{value.value:.4g}", value.unit, f"{limit:.4g}" if limit else "-",
            "-" if share is None else f"{100 * share:.0f}", f"{old.value:.4g}" if old else "-",
            f"{100 * (value.value / old.value - 1):+.1f}" if old and old.value else "-",
            "RED" if old and is_worse(value, old) else "",
        )  # fmt: skip


def compared(suite: Mapping[str, Any], folder: Path = RESULTS) -> tuple[str, list[str]]:
    """All values of a suite as a table, beside those of the newest results of the same card in the folder; and the
    names of those that are worse."""
    now, path = values(suite), newest(card(suite["machine"]), folder)
    kept = json.loads(path.read_text()) if path else {}
    same = path is not None and kept["preset"] == suite["preset"]
    before = values(kept) if same else {}
    since = f"before: {path.name}" if path and same else "no results of this card and preset are kept"
    if not now:
        return f"no values; {since}", []
    return f"{since}\n{table(HEAD, list(_rows(now.values(), before)))}", worse(now, before)
