"""Sound is read whole or refused by name; features are the published ones, and live ones do not see the cuts."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models import audio
from liverelay.engine.models.audio import AudioEncoder, feature_count_30, feature_index, normalise
from liverelay.engine.models.audio_live import LiveAudio, LiveAudioConfig, live_distance

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")
soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")

Numbers, Tensors = np.random.Generator, dict[str, Tensor]
RATE, FRAME, BLOCK = 16000, 640, 12
KEY = "encoder.layer_norm.weight"


@pytest.fixture
def folder(checkpoint: Path) -> Path:
    return checkpoint / "wav2vec2-large-xlsr-53-english"


@pytest.fixture
def encoder(folder: Path) -> AudioEncoder:
    return AudioEncoder.load(folder, dtype=torch.float32)


class Ear:
    """An encoder that hears nothing, quickly."""

    def hidden_states(self, values: np.ndarray) -> Tensor:
        return torch.zeros(1, (len(values) - 80) // 320, 1)


def noise(numbers: Numbers, *shape: int) -> np.ndarray:
    return numbers.uniform(-0.5, 0.5, shape).astype(np.float32)


def test_buckets_are_the_published_ones(golden: Path) -> None:
    table = json.loads((golden / "audio_tiny" / "bucket_index_table.json").read_text())
    for count, expected in table["T50_to_T30"].items():
        assert feature_count_30(int(count)) == expected
    assert any("source_index" in case for case in table["cases"])
    for case in table["cases"]:
        numbered, valid = torch.arange(1, case["T30"] + 1).view(1, -1, 1), case["num_valid"]
        source = (audio.bucket(numbered, case["batch_frames"])[0, 0] - 1).tolist()  # -1 where there is nothing
        expected = [*feature_index(range(valid)), *[-1] * (case["num_frames"] - valid)]
        assert source == expected == case.get("source_index", expected)
        assert case.get("last_valid_source_index", expected[valid - 1]) == expected[valid - 1]


def test_every_sixth_sample_is_skipped_and_counts_are_truncated_as_published() -> None:
    assert feature_index(range(5000)).tolist() == [i for i in range(6000) if i % 6 != 3]
    short = [count for count in range(500_000) if feature_count_30(count) != 3 * count // 5]
    assert short[:5] == [205, 410, 820, 845, 1615] and len(short) == 2184
    assert all(feature_count_30(count) == 3 * count // 5 - 1 for count in short)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_any_wav_becomes_16_khz_mono(tmp_path: Path, numbers: Numbers, rate: int, channels: int, subtype: str) -> None:
    count, pitch = int(numbers.integers(rate // 2, rate)), float(numbers.uniform(300, 3000))
    loudness = numbers.uniform(0.1, 0.5, channels)
    samples = (np.sin(2 * np.pi * pitch * np.arange(count) / rate)[:, None] * loudness).astype(np.float32)
    path = tmp_path / "tone.wav"
    soundfile.write(path, samples, rate, subtype=subtype)
    heard = audio.load_waveform(path)
    assert heard.dtype == np.float32 and heard.shape == (-(-count * RATE // rate),) and np.isfinite(heard).all()
    peak = np.abs(np.fft.rfft(heard * np.hanning(len(heard)))).argmax()
    assert abs(peak * RATE / len(heard) - pitch) <= RATE / len(heard)  # one bin
    level = np.sqrt(np.mean(np.square(heard[500:-500], dtype=np.float64)))
    assert level == pytest.approx(loudness.mean() / np.sqrt(2), rel=0.05)  # cut ripples, 8-bit steps


BROKEN: dict[str, Callable[[Path], object]] = {
    "no samples": lambda path: soundfile.write(path, np.zeros(0, np.float32), RATE),
    "not a number": lambda path: soundfile.write(path, np.array([0, np.nan, 0], np.float32), RATE, subtype="FLOAT"),
    "infinite": lambda path: soundfile.write(path, np.array([0, np.inf, 0], np.float32), RATE, subtype="FLOAT"),
    "no bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is a letter, not a sound\n" * 99),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_without_usable_sound_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken sound.wav"
    BROKEN[kind](path)
    with pytest.raises(InputError, match=r"broken sound\.wav") as caught:
        audio.load_waveform(path)
    assert "\n" not in str(caught.value)


def test_normalised_sound_has_mean_zero_and_variance_one(numbers: Numbers) -> None:
    out = normalise(noise(numbers, 20_000) * np.float32(0.3) + np.float32(0.2))
    assert abs(out.mean(dtype=np.float64)) <= 1e-5  # float32 rounding of the mean, over a deviation of 0.09
    assert out.var(dtype=np.float64) == pytest.approx(1, abs=1e-4)  # 1e-7 over a variance of 0.0075
    for silence in (np.zeros(1000, np.float32), np.full(1000, 0.3, np.float32)):
        assert np.isfinite(normalise(silence)).all()


@pytest.mark.parametrize("count", [1, 399, 400, 401, 719, 720])
def test_very_short_sound_has_features(encoder: AudioEncoder, numbers: Numbers, count: int) -> None:
    sound = noise(numbers, count)
    assert encoder.hidden_states(normalise(sound)).shape == (25, 2 if count == 720 else 1, encoder.width)
    features = encoder.encode_file(sound)
    assert features.shape == (25, encoder.width, 48) and features.isfinite().all()
    assert features[:, :, 0].any() and not features[:, :, 1:].any()  # one sample at 30 Hz, then silence


def hear(encoder: AudioEncoder, sound: np.ndarray, rate: int, numbers: Numbers, pieces: int) -> list[Tensor]:
    """Features block by block, asked for at random times after they are ready."""
    live, blocks = LiveAudio(encoder, LiveAudioConfig(left_context_s=0.3)), list[Tensor]()
    for piece in np.split(sound, sorted(numbers.integers(0, len(sound), pieces))):
        live.push(piece, rate)
        while live.ready(BLOCK * (len(blocks) + 1)) and numbers.random() < 0.6:
            blocks.append(live.features(BLOCK * len(blocks), BLOCK * (len(blocks) + 1)))
    live.finish()
    while BLOCK * len(blocks) < (live.total_frames() or 0):
        blocks.append(live.features(BLOCK * len(blocks), BLOCK * (len(blocks) + 1)))
    return blocks


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2)])
def test_the_cuts_leave_no_trace(encoder: AudioEncoder, numbers: Numbers, rate: int, channels: int) -> None:
    sound = noise(numbers, int(numbers.integers(rate, 2 * rate)), channels)
    whole = hear(encoder, sound, rate, numbers, 0)
    for pieces in (5, 60):
        parts = zip(hear(encoder, sound, rate, numbers, pieces), whole, strict=True)
        assert all(torch.equal(part, block) for part, block in parts), pieces


def test_memory_of_a_long_stream_is_bounded_by_the_window(numbers: Numbers) -> None:
    """At most the last window, grown by the block that is waited for and the piece that completes it."""
    live, frame, largest = LiveAudio(Ear(), LiveAudioConfig(4, 0.2)), 0, 0  # type: ignore[arg-type]
    window = int(4.2 * RATE) + BLOCK * FRAME + 320  # it begins on a feature
    for _ in range(240):
        live.push(noise(numbers, RATE // 4), RATE)
        largest = max(largest, live.buffered_samples)
        while live.ready(frame + BLOCK):
            live.features(frame, frame + BLOCK)
            frame += BLOCK
    assert frame == (60 * RATE - RATE // 5) // FRAME // BLOCK * BLOCK
    assert window <= largest <= window + BLOCK * FRAME + RATE // 4
    assert live._buffer.base is None  # no view that keeps dropped samples alive


def test_frames_are_ready_when_sound_and_look_ahead_have_come(encoder: AudioEncoder, numbers: Numbers) -> None:
    live = LiveAudio(encoder, LiveAudioConfig(left_context_s=0))
    live.push(noise(numbers, BLOCK * FRAME + int(0.2 * RATE) - 1), RATE)
    assert not live.ready(BLOCK)
    live.push(noise(numbers, 1), RATE)
    assert live.ready(BLOCK) and not live.ready(BLOCK + 1)
    live.push_silence(2 * BLOCK)
    assert not live.ready(2 * BLOCK)  # silence fills the block; what is heard after it is not known yet
    live.features(BLOCK, 2 * BLOCK)
    with pytest.raises(InputError, match="in order"):
        live.features(0, BLOCK)


def test_length_is_known_at_the_end_and_silence_follows(encoder: AudioEncoder, numbers: Numbers) -> None:
    live, sound = LiveAudio(encoder), noise(numbers, int(numbers.integers(1, 5 * FRAME)))
    live.push(sound, RATE)
    assert live.total_frames() is None
    live.finish()
    assert live.ready(1000) and live.total_frames() == -(-len(sound) // FRAME)
    assert np.array_equal(live.samples(0, 7), np.pad(sound, (0, 7 * FRAME - len(sound))))
    with pytest.raises(InputError, match="ended"):
        live.push(np.zeros(1), RATE)


@pytest.mark.parametrize("rate", [44100, 24000, 22050, 8000])
def test_resampled_streams_last_as_long_as_their_sound(encoder: AudioEncoder, numbers: Numbers, rate: int) -> None:
    for frames in range(1, 20):
        live, count = LiveAudio(encoder), frames * rate // 25
        live.push(noise(numbers, count), rate)
        live.finish()
        assert live.total_frames() == -(-count * RATE // rate // FRAME), (frames, rate)


@pytest.mark.parametrize("rate", [16000, 48000, 44100])
def test_silence_comes_after_the_sound_that_was_pushed_before_it(encoder: AudioEncoder, rate: int) -> None:
    live, tone = LiveAudio(encoder), 0.5 * np.sin(np.arange(rate // 10) / rate * 2 * np.pi * 300)
    live.push(tone, rate)
    live.push_silence(9)
    live.push(tone, rate)
    live.finish()
    heard, once = live.samples(0, 30), RATE // 10
    assert live.total_frames() == -(-(9 * FRAME + once) // FRAME)
    assert np.abs(heard[once + 50 : 9 * FRAME - 50]).max() < 1e-3
    for start in (0, 9 * FRAME):
        assert np.std(heard[start : start + once]) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    assert np.abs(heard[9 * FRAME + once + 50 :]).max() < 1e-3


def test_a_long_silence_does_not_make_speech_loud(encoder: AudioEncoder, numbers: Numbers) -> None:
    live, speech = LiveAudio(encoder), noise(numbers, 4 * BLOCK * FRAME) * 0.1
    live.push(speech, RATE)
    for block in range(3):
        live.features(block * BLOCK, (block + 1) * BLOCK)
    before = live._statistics.normalise(speech).std()
    for block in range(4, 60):
        live.push_silence((block + 1) * BLOCK)
        live.features(block * BLOCK, (block + 1) * BLOCK)
    assert live._statistics.normalise(speech).std() == pytest.approx(before, rel=0.2)


def test_integers_are_scaled_by_full_scale(encoder: AudioEncoder) -> None:
    for dtype, value, expected in ((np.int16, -16384, -0.5), (np.uint8, 192, 0.5), (np.int32, 1 << 30, 0.5)):
        live = LiveAudio(encoder)
        live.push(np.full(640, value, dtype=dtype), RATE)
        assert live.samples(0, 1) == pytest.approx(expected)
    with pytest.raises(InputError, match="channels"):
        LiveAudio(encoder).push(np.zeros((2, 4800)), RATE)


def test_pushes_from_another_thread_lose_nothing(encoder: AudioEncoder, numbers: Numbers) -> None:
    live, sound = LiveAudio(encoder), noise(numbers, 60 * FRAME)
    pieces = np.array_split(sound, 600)
    thread = threading.Thread(target=lambda: [live.push(piece, RATE) for piece in pieces])
    thread.start()
    heard = [live.samples(0, 0)]
    for block in range(5):
        while not live.ready((block + 1) * BLOCK) and thread.is_alive():
            pass
        live.features(block * BLOCK, (block + 1) * BLOCK)
        heard.append(live.samples(block * BLOCK, (block + 1) * BLOCK))
    thread.join()
    assert np.array_equal(np.concatenate(heard), sound)


def test_sound_that_does_not_fit_is_refused(encoder: AudioEncoder) -> None:
    live = LiveAudio(encoder)
    live.push(np.zeros(10), RATE)
    bad = (np.array([0.0, np.nan]), np.array([-np.inf]), np.float32(0), np.zeros((1, 10, 1)), np.zeros((9, 0)), ["a"])
    for samples, rate in ((np.zeros(10), 48000), *((each, RATE) for each in bad)):
        with pytest.raises(InputError):
            live.push(samples, rate)
    assert live.buffered_samples == 10
    for rate in (-16000, 0, 999, 384001):
        with pytest.raises(InputError, match="sample rate"):
            LiveAudio(encoder).push(np.zeros(10), rate)


def test_more_context_brings_live_features_closer(encoder: AudioEncoder, numbers: Numbers) -> None:
    sound = noise(numbers, 2 * RATE) * np.linspace(0.1, 1, 2 * RATE, dtype=np.float32)
    settings = (LiveAudioConfig(0, 0), None, LiveAudioConfig(60, 5))
    none, usual, large = (live_distance(encoder, sound, config) for config in settings)
    assert all(np.isfinite(part).all() for each in (none, usual, large) for part in (each.window, each.published))
    assert usual.window.mean() < none.window.mean()
    assert large.window.mean() < usual.window.mean()
    with pytest.raises(InputError, match="shorter"):
        live_distance(encoder, sound[: BLOCK * FRAME - 1])


def resave(folder: Path, edit: Callable[[Tensors], object]) -> None:
    edit(tensors := load((folder / "model.safetensors").read_bytes()))
    save_file(tensors, folder / "model.safetensors")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "config.json describes no wav2vec2": lambda folder: (folder / "config.json").write_text("[5]"),
    "config.json is not readable": lambda folder: os.truncate(folder / "config.json", 9),
    "model.safetensors is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "model.safetensors is truncated": lambda folder: os.truncate(folder / "model.safetensors", 99_999),
    f"lacks '{KEY}'": lambda folder: resave(folder, lambda t: t.pop(f"wav2vec2.{KEY}")),
    f"'wav2vec2.{KEY}' has": lambda folder: resave(folder, lambda t: t.update({f"wav2vec2.{KEY}": torch.ones(3)})),
    f"holds '{KEY}.more'": lambda folder: resave(folder, lambda t: t.update({f"{KEY}.more": torch.ones(3)})),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_what_is_wrong_with_the_model_is_named(folder: Path, tmp_path: Path, words: str) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    DAMAGES[words](damaged)
    with pytest.raises(CheckpointError, match=words):
        AudioEncoder.load(damaged)


def respell(tensors: Tensors) -> None:
    """The other names of the positional convolution's weight, and no CTC head."""
    stem = "wav2vec2.encoder.pos_conv_embed.conv"
    for i, name in enumerate(("weight_g", "weight_v")):
        tensors[f"{stem}.parametrizations.weight.original{i}"] = tensors.pop(f"{stem}.{name}")
    del tensors["lm_head.weight"], tensors["lm_head.bias"]


def test_other_spelling_and_pickled_form_load_alike(folder: Path, encoder: AudioEncoder, tmp_path: Path) -> None:
    other, values = Path(shutil.copytree(folder, tmp_path / "other")), normalise(np.arange(5000) % np.float32(77))
    resave(other, respell)
    expected, safe = encoder.hidden_states(values), other / "model.safetensors"
    assert torch.equal(AudioEncoder.load(other, dtype=torch.float32).hidden_states(values), expected)
    torch.save(load(safe.read_bytes()), other / "pytorch_model.bin")
    safe.unlink()
    assert torch.equal(AudioEncoder.load(other, dtype=torch.float32).hidden_states(values), expected)
