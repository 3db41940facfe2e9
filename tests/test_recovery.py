"""A run that was cut off goes on from its last snapshot: the same video as without the cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV is not installed")
soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
from PIL import Image  # noqa: E402

from liverelay.engine import media, recovery  # noqa: E402
from liverelay.engine.cli import main  # noqa: E402
from liverelay.engine.errors import OutputError  # noqa: E402
from liverelay.engine.media import VideoWriter, join_videos, pictures_of, probe  # noqa: E402
from liverelay.engine.recovery import RecoverableVideo  # noqa: E402
from liverelay.engine.relay.stage import Stage  # noqa: E402
from tests.colours import exact_rgb  # noqa: E402

SECONDS = 5


@pytest.fixture
def inputs(tmp_path: Path, numbers: np.random.Generator) -> Path:
    Image.fromarray(numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "face.png")
    soundfile.write(tmp_path / "sound.wav", 0.1 * numbers.standard_normal(44100 * SECONDS), 44100)
    return tmp_path


def arguments(checkpoint: Path, inputs: Path, *more: object) -> list[str]:
    given = ("generate", "--checkpoint", checkpoint, "--image", inputs / "face.png", "--audio", inputs / "sound.wav",
             "--size", "64x64", "--threads", 1, "--out", inputs / "video.mp4", *more)  # fmt: skip
    return [str(part) for part in given]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("failure", [RuntimeError("lost"), KeyboardInterrupt()])
def test_the_video_is_the_same_as_without_a_cut(
    checkpoint: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, live: bool, failure: BaseException
) -> None:
    shown: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    run, flags = 0, ["--snapshot-every", "3", "--contact-sheet", inputs / "sheet.png", *(["--live"] if live else [])]
    write = VideoWriter.write

    def cut(self: VideoWriter, frames: np.ndarray, audio: np.ndarray) -> None:
        if run == 1 and sum(map(len, shown[1])) > 80:  # two snapshots are made by then
            raise failure
        shown[run].append(frames)
        write(self, frames, audio)

    monkeypatch.setattr(VideoWriter, "write", cut)
    assert main(arguments(checkpoint, inputs, *flags)) == 0
    os.replace(inputs / "video.mp4", inputs / "whole.mp4")
    (inputs / "sheet.png").unlink()
    run = 1
    interrupt = isinstance(failure, KeyboardInterrupt)
    if interrupt:
        assert main(arguments(checkpoint, inputs, *flags)) == 130
        assert probe(inputs / "video.mp4").frames == sum(map(len, shown[1]))  # what was done can be watched
    else:
        with pytest.raises(RuntimeError, match="lost"):
            main(arguments(checkpoint, inputs, *flags))
        assert not (inputs / "video.mp4").exists()
    run = 2
    assert main(arguments(checkpoint, inputs, *flags, "--devices", "cpu,cpu")) == 0
    whole, before, after = (np.concatenate(shown[i]) for i in range(3))
    assert len(whole) == 25 * SECONDS and 0 < len(after) < len(whole)
    assert np.array_equal(after, whole[-len(after) :]) and np.array_equal(before, whole[: len(before)])
    facts = probe(inputs / "video.mp4")
    assert (facts.frames, facts.audio_rate, facts.fps) == (25 * SECONDS, 44100, 25)
    assert abs(facts.audio_duration_s - SECONDS) < 0.07
    assert names(inputs) == {"face.png", "sound.wav", "whole.mp4", "video.mp4", "sheet.png"}
    for one, other in zip(pictures_of(inputs / "whole.mp4"), pictures_of(inputs / "video.mp4"), strict=True):
        assert np.abs(one.astype(float) - other).mean() < 8  # both are coded, with keyframes at other places


@pytest.mark.slow
def test_a_killed_process_loses_no_more_than_was_made_since_the_snapshot(checkpoint: Path, inputs: Path) -> None:
    soundfile.write(inputs / "sound.wav", np.zeros(16000 * 60), 16000)
    command = [sys.executable, "-m", "liverelay.engine", *arguments(checkpoint, inputs, "--snapshot-every", 5)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state, deadline = inputs / "video.mp4.resume" / "state.json", time.monotonic() + 120
    while not (state.exists() and len(json.loads(state.read_text())["pieces"]) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, capture_output=True, text=True)
    saved = int(again.stderr.partition("going on from frame ")[2].partition(",")[0])
    assert again.returncode == 0 and saved >= 117, again.stderr
    assert probe(inputs / "video.mp4").frames == 25 * 60 and names(inputs) == {"face.png", "sound.wav", "video.mp4"}


def begin_and_fail(checkpoint: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that fails at block 6; returns its folder."""
    denoise = Stage.denoise

    def fail(self: Stage, place: int, block: object, on_step: object = None) -> None:
        if block.block == 6:  # type: ignore[attr-defined]
            raise MemoryError
        denoise(self, place, block, on_step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "denoise", fail)
        assert main(arguments(checkpoint, inputs, "--snapshot-every", "2")) == 1
    return inputs / "video.mp4.resume"


@pytest.mark.parametrize(
    ("flags", "text"),
    [(["--seed", 5], "another seed"), (["--prompt", "x"], "another prompt"), (["--live"], "another live"),
     (["--dtype", "bfloat16"], "another checkpoint or precision"), (["--seconds", 1], "another audio")],
)  # fmt: skip
def test_the_state_of_another_run_is_kept_and_refused(
    checkpoint: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[object], text: str,
) -> None:
    folder = begin_and_fail(checkpoint, inputs, monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert main(arguments(checkpoint, inputs, "--snapshot-every", 2, *flags)) == 1
    assert text in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pieces_of_another_colour_standard_are_not_joined(
    checkpoint: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(media, "COLOURS", "another")
        begin_and_fail(checkpoint, inputs, monkeypatch)
    assert main(arguments(checkpoint, inputs, "--snapshot-every", 2)) == 1
    assert "another colour standard" in capsys.readouterr().err.splitlines()[-1]


def test_a_broken_state_is_one_line(
    checkpoint: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begin_and_fail(checkpoint, inputs, monkeypatch)
    snapshot = next(folder.glob("session-*"))
    snapshot.write_bytes(snapshot.read_bytes()[:5000])
    for _ in range(2):
        capsys.readouterr()
        assert main(arguments(checkpoint, inputs, "--snapshot-every", 2)) == 1
        assert "cannot be read" in capsys.readouterr().err.splitlines()[-1]
        (folder / "state.json").write_text("{")
    assert not (inputs / "video.mp4").exists()


@pytest.mark.parametrize("damage", ["missing", "junk", "another", "run"])
def test_damage_is_told_before_a_block_is_made(
    checkpoint: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = begin_and_fail(checkpoint, inputs, monkeypatch)
    state = json.loads((folder / "state.json").read_text())
    piece = folder / state["pieces"][0][0]
    if damage == "missing":
        piece.unlink()
    elif damage == "junk":
        piece.write_bytes(b"junk")
    else:
        state = {**state, "run": []} if damage == "run" else {**state, "pieces": [[piece.name, 5]]}
        (folder / "state.json").write_text(json.dumps(state))
    capsys.readouterr()
    monkeypatch.setattr(VideoWriter, "write", lambda *_: pytest.fail("a block was made"))
    assert main(arguments(checkpoint, inputs, "--snapshot-every", 2)) == 1
    assert "to begin anew" in capsys.readouterr().err.splitlines()[-1] and (folder / "state.json").exists()


def test_the_folder_is_locked_until_the_video_is_there(
    checkpoint: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join, refused = recovery.join_videos, []

    def joined(*given: Any) -> Path:
        with pytest.raises(OutputError, match="another process"):
            RecoverableVideo(inputs / "video.mp4", {}, sound=np.zeros((1, 1), np.float32), rate=16000, fps=25)
        refused.append(True)
        return join(*given)

    monkeypatch.setattr(recovery, "join_videos", joined)
    assert main(arguments(checkpoint, inputs, "--snapshot-every", 1, "--seconds", 1)) == 0 and refused
    assert names(inputs) == {"face.png", "sound.wav", "video.mp4"}


def test_two_runs_of_one_video_are_not_mixed(
    checkpoint: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    (inputs / "video.mp4.resume").mkdir()
    held = os.open(inputs / "video.mp4.resume", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert main(arguments(checkpoint, inputs, "--snapshot-every", 2)) == 1
    assert "another process" in capsys.readouterr().err.splitlines()[-1]
    os.close(held)
    assert main(arguments(checkpoint, inputs, "--snapshot-every", 2, "--seconds", 1)) == 0


def test_joined_videos_show_every_frame_once(tmp_path: Path, numbers: np.random.Generator) -> None:
    frames = np.repeat(numbers.integers(0, 256, (40, 1, 1, 3), dtype=np.uint8), 64, axis=1).repeat(64, axis=2)
    parts = []
    for number, (first, end) in enumerate(((0, 1), (1, 24), (24, 40))):
        writer = VideoWriter(tmp_path / f"{number}.mp4", fps=25, size=(64, 64))
        writer.write(frames[first:end], np.zeros(0))
        parts.append((writer.close(), end - first))
    sound = (0.1 * numbers.standard_normal((25600, 2))).astype(np.float32)
    for suffix in ("mp4", "mkv"):
        facts = probe(join_videos(parts, tmp_path / f"all.{suffix}", sound, 16000, 25))
        assert (facts.frames, facts.audio_channels) == (40, 2) and abs(facts.audio_duration_s - 1.6) < 0.07
        with av.open(str(tmp_path / f"all.{suffix}")) as file:
            decoded = list(file.decode(video=0))
        assert [round(frame.time * 25) for frame in decoded] == list(range(40))
        for frame, exact in zip(decoded, frames, strict=True):
            assert np.abs(exact_rgb(frame.to_ndarray()) - exact).mean() < 6
