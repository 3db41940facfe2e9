"""Shapes as signed distances (inside negative, in points) and the canvas that they are painted on with soft edges."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.identity import Colour

Number = float | Tensor


def smoothstep(value: Tensor, low: float, high: float) -> Tensor:
    """0 below low, 1 above high, smooth between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def ellipse(x: Tensor, y: Tensor, rx: Number, ry: Number) -> Tensor:
    """Distance to first order: implicit value over the length of its gradient."""
    a, b = x / rx, y / ry
    k = (a * a + b * b).sqrt()
    slope = ((a / rx) ** 2 + (b / ry) ** 2).sqrt()
    return k * (k - 1) / slope.clamp_min(1e-4)


def superellipse(x: Tensor, y: Tensor, rx: float, ry: float, power: float) -> Tensor:
    """|x/rx|^p + |y/ry|^p = 1: rounder corners than a box, fuller than an ellipse."""
    a, b = (x / rx).abs().clamp_min(1e-3), (y / ry).abs().clamp_min(1e-3)
    value = a**power + b**power
    slope = power * ((a ** (power - 1) / rx) ** 2 + (b ** (power - 1) / ry) ** 2).sqrt()
    root = value ** (1 / power)
    return (root - 1) * power * value / root / slope.clamp_min(1e-4)


def capsule(x: Tensor, y: Tensor, a: tuple[float, float], b: tuple[float, float], radius: float) -> Tensor:
    """A line from a to b with round ends."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = (((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((x - a[0] - along * dx) ** 2 + (y - a[1] - along * dy) ** 2).sqrt() - radius


def box(x: Tensor, y: Tensor, rx: float, ry: float, corner: float) -> Tensor:
    """A rectangle with round corners."""
    qx, qy = x.abs() - rx + corner, y.abs() - ry + corner
    return (qx.clamp_min(0) ** 2 + qy.clamp_min(0) ** 2).sqrt() + torch.maximum(qx, qy).clamp_max(0) - corner


def union(a: Tensor, b: Tensor, blend: float = 0.0) -> Tensor:
    """The smaller distance, with a fillet of some points where the two meet."""
    if not blend:
        return torch.minimum(a, b)
    h = (blend - (a - b).abs()).clamp_min(0) / blend
    return torch.minimum(a, b) - h * h * blend / 4


def both(a: Tensor, b: Tensor) -> Tensor:
    """What lies in both shapes."""
    return torch.maximum(a, b)


class Canvas:
    """Premultiplied RGBA [4, H, W] or opaque RGB [T, 3, H, W]; x and y are the points' coordinates, [H, W] or more."""

    def __init__(self, pixels: Tensor, x: Tensor, y: Tensor, edge: float) -> None:
        self.pixels, self.x, self.y, self.edge = pixels, x, y, edge  # edge: width of a soft edge in points
        self.channels = pixels.shape[-3]

    def fill(self, distance: Tensor, colour: Colour, alpha: Number = 1.0, blur: float = 0.0) -> None:
        """Paints a shape over what is there; `blur` points of extra softness make a shadow or a glow."""
        cover = (0.5 - distance / (self.edge + blur)).clamp(0, 1)
        if blur:
            cover = cover * cover * (3 - 2 * cover)
        cover = (cover * alpha).unsqueeze(-3)
        paint = torch.tensor((*colour, 1.0)[: self.channels]).view(-1, 1, 1)
        self.pixels.add_(cover * (paint - self.pixels))

    def outlined(self, distance: Tensor, colour: Colour, line: Colour, width: float = 0.9) -> None:
        """A shape with a line along the inside of its edge."""
        self.fill(distance, line)
        self.fill(distance + width, colour)
