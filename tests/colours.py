"""BT.709 in limited range by its definition, in float64: what video of ours is compared with."""

from __future__ import annotations

import numpy as np

RED, BLUE = 0.2126, 0.0722
WEIGHTS = np.array([RED, 1 - RED - BLUE, BLUE])


def exact_nv12(picture: np.ndarray) -> np.ndarray:
    """Bytes [H, W, 3] as NV12 before rounding, float64 [3/2 H, W]."""
    height, width, _ = picture.shape
    rgb = picture / 255
    mean = rgb.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    luma = mean @ WEIGHTS
    cb, cr = (mean[..., 2] - luma) / (2 - 2 * BLUE), (mean[..., 0] - luma) / (2 - 2 * RED)
    chroma = 128 + 224 * np.stack((cb, cr), axis=-1).reshape(height // 2, width)
    return np.concatenate((16 + 219 * (rgb @ WEIGHTS), chroma))


def exact_rgb(planes: np.ndarray) -> np.ndarray:
    """Bytes of yuv420p [3/2 H, W] as colours in 0..255, float64 [H, W, 3]; chroma is repeated for its 2x2 pixels."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    luma = (planes[:height] - 16.0) / 219
    chroma = (planes[height:].reshape(2, height // 2, width // 2) - 128.0) / 224
    cb, cr = chroma.repeat(2, axis=1).repeat(2, axis=2)
    red, blue = luma + (2 - 2 * RED) * cr, luma + (2 - 2 * BLUE) * cb
    green = (luma - RED * red - BLUE * blue) / (1 - RED - BLUE)
    return 255 * np.stack((red, green, blue), axis=-1)
