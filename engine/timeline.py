"""A picture of a line's work: a row for each stage, a bar for each block, a colour for each session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liverelay.engine.errors import MissingExtraError, OutputError
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


def drawer(path: Path) -> Callable[[Line], None]:
    """What draws a line into the file. MissingExtraError without matplotlib, before anything long is done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "for --plot", "dev") from None

    def draw(line: Line) -> None:
        spans = shown(line)
        height = 1.5 + 0.52 * len(line.stages)
        figure = Figure(figsize=(15, height), layout="constrained")
        _draw(figure, line, spans)
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot write {path}: {error}") from None

    return draw


def shown(line: Line) -> list[Span]:
    """What stages do until the last comer's first BLOCKS blocks are done: what follows repeats what is seen by then."""
    newest = max((span.session for span in line.spans), default=0)
    end = max((span.end for span in line.spans if span.session == newest and span.block < BLOCKS), default=0.0)
    begin = end - 1e-3 * WIDTH * max(line.times.block_ms(stage.plan) for stage in line.stages)
    return [span for span in line.spans if begin <= span.start < end]


def _draw(figure: Any, line: Line, spans: Sequence[Span]) -> None:
    axes = figure.add_subplot()
    first, last = min((span.start for span in spans), default=0.0), max((span.end for span in spans), default=1.0)
    for span in spans:
        _bar(axes, span, last - first)
    names = [f"{'step ' if stage.plan.steps else ''}{stage.plan.name}\n{stage.plan.device}" for stage in line.stages]
    axes.set_yticks(range(len(names)), names, fontsize=10, color=INK)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(first, last)
    axes.set_xlabel("seconds", color=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    slowest = max(line.times.block_ms(stage.plan) for stage in line.stages)
    axes.set_title(
        f"plan {line.plan}: a block every {slowest:.0f} ms = {12e3 / slowest:.1f} FPS", loc="left", color=INK,
        fontsize=13, fontweight="bold", pad=12,
    )
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
