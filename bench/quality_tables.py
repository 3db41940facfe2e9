"""The results of `bench.quality` as text, with the goals beside the values; a goal that is missed says so."""

from __future__ import annotations

from typing import Any

from bench.quality_stream import MARKS

Result = dict[str, Any]
SYNC, FPS, FIRST_S, STEADY, AROUND_0 = 0.8, 25.0, 1.0, 0.05, 0.1


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def span(found: Result, digits: int = 3) -> str:
    """value (low..high)."""
    if found.get("value") is None:
        return "-"
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f}..{found['high']:.{digits}f})"


def goal(met: bool | None, text: str) -> str:
    return f"  goal {'not measured' if met is None else 'met' if met else 'MISSED'}: {text}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as what is in them, the first to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for first, *rest in [header, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return lines


def is_control(label: str) -> bool:
    return label.startswith("truth") or label.endswith("through the VAE")


def lag(row: Result) -> str:
    return "-" if row["correlation"]["value"] is None else f"{row['lag']:+d}"


def lipsync(result: Result) -> list[str]:
    rows = [[label, span(row["correlation"]), lag(row), span(row["offset"], 0), span(row["shuffled"]),
             span(row["silent_opening"]), span(row["spoken_opening"])] for label, row in result.items()]  # fmt: skip
    lines = table(["lip sync", "correlation, 95%", "at lag", "maximum at", "other sound", "silence", "speech"], rows)
    for label, row in result.items():
        if is_control(label):
            continue
        value, offset, other = row["correlation"]["value"], row["offset"]["value"], row["shuffled"]["value"]
        met = None if value is None else value >= SYNC and abs(offset) <= 1
        told = "too little speech" if value is None else f"{value:.3f} at {lag(row)}, maximum at {offset:+d}"
        lines.append(goal(met, f"{label}: correlation >= {SYNC} within +-1 frame ({told})"))
        low, high = (row["shuffled"][end] for end in ("low", "high"))
        near = None if other is None else low <= AROUND_0 and high >= -AROUND_0
        lines.append(goal(near, f"{label}: about 0 with other sound ({number(other)})"))
    return lines


def prompts(result: Result) -> list[str]:
    names = list(next(iter(result.values())))
    rows = [[label, *(f"{span(row[name], 2)} of {row[name]['count']}" for name in names)]
            for label, row in result.items()]  # fmt: skip
    return table(["prompts, share of colours", *names], rows)


def streams(result: Result) -> list[str]:
    """Of long streams: identity at the marks, slopes, lip sync and sharpness early and late."""
    lines: list[str] = []
    marks = [mark for mark in MARKS if any(str(mark) in row.get("marks", {}) for row in result.values())]
    rows = [[label, number(row["others"]), *(span(row["marks"].get(str(mark), {})) for mark in marks)]
            for label, row in result.items() if "marks" in row]  # fmt: skip
    lines += table(["identity, distance", "other people", *(f"at {mark} s" for mark in marks)], rows)
    rows = []
    for label, row in result.items():
        if "marks" in row:
            slopes = [span(row[f"slope_per_{unit}"], 4) for unit in ("decade", "1000_s")]
            measured = (("identity", 3), ("sync", 2), ("sharpness", 2))
            parts = [span(row[f"{name}_{when}"], digits) for name, digits in measured
                     for when in ("early", "late")]  # fmt: skip
            memory = "{:.0f}, {:.0f}".format(*row["memory_mb"])
            rows.append([label, *slopes, *parts, number(row["silent_opening"]["value"]), memory])
    header = ["over time", "slope per decade", "per 1000 s", "identity early", "late", "lip sync early", "late",
              "sharpness early", "late", "silence", "memory MB"]  # fmt: skip
    lines += ["", *table(header, rows)]
    short = [label for label, row in result.items() if "marks" not in row]
    return lines + [f"{label}: the stream was too short to say anything" for label in short]


def identity(result: Result) -> list[str]:
    lines = streams(result)
    for label, row in result.items():
        if is_control(label) or "marks" not in row:
            continue
        for name in ("slope_per_decade", "slope_per_1000_s"):
            found = row[name]
            flat = None if found["value"] is None else found["low"] <= 0 <= found["high"]
            lines.append(goal(flat, f"{label}: the interval of the {name.replace('_', ' ')} contains 0"))
        last = row["marks"].get(str(MARKS[-1]))
        steady = None if last is None else abs(last["ratio"] - 1) <= STEADY
        told = "" if last is None else " ({:+.1f}%, {:+.1f}..{:+.1f}%)".format(
            *(100 * (last[name] - 1) for name in ("ratio", "ratio_low", "ratio_high"))
        )  # fmt: skip
        lines.append(goal(steady, f"{label}: at {MARKS[-1]} s within {100 * STEADY:.0f}% of {MARKS[0]} s{told}"))
    return lines


def teacher(result: Result) -> list[str]:
    rows = [[label, span(row["sync"]["correlation"]), span(row["sync"]["offset"], 0), span(row["identity"]),
             span(row["sharpness"], 2), number(row["seconds_per_frame"])] for label, row in result.items()]  # fmt: skip
    return table(["teacher and student", "lip sync", "maximum at", "identity", "sharpness", "s a frame"], rows)


def precision(result: Result) -> list[str]:
    rows = [[label, span(row["psnr"], 1), str(row["equal"]), span(row["sync"])] for label, row in result.items()]
    return table(["against bfloat16", "PSNR dB", "equal videos", "lip sync"], rows)


def speed(result: Result) -> list[str]:
    machine = result["machine"]
    found = {label: row for label, row in result.items() if label != "machine"}
    rows = [[label, number(row["load_s"], 2), number(row["first_frame_s"], 2), number(row["fps"], 1)]
            for label, row in found.items()]  # fmt: skip
    lines = table(["speed", "load s", "first frames s", "FPS"], rows)
    lines.append(f"{machine['threads']} threads on {machine['cores']} cores, load {machine['load']:.1f}")
    for label, row in found.items():
        lines.append(goal(row["fps"] >= FPS, f"{label}: at least {FPS:.0f} FPS ({row['fps']:.1f})"))
        first = row["first_frame_s"]
        lines.append(goal(first <= FIRST_S, f"{label}: first frame within {FIRST_S:.0f} s once loaded ({first:.2f})"))
    return lines
