"""Builds of csrc/ for tests: warnings are errors, sanitizers where the compiler and the kernel have them."""

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


def run(*command: object, seconds: int = 300, cwd: Path | None = None) -> str:
    """The command's output; it must end well."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=seconds, check=False, cwd=cwd
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def build(folder: Path, *options: str, sources: Path = ROOT, target: str = "all") -> Path:
    """Configure and build `sources` in `folder`."""
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    run(tool("cmake"), "-S", sources, "-B", folder, *generator, "-DLIVERELAY_WERROR=ON", *options)
    run(tool("cmake"), "--build", folder, "--target", target)
    return folder


def build_program(folder: Path, name: str, sanitizer: str) -> Path:
    """A program of csrc/tests under a sanitizer; skipped where the compiler, or the kernel, does not do it."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    for command in ([tool("c++"), FLAGS[sanitizer], str(probe), "-o", str(folder / "probe")], [str(folder / "probe")]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            pytest.skip(f"no {sanitizer} sanitizer here: {(done.stderr.splitlines() or ['it ends at once'])[0]}")
    return build(folder / "build", "-DLIVERELAY_TESTS=ON", f"-DLIVERELAY_SANITIZE={sanitizer}", target=name) / name
