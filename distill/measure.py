"""What can be read off finished frames without knowing how they were made: how far the mouth is open, who it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill.portrait import MOUTH_HEIGHT, ZOOM

# Where a mouth can be, as shares of the picture: outside of it no pixel counts.
MOUTH_BOX = (0.54, 0.90, 0.30, 0.70)  # top, bottom, left, right
# The height measured (in heights of a mouth at opening 1) for true openings: teeth and tongue take their part.
MEASURED, TRUE = (0.0, 0.064, 0.165, 0.256, 0.341, 0.451, 0.54, 1.08), (0.0, 0.075, 0.25, 0.45, 0.65, 0.85, 1.0, 2.0)
# Regions for mean colours, in the same shares: background left and right, hair, forehead, cheeks, clothes.
REGIONS = {
    "background left": (0.02, 0.25, 0.01, 0.10), "background right": (0.02, 0.25, 0.90, 0.99),
    "hair": (0.15, 0.26, 0.38, 0.62), "forehead": (0.31, 0.37, 0.43, 0.57), "left cheek": (0.59, 0.66, 0.32, 0.40),
    "right cheek": (0.59, 0.66, 0.60, 0.68), "clothes left": (0.94, 1.0, 0.30, 0.38),
    "clothes right": (0.94, 1.0, 0.62, 0.70), "collar": (0.92, 1.0, 0.44, 0.56),
}


def region(frames: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    height, width = frames.shape[1:3]
    top, bottom, left, right = box
    return frames[:, round(top * height) : round(bottom * height), round(left * width) : round(right * width)]


def wine_red(red: Any, green: Any, blue: Any) -> Any:
    """How much pixels (channels in 0..1, arrays or tensors) look like the inside of a mouth, 0..1: more red than green
    and, unlike skin, lips and hair, more blue than green, with little green. Linear above 0, so that blur costs
    little, and 0 for every other colour there is."""
    return (2.1 * (red - green) + 2.9 * (blue - green) - 7.7 * green).clip(0, 1)


def mouth_opening(frames: np.ndarray) -> np.ndarray:
    """How far the mouth is open, float32 [T], near the motion's `opening`, from frames uint8 [T, H, W, 3].

    Pixels count by how wine-red they are. Their sums along columns are averaged with the weight of their own cubes:
    this is the height of the tallest columns, so that a wide mouth isn't taken for an open one.
    """
    part = region(frames, MOUTH_BOX).astype(np.float32) / 255
    inside = wine_red(part[..., 0], part[..., 1], part[..., 2])
    columns = inside.sum(1) * (128 / ZOOM / frames.shape[1])
    cubes = columns**3
    height = (cubes * columns).sum(-1) / (cubes.sum(-1) + 1e-3)
    return np.interp(height / MOUTH_HEIGHT, MEASURED, TRUE).astype(np.float32)


def identity_features(frames: np.ndarray) -> np.ndarray:
    """Colours and sizes that stay while a person talks, float32 [T, 30] in 0..1, from frames uint8 [T, H, W, 3].

    Mean RGB of the nine REGIONS; then the share of pixels that differ from the background at the height of the eyes
    (the head's width), in the middle column (its height) and beside the neck (long hair).
    """
    colours = [region(frames, box).mean((1, 2), dtype=np.float32) / 255 for box in REGIONS.values()]
    sides = np.stack(colours[:2], 1)[:, None, None].astype(np.float32)  # [T, 1, 1, 2, 3]
    sizes = []
    for box in ((0.44, 0.56, 0.02, 0.98), (0.02, 0.78, 0.45, 0.55), (0.76, 0.85, 0.02, 0.98)):
        part = region(frames, box).astype(np.float32)[..., None, :] / 255
        apart = np.sqrt(((part - sides) ** 2).sum(-1)).min(-1)
        sizes.append(np.clip((apart - 0.08) / 0.12, 0, 1).mean((1, 2)))
    return np.concatenate([*colours, np.stack(sizes, 1)], 1).astype(np.float32)
