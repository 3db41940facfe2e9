"""The parts of a portrait that only move with the head or not at all, each painted once for an identity.

Head layers use the head's own coordinates in points: u to the right, v down, the origin between the eyes and nose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.identity import Colour, Identity, dark, light, mix
from distill.shapes import Canvas, both, box, capsule, ellipse, smoothstep, superellipse, union

HEAD_X, HEAD_Y = 64.0, 61.0  # where the head's origin is in the picture, in points
REACH = 72.0  # a head layer covers -REACH..REACH in both directions
EYE_V, MOUTH_V, BROW_V = -2.0, 18.5, -12.5


def head_canvas(size: int, detail: float = 1.5) -> Canvas:
    """An empty layer in head coordinates with `detail` texels for a pixel of the picture."""
    texels = round(2 * REACH * size / 128 * detail)
    axis = (torch.arange(texels, dtype=torch.float32) + 0.5) * (2 * REACH / texels) - REACH
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    return Canvas(torch.zeros(4, texels, texels), u, v, edge=128 / size)


def picture_axes(size: int) -> tuple[Tensor, Tensor]:
    """x, y [size, size] of the pixels' middles in points."""
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) * (128 / size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def background(who: Identity, size: int) -> Tensor:
    """RGB [3, size, size]."""
    x, y = picture_axes(size)
    base = who.background_colour
    canvas = Canvas(torch.empty(3, size, size), x, y, edge=128 / size)
    canvas.pixels[:] = torch.tensor(base).view(3, 1, 1)
    everywhere = torch.full_like(x, -99.0)
    if who.background_kind == "gradient":
        canvas.fill(everywhere, dark(base, 0.22), alpha=smoothstep(y, 10, 140))
    elif who.background_kind == "halo":
        canvas.fill(ellipse(x - 64, y - 62, 54, 54), light(base, 0.16))
    elif who.background_kind == "two-tone":
        canvas.fill(x * 0.5 - y + 42, dark(base, 0.12))
    return canvas.pixels


def body(who: Identity, size: int) -> Tensor:
    """Neck, shoulders and collar as RGBA [4, size, size]; they stay where they are."""
    x, y = picture_axes(size)
    canvas = Canvas(torch.zeros(4, size, size), x, y, edge=128 / size)
    x = x - HEAD_X
    cloth, skin, a = who.clothes_colour, who.skin, (x.abs())
    line, fold = dark(cloth, 0.28), dark(cloth, 0.14)
    neck = box(x, y - 96, 10.5, 18, 6)
    shoulders = superellipse(x, y - 142, 49, 37, 2.5)
    if who.collar == "hoodie":
        canvas.outlined(ellipse(x, y - 107, 27, 11), fold, line)
    canvas.outlined(shoulders, cloth, line)
    canvas.fill(capsule(a, y, (33, 121), (35, 130), 0.5), line, alpha=0.7)
    if who.collar == "vee":
        opening = a * 0.86 + (y - 122) * 0.5
        canvas.fill(both(opening - 2.6, shoulders), fold)
        canvas.fill(both(opening, shoulders), dark(skin, 0.07))
    elif who.collar in ("crew", "hoodie"):
        canvas.fill(ellipse(x, y - 104, 17, 9), fold)
        canvas.fill(ellipse(x, y - 103, 14, 7.5), dark(skin, 0.07))
    elif who.collar == "shirt":
        canvas.fill(both(a * 0.86 + (y - 118) * 0.5, shoulders), dark(skin, 0.07))
    canvas.fill(neck, dark(skin, 0.07))
    canvas.fill(both(neck, ellipse(x, y - 88, 24, 16)), dark(skin, 0.24), blur=4)
    if who.collar == "turtleneck":
        canvas.outlined(box(x, y - 106, 14.5, 8.5, 4), light(cloth, 0.06), line)
    elif who.collar == "shirt":
        flap = both(both(a * 0.8 - (y - 99) * 0.6 - 7, -(a * 0.86 + (y - 118) * 0.5)), both(y - 119 + a * 0.15, a - 21))
        canvas.outlined(flap, light(cloth, 0.25), line)
        canvas.fill(box(x, y - 130, 0.4, 13, 0.2), line)
        canvas.fill(ellipse(x - 2.4, y - 123, 1, 1), line)
    elif who.collar == "hoodie":
        canvas.fill(capsule(a, y, (7, 111), (8, 121), 0.8), light(cloth, 0.5))
    return canvas.pixels


def skull(who: Identity, u: Tensor, v: Tensor) -> Tensor:
    """The face's outline: an ellipse above, a jaw of the identity's exponent below."""
    upper = superellipse(u, v, who.face_width, who.face_height, 2.15)
    lower = superellipse(u, v, who.face_width, who.face_height, who.jaw)
    return torch.where(v < 0, upper, lower + (upper - lower) * (1 - v / 8).clamp(0, 1))


def back_hair(who: Identity, size: int) -> Tensor:
    """Hair behind head and body, RGBA."""
    canvas = head_canvas(size)
    u, v, w, h = canvas.x, canvas.y, who.face_width, who.face_height
    colour, line = dark(who.hair, 0.14), dark(who.hair, 0.4)
    style = who.hair_style
    cap = ellipse(u, v + 6, w + 5, h + 2)
    if style == "bob":
        canvas.outlined(union(cap, superellipse(u, v - 6, w + 8.5, 29, 3.2), 6), colour, line)
    elif style == "long":
        canvas.outlined(union(cap, superellipse(u, v - 22, w + 8 + 0.0, 46, 4), 6), colour, line)
    elif style == "bun":
        bun = ellipse(u, v + h + 10.5, 12, 10.5)
        canvas.outlined(bun, who.hair, line)
        canvas.fill(ellipse(u + 3, v + h + 14, 5, 2.2), light(who.hair), alpha=0.5, blur=2)
        canvas.outlined(cap, colour, line)
    elif style == "ponytail":
        tail = union(ellipse(u - w - 7, v + 10, 9, 13), ellipse(u - w - 9, v - 12, 7, 24), 10)
        canvas.outlined(tail, colour, line)
        canvas.outlined(cap, colour, line)
    elif style == "curly":
        canvas.outlined(curls(u, v, w, h), colour, line)
    elif style != "bald":
        canvas.outlined(ellipse(u, v + 7, w + 2.5, h - 2), colour, line)
    return canvas.pixels


def curls(u: Tensor, v: Tensor, w: float, h: float) -> Tensor:
    """A cloud of circles round the upper head."""
    shape = ellipse(u, v + 9, w + 4, h)
    for angle in torch.linspace(-0.35, torch.pi + 0.35, 11).tolist():
        centre = torch.tensor(angle)
        x, y = float(centre.cos()) * (w + 3), -float(centre.sin()) * (h + 1) - 8
        shape = union(shape, ellipse(u - x, v - y, 7.5, 7.5), 2)
    return shape


def face(who: Identity, size: int) -> Tensor:
    """Ears, face, cheeks, nose, freckles and beard, RGBA; eyes, brows and mouth move and come later."""
    canvas = head_canvas(size)
    u, v, a, w = canvas.x, canvas.y, canvas.x.abs(), who.face_width
    skin, line = who.skin, mix(dark(who.skin, 0.34), (0.35, 0.2, 0.14), 0.2)
    ear = ellipse(a - w - 0.4, v - 2, who.ears, who.ears * 1.3)
    canvas.outlined(ear, skin, line)
    canvas.fill(ellipse(a - w - 1.2, v - 2, who.ears * 0.5, who.ears * 0.75), dark(skin, 0.16), blur=1)
    outline = skull(who, u, v)
    canvas.outlined(outline, skin, line)
    inside = outline + 1.4
    canvas.fill(both(inside, -ellipse(u + 3, v + 4, w + 1, who.face_height + 1)), dark(skin, 0.13), alpha=0.8, blur=3)
    canvas.fill(ellipse(u + 8, v + 18, 15, 9), light(skin, 0.25), alpha=0.45, blur=9)
    canvas.fill(ellipse(a - who.eye_distance - 4, v - 9.5, 6.5, 4.2), (0.93, 0.42, 0.40), alpha=who.blush, blur=4)
    if who.freckles:
        for x, y in ((9, 8), (12.5, 6.6), (15.5, 9), (12, 10.4), (18.2, 7)):
            canvas.fill(ellipse(a - x, v - y, 0.75, 0.7), dark(skin, 0.3), alpha=0.75)
    beard(who, canvas, outline)
    nose = union(ellipse(u, v - 8, who.nose, 2.5), ellipse(u, v - 4.5, who.nose * 0.55, 4), 3)
    canvas.fill(nose - 0.2, dark(skin, 0.24), alpha=0.8, blur=1)
    canvas.fill(both(nose, v - 9.2) + 0.3, mix(skin, (0.95, 0.55, 0.48), 0.16), blur=0.6)
    canvas.fill(ellipse(u + 0.8, v - 6.3, who.nose * 0.36, 1.2), light(skin, 0.5), alpha=0.7, blur=1)
    return canvas.pixels


def beard(who: Identity, canvas: Canvas, outline: Tensor) -> None:
    """Hair in the lower face; a full beard leaves the mouth's surroundings to the lips."""
    u, v, a = canvas.x, canvas.y, canvas.x.abs()
    colour = dark(who.hair, 0.06)
    if who.beard == "full":
        edge = 13.2 - 19 * ((a - 10) / (who.face_width - 10)).clamp(0, 1) ** 1.6 + 1.5 * (1 - a / 9).clamp_min(0)
        canvas.fill(both(outline - 0.6, (edge - v) * 0.8), colour, blur=1.2)
    elif who.beard == "goatee":
        canvas.fill(superellipse(u, v - who.face_height + 6, 9.5, 7, 2.6), colour, blur=0.8)
    if who.beard in ("goatee", "moustache"):
        curl = v - 13.2 - 0.018 * (a - 2) ** 2
        canvas.fill(ellipse(a - 5.2, curl, 7, 1.9), colour, blur=0.6)


def hairline(who: Identity, u: Tensor) -> Tensor:
    """The height v down to which hair covers the forehead, for each column."""
    w, h = who.face_width, who.face_height
    side = (u.abs() / w).clamp_max(1.1) ** 6 * 16
    if who.hair_style == "fringe":
        return -h * 0.44 + 1.6 * torch.cos(u * 0.75) + side * 1.2
    if who.hair_style == "bob":
        return -h * 0.50 + 0.004 * u * u + 1.0 * torch.cos(u * 0.9) + side * 1.4
    if who.hair_style in ("long", "ponytail"):
        return -h * 0.98 + 2.9 * (u + 7).abs() ** 0.62 + side * 1.3
    if who.hair_style == "parted":
        return -h * 0.86 + 0.012 * (u + 14) ** 2 * (u > -14) + 0.05 * (u + 14) ** 2 * (u <= -14) + side * 0.6
    if who.hair_style == "spiky":
        return -h * 0.66 + 2.6 * (torch.remainder(u / 7.5, 1) - 0.5).abs() * 2 + side * 0.7
    return -h * 0.70 + 0.0035 * u * u + side * 0.8


def front_hair(who: Identity, size: int) -> Tensor:
    """Hair over the forehead, and glasses, RGBA."""
    canvas = head_canvas(size)
    u, v, w, h = canvas.x, canvas.y, who.face_width, who.face_height
    colour, line, style = who.hair, dark(who.hair, 0.4), who.hair_style
    top = {"short": 3.0, "curly": 4.0, "parted": 6.0, "spiky": 4.0}.get(style, 4.5)
    if style != "bald":
        dome = superellipse(u, v, w + 1.8, h + top, 2.2)
        if style == "curly":
            dome = union(dome, curls(u, v, w - 2, h - 1), 2)
        if style == "spiky":
            dome = dome - 5.5 * (1 - (torch.remainder(u / 9 + 0.1, 1) - 0.5).abs() * 2) * smoothstep(-v, 14, 30)
        hair = both(dome, (v - hairline(who, u)) * 0.8)
        canvas.fill(both(hair - 1.4, dome), dark(who.skin, 0.3), alpha=0.5, blur=2.5)
        canvas.outlined(hair, colour, line)
        shine = both((ellipse(u + 4, v + 4, w - 7, h - 4)).abs() - 1.5, both(v + h * 0.66, hair + 2))
        canvas.fill(shine, light(colour, 0.35), alpha=0.55, blur=2.5)
    if who.glasses != "none":
        frame, a = (0.17, 0.16, 0.2), u.abs()
        x, y, r = a - who.eye_distance, v - EYE_V - 0.3, who.eye_width + 3.2
        rim = ellipse(x, y, r, r * 0.98) if who.glasses == "round" else box(x, y, r, r * 0.82, 3)
        canvas.fill(rim, (0.8, 0.92, 1.0), alpha=0.13)
        canvas.fill(rim.abs() - 0.62, frame)
        bridge = who.eye_distance - r
        canvas.fill(both((ellipse(u, v - EYE_V + 0.5, bridge + 1, 2.2)).abs() - 0.6, v - EYE_V), frame)
        canvas.fill(capsule(a, v, (who.eye_distance + r, EYE_V), (w + 1, EYE_V - 1), 0.7), frame)
    return canvas.pixels


def closed_line(who: Identity) -> Colour:
    """The line between closed lips: a brown, so that it isn't taken for the inside of the mouth."""
    return mix(dark(who.lip, 0.35), (0.42, 0.26, 0.18), 0.5)
