"""Contact sheets and curves of `bench.quality`."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liverelay.engine.errors import MissingExtraError, OutputError

Row = tuple[str, Sequence[np.ndarray]]  # a title and frames uint8 [H, W, 3]
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]  # name: x and y
missing: list[Path] = []  # pictures that could not be written


def prepare(folder: Path) -> None:
    """Before any long work: MissingExtraError without what draws, OutputError where the folder cannot be."""
    for library, extra in (("PIL", "media"), ("matplotlib", "view")):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError("Pillow" if library == "PIL" else library, "to draw pictures", extra)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be a folder of pictures: {error.strerror}") from None


def spread(frames: np.ndarray, count: int = 10) -> list[np.ndarray]:
    """So many frames of a video, evenly spaced."""
    return [frames[int((i + 0.5) * len(frames) / count)] for i in range(min(count, len(frames)))]


def _keep(path: Path, save: Callable[[Path], object]) -> None:
    """A picture that cannot be written is named; what was measured for it goes on."""
    try:
        save(path)
    except OSError as error:
        missing.append(path)
        print(f"cannot write {path}: {error.strerror or error}", file=sys.stderr)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sheet(path: Path, rows: Sequence[Row]) -> None:
    """Rows of frames, each below its title."""
    from PIL import Image, ImageDraw

    rows = [row for row in rows if len(row[1])]
    if not rows:
        return
    height, width = rows[0][1][0].shape[:2]
    picture = Image.new("RGB", (width * max(len(frames) for _, frames in rows), (height + 16) * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, frames) in enumerate(rows):
        top = number * (height + 16)
        draw.text((2, top + 2), title, fill="black")
        for column, frame in enumerate(frames):
            picture.paste(Image.fromarray(frame), (column * width, top + 16))
    _keep(path, picture.save)


def plot(path: Path, panels: Sequence[tuple[str, Curves]], *, across: str, logarithmic: bool = False) -> None:
    """Curves below each other; a panel is the name of its vertical axis, and what is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2 * len(panels) + 0.6))
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, (name, curves) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, name, curves, logarithmic)
    axes[-1, 0].set_xlabel(across)
    figure.tight_layout()
    _keep(path, lambda path: figure.savefig(path, dpi=110))


def _panel(axis: Any, name: str, curves: Curves, logarithmic: bool) -> None:
    for label, (x, y) in curves.items():
        axis.plot(x, y, label=label, linewidth=1)
    axis.set_ylabel(name)
    axis.grid(alpha=0.3)
    if logarithmic:
        axis.set_xscale("log")
    if len(curves) > 1:
        axis.legend(fontsize=7, loc="best")
