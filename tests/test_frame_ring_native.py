"""The frame ring's C++ core, built apart: warnings as errors, sanitizers, a million operations, damaged segments."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}


def tool(name: str) -> str:
    """From PATH or beside the interpreter; the test is skipped where it is missing."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is missing")
    return found


def run(*command: object, seconds: int = 300) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def build(folder: Path, *options: str, target: str = "all") -> Path:
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    run(tool("cmake"), "-S", ROOT, "-B", folder, *generator, "-DLIVERELAY_WERROR=ON", *options)
    run(tool("cmake"), "--build", folder, "--target", target)
    return folder


def build_tests(folder: Path, sanitizer: str, program: str = "frame_ring_test") -> Path:
    """A test program under a sanitizer; skipped where the compiler, or the kernel, does not do it."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    for command in ([tool("c++"), FLAGS[sanitizer], str(probe), "-o", str(folder / "probe")], [str(folder / "probe")]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            pytest.skip(f"no {sanitizer} sanitizer here: {(done.stderr.splitlines() or ['it ends at once'])[0]}")
    options = ("-DLIVERELAY_PYTHON=OFF", "-DLIVERELAY_TESTS=ON", f"-DLIVERELAY_SANITIZE={sanitizer}")
    return build(folder / "build", *options, target=program) / program


def test_the_core_is_sound_under_address_and_undefined_sanitizer(tmp_path: Path, seed: int) -> None:
    program = build_tests(tmp_path, "address")
    assert "opened" in run(program, "fuzz", 4000, seed)
    for policy in ("block", "drop"):
        assert "100000 pushed" in run(program, "stress", 100_000, seed, policy)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_million_operations_with_random_stalls(tmp_path: Path, sanitizer: str, seed: int) -> None:
    program = build_tests(tmp_path, sanitizer)
    run(program, "fuzz", 20_000, seed)
    for policy in ("block", "drop"):
        assert "1000000 pushed" in run(program, "stress", 1_000_000, seed, policy)


@pytest.mark.slow
def test_the_module_compiles_without_a_warning(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    build(tmp_path, f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
