"""The frame ring's C++ core, built apart: warnings as errors, sanitizers, a million operations, damaged segments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.native_build import build, build_program, run


def test_the_core_is_sound_under_address_and_undefined_sanitizer(tmp_path: Path, seed: int) -> None:
    program = build_program(tmp_path, "frame_ring_test", "address")
    assert "opened" in run(program, "fuzz", 4000, seed)
    for policy in ("block", "drop"):
        assert "100000 pushed" in run(program, "stress", 100_000, seed, policy)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_million_operations_with_random_stalls(tmp_path: Path, sanitizer: str, seed: int) -> None:
    program = build_program(tmp_path, "frame_ring_test", sanitizer)
    run(program, "fuzz", 20_000, seed)
    for policy in ("block", "drop"):
        assert "1000000 pushed" in run(program, "stress", 1_000_000, seed, policy)


@pytest.mark.slow
def test_the_module_compiles_without_a_warning(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    build(tmp_path, "-DLIVERELAY_PYTHON=ON", "-DLIVERELAY_LIBRARY=OFF", *python)
