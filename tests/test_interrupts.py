"""Ctrl-C, once or several times: what is done is kept and named, and nothing cuts the end of the process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from liverelay.engine import progress
from liverelay.engine.cli import main


@pytest.fixture
def caught() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in progress.INTERRUPTS]
    progress.catch_interrupts()
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.usefixtures("caught")
@pytest.mark.parametrize("second", progress.INTERRUPTS)
def test_an_interrupt_soon_after_another_is_the_same(
    monkeypatch: pytest.MonkeyPatch, numbers: np.random.Generator, second: signal.Signals
) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + numbers.random())
    signal.raise_signal(second)
    monkeypatch.setattr(time, "monotonic", lambda: now + progress.PATIENCE_S + 1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(second)


@pytest.mark.usefixtures("caught")
def test_an_interrupt_waits_for_what_must_not_be_cut() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), progress.uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        done.append("the rest")
    assert done
    with progress.uninterrupted():
        signal.raise_signal(signal.SIGINT)  # soon after the first one


def test_an_interrupt_inside_an_exec_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(
        "import sys; from liverelay.engine import cli; sys.argv = ['liverelay', 'kernels']\n"
        "cli._kernels = lambda a: exec('raise KeyboardInterrupt')\n"
        "sys.exit(cli.main())\n"
    )
    command = [sys.executable, "-m", "talk"]  # with -m, Python remembers it
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("value", ["2", "many"])
def test_a_world_size_of_somebody_else_is_one_line_where_it_matters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.delenv("RANK", raising=False)
    assert main(["plan", "--gpus", "5"]) == 0
    assert main(["generate", "--checkpoint", "a", "--image", "b", "--audio", "c", "--out", "d.mp4"]) == 1
    assert "is not as torchrun sets it" in capsys.readouterr().err


def test_two_interrupts_leave_a_playable_file_and_its_name(checkpoint: Path, tmp_path: Path, seed: int) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    soundfile, numbers = pytest.importorskip("soundfile"), np.random.default_rng(seed)
    from PIL import Image

    from liverelay.engine.media import probe

    Image.fromarray(numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "face.png")
    soundfile.write(tmp_path / "sound.wav", np.zeros(16000 * 100), 16000)
    for run, gap in enumerate((0.0, *numbers.uniform(0, 0.2, 2))):
        out = tmp_path / f"{run}.mp4"
        given = ("generate", "--checkpoint", checkpoint, "--image", tmp_path / "face.png", "--audio",
                 tmp_path / "sound.wav", "--size", "64x64", "--threads", "1", "--devices", "cpu,cpu",
                 "--snapshot-every", "2", "--out", out)  # fmt: skip
        command = [sys.executable, "-m", "liverelay.engine", *map(str, given)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not (tmp_path / f"{out.name}.resume" / "state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for pause in (numbers.uniform(0, 0.3), gap):
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and printed.split() == [str(out)], (gap, errors)
        assert "Traceback" not in errors and "terminate" not in errors
        assert probe(out).frames
