"""The ahead-of-time gate: its rules on invented figures, the table on disk, and real compilations in processes.

The real ones run apart, because a process that has a fake driver can launch nothing more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import aot
from bench.aot import Selection, Table, faults, jobs_of, regressions, summary, violations
from bench.fake_gpu import Job, Result, Row, check_descriptors, occupancy, read_log
from liverelay.kernels.spec import GFX942, KernelSpec

ROOT = Path(__file__).resolve().parents[1]
JOB = Job("attention", "14B", "bfloat16", 90, hot=True, dot=True)
ROW = Row(
    "attention", "14B", "bfloat16", 90, "attention_kernel", registers=168, spill_stores=0, spill_loads=0,
    shared=132096, warps=8, ctas=1, limit="shared", occupancy=12, wgmma=24, tma=10, warnings=("C7510",),
)  # fmt: skip
RESULT = Result(JOB, (ROW,))
ALL = Selection()
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'kernel'
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    176 bytes stack frame, 176 bytes spill stores, 164 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 176 bytes cumulative stack size
"""


def at(arch: int, **changes: Any) -> Result:
    """The clean result of a kernel without a product on an architecture, changed."""
    return Result(replace(JOB, arch=arch, dot=False), (replace(ROW, arch=arch, shared=1024, **changes),))


def check(result: Result, committed: tuple[Row, ...] = (ROW,), version: str = "3") -> list[str]:
    return violations([result], Table("3", committed), version, ALL)


def command(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The gate in a process of its own, with Triton compiling."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.aot", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


# -- rules ------------------------------------------------------------------------------------------------------------


def test_clean_figures_pass() -> None:
    assert check(RESULT) == []
    # Growth within the margins passes as well.
    assert check(replace(RESULT, rows=(replace(ROW, registers=176, shared=ROW.shared + 4096, ctas=2),))) == []


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Result(JOB, error="CompilationError: boom"), "does not compile: CompilationError: boom"),
        (Result(JOB, (replace(ROW, spill_stores=8),)), "spills 8 bytes"),
        (Result(JOB, (replace(ROW, spill_loads=4),)), "4 of loads"),
        (Result(JOB, (replace(ROW, wgmma=0, mma=256),)), "no wgmma"),
        (Result(replace(JOB, dtype="float8_e4m3fn"), (replace(ROW, dtype="float8_e4m3fn", wgmma=0),)), "no wgmma"),
        (Result(JOB, (replace(ROW, shared=227 * 1024 + 1),)), "228 KiB of shared memory, a block has at most 227"),
        (Result(JOB, (replace(ROW, arch=89, shared=100 * 1024),)), "at most 99 KiB"),
        (Result(replace(JOB, arch=GFX942), (replace(ROW, arch=GFX942, shared=0, wgmma=0),)), "no mfma"),
    ],
)
def test_a_fault_is_seen_and_named(result: Result, text: str) -> None:
    found = list(faults(result))
    assert len(found) == 1 and text in found[0]
    assert found[0].startswith("attention [14B] ") and (" sm_" in found[0] or " gfx942" in found[0])


@pytest.mark.parametrize(
    "result",
    [
        Result(replace(JOB, hot=False), (replace(ROW, spill_stores=8, spill_loads=8),)),
        Result(replace(JOB, dtype="float32"), (replace(ROW, dtype="float32", wgmma=0),)),
        Result(replace(JOB, arch=80), (replace(ROW, arch=80, wgmma=0, mma=256),)),
        Result(JOB, (replace(ROW, function="prepare", wgmma=0), ROW)),  # one kernel of a launch has the product
        at(100),
    ],
)
def test_what_is_allowed_passes(result: Result) -> None:
    assert list(faults(result)) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (replace(ROW, registers=177), "177 registers, the table has 168"),
        (replace(ROW, shared=ROW.shared + 4097), "134 KiB of shared memory, the table has 129 KiB"),
        (replace(ROW, ctas=0), "0 blocks on an SM"),
        (replace(ROW, warnings=("C7510", "C7515")), "C7515"),
    ],
)
def test_a_regression_is_seen(row: Row, text: str) -> None:
    found = check(replace(RESULT, rows=(row,)))
    assert len(found) == 1 and text in found[0] and "sm_90" in found[0] and "--write" in found[0]


def test_rows_on_one_side_only_are_seen() -> None:
    other = replace(ROW, dims="1.3B")
    assert "the table has it" in next(regressions([ROW], [ROW, other]))
    assert "the table lacks it" in next(regressions([ROW, other], [ROW]))
    assert violations([RESULT], None, "3", ALL) == [f"bench/aot_table.json is missing: {aot.RENEW}"]


def test_rows_that_were_not_asked_for_are_not_missed() -> None:
    committed = (ROW, replace(ROW, arch=80), replace(ROW, kernel="gelu"))
    table = Table("3", committed)
    assert len(violations([RESULT], table, "3", ALL)) == 2
    assert not violations([RESULT], table, "3", Selection((90,), "atten"))


def test_a_failed_compilation_is_one_violation() -> None:
    assert len(check(Result(JOB, error="boom"))) == 1


def test_a_table_of_another_version_is_not_compared() -> None:
    worse = replace(RESULT, rows=(replace(ROW, registers=200),))
    assert check(worse) and not check(worse, version="4")
    assert check(replace(RESULT, rows=(replace(ROW, spill_stores=4),)), version="4")


def test_summary_has_the_worst_figures() -> None:
    line = summary([RESULT, at(80, registers=200)], Selection((80, 90)))
    assert line == (
        "aot: 2 compiled for 80,90: 0 spills, at most 200 registers, 129 KiB shared memory,"
        " all dots are wgmma on sm_90"
    )
    cold = Result(replace(JOB, hot=False, dot=False), (replace(ROW, spill_stores=8, spill_loads=4),))
    assert "at most 12 bytes of spills" in summary([cold], ALL)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_the_log_of_ptxas_is_read() -> None:
    expected = {"registers": 255, "spill_stores": 176, "spill_loads": 164, "warnings": ("C7510",)}
    assert read_log(LOG) == expected
    with pytest.raises(RuntimeError, match="no registers"):
        read_log("ptxas info    : something new")


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((90, 168, 132096, 8), (1, "registers+shared", 12)),
        ((90, 40, 16, 4), (12, "registers", 75)),
        ((90, 32, 0, 4), (16, "threads+registers", 100)),
        ((90, 16, 0, 1), (32, "blocks", 50)),
        ((89, 16, 0, 4), (12, "threads", 100)),
        ((89, 64, 100 * 1024, 4), (0, "shared", 0)),
        ((100, 100, 1024, 4, 256), (2, "tmem", 12)),
        ((GFX942, 128, 0, 4), (4, "registers", 50)),
        ((GFX942, 16, 64 * 1024, 8), (1, "shared", 25)),
        ((GFX942, 16, 64 * 1024 + 1, 8), (0, "shared", 0)),
    ],
)
def test_occupancy(figures: tuple[int, int, int, int], expected: tuple[int, str, int]) -> None:
    assert occupancy(*figures) == expected


# -- jobs and table ---------------------------------------------------------------------------------------------------


def kernel(**changes: Any) -> KernelSpec:
    unused = dict.fromkeys(("launch", "reference", "plain", "make", "cost"))
    fields = unused | {"name": "k", "production": {"big": {}}, "small": {"odd": {}, "one": {}}}
    return KernelSpec(**(fields | changes))


def test_jobs_of_a_kernel() -> None:
    jobs = {(job.dims, job.dtype) for job in jobs_of(kernel(), ALL)}
    assert jobs == {("big", "bfloat16"), ("odd", "float32"), ("odd", "bfloat16")}
    assert {job.arch for job in jobs_of(kernel(), ALL)} == {80, 89, 90, 100, GFX942}
    assert {job.arch for job in jobs_of(kernel(min_arch=90), ALL)} == {90, 100}
    assert {job.arch for job in jobs_of(kernel(min_arch=90, max_arch=90), ALL)} == {90}
    assert {job.arch for job in jobs_of(kernel(dtypes=(torch.float8_e4m3fn,)), ALL)} == {89, 90, 100}
    assert ("big", "float32") in {(job.dims, job.dtype) for job in jobs_of(kernel(dtypes=(torch.float32,)), ALL)}
    assert not list(jobs_of(kernel(), Selection((90,), "other")))


def test_table_is_sorted_one_row_a_line_and_read_back(tmp_path: Path) -> None:
    path, rows = tmp_path / "table.json", (ROW, replace(ROW, arch=80), replace(ROW, kernel="a"))
    Table("3", rows).write(path)
    text = path.read_text()
    assert [json.loads(line.rstrip(","))["arch"] for line in text.splitlines()[1:-1]] == [90, 80, 90]
    assert Table.read(path) == Table("3", (rows[2], rows[1], rows[0]))
    Table("3", rows[::-1]).write(path)
    assert path.read_text() == text
    assert Table.read(tmp_path / "none.json") is None


def test_writing_keeps_what_was_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "TABLE", tmp_path / "table.json")
    other = replace(ROW, arch=80)
    assert aot.write([RESULT, Result(replace(JOB, arch=80), (other,))], "3", ALL) is None
    grown = Result(JOB, (replace(ROW, registers=200),))
    assert aot.write([grown], "3", Selection((90,))) is None
    table = Table.read(aot.TABLE)
    assert table is not None and {row.registers for row in table.rows} == {168, 200}
    assert "triton 3" in (aot.write([grown], "4", Selection((90,))) or "")
    assert "not everything compiles" in (aot.write([Result(JOB, error="boom")], "3", ALL) or "")
    assert Table.read(aot.TABLE) == table


def test_documentation_table() -> None:
    text = list(aot.markdown([RESULT, Result(replace(JOB, production=False), (replace(ROW, dims="odd"),))], "3"))
    assert len(text) == 4 and text[-1].startswith("| attention | 14B | bfloat16 | sm_90 | 168 | 0 / 0 | 129 KiB |")
    assert "wgmma 24, tma 10" in text[-1] and text[1].count("|") == text[2].count("|") == text[3].count("|")


# -- processes --------------------------------------------------------------------------------------------------------


def dies_on_two(job: Job) -> Result:
    """Stands in for the compiler; crashes as a compiler pass does."""
    if job.dims == "2":
        os._exit(1)
    return Result(job, (replace(ROW, dims=job.dims),))


def test_a_crash_of_the_compiler_costs_one_job() -> None:
    jobs = [replace(JOB, dims=str(n)) for n in range(4)]
    results = list(aot.compile_all(jobs, 1, dies_on_two))
    assert [result.job for result in results] == jobs
    assert [result.error for result in results] == ["", "", "the compiler's process died", ""]


def test_a_descriptor_that_tma_refuses_fails_its_launch() -> None:
    tma = pytest.importorskip("liverelay.kernels.tma", exc_type=ImportError)
    given = tma.descriptor("a kernel", "x", torch.zeros(64, 128), [64, 32])
    boxes = [{"elem_size": 4, "block_size": [64, 32], "swizzle": 3}]
    launch = types.SimpleNamespace(
        name="a_kernel", arguments=(7, given), compiled=types.SimpleNamespace(metadata=types.SimpleNamespace())
    )
    for found in ([], boxes):  # where descriptors become pointers there are none
        launch.compiled.metadata.tensordesc_meta = found
        check_descriptors(launch)
    boxes[0]["block_size"] = [512, 32]
    with pytest.raises(ValueError, match=r"^a_kernel: TMA cannot take descriptor 0: a box \[512, 32\] is not of 1"):
        check_descriptors(launch)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("archs", ["90", "gfx942,80"])
def test_a_small_kernel_compiles(archs: str) -> None:
    run = command("--kernel", "rms_norm", "--arch", archs, "--jobs", "1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rms_norm" in run.stdout and run.stdout.splitlines()[-1].startswith("aot: ")


@pytest.mark.usefixtures("compiler")
def test_the_interpreter_is_refused_in_one_line() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench.aot"], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "TRITON_INTERPRET" in run.stderr


@pytest.mark.parametrize("changes", [{}, {"spill_stores": 8}], ids=["clean", "spilling"])
def test_exit_status(
    changes: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "TABLE", tmp_path / "table.json")
    Table("3", (ROW,)).write(aot.TABLE)
    say: Callable[[str], None] = print
    status = aot.finish([Result(JOB, (replace(ROW, **changes),))], aot.arguments(["--check"]), "3", say)
    last = capsys.readouterr().out.splitlines()[-1]
    assert (status, last) == ((1, "aot: 1 violation") if changes else (0, summary([RESULT], ALL)))


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_every_kernel_passes_the_gate() -> None:
    run = command("--check", timeout=1800)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.splitlines()[-1].startswith("aot: ")
