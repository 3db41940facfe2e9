"""Draws samples/portrait.png and samples/toon.png, speaks samples/speech.wav: python samples/make_samples.py

All are made from nothing but this repository (drawing: Pillow, PyTorch; voice: the program espeak-ng), so they are free
of anybody's likeness, voice or rights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).resolve().parent
WIDTH, HEIGHT, SCALE = 512, 768, 4  # drawn SCALE times larger, then reduced: smooth edges
RATE = 16000
SENTENCES = ("Hello! It is good to see you here.", "Ask me anything, and I will answer while you watch.")
PAUSE_S = 0.9
PEAK = 0.7

SKIN, SHADE, BLUSH, LIPS = "#f2c5a0", "#dfa37d", "#ee9c85", "#c0584f"
HAIR, HAIR_LIGHT, DARK = "#4a2f27", "#6b4638", "#2b211f"
COAT, COAT_SHADE, SHIRT, IRIS = "#2f6f73", "#24585c", "#f6f1e7", "#4d7a4f"
Point = tuple[float, float]


class Canvas:
    """Shapes in the picture's own pixel coordinates, mirrored about the middle where wanted."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self._draw = ImageDraw.Draw(image)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: str, *, mirror: bool = False) -> None:
        """An ellipse around (x, y)."""
        for middle in {x, WIDTH - x} if mirror else {x}:
            box = (middle - rx, y - ry, middle + rx, y + ry)
            self._draw.ellipse([SCALE * value for value in box], fill=fill)

    def shape(self, points: Sequence[Point], fill: str, *, mirror: bool = False) -> None:
        """A closed smooth curve through the points (Catmull-Rom)."""
        for flip in (False, True) if mirror else (False,):
            path = [(WIDTH - x, y) if flip else (x, y) for x, y in points]
            self._draw.polygon([(SCALE * x, SCALE * y) for x, y in smooth(path)], fill=fill)

    def stroke(self, points: Sequence[Point], width: float, fill: str, *, mirror: bool = False) -> None:
        """An open smooth line with round ends."""
        for flip in (False, True) if mirror else (False,):
            path = [(WIDTH - x, y) if flip else (x, y) for x, y in points]
            for x, y in smooth([path[0], *path, path[-1]], closed=False, steps=120):
                box = (x - width / 2, y - width / 2, x + width / 2, y + width / 2)
                self._draw.ellipse([SCALE * value for value in box], fill=fill)

    def glow(self, x: float, y: float, rx: float, ry: float, colour: str, strength: float) -> None:
        """A soft spot of colour."""
        mask = Image.new("L", self.image.size, 0)
        box = [SCALE * value for value in (x - rx, y - ry, x + rx, y + ry)]
        ImageDraw.Draw(mask).ellipse(box, fill=round(255 * strength))
        mask = mask.filter(ImageFilter.GaussianBlur(SCALE * min(rx, ry) / 2))
        self.image.paste(Image.new("RGB", self.image.size, colour), mask=mask)


def smooth(points: Sequence[Point], *, closed: bool = True, steps: int = 24) -> list[Point]:
    """Points of a Catmull-Rom curve; an open one ends at its second and last but one point."""
    nodes = np.asarray([points[-1], *points, *points[:2]] if closed else points, dtype=np.float64)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = [
        b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
        for a, b, c, d in zip(nodes, nodes[1:], nodes[2:], nodes[3:], strict=False)
    ]
    return [(float(x), float(y)) for x, y in np.concatenate(pieces)]


def background() -> Image.Image:
    """A calm vertical gradient with a lighter centre."""
    y, x = np.mgrid[0 : HEIGHT * SCALE : SCALE, 0 : WIDTH * SCALE : SCALE] / (HEIGHT * SCALE)
    light = np.exp(-(((x - 0.33) / 0.30) ** 2 + ((y - 0.36) / 0.34) ** 2))[..., None]
    top, bottom, centre = (np.array(c, dtype=np.float64) for c in ((142, 176, 190), (196, 205, 196), (238, 232, 214)))
    colour = top + (bottom - top) * y[..., None]
    pixels = colour + (centre - colour) * 0.75 * light
    image = Image.fromarray(pixels.round().astype(np.uint8))
    return image.resize((WIDTH * SCALE, HEIGHT * SCALE), Image.Resampling.BICUBIC)


def body(c: Canvas) -> None:
    """Hair behind the head, shoulders, neck, collar."""
    c.shape([(256, 118), (356, 150), (404, 250), (398, 380), (420, 470), (370, 540), (256, 560), (142, 540), (92, 470),
             (114, 380), (108, 250), (156, 150)], HAIR)
    c.shape([(256, 560), (350, 566), (440, 606), (490, 690), (512, 800), (256, 830), (0, 800), (22, 690), (72, 606),
             (162, 566)], COAT)
    c.shape([(196, 556), (256, 600), (316, 556), (300, 690), (256, 800), (212, 690)], SHIRT)
    c.shape([(206, 440), (306, 440), (312, 550), (290, 604), (256, 624), (222, 604), (200, 550)], SKIN)
    c.shape([(204, 440), (256, 480), (308, 440), (310, 500), (256, 540), (202, 500)], SHADE)
    c.shape([(188, 552), (200, 548), (226, 640), (246, 730), (222, 720), (168, 640)], COAT_SHADE, mirror=True)


def face(c: Canvas) -> None:
    """Head, cheeks, nose, mouth."""
    c.shape([(256, 170), (340, 196), (378, 280), (374, 370), (346, 436), (304, 480), (256, 497), (208, 480), (166, 436),
             (138, 370), (134, 280), (172, 196)], SKIN)
    c.glow(190, 394, 28, 21, BLUSH, 0.6)
    c.glow(322, 394, 28, 21, BLUSH, 0.6)
    c.stroke([(262, 322), (268, 350), (274, 376), (256, 386)], 4.5, SHADE)
    c.stroke([(240, 382), (246, 387), (256, 387)], 4.5, SHADE)
    c.shape([(214, 424), (236, 418), (256, 422), (276, 418), (298, 424), (280, 444), (256, 450), (232, 444)], LIPS)
    c.shape([(222, 425), (256, 429), (290, 425), (276, 433), (256, 435), (236, 433)], "#f9efe8")
    c.stroke([(208, 421), (214, 424), (220, 427)], 4, "#9c463f", mirror=True)
    c.stroke([(240, 462), (256, 465), (272, 462)], 4, SHADE)


def eyes(c: Canvas) -> None:
    """Whites, irises with a highlight, lids, brows."""
    for x in (200.0, 312.0):
        c.shape([(x - 31, 330), (x - 14, 314), (x + 14, 314), (x + 31, 330), (x + 14, 345), (x - 14, 345)], "#fffdf8")
        c.oval(x, 329, 16.5, 16.5, IRIS)
        c.oval(x, 329, 8.5, 8.5, DARK)
        c.oval(x + 6, 322, 4.5, 4.5, "#ffffff")
    c.stroke([(168, 332), (184, 314), (208, 310), (232, 328)], 6, DARK, mirror=True)
    c.stroke([(176, 343), (196, 349), (220, 343)], 2.5, SHADE, mirror=True)
    c.stroke([(162, 292), (180, 279), (206, 276), (232, 284)], 9, HAIR, mirror=True)


def fringe(c: Canvas) -> None:
    """Hair in front: a side parting, locks beside the face, some light on it."""
    c.shape([(300, 138), (236, 126), (160, 158), (120, 240), (116, 330), (134, 344), (150, 280), (200, 236), (262, 210),
             (308, 170)], HAIR)
    c.shape([(286, 136), (340, 146), (388, 216), (398, 330), (378, 346), (366, 286), (336, 232), (290, 190)], HAIR)
    c.shape([(128, 286), (142, 340), (146, 420), (136, 490), (146, 540), (106, 500), (108, 400), (112, 330)], HAIR,
            mirror=True)
    c.stroke([(276, 156), (226, 172), (172, 214), (146, 262)], 7, HAIR_LIGHT)
    c.stroke([(258, 146), (204, 160), (156, 200)], 4, HAIR_LIGHT)
    c.stroke([(318, 160), (358, 200), (380, 262)], 6, HAIR_LIGHT)


def draw_portrait(path: Path) -> None:
    """A friendly cartoon person who looks into the camera, mouth nearly closed."""
    c = Canvas(background())
    for part in (body, face, eyes, fringe):
        part(c)
    c.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path, optimize=True)


def draw_toon(path: Path) -> None:
    """A portrait as the bundled small model knows them (distill/), of a person it was not trained on."""
    sys.path.insert(0, str(FOLDER.parent))
    from distill.identity import Identity
    from distill.portrait import render_still

    person = Identity.random(np.random.default_rng([1, 9006]))
    Image.fromarray(render_still(person, 256)).save(path, optimize=True)


def speak(path: Path) -> None:
    """Two sentences with a pause between them, 16 kHz mono PCM 16."""
    import soundfile
    import soxr

    pieces = []
    with tempfile.TemporaryDirectory() as folder:
        for i, sentence in enumerate(SENTENCES):
            wav = Path(folder) / f"{i}.wav"
            command = ["espeak-ng", "-v", "en-us+f3", "-s", "150", "-w", str(wav), sentence]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                sys.exit("espeak-ng is not installed (apt-get install espeak-ng): speech.wav is left as it is")
            except subprocess.CalledProcessError as error:
                sys.exit(f"espeak-ng failed: {error.stderr.strip()}")
            sound, rate = soundfile.read(wav, dtype="float64")
            pieces += [soxr.resample(sound, rate, RATE, quality="VHQ"), np.zeros(round(PAUSE_S * RATE))]
    quiet = np.zeros(round(0.25 * RATE))
    speech = np.concatenate([quiet, *pieces[:-1], quiet])
    soundfile.write(path, speech * (PEAK / np.abs(speech).max()), RATE, subtype="PCM_16")


if __name__ == "__main__":
    draw_portrait(FOLDER / "portrait.png")
    draw_toon(FOLDER / "toon.png")
    speak(FOLDER / "speech.wav")
