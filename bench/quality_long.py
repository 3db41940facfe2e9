"""The parts of `bench.quality` that look at long streams: identity over time, and the method with parts taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench import quality_pictures as pictures
from bench import quality_stream as streams
from bench.quality_clips import loaded
from bench.quality_options import Options
from bench.quality_rollout import VARIANTS, Rollout, Variant
from bench.quality_stream import Live, Talker, Truth, Watch, Who
from distill.motion import FPS
from liverelay.engine import Engine
from liverelay.engine.progress import Progress

Result = dict[str, Any]
Make = Callable[[Who, int], Talker]
SAVE_EVERY = 10  # pieces of sound


def follow(label: str, make: Make, people: list[Who], options: Options, seconds: float, result: Result) -> list[Watch]:
    """Stream to all people until `seconds`; result[label] is renewed as it grows, and kept when the run is cut off."""
    with contextlib.ExitStack() as open_ones:
        talkers = [make(who, options.seed + i) for i, who in enumerate(people)]
        for talker in talkers:
            open_ones.callback(talker.close)
        watches = [Watch(who) for who in people]
        progress, pieces = Progress(streams.pieces(seconds) * streams.PIECE_S * FPS, FPS), 0
        print(f"{label}: {seconds:g} s, {len(people)} side by side", flush=True)

        def note() -> None:
            columns = streams.table_of(watches)
            result[label] = streams.summary(columns) | {"others": float(np.mean([who.others for who in people]))}
            result[label]["columns"] = {name: np.round(values, 5).tolist() for name, values in columns.items()}
            options.save(result)

        def tell(frames: int) -> None:
            nonlocal pieces
            pieces += 1
            progress.update(frames * len(people) // 12, frames)
            if pieces % SAVE_EVERY == 0:
                note()

        try:
            streams.run(talkers, watches, seconds, seed=options.seed, tell=tell)
        finally:
            progress.finish()
            note()
    return watches


def models(options: Options) -> Iterator[tuple[str, Engine]]:
    for label, folder in options.checkpoints.items():
        with loaded(folder, options) as engine:
            yield label, engine


def identity(options: Options) -> Result:
    """Who it is and how well the lips follow, over a long live stream."""
    seconds, result, watched = options.seconds or 120.0, {}, {}
    people = [Who.of_seed(options.seed + i) for i in range(options.people)]
    control = min(seconds, 200.0)
    watched["truth"] = follow("truth", lambda who, seed: Truth(who.of, seed), people, options, control, result)
    try:
        for label, engine in models(options):
            make: Make = lambda who, seed, engine=engine: Live(engine, who.of, seed)  # noqa: E731
            if options.skim:
                make = maker(engine, Variant(), streams.looked_at(seconds))
            watched[label] = follow(label, make, people, options, seconds, result)
    finally:
        draw("identity", watched, result, options)
    return result


def ablations(options: Options) -> Result:
    """The same stream without some part of the method."""
    seconds, result, watched = options.seconds or 60.0, {}, {}
    people = [Who.of_seed(options.seed + i) for i in range(options.people)]
    try:
        for label, engine in models(options):
            for name, variant in VARIANTS.items():
                watched[f"{label}: {name}"] = follow(
                    f"{label}: {name}", maker(engine, variant), people, options, seconds, result
                )
    finally:
        draw("ablations", watched, result, options)
    return result


def maker(engine: Engine, variant: Variant, windows: set[int] | None = None) -> Make:
    return lambda who, seed: Rollout(engine, who.of, seed, variant, windows)


def draw(name: str, watched: dict[str, list[Watch]], result: Result, options: Options) -> None:
    """Curves over time, and frames at some times, of the first person."""
    if not options.pictures or not result:
        return
    panels = []
    for column in ("identity", "sync 0", "sharpness"):
        curves = {label: (np.array(row["columns"]["seconds"]), np.array(row["columns"][column]))
                  for label, row in result.items() if row["columns"].get(column)}  # fmt: skip
        panels.append((column, curves))
    pictures.plot(options.pictures / f"{name}.png", panels, across="seconds", logarithmic=True)
    rows = []
    for label, (first, *_) in watched.items():
        if label == "truth":
            times = ", ".join(f"{mark} s" for mark in first.kept)
            rows.append((f"picture, prompt '{first.who.of.prompt}'; below it {times}", [first.who.of.still]))
        rows.append((label, list(first.kept.values())))
    pictures.sheet(options.pictures / f"{name}_sheet.png", rows)

