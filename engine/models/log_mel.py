"""A light audio front end in the place of wav2vec2: one state of log-mel energies, 50 a second, on the same grid.

A checkpoint chooses it by `{"model_type": "log_mel", "bands": 40}` in the config.json of
its audio folder. It has no weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from liverelay.engine.errors import CheckpointError
from liverelay.engine.models.audio import MIN_SAMPLES, SAMPLE_RATE, AudioEncoder, Samples

HOP, WINDOW = 320, 1024
MIDDLE = 200  # of the first feature, in samples: that of wav2vec2's 400
LOWEST_HZ, HIGHEST_HZ = 60.0, 7600.0
FLOOR = 1e-5  # of power, where that of the whole sound is 1: -50 dB
MAX_BANDS = 128


class LogMel(AudioEncoder):
    """hidden_states [1, T50, bands]; everything else as wav2vec2's encoder."""

    def __init__(self, bands: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.num_states, self.width = 1, bands
        self._filters = torch.from_numpy(mel_filters(bands)).to(device)
        self._window = torch.hann_window(WINDOW, device=device)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> LogMel:
        """CheckpointError unless config.json names a number of bands."""
        bands = _settings(folder).get("bands")
        if type(bands) is not int or not 1 <= bands <= MAX_BANDS:
            raise CheckpointError(f"{folder / 'config.json'} says bands={bands!r}; it must be within 1..{MAX_BANDS}")
        return cls(bands, torch.device(device), dtype)

    @torch.inference_mode()
    def hidden_states(self, values: Samples) -> Tensor:
        """values: normalised samples [n] -> [1, T50, bands], T50 = floor((n - 80) / 320), near -1..2.

        Feature i hears 64 ms around sample 320 i + 200, zeros before and after the sound; log10 of the mean power of
        each band, halved.
        """
        count = (max(MIN_SAMPLES, len(values)) - 80) // HOP
        left = WINDOW // 2 - MIDDLE
        needed = (count - 1) * HOP + WINDOW
        padded = np.pad(values, (left, max(0, needed - left - len(values))))[:needed]
        frames = torch.from_numpy(padded).to(self.device).unfold(0, WINDOW, HOP) * self._window
        power = torch.fft.rfft(frames).abs().square() / self._window.square().sum()
        energies = (power @ self._filters).clamp_min(FLOOR).log10()
        return (energies / 2 + 1).to(self.dtype).unsqueeze(0)


def is_log_mel(folder: Path) -> bool:
    """Whether an audio folder's config.json names this front end; its other faults are told on loading."""
    try:
        return _settings(folder).get("model_type") == "log_mel"
    except CheckpointError:
        return False


def load_encoder(folder: Path, *, device: str, dtype: torch.dtype) -> AudioEncoder:
    """The front end that a folder holds."""
    return (LogMel if is_log_mel(folder) else AudioEncoder).load(folder, device=device, dtype=dtype)


def _settings(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as json: {error}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} does not hold a table of names")
    return settings


def mel_filters(bands: int) -> npt.NDArray[np.float32]:
    """Triangles of equal width in mel, each of sum 1: [WINDOW / 2 + 1, bands]. mel = 1127 ln(1 + f / 700)."""
    low, high = (1127 * np.log1p(f / 700) for f in (LOWEST_HZ, HIGHEST_HZ))
    corners = 700 * np.expm1(np.linspace(low, high, bands + 2) / 1127)
    bins = np.arange(WINDOW // 2 + 1)[:, None] * SAMPLE_RATE / WINDOW
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling))
    nearest = np.abs(bins - corners[1:-1]).argmin(axis=0)  # low bands are narrower than the distance of two bins
    filters[nearest, np.arange(bands)] = np.maximum(filters[nearest, np.arange(bands)], 1e-3)
    return (filters / filters.sum(axis=0)).astype(np.float32)
