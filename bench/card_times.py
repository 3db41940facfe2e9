"""The planner's times of each card, engine/relay/card_times.py, as the newest results of the card have them.

bench/ is not installed with the package, so the figures that `liverelay plan` needs are kept there;
`python -m bench.report --times` writes them, a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench.suite_values import RESULTS, newest

DOCUMENT = RESULTS.parents[1] / "engine" / "relay" / "card_times.py"
WORDS = ("", "products", "all")
Results = list[dict[str, Any]]


def results(suite: Mapping[str, Any], kind: str, fp8: str | None = None) -> Results:
    """Results of the parts that hold `kind`, with that in FP8."""
    found = [part["result"] for part in suite["parts"] if isinstance(part.get("result"), dict)]
    return [one for one in found if kind in one and fp8 in (None, one.get("fp8"))]


def _ms(seconds: float) -> float:
    return float(f"{1e3 * seconds:.5g}")


def vae_s(suite: Mapping[str, Any]) -> float | None:
    """Seconds of decoding a block, captured: measured by itself, else the median of all lines'."""
    if own := results(suite, "vae"):
        return float(own[0]["vae"]["captured_s"])
    lines = [one["parts"].get("line", {}) for one in results(suite, "parts")]
    taken = [line["vae"]["captured_s"] for line in lines if "vae" in line]
    return median(taken) if taken else None


def whole_s(suite: Mapping[str, Any], fp8: str) -> tuple[float, bool]:
    """Seconds of a captured block-step and whether they were measured: as the engine's stage on a line has it, else of
    a single graph; else what a line of four steps takes, less its video. 0 where there is none of them."""
    lines = [one["parts"] for one in results(suite, "parts", fp8)]
    for line in lines:
        if "captured" in line.get("stage", {}):
            return line["stage"]["captured"]["s"], True
    for one in results(suite, "backends", fp8):
        if took := one["backends"].get("fastest", {}).get("graph_s"):
            return took, True
    for line in lines:
        if "vae" in line.get("line", {}):
            (stage,) = line["line"]["figures"]["stages"]
            return (stage["compute_ms"][0] / 1e3 - line["line"]["vae"]["captured_s"]) / 4, False
    return 0.0, False


def parts_of(suite: Mapping[str, Any], fp8: str) -> list[float] | None:
    """Milliseconds of products, self-attention, element-wise kernels and the rest, of eager steps."""
    for one in results(suite, "backends", fp8):
        if parts := one["backends"].get("fastest", {}).get("parts_s"):
            return [_ms(seconds) for name, seconds in parts.items() if name != "block-step"]
    return None


def steps(suite: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By what is in FP8. Where no split of products in FP8 was measured, it is that of all in FP8 with the attention of
    bfloat16."""
    found = {}
    for word in WORDS:
        whole, measured = whole_s(suite, word)
        if not whole:
            continue
        if (parts := parts_of(suite, word)) is None:
            base, full = parts_of(suite, ""), parts_of(suite, "all")
            if base is None or full is None:
                continue
            parts = [full[0], base[1], *full[2:]]
        found[word] = {"whole_ms": _ms(whole), "parts_ms": tuple(parts), "measured": measured}
    return found


def times(path: Path) -> dict[str, Any]:
    """What the planner knows of the card with these results."""
    suite = json.loads(path.read_text())
    vae = vae_s(suite)
    found = {
        "model": suite["machine"]["gpu"], "memory": suite["machine"]["memory_bytes"], "results": path.stem,
        "steps": steps(suite), "vae_ms": vae and _ms(vae),
    }  # fmt: skip
    opened = results(suite, "opening")
    parts = opened[0]["opening"].get("parts_s", {}) if opened else {}
    for name in ("encode", "prefill", "prime"):
        found[f"{name}_ms"] = _ms(parts[f"{name}_s"]) if f"{name}_s" in parts else None
    return found


def document(folder: Path = RESULTS) -> str:
    """The module's text."""
    dates = {card: max(path.stem.partition("-")[2] for path in folder.glob(f"{card}-*.json"))
             for card in sorted({path.name.partition("-")[0] for path in folder.glob("*.json")})}  # fmt: skip
    latest = max(dates, key=lambda card: dates[card])
    lines = [
        '"""Measured times of one GPU of each card in ms, for the planner; None: not measured.', "",
        "Made by `python -m bench.report --times` from the newest file of each card in bench/results, not by hand.",
        "steps: one block-step with a full ring by what is in FP8, as a whole, captured, and by part, launch by launch",
        "(products with text and sound, self-attention, element-wise kernels, the rest); measured: else the whole is",
        "that of a line less its video. The 14B model at 704x384.",
        '"""', "",
        "from __future__ import annotations", "", "from typing import Any", "",
        f'NEWEST = "{latest}"  # the card with the latest results', "CARDS: dict[str, dict[str, Any]] = {",
    ]  # fmt: skip
    for card in dates:
        path = newest(card, folder)
        assert path is not None
        lines.append(f'    "{card}": {{')
        for name, value in times(path).items():
            if name != "steps":
                lines.append(f'        "{name}": {json.dumps(value) if isinstance(value, str) else value},')
                continue
            lines.append('        "steps": {')
            for word, step in value.items():
                inner = ", ".join(f'"{key}": {figure}' for key, figure in step.items())
                lines.append(f'            "{word}": {{{inner}}},')
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}", ""])
