"""`python -m distill.clips --out sheet.png --count 12`: see the clips that small cartoon models learn from.

A clip is a talking portrait with its sound, the picture it starts from and a prompt. A prompt that names a colour wins
over the picture: the video has that colour behind the person or as clothes, the picture another one.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.identity import COLOURS, Identity
from distill.motion import FPS, Motion, mouth_track, random_motion
from distill.portrait import render, render_still
from distill.run import run_program
from distill.speech import speech
from liverelay.engine import media
from liverelay.engine.arguments import number, positive
from liverelay.engine.errors import MissingExtraError, OutputError

BEHIND = ("{} background", "a {} background", "a person in front of a {} wall", "someone talks in front of a {} wall",
          "{} wall behind the person", "the background is {}")
WORN = ("{} clothes", "a person who wears {} clothes", "someone in a {} shirt", "the shirt is {}")
BOTH = ("{} clothes and a {} background", "a person in a {} shirt in front of a {} wall")  # clothes come first
VOCABULARY: tuple[str, ...] = tuple(sorted(
    {word for text in BEHIND + WORN + BOTH for word in text.split() if word != "{}"} | set(COLOURS) | {"an"}
))


@dataclass(frozen=True)
class Clip:
    """One example. `identity` is the video's; `still` shows other colours where the prompt names one."""

    identity: Identity
    motion: Motion  # [T] at 25 FPS
    sound: np.ndarray  # float32 [T * 640] at 16 kHz
    prompt: str  # words of VOCABULARY, or ""
    frames_uint8: np.ndarray  # [T, size, size, 3]
    still: np.ndarray  # uint8 [size, size, 3]


def clip(seed: int, frames: int, held_out: bool = False, size: int = 128) -> Clip:
    """The clip of this seed, always the same on one machine; held-out clips share no seed, voice or sentence."""
    rng = np.random.default_rng([int(held_out), seed])
    person = Identity.random(rng)
    identity, prompt = prompted(rng, person)
    sound = speech(rng, frames / FPS, held_out)
    motion = random_motion(rng, frames).with_mouth(*mouth_track(sound, frames))
    return Clip(identity, motion, sound, prompt, render(identity, motion, size), render_still(person, size))


def prompted(rng: np.random.Generator, person: Identity) -> tuple[Identity, str]:
    """The person with the colours that a prompt names, and the prompt; "" and no change in half of the cases."""
    kind = rng.choice(["none", "behind", "worn", "both"], p=(0.5, 0.28, 0.14, 0.08))
    others = [name for name in COLOURS if name not in (person.clothes, person.background)]
    worn, behind = (str(name) for name in rng.choice(others, 2, replace=False))
    if kind == "behind":
        return replace(person, background=behind), _words(rng, BEHIND, behind)
    if kind == "worn":
        return replace(person, clothes=worn), _words(rng, WORN, worn)
    if kind == "both":
        return replace(person, clothes=worn, background=behind), _words(rng, BOTH, worn, behind)
    return person, ""


def _words(rng: np.random.Generator, phrases: tuple[str, ...], *colours: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", str(rng.choice(phrases)).format(*colours))


def sheet(clips: list[Clip], columns: int = 10) -> Any:
    """A Pillow picture: for each clip its still, evenly spaced frames, below them opening (red) and spread (blue)."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise MissingExtraError("Pillow", "to write a contact sheet", "media") from None
    size, curve, gap = clips[0].still.shape[0], 40, 4
    row = size + curve + 18
    picture = Image.new("RGB", (size * (columns + 1) + gap, row * len(clips)), "white")
    draw = ImageDraw.Draw(picture)
    for index, one in enumerate(clips):
        top, left, count = index * row, size + gap, one.motion.frames
        picture.paste(Image.fromarray(one.still), (0, top))
        for column in range(columns):
            frame = one.frames_uint8[int((column + 0.5) * count / columns)]
            picture.paste(Image.fromarray(frame), (left + column * size, top))
        floor = top + size + curve
        for values, low, high, colour in ((one.motion.spread, -1, 1, "#88a8e0"), (one.motion.opening, 0, 1, "#c02040")):
            points = [(left + (t + 0.5) / count * columns * size, floor - (float(v) - low) / (high - low) * (curve - 4))
                      for t, v in enumerate(values)]
            draw.line(points, fill=colour, width=2)
        draw.text((2, top + size + 2), one.prompt.replace(" in front", "\nin front") or "(no prompt)", fill="black")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distill.clips", description=__doc__.splitlines()[0].split(": ")[1])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--count", type=positive(int, "clips"), default=12)
    parser.add_argument("--frames", type=positive(int, "frames"), default=100)
    parser.add_argument("--seed", type=number(int, "seeds"), default=0, help="of the first clip")
    parser.add_argument("--held-out", action="store_true", help="clips of evaluation")
    arguments = parser.parse_args()
    form = media.picture_format(arguments.out)
    media.check_writable(arguments.out)
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    picture = sheet([clip(seed, arguments.frames, arguments.held_out) for seed in seeds])
    part = media.part_path(arguments.out)
    try:
        picture.save(part, format=form)
        os.replace(part, arguments.out)
    except (OSError, ValueError) as error:  # a JPEG has at most 65500 rows
        raise OutputError(f"cannot write {arguments.out}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    print(arguments.out)


if __name__ == "__main__":
    run_program(main)
