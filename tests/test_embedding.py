"""Programs in C, C++ and Python without torch use a running engine, as docs/embedding.md tells their authors."""

from __future__ import annotations

import ctypes
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
import venv
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from liverelay.engine import __version__, native
from liverelay.engine.config import StreamConfig
from liverelay.engine.engine import Engine
from liverelay.engine.serving.protocol import MAGIC, VERSION, Code
from liverelay.engine.serving.server import Server
from tests.native_build import ROOT, build, build_program, run, tool

for library in ("transformers", "PIL", "ftfy", "soxr"):
    pytest.importorskip(library)
if not hasattr(native.module(), "ring_create"):
    pytest.skip("the compiled module was not built", allow_module_level=True)
PICTURE, SPEECH = ROOT / "samples" / "portrait.png", ROOT / "samples" / "speech.wav"
HEADER = (ROOT / "csrc" / "include" / "liverelay.h").read_text()


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    before, stream = torch.get_num_threads(), StreamConfig(motion_pixel_frames=25)
    torch.set_num_threads(1)
    engine = Engine.load(checkpoint, device="cpu", dtype=torch.float32, stream=stream)
    server = Server(engine, tmp_path_factory.mktemp("serve") / "s")
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.close()
    thread.join(10)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `cmake --install` puts there; built without Python, its tools and its module."""
    folder = tmp_path_factory.mktemp("library")
    build(folder / "build")
    run(tool("cmake"), "--install", folder / "build", "--prefix", folder / "prefix")
    return folder / "prefix"


@pytest.fixture(scope="module")
def examples(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, built as a project of their own that finds the installed library."""
    folder = tmp_path_factory.mktemp("examples")
    return build(folder, f"-DCMAKE_PREFIX_PATH={prefix}", sources=ROOT / "examples" / "embedding")


def wait_until_free(server: Server) -> None:
    """Clients that did not say farewell are noticed a little later."""
    deadline = time.monotonic() + 20
    while server.sessions and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.sessions == 0


def library_of(prefix: Path) -> Path:
    return next(prefix.rglob("libliverelay.so"))


def frames_of(output: str) -> int:
    found = re.search(r"^(\d+) frames: ffmpeg .*bt709.* -s 128x128", output, re.MULTILINE)
    assert found, output
    return int(found[1])


def speech() -> np.ndarray:
    with wave.open(str(SPEECH)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


def check_sound(path: Path, frames: int) -> None:
    """A WAV file of the sample, and of silence up to the end of the last frame."""
    expected = speech()
    assert frames == -(-len(expected) // 640)
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        assert file.getnframes() == frames * 640 and path.stat().st_size == 44 + frames * 1280
        heard = np.frombuffer(file.readframes(frames * 640), np.int16)
    assert np.array_equal(heard, np.pad(expected, (0, frames * 640 - len(expected))))


def test_examples_in_three_languages_make_the_same_video(
    server: Server, prefix: Path, examples: Path, tmp_path: Path
) -> None:
    frames = frames_of(run(examples / "talk_c", server.path, PICTURE, SPEECH, "c.rgb", "c.wav", cwd=tmp_path))
    video = np.fromfile(tmp_path / "c.rgb", np.uint8)
    assert video.size == frames * 128 * 128 * 3 and video.std() > 1
    check_sound(tmp_path / "c.wav", frames)

    output = run(examples / "talk_cpp", server.path, PICTURE, SPEECH, "cpp.nv12", "cpp.wav", cwd=tmp_path)
    assert frames_of(output) == frames and re.search(r"snapshot [0-9a-f]{32} goes on with frame", output)
    check_sound(tmp_path / "cpp.wav", frames)
    assert (tmp_path / "cpp.nv12").stat().st_size == video.size // 2

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode
    script = ROOT / "examples" / "embedding" / "talk_ctypes.py"
    output = run(
        python, "-I", script, library_of(prefix), server.path, PICTURE, SPEECH, "py.rgb", "py.wav", cwd=tmp_path
    )
    assert frames_of(output) == frames and np.array_equal(np.fromfile(tmp_path / "py.rgb", np.uint8), video)
    check_sound(tmp_path / "py.wav", frames)
    wait_until_free(server)


def test_an_example_says_in_one_line_what_is_wrong(examples: Path, server: Server, tmp_path: Path) -> None:
    for program in ("talk_c", "talk_cpp"):
        for path, picture, text in (("nowhere", PICTURE, "nobody serves on"), (server.path, SPEECH, "not a readable")):
            command = [examples / program, path, picture, SPEECH, tmp_path / "v", tmp_path / "a"]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            assert done.returncode == 1 and text in done.stderr and done.stderr.count("\n") == 1


def test_the_library_is_found_and_shows_its_interface_only(prefix: Path) -> None:
    shown = run(tool("nm"), "-D", "--defined-only", library_of(prefix))
    declared = set(re.findall(r"^LIVERELAY_API [^(]*?(liverelay_\w+)\(", HEADER, re.MULTILINE))
    assert {line.split()[-1] for line in shown.splitlines()} == declared and len(declared) == 18
    assert not re.search("python|torch|cuda", run(tool("ldd"), library_of(prefix)), re.IGNORECASE)
    if shutil.which("pkg-config"):
        folder = next(prefix.rglob("liverelay.pc")).parent
        flags = run("env", f"PKG_CONFIG_PATH={folder}", "pkg-config", "--cflags", "--libs", "liverelay")
        assert "-lliverelay" in flags and (folder / flags.split()[0].removeprefix("-I") / "liverelay.h").exists()
    assert next(prefix.rglob(f"libliverelay.so.{re.findall(r'LIVERELAY_ABI (.)u', HEADER)[0]}")).exists()
    assert re.search(rf'VERSION "{__version__}"', next(prefix.rglob("liverelayConfigVersion.cmake")).read_text())


def test_the_header_is_strict_c_and_cpp_and_agrees_with_the_protocol(tmp_path: Path) -> None:
    include = f"-I{ROOT / 'csrc' / 'include'}"
    for compiler, name, standard in (("cc", "a.c", "c99"), ("cc", "b.c", "c17"), ("c++", "a.cpp", "c++11")):
        (tmp_path / name).write_text("#include <liverelay.h>\nint main(void) { return LIVERELAY_OK; }\n")
        flags = (f"-std={standard}", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-c", include)
        run(tool(compiler), *flags, tmp_path / name, "-o", tmp_path / "o")
    codes = dict(re.findall(r"LIVERELAY_E_(\w+) = (-\d+)", HEADER))
    assert {name: int(codes[name]) for name in Code.__members__} == dict(Code.__members__)
    control = (ROOT / "csrc" / "control.h").read_text()
    assert f"kControlVersion = {VERSION}," in control
    assert f"kControlMagic = 0x{int.from_bytes(MAGIC, 'little'):X}U" in control


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_client_library_is_sound_under_sanitizers(
    server: Server, tmp_path: Path, sanitizer: str, seed: int
) -> None:
    program = build_program(tmp_path, "client_test", sanitizer)
    for verb in ("use", "threads"):
        assert "done" in run(program, verb, server.path, PICTURE, seed)
        wait_until_free(server)


def test_a_killed_server_is_noticed_and_replaced(
    examples: Path, prefix: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path, outputs = tmp_path / "s", (tmp_path / "v", tmp_path / "a")
    serve = [sys.executable, "-m", "liverelay.engine", "serve", "--checkpoint", str(checkpoint), "--socket", str(path)]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None and "serving" in killed.stdout.readline()
        talk = runpy.run_path(str(ROOT / "examples" / "embedding" / "talk_ctypes.py"))
        library, own, session = talk["load"](str(library_of(prefix))), ctypes.c_uint64(), ctypes.c_uint64()
        assert library.liverelay_connect(str(path).encode(), 1, 60000, ctypes.byref(own)) == 0
        image, options = PICTURE.read_bytes(), talk["Options"](struct_bytes=48, max_area=64 * 64)
        assert library.liverelay_open(own, image, len(image), b"", options, 60000, ctypes.byref(session)) == 0
        command = [str(part) for part in (examples / "talk_c", path, PICTURE, SPEECH, *outputs)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as client:
            while not outputs[0].exists() or not outputs[0].stat().st_size:
                assert client.poll() is None
                time.sleep(0.01)
            killed.kill()
            assert client.stderr is not None
            error = client.stderr.read()
            assert client.wait(60) == 1 and "the server" in error and "-5" in error
        killed.wait()
        assert library.liverelay_push(session, bytes(1280), 640, 1, 1, 16000, 0, None) == Code.LOST
        assert library.liverelay_close(session) == 0 and library.liverelay_disconnect(own) == 0
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "serving" in process.stdout.readline()  # the stale socket is replaced
        run(*command)
        process.terminate()
        assert process.wait(60) == 0
