"""The data that small cartoon models learn from: portraits, what is measured in them, mouths from sound."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import clips, espeak
from distill.clips import VOCABULARY, clip
from distill.identity import COLOURS, Identity
from distill.measure import identity_features, mouth_opening
from distill.motion import RATE, Motion, mouth_track, neutral, random_motion
from distill.portrait import render, render_still
from distill.sentences import GRAMMAR, sentence
from distill.speech import EVALUATION_VOICES, TRAINING_VOICES, speech
from distill.toon import text_encoder
from liverelay.engine.errors import OutputError

Numbers = np.random.Generator


def talking(numbers: Numbers, frames: int) -> Motion:
    """Random sway with a random smooth mouth."""
    opening = np.convolve(numbers.uniform(-0.4, 1.2, frames + 2), np.ones(3) / 2, "valid").clip(0, 1)
    return random_motion(numbers, frames).with_mouth(opening, numbers.uniform(-1, 1, frames))


def degraded(numbers: Numbers, frames: np.ndarray) -> np.ndarray:
    """As a codec leaves it: blurred over 2 x 2 pixels, noise, a slight cast."""
    x = frames.astype(np.float32)
    x = (x + np.roll(x, 1, 1)) / 2
    x = (x + np.roll(x, 1, 2)) / 2 + numbers.normal(0, 6, x.shape) + numbers.uniform(-5, 5, 3)
    return x.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("spoilt", [False, True], ids=["as rendered", "blurred and noisy"])
def test_the_measured_opening_is_the_true_one(numbers: Numbers, spoilt: bool) -> None:
    true, seen = [], []
    for _ in range(30):
        motion = talking(numbers, 16)
        frames = render(Identity.random(numbers), motion)
        true.append(motion.opening)
        seen.append(mouth_opening(degraded(numbers, frames) if spoilt else frames))
    x, y = np.concatenate(true), np.concatenate(seen)
    assert np.corrcoef(x, y)[0, 1] > 0.97
    assert 0.8 < (x * y).sum() / (x * x).sum() < 1.1


def test_a_shut_mouth_measures_nothing(numbers: Numbers) -> None:
    for _ in range(30):
        frames = render(Identity.random(numbers), random_motion(numbers, 4))
        assert mouth_opening(frames).max() < 0.08


@pytest.mark.parametrize("size", [64, 200, 512])
def test_a_portrait_is_the_same_picture_in_every_size(numbers: Numbers, size: int) -> None:
    who = Identity.random(numbers)
    motion = talking(numbers, 1)
    small, large = identity_features(render(who, motion)), identity_features(render(who, motion, size))
    assert np.abs(small - large).max() < 0.12 and np.abs(small - large).mean() < 0.02
    assert render_still(who, size).shape == (size, size, 3)


def test_a_size_that_cannot_be_drawn_is_refused(numbers: Numbers) -> None:
    with pytest.raises(ValueError, match="64 to 512"):
        render(Identity.random(numbers), neutral(), 32)


def test_a_frame_does_not_depend_on_its_neighbours(numbers: Numbers) -> None:
    who, motion = Identity.random(numbers), talking(numbers, 19)
    alone = np.concatenate([render(who, motion[t : t + 1]) for t in range(19)])
    assert np.abs(render(who, motion).astype(int) - alone).max() <= 3  # float32 rounds by the place in memory


def test_identity_features_tell_talking_from_another_person(numbers: Numbers) -> None:
    for _ in range(8):
        who = Identity.random(numbers)
        frames = render(who, talking(numbers, 12))
        seen, still = identity_features(frames), identity_features(render_still(who)[None])
        others = identity_features(np.stack([render_still(Identity.random(numbers)) for _ in range(4)]))
        within = np.sqrt(((seen - still) ** 2).mean(1)).max()
        assert within < np.sqrt(((others - still) ** 2).mean(1)).min()


@pytest.mark.parametrize("name", COLOURS)
def test_a_background_has_the_colour_of_its_name(numbers: Numbers, name: str) -> None:
    frame = render_still(replace(Identity.random(numbers), background=name))
    corner = frame[2:10, 2:10].reshape(-1, 3).mean(0) / 255
    nearest = min(COLOURS, key=lambda other: float(((corner - COLOURS[other]) ** 2).sum()))
    assert nearest == name


def test_random_motion_blinks_and_stays_in_bounds(numbers: Numbers) -> None:
    motion = random_motion(numbers, 1500)
    starts = int(((motion.blink[1:] > 0.5) & (motion.blink[:-1] <= 0.5)).sum())
    assert 10 <= starts <= 32
    for curve, limit in ((motion.x, 12), (motion.y, 8), (motion.roll, 0.2), (motion.yaw, 2), (motion.gaze_x, 2)):
        assert np.abs(curve).max() < limit
    assert np.abs(np.diff(motion.x)).max() < 1.0


def vowel(hertz: tuple[float, ...], level: float, seconds: float = 1.0) -> np.ndarray:
    """Harmonics of 120 Hz that fall by 6 dB an octave, through resonances 80 Hz wide, at a level in dBFS."""
    time, pitch = np.arange(int(seconds * RATE)) / RATE, 120.0 * np.arange(1, 34)
    gains = 1 / pitch
    for h in (*hertz, 3500):
        gains = gains * h * h / np.hypot(h * h - pitch**2, 80 * pitch)
    sound = (np.sin(2 * np.pi * pitch[:, None] * time) * gains[:, None]).sum(0)
    return (sound / np.sqrt((sound**2).mean()) * 10 ** (level / 20)).astype(np.float32)


def hiss(numbers: Numbers, low: float, level: float) -> np.ndarray:
    """One second of noise above a frequency."""
    spectrum = np.fft.rfft(numbers.normal(size=RATE))
    spectrum[: int(low)] = 0
    sound = np.fft.irfft(spectrum, RATE)
    return (sound / np.sqrt((sound**2).mean()) * 10 ** (level / 20)).astype(np.float32)


def test_silence_and_quiet_noise_keep_the_mouth_shut(numbers: Numbers) -> None:
    assert mouth_track(np.zeros(RATE, np.float32), 25)[0].max() == 0
    assert mouth_track(hiss(numbers, 50, -50.0), 25)[0].max() < 0.02


def test_open_vowels_open_more_than_closed_ones_and_hiss_hardly_at_all(numbers: Numbers) -> None:
    a, i = (mouth_track(vowel(f, -18), 25)[0][2:-2].mean() for f in ((760, 1250, 2500), (290, 2250, 3000)))
    assert a > 0.6 and 0.1 < i < 0.6 * a
    assert mouth_track(hiss(numbers, 3200, -18.0), 25)[0].max() < 0.1


def test_front_vowels_are_wide_and_back_ones_round() -> None:
    i, u, a = (mouth_track(vowel(f, -18), 25)[1][2:-2].mean()
               for f in ((290, 2250, 3000), (310, 750, 2300), (760, 1250, 2500)))
    assert i > 0.5 and u < -0.5 and u < a < i


def test_the_mouth_follows_the_frames_own_sound() -> None:
    sound = np.zeros(4 * RATE, np.float32)
    sound[RATE : 2 * RATE] = vowel((760, 1250, 2500), -18)
    opening, _ = mouth_track(sound, 100)
    assert opening[28:47].min() > 0.5
    assert opening[:23].max() == 0 and opening[52:].max() == 0
    louder = mouth_track(np.concatenate([sound, vowel((760, 1250, 2500), -12)]), 125)[0][:98]
    assert np.abs(louder - opening[:98]).max() < 0.12  # what comes later changes little


@pytest.mark.parametrize("samples", [0, 1, 300, 3 * RATE])
def test_sound_of_another_length_is_padded_or_cut(numbers: Numbers, samples: int) -> None:
    opening, spread = mouth_track(numbers.normal(0, 0.1, samples).astype(np.float32), 40)
    assert opening.shape == spread.shape == (40,) and opening.dtype == np.float32
    assert np.isfinite(opening).all() and np.isfinite(spread).all()


@pytest.fixture(params=["espeak", "own synthesiser"])
def voices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Speech with the optional voices, and as where their package is missing."""
    if request.param == "espeak" and espeak.files() is None:
        pytest.skip("espeakng_loader is not installed")
    if request.param == "espeak":
        monkeypatch.setattr("distill.speech.OWN_SHARE", 0.0)
    else:
        monkeypatch.setattr(espeak, "files", lambda: None)
    return str(request.param)


def test_speech_is_as_loud_as_it_should_be_with_silence_between(numbers: Numbers, voices: str) -> None:
    for held_out in (False, True):
        sound = speech(numbers, 8, held_out)
        assert sound.shape == (8 * RATE,) and sound.dtype == np.float32 and np.abs(sound).max() < 1
        level = 10 * np.log10((sound.reshape(-1, 640) ** 2).mean(1) + 1e-12)
        assert -33 < np.percentile(level[level > level.max() - 25], 70) < -9
        assert (level < -48).mean() > 0.02 and (level > level.max() - 25).mean() > 0.2
        opening, spread = mouth_track(sound, 200)
        assert opening.max() > 0.3 and opening[level < -50].max() < 0.5 and opening.std() > 0.08
        assert spread.max() - spread.min() > 0.5


def test_speech_depends_on_its_seed_alone(seed: int, voices: str) -> None:
    first = speech(np.random.default_rng(seed), 3)
    speech(np.random.default_rng(seed + 1), 2, held_out=True)
    assert np.array_equal(first, speech(np.random.default_rng(seed), 3))
    assert not np.array_equal(first, speech(np.random.default_rng(seed + 1), 3))


def test_voices_and_templates_of_evaluation_are_not_those_of_training(numbers: Numbers) -> None:
    assert not set(TRAINING_VOICES) & set(EVALUATION_VOICES)
    for language, (words, training, evaluation) in GRAMMAR.items():
        assert not set(training) & set(evaluation)
        fresh, known = ({sentence(numbers, language, held) for _ in range(60)} for held in (True, False))
        assert not fresh & known and not any("{" in text for text in fresh | known)
        assert all(words.values())


def test_every_voice_speaks(numbers: Numbers) -> None:
    if espeak.files() is None:
        pytest.skip("espeakng_loader is not installed")
    for voice in (*TRAINING_VOICES, *EVALUATION_VOICES):
        sound = espeak.say("One two three.", f"{numbers.choice(list(GRAMMAR))}+{voice}", 160, 50, 50)
        assert len(sound) > 0.5 * RATE and np.sqrt((sound**2).mean()) > 0.01
    with pytest.raises(RuntimeError, match="no voice"):
        espeak.say("One.", "xx-nowhere", 160, 50, 50)


def test_a_clip_depends_on_its_seed_alone(seed: int) -> None:
    one, again, held_out = clip(seed, 20), clip(seed, 20), clip(seed, 20, held_out=True)
    assert np.array_equal(one.frames_uint8, again.frames_uint8) and np.array_equal(one.sound, again.sound)
    assert one.prompt == again.prompt and one.identity == again.identity
    assert one.frames_uint8.shape == (20, 128, 128, 3) and one.still.shape == (128, 128, 3)
    assert one.sound.shape == (20 * 640,) and one.motion.frames == 20
    assert held_out.identity != one.identity and not np.array_equal(held_out.sound, one.sound)


def test_prompts_name_what_the_video_shows_and_the_still_does_not(numbers: Numbers) -> None:
    prompts = []
    for _ in range(400):
        person = Identity.random(numbers)
        shown, prompt = clips.prompted(numbers, person)
        words = prompt.split()
        assert set(words) <= set(VOCABULARY) and shown.clothes != shown.background
        changed = {new for old, new in ((person.clothes, shown.clothes), (person.background, shown.background))
                   if old != new}
        assert changed == set(words) & set(COLOURS)
        assert replace(shown, clothes=person.clothes, background=person.background) == person
        if {"wall", "background"} & set(words):
            assert shown.background in words and person.background != shown.background
        prompts.append(prompt)
    assert 0.4 < prompts.count("") / 400 < 0.6 and len(set(prompts)) > 40


def test_words_that_name_no_colour_do_nothing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = text_encoder(list(VOCABULARY), tmp_path)
    empty = encoder.encode("")
    for prompt in ("A woman talks to the camera.", "a person\ntalks", "the bluish wall behind the person"):
        assert torch.equal(encoder.encode(prompt), empty), prompt
    known = encoder.encode("a grey background")
    assert len(known) == 4
    for prompt in ("A Gray, endless background!", "  a\nbright grey   background"):
        assert torch.equal(encoder.encode(prompt), known), prompt


def test_the_command_writes_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["clips", "--out", str(out), "--count", "2", "--frames", "20"])
    clips.main()
    assert image.open(out).size == (128 * 11 + 4, 2 * (128 + 58))
    monkeypatch.setattr(sys, "argv", ["clips", "--out", str(tmp_path / "nowhere" / "sheet.png")])
    with pytest.raises(OutputError, match="does not exist"):
        clips.main()
    assert list(tmp_path.iterdir()) == [out]
