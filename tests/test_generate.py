"""The main job as a user sees it: one image and a sound in, a playable video with its sound out; bad input refused."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="PyAV is not installed")
soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")

from PIL import Image  # noqa: E402

from liverelay.engine.cli import main  # noqa: E402
from liverelay.engine.media import VideoWriter, probe  # noqa: E402


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


def arguments(checkpoint: Path, picture: Path, sound: Path, out: Path, *more: object) -> list[str]:
    given = (
        "generate", "--checkpoint", checkpoint, "--image", picture, "--audio", sound, "--prompt", "A person talks.",
        "--out", out, "--size", "64x64", *more,
    )  # fmt: skip
    return [str(part) for part in given]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("seconds", "rate", "channels", "flags"),
    [
        (1.3, 16000, 1, []),
        (0.7, 44100, 2, ["--dtype", "bfloat16"]),
        (1.0, 8000, 1, ["--live"]),
        (0.02, 48000, 1, []),
        (2.0, 22050, 3, ["--seconds", "0.6"]),
        (0.4, 16000, 1, ["--fp8"]),
        (0.4, 16000, 1, ["--fp8", "all"]),
    ],
)
def test_video_lasts_as_long_as_the_sound(
    checkpoint: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, rate: int,
    channels: int, flags: list[str],
) -> None:
    sound = write_sound(tmp_path / "sound.wav", seconds, rate, channels)
    out, sheet = tmp_path / "video.mp4", tmp_path / "sheet.png"
    assert main(arguments(checkpoint, picture, sound, out, "--contact-sheet", sheet, *flags)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    facts = probe(out)
    lasts = 0.6 if "--seconds" in flags else seconds
    assert facts.fps == 25
    assert (facts.width, facts.height) == (64, 64)
    assert facts.frames == int(np.ceil(lasts * 25 - 1e-9))
    assert abs(facts.audio_duration_s - lasts) < 0.07
    assert facts.video_start_s == pytest.approx(facts.audio_start_s, abs=0.03)
    assert Image.open(sheet).size[0] > 64
    assert names(tmp_path) == ["sheet.png", "sound.wav", "video.mp4"]


def test_the_same_seed_gives_the_same_frames_and_another_seed_others(
    checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, write = write_sound(tmp_path / "sound.wav", 0.5), VideoWriter.write
    videos: list[list[np.ndarray]] = []

    def keep(self: VideoWriter, frames: np.ndarray, audio: np.ndarray) -> None:
        videos[-1].append(frames)  # before the encoder: libx264 itself is not repeatable to the bit
        write(self, frames, audio)

    monkeypatch.setattr(VideoWriter, "write", keep)
    for seed in (1, 1, 2):
        videos.append([])
        assert main(arguments(checkpoint, picture, sound, tmp_path / "video.mp4", "--seed", seed)) == 0
    first, again, other = (np.concatenate(video) for video in videos)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def sizes(folder: Path) -> set[int]:
    """Of the unfinished files."""
    found = set()
    for part in folder.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):
            found.add(part.stat().st_size)
    return found


@pytest.mark.parametrize("existing", [False, True])
def test_interrupt_leaves_a_playable_file_of_what_is_done(
    checkpoint: Path, picture: Path, tmp_path: Path, existing: bool
) -> None:
    sound = write_sound(tmp_path / "sound.wav", 120)
    out, cut = tmp_path / "video.mp4", tmp_path / "video.mp4"
    if existing:
        out.write_bytes(b"the video of yesterday")
        cut = tmp_path / "video.interrupted.mp4"
    command = [sys.executable, "-m", "liverelay.engine", *arguments(checkpoint, picture, sound, out, "--threads", 1)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (written := sizes(tmp_path) - {0, 65536}):  # 65536: the probe for a folder that takes a file
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM if existing else signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert written and process.returncode == 130, errors
    assert printed.splitlines()[-1] == str(cut) and "Traceback" not in errors
    assert 0 < probe(cut).frames < 120 * 25
    assert names(tmp_path) == sorted({"sound.wav", "video.mp4", cut.name})
    assert not existing or out.read_bytes() == b"the video of yesterday"


BROKEN = {
    "no image": (("--image", "absent.png"), "absent.png"),
    "no audio": (("--audio", "absent.wav"), "absent.wav"),
    "no checkpoint": (("--checkpoint", "absent"), "absent"),
    "no checkpoint but a folder": (("--checkpoint", "."), "config.json"),
    "image is no image": (("--image", "text.txt"), "text.txt"),
    "image is cut off": (("--image", "cut.png"), "cut.png"),
    "image is a thread": (("--image", "thread.png"), "long and thin"),
    "audio is no audio": (("--audio", "text.txt"), "text.txt"),
    "empty audio": (("--audio", "empty.wav"), "empty.wav"),
    "NaN audio": (("--audio", "nan.wav"), "nan.wav"),
    "integers as floats": (("--audio", "loud.wav"), "up to 30000; full scale is 1"),
    "size does not divide": (("--size", "100x64"), "128x64"),
    "no folder for the output": (("--out", "nowhere/x.mp4"), "nowhere"),
    "no folder where the output leads": (("--out", "link.mp4"), "the folder /nowhere does not exist"),
    "no folder for the sheet": (("--contact-sheet", "nowhere/x.png"), "nowhere"),
    "sheet over video": (("--contact-sheet", "x.mp4"), "x.mp4"),
    "trace over the picture": (("--trace", "deep.png", "--image", "deep.png"), "overwrite the input"),
    "telemetry over video": (("--telemetry", "x.mp4"), "x.mp4"),
    "two reports in one file": (("--telemetry", "a.json", "--trace", "./a.json"), "the telemetry and the trace are"),
    "telemetry over the LoRA": (("--lora", "text.txt", "--telemetry", "link.txt"), "overwrite the input"),
    "no folder for the trace": (("--trace", "nowhere/x.json"), "nowhere"),
    "sheet is no picture": (("--contact-sheet", "x.pdf"), ".png"),
    "sheet over the sound": (("--contact-sheet", "tone.png", "--audio", "tone.png"), "overwrite the input"),
    "a folder for a sound": (("--audio", "."), "is not a file"),
    "too many threads": (("--threads", "100000"), "at most"),
    "a size without end": (("--size", "6400000000000x64"), "8192x64"),
    "sixteen bits": (("--image", "deep.png"), "8 bits"),
    "unknown container": (("--out", "x.txt"), ".txt"),
    "no such device": (("--device", "tpu"), "tpu"),
    "unknown backend": (("--backend", "cuda9"), "cuda9"),
    "LoRA missing": (("--lora", "absent.safetensors"), "absent.safetensors"),
    "distance out of range": (("--relative-distance", "-1"), "relative distance -1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], case: str,
) -> None:
    write_sound(tmp_path / "sound.wav", 0.3)
    (tmp_path / "text.txt").write_text("not what it seems")
    (tmp_path / "link.txt").hardlink_to(tmp_path / "text.txt")
    (tmp_path / "link.mp4").symlink_to("/nowhere/x.mp4")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:2000])
    Image.new("RGB", (1, 4000)).save(tmp_path / "thread.png")
    Image.new("I;16", (64, 64)).save(tmp_path / "deep.png")
    (tmp_path / "tone.png").write_bytes((tmp_path / "sound.wav").read_bytes())
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "loud.wav", np.full(1000, 30000, dtype=np.float32), 16000, subtype="FLOAT")
    before = names(tmp_path)
    flags, word = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    assert main(arguments(checkpoint, picture, Path("sound.wav"), Path("x.mp4"), *flags)) == 1
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("liverelay: ")]
    assert len(lines) == 1 and word in lines[0], printed.err
    assert not printed.out and names(tmp_path) == before


@pytest.mark.parametrize("flags", [("--size", "64"), ("--seconds", "-1"), ("--max-area", "tall"), ("--threads", "0")])
def test_wrong_usage_is_refused_at_once(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments(Path("a"), Path("b"), Path("c"), Path("d"), *flags))
    assert stop.value.code == 2
    assert f"{flags[0]}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "failure", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_is_one_line(
    checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], failure: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("liverelay.engine.relay.stage.Stage.denoise", fail)
    sound = write_sound(tmp_path / "sound.wav", 0.3)
    assert main(arguments(checkpoint, picture, sound, tmp_path / "x.mp4")) == 1
    assert "out of memory; choose a smaller" in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path) == ["sound.wav"]
