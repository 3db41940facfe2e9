"""Distances that the tests use; all in float64."""

from __future__ import annotations

import math

from torch import Tensor


def relative(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; infinite where the shapes differ or a value is not finite."""
    if out.shape != reference.shape or not out.isfinite().all():
        return math.inf
    a, b = out.double(), reference.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def largest(out: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ or a value is not finite."""
    if out.shape != reference.shape or not out.isfinite().all():
        return math.inf
    return float((out.double() - reference.double()).abs().max())


def psnr_db(out: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of video in [-1, 1]."""
    if out.shape != reference.shape or not out.isfinite().all():
        return -math.inf
    return 10 * math.log10(4 / max(float((out.double() - reference.double()).square().mean()), 1e-30))
