"""`liverelay serve` as a command: how it ends, what it leaves, what it refuses before a model is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from liverelay.engine import cli, native
from liverelay.engine.errors import RingClosedError
from liverelay.engine.frame_ring_layout import FOLDER
from liverelay.engine.serving.protocol import Kind
from tests.serving_client import Numbers, ServingClient, picture, png, request, sound

for library in ("transformers", "PIL", "ftfy", "soxr"):
    pytest.importorskip(library)
if not hasattr(native.module(), "ring_create"):
    pytest.skip("the compiled module was not built", allow_module_level=True)


def test_without_the_compiled_module_serve_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "liverelay.engine._C", None)
    assert cli.main(["serve", "--checkpoint", str(tmp_path), "--socket", str(tmp_path / "s")]) == 1
    error = capsys.readouterr().err
    assert "compiled module" in error and error.count("\n") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_polite_kill_removes_the_socket_and_the_rings(
    checkpoint: Path, numbers: Numbers, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    path, lines, trace = tmp_path / "s", tmp_path / "t.jsonl", tmp_path / "t.json"
    command = [sys.executable, "-m", "liverelay.engine", "serve", "--checkpoint", str(checkpoint), "--socket", path]
    command += ["--threads", "1", "--telemetry", lines, "--trace", trace]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "serving" in process.stdout.readline()
        client = ServingClient(path)
        client.open(Kind.OPEN, request(png(picture(numbers)), slots=2))
        client.push(sound(numbers, 16000))
        client.pop()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == status and "Traceback" not in error and "first frame after" in error
    assert not path.exists() and not os.path.exists(FOLDER / client.frames.name)
    with pytest.raises(RingClosedError):
        while True:
            client.pop()
    assert all(json.loads(line) for line in lines.read_text().splitlines()) and json.loads(trace.read_text())


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--threads", "100000"), "too many"),
        (("--telemetry", "FOLDER/a", "--trace", "FOLDER/a"), "the same file"),
        (("--telemetry", "FOLDER/nowhere/a"), "nowhere"),
        ((), "--devices instead of torchrun"),
    ],
)
def test_serve_refuses_in_one_line_what_cannot_be(tmp_path: Path, more: tuple[str, ...], text: str) -> None:
    given = [word.replace("FOLDER", str(tmp_path)) for word in more]
    command = [sys.executable, "-m", "liverelay.engine", "serve", "--checkpoint", tmp_path, "--socket", tmp_path / "s"]
    ranks = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = subprocess.run(
        [*command, *given], env=os.environ | ({} if more else ranks), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and text in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
