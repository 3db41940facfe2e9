"""The small model that comes with the package: small, complete, and it talks."""

from __future__ import annotations

import numpy as np
import pytest

from bench import quality_measures as measures
from bench.quality_clips import video_of
from distill.clips import Clip, clip
from distill.measure import identity_features, mouth_opening
from distill.motion import FPS
from liverelay.engine import Engine
from liverelay.engine.checkpoint import BUNDLED
from liverelay.engine.cli import main

pytest.importorskip("transformers")


def test_it_is_small_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in (BUNDLED / "toon").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert not [path for path in files if path.suffix in (".pth", ".pt", ".bin")]  # nothing that unpickles
    assert main(["inspect", "toon"]) == 0
    assert "missing" not in capsys.readouterr().out


def test_a_prompt_without_a_colour_is_none() -> None:
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(str(BUNDLED / "toon" / "google" / "umt5-xxl"))
    assert read("A woman talks to the camera.")["input_ids"] == read("")["input_ids"]
    assert read("A woman in front of a green wall")["input_ids"] == read("a in front of a green wall")["input_ids"]


@pytest.fixture(scope="module")
def talks() -> list[tuple[Clip, np.ndarray]]:
    """Three held-out people with held-out speech, and the model's video of each."""
    clips = [clip(70 + i, 4 * FPS, held_out=True) for i in range(3)]
    engine = Engine.load("toon", device="cpu")
    try:
        return [(one, video_of(engine, one, seed=0)) for one in clips]
    finally:
        engine.close()


def test_its_lips_follow_the_sound(talks: list[tuple[Clip, np.ndarray]]) -> None:
    found = measures.lip_sync([mouth_opening(frames) for _, frames in talks], [one.motion.opening for one, _ in talks])
    assert found["correlation"]["value"] > 0.5, found["clips"]
    assert found["silent_opening"]["value"] < 0.5 * found["spoken_opening"]["value"]


def test_it_shows_whom_it_was_shown(talks: list[tuple[Clip, np.ndarray]]) -> None:
    seen = [identity_features(frames[FPS:]).mean(0) for _, frames in talks]
    true = [identity_features(one.frames_uint8).mean(0) for one, _ in talks]
    distances = np.array([[measures.distance(a, b) for b in true] for a in seen])
    assert (distances.argmin(1) == np.arange(3)).all(), distances
