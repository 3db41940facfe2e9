"""Cartoon portraits that talk: pictures of an identity for a motion.

Layers that only move with the head are painted once and sampled through the head's coordinates; eyes, brows and mouth
are painted for every frame in a small window. The head turns by a shift that is largest in the middle of the face.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from distill import drawing
from distill.drawing import BROW_V, EYE_V, HEAD_X, HEAD_Y, MOUTH_V, REACH
from distill.identity import COLOURS, Identity, dark, mix, rgb
from distill.motion import Motion, neutral
from distill.shapes import Canvas, both, capsule, ellipse, smoothstep

__all__ = ["COLOURS", "MOUTH_HEIGHT", "MOUTH_INSIDE", "Identity", "Motion", "render", "render_still"]

MOUTH_INSIDE = rgb(0x76003C)  # no other part has a colour near it
MOUTH_HEIGHT = 14.0  # points of the inside at opening 1
TEETH, TONGUE = rgb(0xF4F0EA), rgb(0xD0566C)
WHITE, PUPIL = rgb(0xFBFBF8), rgb(0x16131A)
TURN, JAW = 5.0, 3.0  # points: features at yaw or pitch 1, the chin at opening 1
PIVOT = 30.0  # the head rolls around the neck
ZOOM, TOP = 1.2, 0.3  # the head fills the picture; of what is cut off above and below, this part lies above
BATCH = 8  # frames that are painted together; their planes stay in the cache


def render(identity: Identity, motion: Motion, size: int = 128) -> np.ndarray:
    """uint8 [T, size, size, 3]."""
    if not 64 <= size <= 512:
        raise ValueError(f"size is {size}; portraits are made with 64 to 512 pixels")
    whole = round(size * ZOOM)
    top, left = round((whole - size) * TOP), (whole - size) // 2
    painter = _Painter(identity, whole)
    frames = np.empty((motion.frames, size, size, 3), np.uint8)
    with torch.inference_mode():
        for start in range(0, motion.frames, BATCH):
            pixels = painter.paint(motion[start : start + BATCH])[:, :, top : top + size, left : left + size]
            frames[start : start + BATCH] = (pixels * 255 + 0.5).clamp_(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return frames


def render_still(identity: Identity, size: int = 128) -> np.ndarray:
    """The reference picture, uint8 [size, size, 3]: straight ahead, eyes open, mouth shut."""
    return render(identity, neutral(), size)[0]


class _Painter:
    """The static layers of an identity and what is painted over them."""

    def __init__(self, who: Identity, size: int) -> None:
        self.who, self.size, self.scale = who, size, size / 128
        self.x, self.y = drawing.picture_axes(size)
        self.backdrop = drawing.background(who, size)
        self.back = _Layer(drawing.back_hair(who, size))
        self.face = _Layer(drawing.face(who, size))
        self.front = _Layer(drawing.front_hair(who, size))
        torso = drawing.body(who, size)
        rows = torso[3].amax(1).nonzero()
        self.body_from = int(rows[0])
        self.body = torso[:, self.body_from :]

    def paint(self, motion: Motion) -> Tensor:
        """RGB float [T, 3, size, size] in 0..1."""
        now = {name: torch.from_numpy(value).view(-1, 1, 1) for name, value in vars(motion).items()}
        pixels = self.backdrop.expand(motion.frames, -1, -1, -1).clone()
        cos, sin = now["roll"].cos(), now["roll"].sin()
        x, y = self.x - HEAD_X - now["x"], self.y - HEAD_Y - PIVOT - now["y"]
        u, v = cos * x + sin * y, cos * y - sin * x + PIVOT
        self.back.draw(pixels, u + 1.5 * now["yaw"], v + 1.0 * now["pitch"])
        below = pixels[:, :, self.body_from :]
        below.mul_(1 - self.body[3]).add_(self.body[:3])
        depth = (1 - (u / 42) ** 2 - (v / 48) ** 2).clamp_min_(0) * TURN
        u, v = u - depth * now["yaw"], v - depth * now["pitch"]
        self.face.draw(pixels, u, v - JAW * now["opening"] * smoothstep(v, 10, 30))
        self.mouth(self.window(pixels, u, v, motion, (-15, 8, 15, 36)), now)
        self.eyes(self.window(pixels, u, v, motion, (-23, -20, 23, 8)), now)
        self.front.draw(pixels, u, v)
        return pixels

    def window(self, pixels: Tensor, u: Tensor, v: Tensor, motion: Motion, around: tuple[int, ...]) -> Canvas:
        """The part of the picture that a box of head coordinates can be in during these frames."""
        left, top, right, bottom = around
        turn = float(np.abs(motion.roll).max(initial=0)) * 50 + 1
        moved = [(curve + TURN * shift) for curve, shift in ((motion.x, motion.yaw), (motion.y, motion.pitch))]

        def pixel(value: float) -> int:
            return min(self.size, max(0, round(value * self.scale)))

        columns = slice(pixel(HEAD_X + left + moved[0].min() - turn), pixel(HEAD_X + right + moved[0].max() + turn))
        rows = slice(pixel(HEAD_Y + top + moved[1].min() - turn), pixel(HEAD_Y + bottom + moved[1].max() + turn))
        return Canvas(pixels[:, :, rows, columns], u[:, rows, columns], v[:, rows, columns], edge=1 / self.scale)

    def mouth(self, canvas: Canvas, now: dict[str, Tensor]) -> None:
        who, opening = self.who, now["opening"]
        width = who.mouth_width * (1 + 0.30 * now["spread"]) * (1 - 0.12 * opening)
        half = MOUTH_HEIGHT / 2 * opening
        x = canvas.x
        bend = who.smile * (1 - 0.6 * opening) * ((x / width) ** 2).clamp_max(1.6)
        y = canvas.y - MOUTH_V - half * 0.42 + bend - who.smile * 0.5
        canvas.fill(ellipse(x, y, width + 1.3, half + who.lip_thickness), who.lip, blur=0.3)
        canvas.fill(ellipse(x, y - half - who.lip_thickness * 0.6, width * 0.5, who.lip_thickness * 0.4),
                    mix(who.lip, (1.0, 0.9, 0.88), 0.5), alpha=0.5, blur=0.8)
        line = both(y.abs() - 0.45, x.abs() - width)
        canvas.fill(line, drawing.closed_line(who), alpha=1 - smoothstep(opening, 0.02, 0.1))
        inner = both(ellipse(x, y, width, half.clamp_min(0.3)), x.abs() - width)
        canvas.fill(inner, MOUTH_INSIDE, alpha=(half / 0.5).clamp_max(1))
        teeth = both(inner + 0.4, y + half * 0.55)
        canvas.fill(both(teeth, x.abs() - width * 0.72), TEETH, alpha=smoothstep(opening, 0.15, 0.4))
        tongue = ellipse(x, y - half * 0.95, width * 0.62, half.clamp_min(0.3) * 0.5)
        canvas.fill(both(inner + 0.4, tongue), TONGUE, alpha=smoothstep(opening, 0.3, 0.6))

    def eyes(self, canvas: Canvas, now: dict[str, Tensor]) -> None:
        who, u, v = self.who, canvas.x, canvas.y
        line = mix(dark(who.skin, 0.6), PUPIL, 0.5)
        x, y = u.abs() - who.eye_distance, v - EYE_V
        tilted = y + who.eye_tilt * x
        shut = now["blink"]
        across = (x / who.eye_width).abs().clamp_max(1.2)
        lid = -who.eye_height * (1 - across**2.5) * (1 - 1.7 * shut)  # its height over the eye's middle
        steep = who.eye_height / who.eye_width * 2.5 * across**1.5 * (1 - 1.7 * shut)
        under = (lid - tilted) / (1 + steep * steep).sqrt()
        eye = both(ellipse(x, tilted, who.eye_width, who.eye_height), under)
        canvas.fill(eye - 0.5, dark(who.skin, 0.3), alpha=0.6, blur=0.8)
        canvas.fill(eye, WHITE)
        side = u.sign()
        gx, gy = x * side - 1.7 * now["gaze_x"], y - 0.4 - 1.3 * now["gaze_y"]
        radius = min(who.eye_height * 0.86, who.eye_width * 0.74)
        iris = ellipse(gx, gy, radius, radius)
        canvas.fill(both(eye, iris), dark(who.iris, 0.4))
        canvas.fill(both(eye, iris + 0.7), who.iris)
        canvas.fill(both(eye, ellipse(gx, gy, radius * 0.55, radius * 0.55)), PUPIL)
        canvas.fill(both(eye, ellipse(gx + radius * 0.35, gy + radius * 0.4, radius * 0.3, radius * 0.3)), WHITE)
        thickness = 0.65 + 0.3 * (x / who.eye_width).clamp(-1, 1)
        canvas.fill(both(under.abs() - thickness, x.abs() - who.eye_width - 0.4), line)
        bow = who.brow_curve * (x / 6) ** 2 - who.brow_tilt * x - 0.5
        brow = y - (BROW_V - EYE_V) + 2.6 * now["brow"] - bow - 1.0 * shut
        hair = dark(mix(who.hair, who.skin, 0.08), 0.3)
        canvas.fill(capsule(x, brow, (-5.5, 0.0), (6.0, 0.4), who.brow_thickness), hair)


class _Layer:
    """A painted head layer and the box that it covers."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        covered = pixels[3] > 0
        self.empty = not bool(covered.any())
        if not self.empty:
            texel = 2 * REACH / pixels.shape[-1]
            rows, columns = covered.any(1).nonzero(), covered.any(0).nonzero()
            edges = (columns[0] - 1, columns[-1] + 2, rows[0] - 1, rows[-1] + 2)  # a texel more: it is interpolated
            self.box = [float(edge) * texel - REACH for edge in edges]

    def draw(self, pixels: Tensor, u: Tensor, v: Tensor) -> None:
        """Over RGB [T, 3, H, W], where u and v [T, H, W] say which point of the layer each pixel shows."""
        if self.empty:
            return
        left, right, top, bottom = self.box
        hit = ((u > left) & (u < right) & (v > top) & (v < bottom)).any(0)
        if not bool(hit.any()):
            return
        rows, columns = hit.any(1).nonzero(), hit.any(0).nonzero()
        part = (slice(None), slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        grid = torch.stack((u[part], v[part]), -1).div_(REACH)
        source = self.pixels.expand(len(u), -1, -1, -1)
        layer = grid_sample(source, grid, mode="bilinear", align_corners=False)
        target = pixels[:, :, part[1], part[2]]
        target.mul_(1 - layer[:, 3:]).add_(layer[:, :3])
