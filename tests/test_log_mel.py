"""The log-mel front end: where it hears, what it says of levels, and that it stands in wav2vec2's place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from liverelay.engine.errors import CheckpointError
from liverelay.engine.models.audio import AudioEncoder
from liverelay.engine.models.audio_live import LiveAudio, on_absolute_grid
from liverelay.engine.models.log_mel import LogMel, load_encoder, mel_filters


def encoder(bands: int = 40) -> LogMel:
    return LogMel(bands, torch.device("cpu"), torch.float32)


def seeded(rng: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(1 << 31, (), generator=rng)))


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 719, 720, 16000, 16001])
def test_there_are_as_many_features_as_of_wav2vec2(samples: int) -> None:
    states = encoder().hidden_states(np.zeros(samples, np.float32))
    assert states.shape == (1, (max(400, samples) - 80) // 320, 40)


def test_energies_equal_a_plain_fourier_sum(rng: torch.Generator) -> None:
    random = seeded(rng)
    sound = random.standard_normal(4000).astype(np.float32)
    states = encoder().hidden_states(sound)[0].double().numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    wave = np.exp(-2j * np.pi * np.outer(np.arange(513), np.arange(1024)) / 1024)
    for i in (0, 3, len(states) - 1):
        piece = np.array([sound[t] if 0 <= t < 4000 else 0.0 for t in range(320 * i - 312, 320 * i + 712)])
        power = np.abs(wave @ (piece * window)) ** 2 / (window**2).sum()
        want = np.log10(np.maximum(power @ mel_filters(40).astype(np.float64), 1e-5)) / 2 + 1
        np.testing.assert_allclose(states[i], want, atol=1e-4)


def test_a_tone_is_heard_where_and_when_it_sounds(rng: torch.Generator) -> None:
    random = seeded(rng)
    band, place = int(random.integers(8, 38)), int(random.integers(10, 40))
    low, high = 1127 * np.log1p(60 / 700), 1127 * np.log1p(7600 / 700)
    hertz = 700 * np.expm1((low + (high - low) * (band + 1) / 41) / 1127)
    middle = 320 * place + 200
    time = np.arange(16000)
    sound = (np.sin(2 * np.pi * hertz * time / 16000) * (abs(time - middle) < 300)).astype(np.float32)
    states = encoder().hidden_states(sound)[0]
    assert abs(int(states[place].argmax()) - band) <= 1
    assert int(states[:, band].argmax()) == place


def test_live_features_are_those_of_the_whole_sound_but_for_its_loudness(rng: torch.Generator) -> None:
    """A window of 64 ms needs no more than the look-ahead, so only the running loudness differs."""
    sound = seeded(rng).standard_normal(25 * 640).astype(np.float32) * 0.1
    live = LiveAudio(encoder())
    live.push(sound, 16000)
    live.finish()
    heard = torch.cat([live.features(0, 12), live.features(12, 24)], dim=2)
    whole = on_absolute_grid(encoder().hidden_states(sound / sound.std()), 0, 0, 24)
    assert float((heard - whole).abs().max()) < 0.02


def test_a_folder_names_its_front_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "log_mel", "bands": 24}))
    found = load_encoder(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert isinstance(found, AudioEncoder) and (found.num_states, found.width) == (1, 24)
    assert found.hidden_states(np.zeros(1600, np.float32)).dtype is torch.bfloat16


@pytest.mark.parametrize("bands", [0, "40", None, 1000, True])
def test_a_wrong_number_of_bands_is_refused(tmp_path: Path, bands: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "log_mel", "bands": bands}))
    with pytest.raises(CheckpointError, match="bands="):
        load_encoder(tmp_path, device="cpu", dtype=torch.float32)
