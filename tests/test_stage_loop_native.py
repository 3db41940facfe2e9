"""The stage loop's C++ core, built apart: sanitizers, lines with random stalls, lines that are cut in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native_build import build_program, run


@pytest.mark.slow
def test_lines_are_sound_under_address_and_undefined_sanitizer(tmp_path: Path, seed: int) -> None:
    program = build_program(tmp_path, "stage_loop_test", "address")
    assert "5000 jobs" in run(program, "line", 5000, seed)
    assert "50 lines were cut" in run(program, "close", 50, seed)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_many_lines_with_random_stalls(tmp_path: Path, sanitizer: str, seed: int) -> None:
    program = build_program(tmp_path, "stage_loop_test", sanitizer)
    for number in range(5):
        assert "30000 jobs" in run(program, "line", 30_000, seed + number)
    assert "1000 lines were cut" in run(program, "close", 1000, seed)
