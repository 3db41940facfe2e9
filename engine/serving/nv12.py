"""RGB frames as NV12, what hardware encoders take: BT.601, limited range, as FFmpeg assumes of untagged video."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
SCALE_Y, SCALE_C = np.float32(219 / 255), np.float32(224 / 255)


def to_nv12(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] with even sides -> uint8 [3/2 H, W]: luma, then rows of Cb, Cr of each 2x2 pixels' mean."""
    height, width, _ = frame.shape
    pixels = frame.astype(np.float32)
    out = np.empty((height * 3 // 2, width), np.uint8)
    np.rint(pixels @ LUMA * SCALE_Y + 16, out=out[:height], casting="unsafe")
    small = pixels.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    luma, chroma = small @ LUMA, out[height:].reshape(height // 2, width // 2, 2)
    for place, (channel, weight) in enumerate(((2, LUMA[2]), (0, LUMA[0]))):
        difference = (small[..., channel] - luma) / (2 * (1 - weight))
        np.rint(difference * SCALE_C + 128, out=chroma[..., place], casting="unsafe")
    return out
