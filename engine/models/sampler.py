"""The 4-step flow-matching Euler schedule, and the counter-based generator of noise and relative distances.

Source: spec dit.md section 8 (shift applied twice), section 7.3 (relative distance); design section 2, item 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TRAIN_STEPS = 1000
DISTANCE_RANGE = (4, 30)
_NOISE, _DISTANCE = 1, 2


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the steps: `sigmas` has one more entry than `timesteps` and ends in 0; all are float32 values."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1:
            raise ValueError(f"{len(self.timesteps)} timesteps go with one noise level more, not {len(self.sigmas)}")

    def step_size(self, step: int) -> float:
        """sigma[step+1] - sigma[step] in float32."""
        return float(np.float32(self.sigmas[step + 1]) - np.float32(self.sigmas[step]))


def make_schedule(steps: int = 4, shift: float = 3.0) -> Schedule:
    """The published schedule: 1000, 857.692, 602.151, 8.929 for 4 steps and shift 3."""

    def shifted(sigma: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return shift * sigma / (1 + (shift - 1) * sigma)

    lowest = shifted(np.array(1 / TRAIN_STEPS)).astype(np.float32)
    sigmas = shifted(np.linspace(1.0, float(lowest), steps)).astype(np.float32)
    timesteps = sigmas * np.float32(TRAIN_STEPS)
    return Schedule(tuple(float(t) for t in timesteps), (*(float(s) for s in sigmas), 0.0))


def _generator(seed: int, session: int, block: int, step: int, purpose: int) -> np.random.Generator:
    # Philox is counter-based: the key names the stream, the upper counter words name the place in it, and the lowest
    # word is left to the draw itself, so that every stage agrees on every number without talking.
    mask = (1 << 64) - 1
    key = np.array([seed & mask, session & mask], dtype=np.uint64)
    counter = np.array([0, block, step, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def block_noise(seed: int, session: int, block: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Standard normal float32 noise of one block, the same wherever and whenever it is asked for."""
    return _generator(seed, session, block, 0, _NOISE).standard_normal(shape, dtype=np.float32)


def relative_distance(seed: int, session: int, block: int, step: int) -> int:
    """The uniform draw from 4..30 latent frames that the published code makes for every forward call."""
    low, high = DISTANCE_RANGE
    return int(_generator(seed, session, block, step, _DISTANCE).integers(low, high + 1))
