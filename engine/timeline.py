"""A picture of a line's work, simulated or recorded: a row for each stage, a bar for each block, a colour for each
session. `liverelay timeline` draws the trace that `generate --trace` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverelay.engine.errors import InputError, MissingExtraError, OutputError
from liverelay.engine.media import part_path, picture_format, real_path
from liverelay.engine.relay.simulator import Line, Span

# A dozen hues of like lightness, so that no session stands out; text on them is dark.
COLOURS = (
    "#7db8e8", "#f4a582", "#92d3a2", "#d6a9dd", "#f2d06b", "#8fd6d3", "#f2a3b8", "#b6c978", "#a9b4ee", "#dbb98f",
    "#9ed0f0", "#c7c7c7",
)  # fmt: skip
INK, FAINT, PREFILL = "#22303c", "#d9dee3", "#5b6770"
BLOCKS = 9  # of the session that came last: the picture ends with them
WIDTH = 64  # blocks of the slowest stage beside each other, at most
NARROW = 0.007  # of the picture's width: bars below it carry no number


@dataclass(frozen=True)
class Picture:
    """rows: a name for each stage; spans: what the stages did."""

    title: str
    rows: tuple[str, ...]
    spans: Sequence[Span]


def of_line(line: Line) -> Picture:
    """What a simulated line did."""
    slowest = max(line.times.block_ms(stage.plan) for stage in line.stages)
    rows = tuple(f"{'step ' if s.plan.steps else ''}{s.plan.name}\n{s.plan.device}" for s in line.stages)
    title = f"plan {line.plan}: a block every {slowest:.0f} ms = {12e3 / slowest:.1f} FPS"
    return Picture(title, rows, shown(line.spans, slowest))


def of_trace(path: Path) -> Picture:
    """What a real line did, from the file of `--trace`. InputError when it is none."""
    try:
        events = json.loads(path.read_text().rstrip().rstrip(",").removesuffix("]") + "]")  # of a killed run, too
        names = {event["pid"]: str(event["args"]["name"]) for event in events if event["ph"] == "M"}
        spans = [
            Span(event["pid"], event["tid"], event["args"]["block"], "block", 1e-6 * event["ts"],
                 1e-6 * (event["ts"] + event["dur"]))
            for event in events if event["ph"] == "X" and event["cat"] == "compute"
        ]  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a trace of generate --trace: {error}") from None
    if not spans:
        raise InputError(f"{path} holds no blocks")
    busy = [[span.end - span.start for span in spans if span.stage == stage] for stage in names]
    slowest = 1e3 * max(sorted(times)[len(times) // 2] for times in busy if times)
    rows = tuple(name.removeprefix("stage ").replace(" on ", "\n") for _, name in sorted(names.items()))
    title = f"stages {', '.join(row.partition(chr(10))[0] for row in rows)}: the slowest takes {slowest:.0f} ms a block"
    return Picture(title, rows, shown(spans, slowest))


def drawer(path: Path) -> Callable[[Picture], None]:
    """What draws a picture into the file. MissingExtraError without matplotlib, before anything long is done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "to draw a timeline", "view") from None

    def draw(picture: Picture) -> None:
        figure = Figure(figsize=(15, 1.5 + 0.52 * len(picture.rows)), layout="constrained")
        _draw(figure, picture)
        part = part_path(real_path(path))
        try:
            figure.savefig(part, dpi=150, format=picture_format(path).lower())
            os.replace(part, real_path(path))
        except (OSError, ValueError) as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot write {path}: {error}") from None

    return draw


def shown(spans: Sequence[Span], slowest_ms: float) -> list[Span]:
    """What stages do until the last comer's first BLOCKS blocks are done: what follows repeats what is seen by then."""
    newest = max((span.session for span in spans), default=0)
    end = max((span.end for span in spans if span.session == newest and span.block < BLOCKS), default=0.0)
    begin = end - 1e-3 * WIDTH * slowest_ms
    return [span for span in spans if begin <= span.start < end]


def _draw(figure: Any, picture: Picture) -> None:
    axes, spans, rows = figure.add_subplot(), picture.spans, picture.rows
    first, last = min((span.start for span in spans), default=0.0), max((span.end for span in spans), default=1.0)
    for span in spans:
        _bar(axes, span, last - first)
    axes.set_yticks(range(len(rows)), rows, fontsize=10, color=INK)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(first, last)
    axes.set_xlabel("seconds", color=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(picture.title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=12)
    _legend(figure, spans)


def _bar(axes: Any, span: Span, shown_s: float) -> None:
    """A block with its number, or the preparation of a session's sink and decoder, hatched."""
    colour, width = COLOURS[span.session % len(COLOURS)], span.end - span.start
    if span.block < 0:
        axes.barh(span.stage, width, left=span.start, height=0.72, color=colour, edgecolor=PREFILL, hatch="////",
                  linewidth=0.6)  # fmt: skip
        return
    axes.barh(span.stage, width, left=span.start, height=0.72, color=colour, edgecolor="white", linewidth=0.8)
    if width > NARROW * shown_s:
        axes.text(span.start + width / 2, span.stage, str(span.block), ha="center", va="center", fontsize=8, color=INK)


def _legend(figure: Any, spans: Sequence[Span]) -> None:
    from matplotlib.patches import Patch

    sessions = sorted({span.session for span in spans})
    handles = [Patch(color=COLOURS[n % len(COLOURS)], label=f"session {n}") for n in sessions[: len(COLOURS)]]
    if any(span.block < 0 for span in spans):
        handles.append(Patch(facecolor="white", edgecolor=PREFILL, hatch="////", label="sink and decoder prepared"))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)
