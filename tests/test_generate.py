"""The main job as a user sees it: one image and a sound in, a playable video with its sound out; bad input refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV is not installed")
soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")

from PIL import Image  # noqa: E402

from liverelay.engine.media import probe  # noqa: E402

SIZE = "64x64"


def liverelay(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "liverelay.engine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "portrait.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(path)
    return path


def write_sound(path: Path, seconds: float, rate: int = 16000, channels: int = 1) -> Path:
    time_s = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 220 * time_s) * (np.sin(2 * np.pi * 3 * time_s) > 0)
    soundfile.write(path, np.repeat(tone[:, None], channels, axis=1), rate)
    return path


def arguments(checkpoint: Path, picture: Path, sound: Path, out: Path) -> Sequence[object]:
    return (
        "generate", "--checkpoint", checkpoint, "--image", picture, "--audio", sound, "--prompt", "A person talks.",
        "--out", out, "--size", SIZE, "--threads", 1,
    )


@pytest.mark.parametrize(
    ("seconds", "rate", "channels", "live"),
    [(1.3, 16000, 1, False), (0.7, 44100, 2, False), (1.0, 8000, 1, True), (0.02, 48000, 1, False)],
)
def test_video_lasts_as_long_as_the_sound(
    checkpoint: Path, picture: Path, tmp_path: Path, seconds: float, rate: int, channels: int, live: bool
) -> None:
    sound = write_sound(tmp_path / "sound.wav", seconds, rate, channels)
    out = tmp_path / "video.mp4"
    sheet = tmp_path / "sheet.png"
    flags = ["--live"] if live else []
    done = liverelay(*arguments(checkpoint, picture, sound, out), "--contact-sheet", sheet, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    facts = probe(out)
    assert facts.fps == 25
    assert (facts.width, facts.height) == (64, 64)
    assert facts.frames == int(np.ceil(seconds * 25 - 1e-9))
    assert abs(facts.audio_duration_s - seconds) < 0.07
    assert facts.video_start_s == pytest.approx(facts.audio_start_s, abs=0.03)
    assert Image.open(sheet).size[0] > 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png", "sound.wav", "video.mp4"]


def test_the_same_seed_gives_the_same_video_and_another_seed_another(
    checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    sound = write_sound(tmp_path / "sound.wav", 0.5)
    videos = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.mp4"
        assert liverelay(*arguments(checkpoint, picture, sound, out), "--seed", seed).returncode == 0
        with av.open(str(out)) as container:
            videos.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_interrupt_leaves_a_playable_file_of_what_is_done(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "sound.wav", 120)
    out = tmp_path / "video.mp4"
    command = [sys.executable, "-m", "liverelay.engine", *map(str, arguments(checkpoint, picture, sound, out))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part_written = False
    for _ in range(600):
        time.sleep(0.2)
        parts = list(tmp_path.glob("*.part*"))
        part_written = bool(parts) and parts[0].stat().st_size > 0
        if part_written or process.poll() is not None:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert part_written
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    facts = probe(out)
    assert 0 < facts.frames < 120 * 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sound.wav", "video.mp4"]


BROKEN = {
    "no image": (("--image", "absent.png"), "absent.png"),
    "no audio": (("--audio", "absent.wav"), "absent.wav"),
    "no checkpoint": (("--checkpoint", "absent"), "absent"),
    "image is no image": (("--image", "text.txt"), "text.txt"),
    "audio is no audio": (("--audio", "text.txt"), "text.txt"),
    "empty audio": (("--audio", "empty.wav"), "empty.wav"),
    "NaN audio": (("--audio", "nan.wav"), "nan.wav"),
    "size does not divide": (("--size", "100x64"), "100x64"),
    "no folder for the output": (("--out", "nowhere/x.mp4"), "nowhere"),
    "unknown container": (("--out", "x.txt"), ".txt"),
    "no such device": (("--device", "tpu"), "tpu"),
    "unknown backend": (("--backend", "cuda9"), "cuda9"),
    "LoRA missing": (("--lora", "absent.safetensors"), "absent.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    checkpoint: Path, picture: Path, tmp_path: Path, case: str
) -> None:
    sound = write_sound(tmp_path / "sound.wav", 0.3)
    (tmp_path / "text.txt").write_text("not what it seems")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    before = sorted(tmp_path.iterdir())
    flags, word = BROKEN[case]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = liverelay(*arguments(checkpoint, picture, sound, tmp_path / "x.mp4"), *flags, cwd=tmp_path, env=environment)
    assert done.returncode not in (0, -11), done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("liverelay: ")]
    assert len(lines) == 1 and word in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before
