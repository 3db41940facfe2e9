"""The line over several processes, as torchrun starts them: equal to one process; broken lines say who broke."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import regression

av = pytest.importorskip("av", reason="PyAV is not installed")
soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

ENGINE = ["-m", "liverelay.engine"]
Flags = Sequence[object]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def start(processes: int, flags: Flags, *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *ENGINE]
    if processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *launcher]
        command = [sys.executable, *run, *ENGINE]
    return subprocess.Popen(
        [*command, *map(str, flags)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, errors


def ours(errors: str) -> set[str]:
    return {line for line in errors.splitlines() if line.startswith("liverelay: ")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    numbers = np.random.default_rng()
    Image.fromarray(numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "face.png")
    soundfile.write(folder / "sound.wav", 0.1 * numbers.standard_normal(16000 * 40), 16000)
    return folder


def generate(checkpoint: Path, inputs: Path, out: Path, *more: object) -> list[object]:
    flags = ["generate", "--checkpoint", checkpoint, "--image", inputs / "face.png", "--audio", inputs / "sound.wav"]
    return [*flags, "--size", "64x64", "--threads", 1, "--out", out, *more]


def pictures(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize(("processes", "more"), [(2, []), (3, []), (5, []), (3, ["--plan", "0+1,2+3+vae1,vae2"])])
def test_given_tensors_give_the_same_over_processes(tmp_path: Path, processes: int, more: list[str]) -> None:
    (tmp_path / "given").mkdir()
    regression.make_tpp(tmp_path / "given", clips=3, blocks=4)
    results = []
    for count, flags in ((1, []), (processes, more)):
        out = tmp_path / f"{count}.safetensors"
        status, errors = finish(start(count, ["golden", "tpp", tmp_path / "given", "--out", out, *flags]))
        assert status == 0, errors
        results.append(load_file(out))
    alone, together = results
    assert alone.keys() == together.keys() and len(alone) == 49
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_a_video_is_the_same_over_threads_and_processes(checkpoint: Path, inputs: Path, tmp_path: Path) -> None:
    videos = []
    for count, more in ((1, ()), (1, ("--devices", "cpu,cpu,cpu")), (3, ("--plan", "0,1+2+3,vae"))):
        out = tmp_path / f"{len(videos)}.mkv"
        status, errors = finish(start(count, generate(checkpoint, inputs, out, "--seconds", 3, *more)))
        assert status == 0, errors
        videos.append(pictures(out))
    assert len(videos[0]) == 75
    for other in videos[1:]:
        assert len(other) == 75 and all(map(np.array_equal, other, videos[0]))


@pytest.mark.slow
def test_a_vae_in_two_processes_makes_the_same_video(checkpoint: Path, inputs: Path, tmp_path: Path) -> None:
    split, videos = ("--plan", "0,1,2,3,vae1,vae2"), []
    for count, more in ((1, ()), (1, (*split, "--devices", "cpu,cpu,cpu,cpu,cpu,cpu")), (6, split)):
        out = tmp_path / f"{len(videos)}.mkv"
        status, errors = finish(start(count, generate(checkpoint, inputs, out, "--seconds", 3, *more)), 300)
        assert status == 0, errors
        videos.append(pictures(out))
    for other in videos[1:]:
        assert len(other) == 75 and all(map(np.array_equal, other, videos[0]))


def ranks(out: Path) -> dict[int, int]:
    """Process numbers by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            settings = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and b"torch.distributed.run" not in words:
            found |= {int(line[5:]): int(folder.name) for line in settings if line.startswith(b"RANK=")}
    return found


def size(path: Path) -> int:
    """Of a file that may be gone by now: 0."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def runs(number: int) -> bool:
    """Whether a process is there and not yet ended."""
    try:
        return "zombie" not in Path(f"/proc/{number}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("number", "rank", "text"),
    [
        (signal.SIGKILL, 1, "liverelay: stage 1+2 (rank 1) has ended"),
        (signal.SIGSTOP, 2, "liverelay: stage 3+vae (rank 2) was silent for 2 s"),
        (signal.SIGKILL, 0, "(stage 0) is gone"),
    ],
)
def test_a_lost_process_is_named_by_all_the_others(
    checkpoint: Path, inputs: Path, tmp_path: Path, number: int, rank: int, text: str
) -> None:
    out = tmp_path / "x.mkv"
    process = start(3, generate(checkpoint, inputs, out, "--timeout", 2))
    deadline = time.monotonic() + 60
    while not {size(part) for part in tmp_path.glob(".x.mkv.*")} - {0, 65536}:  # more than the probe of the disk
        assert process.poll() is None and time.monotonic() < deadline, finish(process)[1]
        time.sleep(0.05)
    victims, lost = ranks(out), time.monotonic()
    others = [victims[other] for other in victims if other != rank]
    assert len(others) == 2
    os.kill(victims[rank], number)
    while any(map(runs, others)):
        assert time.monotonic() - lost < 8
        time.sleep(0.02)
    os.kill(victims[rank], signal.SIGKILL) if number == signal.SIGSTOP else None
    status, errors = finish(process)
    assert status != 0 and any(text in line for line in ours(errors)), errors
    assert not list(tmp_path.glob(".*")) or rank == 0
    assert rank == 0 or 0 < len(pictures(out)) < 1000  # what was done can be watched


def test_a_run_that_loses_a_process_starts_again_where_it_was(
    checkpoint: Path, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.mkv"
    flags = generate(checkpoint, inputs, out, "--timeout", 2, "--snapshot-every", 4)
    process = start(3, flags, "--max-restarts", "1")
    deadline = time.monotonic() + 60
    while not (tmp_path / "x.mkv.resume" / "state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, finish(process)[1]
        time.sleep(0.02)
    os.kill(ranks(out)[1], signal.SIGKILL)
    status, errors = finish(process)
    assert status == 0 and "going on from frame" in errors, errors
    assert len(pictures(out)) == 1000 and [path.name for path in tmp_path.iterdir()] == ["x.mkv"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--plan", "0+1+2,3+vae", "--transport", "local"], "transport local is for one process"),
        (["--plan", "0+1+2+3+vae"], "the plan 0+1+2+3+vae has 1 stages for 2 devices"),
        (["--transport", "nccl"], "nccl needs a GPU"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_by_every_process(
    checkpoint: Path, inputs: Path, tmp_path: Path, flags: list[str], text: str
) -> None:
    status, errors = finish(start(2, [*generate(checkpoint, inputs, tmp_path / "x.mkv"), *flags]))
    assert status != 0 and any(text in line for line in ours(errors)), errors
    assert not list(tmp_path.iterdir())


def test_a_rank_that_waits_for_the_others_can_be_ended(checkpoint: Path, inputs: Path, tmp_path: Path) -> None:
    flags = generate(checkpoint, inputs, tmp_path / "x.mkv", "--audio", "nowhere.wav")  # seen by the leader alone
    status, errors = finish(start(2, flags))
    assert status != 0 and ours(errors) == {"liverelay: the sound file nowhere.wav does not exist"}
    assert "SIGKILL" not in errors  # which torchrun sends half a minute later
