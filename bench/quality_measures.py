"""What a talking video is judged by: lip sync, identity, named colours, sharpness; with confidence intervals.

Videos are uint8 [T, H, W, 3] at 25 FPS, openings of the mouth float32 [T]. All intervals hold 95%.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from distill.identity import COLOURS
from distill.measure import REGIONS

LAGS = np.arange(-10, 11)  # frames by which the video is late
CLOSE = (9, 10, 11)  # of LAGS: -1, 0, 1
SPOKEN, SHUT = 0.1, 0.02  # true openings above which somebody speaks, below which the mouth is shut
FEWEST = 10  # frames of which a correlation is made
DRAWS = 2000
# Student's t for 95%, over 1 / degrees of freedom.
STUDENT = (0, 1 / 30, 1 / 10, 1 / 5, 1 / 3, 1 / 2, 1), (1.960, 2.042, 2.228, 2.571, 3.182, 4.303, 12.706)
Array = np.ndarray


# -- lip sync ----------------------------------------------------------------------------------------------------------


def near(mask: Array, frames: int) -> Array:
    """Where the mask holds at most so many frames away."""
    return np.convolve(mask, np.ones(2 * frames + 1), "same") > 0.5 if len(mask) > 2 * frames else mask


def spoken(opening: Array) -> Array:
    """Speech with its short pauses: within 5 frames of an open mouth."""
    return near(opening > SPOKEN, 5)


def silent(opening: Array) -> Array:
    """Shut mouths, 4 frames away from any sound."""
    return ~near(opening > SHUT, 4)


def correlation(seen: Array, true: Array) -> float:
    """nan where the truth says too little; 0 for what never changes although it should."""
    if len(true) < FEWEST or true.std() < 1e-6:
        return math.nan
    return 0.0 if seen.std() < 1e-6 else float(np.corrcoef(seen, true)[0, 1])


def lag_curve(seen: Array, true: Array, where: Array) -> Array:
    """Correlation of the seen opening `lag` frames later with the true one, for all LAGS, over frames `where`."""
    count, values = min(len(seen), len(true)), []
    for lag in LAGS:
        at = np.arange(max(0, -lag), min(count, count - lag))
        at = at[where[at]]
        values.append(correlation(seen[at + lag], true[at]))
    return np.array(values)


def lip_sync(seen: list[Array], true: list[Array]) -> dict[str, Any]:
    """Of clips. `correlation` is at the best lag of -1..1, the same for all clips; `shuffled` is with the sound of all
    other clips, at that lag; `offset` is where the mean over all LAGS has its maximum."""
    curves = np.array([lag_curve(s, t, spoken(t)) for s, t in zip(seen, true, strict=True)])
    mean = _nanmean(curves)
    best = max(CLOSE, key=lambda i: -math.inf if math.isnan(mean[i]) else mean[i])
    others = []
    for i, video in enumerate(seen):
        values = [_against(video, true[i], other, best) for j, other in enumerate(true) if j != i]
        others.append(float(_nanmean(np.array(values)[:, None])[0]) if values else math.nan)
    still = [float(s[silent(t)].mean()) if silent(t).sum() >= 3 else math.nan for s, t in zip(seen, true, strict=True)]
    heard = [float(s[spoken(t)].mean()) if spoken(t).any() else math.nan for s, t in zip(seen, true, strict=True)]
    return {
        "correlation": interval(curves[:, best]), "lag": int(LAGS[best]), "offset": _offset(curves),
        "shuffled": interval(np.array(others)), "silent_opening": interval(np.array(still)),
        "spoken_opening": interval(np.array(heard)), "curve": mean.tolist(), "clips": curves[:, best].tolist(),
    }  # fmt: skip


def _against(seen: Array, own: Array, other: Array, best: int) -> float:
    """Correlation with another clip's sound, where both speak: pauses at the start would make all clips alike."""
    count = min(len(seen), len(other))
    where = spoken(own)[:count] & spoken(other)[:count]
    return float(lag_curve(seen[:count], other[:count], where)[best])


def _offset(curves: Array) -> dict[str, Any]:
    """The lag of the mean curve's maximum, with the interval over clips drawn anew."""
    if np.isnan(curves).all():
        return {"value": None, "low": None, "high": None}
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS // 4):
        mean = _nanmean(curves[rng.integers(len(curves), size=len(curves))])
        if not np.isnan(mean).all():
            found.append(int(LAGS[np.nanargmax(mean)]))
    low, high = np.percentile(found, (2.5, 97.5))
    return {"value": int(LAGS[np.nanargmax(_nanmean(curves))]), "low": float(low), "high": float(high)}


def _nanmean(values: Array) -> Array:
    """Over the first axis; nan where there is nothing, without a warning."""
    there = ~np.isnan(values)
    sums = np.where(there, values, 0).sum(0)
    return np.where(there.any(0), sums / np.maximum(there.sum(0), 1), math.nan)


# -- intervals ---------------------------------------------------------------------------------------------------------


def interval(values: Array, block: int = 1) -> dict[str, Any]:
    """Mean with its interval: Student's for less than 20 values that are independent, else a bootstrap's, in which
    `block` neighbours are drawn together. None where there are no values."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": None, "low": None, "high": None, "count": 0}
    if 1 < len(values) < 20 and block == 1:
        error = values.std(ddof=1) / math.sqrt(len(values)) * float(np.interp(1 / (len(values) - 1), *STUDENT))
        low, high = values.mean() - error, values.mean() + error
    else:
        low, high = np.percentile(_draw(values, block).mean(1), (2.5, 97.5))
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "count": len(values)}


def _draw(values: Array, block: int, draws: int = DRAWS) -> Array:
    """Resampled series [draws, n], from blocks that wrap around the end."""
    rng, n = np.random.default_rng(0), len(values)
    block = min(block, n)
    starts = rng.integers(n, size=(draws, -(-n // block)))
    index = (starts[..., None] + np.arange(block)).reshape(draws, -1)[:, :n] % n
    return values[index]


def alike(residuals: Array, fitted: int = 1) -> float:
    """How many neighbours say as much as one value alone, from 1 on: the sum of a series' autocorrelations, or what
    the first one makes of it, whichever is more, up to a quarter of all: a smooth bend is no chance. Residuals of
    `fitted` coefficients look less alike than they are; the first autocorrelation makes up for that."""
    n = len(residuals)
    centred = residuals - residuals.mean()
    power = float((centred**2).sum())
    if n < 4 or power < 1e-30:
        return 1.0
    found, total = [float((centred[:-lag] * centred[lag:]).sum()) / power for lag in range(1, n // 3 + 1)], 1.0
    for value in itertools.takewhile(lambda value: value > 0.05, found):
        total += 2 * value
    first = min(found[0] + (1 + (2 + fitted) * found[0]) / n, 0.95)
    return min(n / 4, max(1.0, total, (1 + first) / (1 - first)))


def block_length(values: Array) -> int:
    """Of a bootstrap: twice as many as are alike, at least the cube root of their number, at most a quarter of it."""
    n = len(values)
    return int(np.clip(math.ceil(2 * alike(values)), math.ceil(n ** (1 / 3)), max(1, n // 4)))


def slope(x: Array, y: Array) -> dict[str, Any]:
    """Least squares y over x; the interval counts neighbours in time that are `alike` as one (Student's t)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = ~np.isnan(y)
    x, y = x[kept], y[kept]
    n = len(x)
    if n < 10:
        return {"value": None, "low": None, "high": None, "windows": n}
    square = float(((x - x.mean()) ** 2).sum())
    value = float((x - x.mean()) @ y) / square
    residuals = y - y.mean() - value * (x - x.mean())
    together = alike(residuals, 2)
    error = math.sqrt(float((residuals**2).sum()) / (n - 2) / square * together)
    error *= float(np.interp(1 / max(1.0, n / together - 2), *STUDENT))
    return {"value": value, "low": value - error, "high": value + error, "windows": n, "alike": together}


# -- pictures ----------------------------------------------------------------------------------------------------------


def distance(features: Array, reference: Array) -> Array:
    """Root mean square difference of identity features [T, 30] from those of the reference [30]."""
    return np.sqrt(((features - reference) ** 2).mean(-1))


def colours(features: Array) -> dict[str, str]:
    """The names in COLOURS nearest to background and clothes; features [30], a mean over frames."""
    names = list(REGIONS)
    found = {}
    for what in ("background", "clothes"):
        sides = [names.index(f"{what} {side}") for side in ("left", "right")]
        colour = np.mean([features[3 * i : 3 * i + 3] for i in sides], axis=0)
        found[what] = min(COLOURS, key=lambda name: float(((colour - COLOURS[name]) ** 2).sum()))
    return found


def gradient(frames: Array) -> float:
    """Mean difference of neighbouring pixels' brightness, 0..255: how sharp a video is."""
    grey = frames.mean(-1, dtype=np.float32)
    return float(np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean())


def psnr(a: Array, b: Array) -> float:
    """dB between two videos; inf where they are equal."""
    error = float(((a.astype(np.float32) - b) ** 2).mean(dtype=np.float64))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def blurred(frames: Array) -> Array:
    """As a codec may leave it: each pixel with a quarter of both neighbours' sum, both ways."""
    x = frames.astype(np.float32)
    for axis in (1, 2):
        x = (2 * x + np.roll(x, 1, axis) + np.roll(x, -1, axis)) / 4
    return (x + 0.5).astype(np.uint8)
