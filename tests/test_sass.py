"""Counts of machine code: loops, widths and pipes of invented code, the check, one real kernel in a process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import sass
from bench.machine_code import accesses, code_of, loops, parse, pipes_of, reachable
from bench.sass import Row, Table, compare, loop_figures, whole_figures

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR20], R24"
TILE = [PRODUCT] * 8  # 64 queries, 128 keys, heads of 128
SPIN = ["SPIN:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0", "@!P0 BRA `(SPIN)", "BRA `(GO)"]
ROW = Row(
    "attention", "14B", "bfloat16", "attention_kernel", unit="tile", units=2.0, usual=900, apart=20, tensor_cycles=1024,
    pipes=dict.fromkeys(sass.NAMES, 0) | {"xu": 132, "alu": 50, "fma": 300}, accesses={"load 128": 4, "store 32": 1},
)  # fmt: skip


def text(lines: list[str]) -> str:
    """As nvdisasm prints it: `NAME:` is a label, all else an instruction."""
    start = ["//----- .text.kernel -----", "\t.align\t128", ".text.kernel:"]
    code = (f"        /*{16 * n:04x}*/                   {line} ;" for n, line in enumerate(lines))
    return "\n".join(start + [line if line.endswith(":") else made for line, made in zip(lines, code, strict=True)])


def filler(n: int) -> list[str]:
    return ["FADD R1, R1, R2"] * n


def figures(lines: list[str]) -> dict[str, object]:
    return loop_figures(parse(text([*lines, "EXIT", "LOST:", "BRA `(LOST)"])), head_dim=128)


@pytest.fixture
def sizes(seed: int) -> list[int]:
    """Fresh lengths for parts of invented code."""
    return random.Random(seed).sample(range(1, 90), 6)


# -- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["@P1 BRA `(SKIP)", "@!UP0 BRA `(SKIP)", "BRA.DIV UR4, `(SKIP)"])
def test_what_a_branch_may_skip_is_counted_apart(branch: str, sizes: list[int]) -> None:
    a, b, c, *_ = sizes
    body = [*filler(a), *TILE, branch, *filler(b), "SKIP:", *filler(c), "@P0 BRA `(HEAD)"]
    found = figures(["MOV R1, R2", "HEAD:", *body, *filler(7)])
    assert (found["usual"], found["apart"], found["units"]) == (a + c + 10, b, 1.0)


def test_the_shorter_side_of_a_branch_is_usual(sizes: list[int]) -> None:
    a, b, *_ = sizes
    sides = ["@P1 BRA `(ELSE)", *filler(a), "BRA `(END)", "ELSE:", *filler(b), "END:"]
    found = figures(["HEAD:", *TILE, *sides, "@P0 BRA `(HEAD)"])
    assert (found["usual"], found["apart"]) == (min(a + 1, b) + 10, max(a + 1, b))


def test_a_spin_on_a_barrier_is_counted_apart(sizes: list[int]) -> None:
    wait = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0", "@!P0 BRA `(SPIN)", "GO:"]
    body = ["HEAD:", *wait, *TILE, *filler(sizes[0]), "@P1 BRA `(HEAD)", "EXIT"]
    found = figures([*body, *SPIN])
    assert (found["usual"], found["apart"]) == (sizes[0] + 11, 3)


def test_of_nested_loops_the_innermost_with_products_counts(sizes: list[int]) -> None:
    a, b, c, d, *_ = sizes
    clear = ["CLEAR:", *filler(b), "@P2 BRA `(CLEAR)"]  # within the inner loop, and without products
    inner = ["INNER:", *filler(a), *clear, *TILE, "@P0 BRA `(INNER)"]
    found = figures(["OUTER:", *filler(c), *TILE, *inner, *filler(d), "@P1 BRA `(OUTER)"])
    assert (found["usual"], found["apart"]) == (a + b + 10, 0)


def test_products_that_a_branch_may_skip_are_usual(sizes: list[int]) -> None:
    body = [*filler(sizes[0]), "@P1 BRA `(SKIP)", *TILE, "SKIP:", "@P0 BRA `(HEAD)"]
    found = figures(["HEAD:", *body])
    assert (found["usual"], found["apart"], found["units"]) == (sizes[0] + 10, 0, 1.0)


def test_the_copy_with_more_instructions_a_tile_stands_for_all(sizes: list[int]) -> None:
    a, b, *_ = sizes
    first = ["ONE:", *filler(a), *TILE, "@P0 BRA `(ONE)"]
    second = ["TWO:", *filler(2 * b), *TILE, *TILE, "@P0 BRA `(TWO)"]  # two tiles a turn
    found = figures([*first, *second])
    assert found["usual"] == max((a + 9) / 1, (2 * b + 17) / 2) * found["units"]


def test_tiles_follow_from_the_products() -> None:
    half = [line.replace("64x128x32", "64x64x32") for line in TILE]
    wide = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24"] * 16
    for lines, tiles, cycles in ((TILE, 1, 512), (TILE * 3, 3, 1536), (half, 0.5, 256), (wide, 1, 1024)):
        found = figures(["HEAD:", *lines, "@P0 BRA `(HEAD)"])
        assert (found["units"], found["tensor_cycles"]) == (tiles, cycles)


def test_code_without_products_has_no_loop_over_keys() -> None:
    with pytest.raises(ValueError, match="no loop with matrix products"):
        figures(["HEAD:", *filler(3), "@P0 BRA `(HEAD)", *TILE])


def test_a_branch_by_table_leads_to_all_its_targets() -> None:
    table = 'BRX R2 -0x190 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)'
    blocks = parse(text([table, ".L_x_1:", *filler(2), "EXIT", ".L_x_2:", *filler(3), "EXIT", *filler(5)]))
    assert len(code_of(blocks, reachable(blocks))) == 1 + 3 + 4
    assert loops(blocks) == {}


def test_a_loop_with_two_entries_is_no_natural_loop() -> None:
    lines = ["@P0 BRA `(B)", "A:", *filler(1), "B:", *filler(1), "@P1 BRA `(A)", "EXIT"]
    assert loops(parse(text(lines))) == {}


# -- counts -----------------------------------------------------------------------------------------------------------


def test_instructions_are_counted_by_pipe() -> None:
    lines = [
        PRODUCT, "MUFU.EX2 R1, R1", "@!P3 FFMA R1, R1, R2, R3", "FADD.FTZ R1, R1, R2", "IMAD.MOV.U32 R1, RZ, RZ, R2",
        "IMAD.WIDE R2, R3, R4, R6", "FMNMX R1, R1, R2, !PT", "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R1, R2, R3, R4",
        "LDS.128 R4, [R1]", "SHFL.BFLY PT, R1, R1, 0x1, 0x1f", "UIADD3 UR4, UR4, 0x1, URZ", "NEWTHING R1", "EXIT",
    ]  # fmt: skip
    blocks = parse(text(lines))
    counts = {name: count for name, count in pipes_of(code_of(blocks, reachable(blocks))).items() if count}
    once = ("tensor", "xu", "move", "imad", "alu", "convert", "shared", "shuffle", "uniform", "other", "control")
    assert counts == {"fma": 2, **dict.fromkeys(once, 1)}


def test_global_accesses_are_counted_by_width() -> None:
    lines = [
        "@P0 LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "LDG.E R4, desc[UR4][R2.64]",
        "LDG.E.64 R4, desc[UR4][R2.64]", "LDG.E.U16 R4, desc[UR4][R2.64]", "STG.E.U8 desc[UR4][R2.64], R4",
        "STG.E.128 desc[UR4][R2.64], R4", "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "LDS.64 R4, [R1]",
    ]  # fmt: skip
    expected = {"load 128": 3, "load 16": 1, "load 32": 1, "load 64": 1, "store 128": 1, "store 8": 1}
    assert accesses(parse(text(lines))[0].code) == expected


def test_of_rows_a_loop_is_counted_apart(sizes: list[int]) -> None:
    a, b, *_ = sizes
    lines = [*filler(a), "HEAD:", *filler(b), "LDG.E R4, [R2]", "@P0 BRA `(HEAD)", "EXIT", *filler(4)]
    found = whole_figures(parse(text(lines)), elements=8.0)
    assert (found["usual"], found["apart"], found["accesses"]) == (a + 1, b + 2, {"load 32": 1})


def test_cycles_are_of_two_warps_and_of_one_tile_each() -> None:
    assert ROW.cycles == {"issue": 900, "tensor": 1024, "xu": 1056, "alu": 100, "fma": 300}


def test_attention_and_rows_are_counted_in_every_variant() -> None:
    registry = pytest.importorskip("liverelay.kernels.registry", exc_type=ImportError)
    counted = {job.kernel for job in sass.jobs(registry.KERNELS, "")}
    attention = {spec.name for spec in registry.KERNELS if spec.dot and "attention" in spec.name and spec.on(90)}
    assert attention and attention | {"rms_norm", "gelu_quant", "qk_norm_rope", "store_values"} <= counted
    assert "embed" not in counted and {job.kernel for job in sass.jobs(registry.KERNELS, "gelu_q")} == {"gelu_quant"}


# -- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (replace(ROW, usual=901), "450.5 instructions a tile, the table has 450"),
        (replace(ROW, apart=21), "10.5 instructions apart a tile, the table has 10"),
        (replace(ROW, pipes=ROW.pipes | {"xu": 133}), "66.5 MUFU instructions a tile, the table has 66"),
        (replace(ROW, accesses={"load 64": 8}), "8 loads and stores of less than 128 bits, the table has 1"),
    ],
)
def test_what_grows_fails_and_what_falls_asks_for_a_new_table(row: Row, what: str) -> None:
    faults, fallen = compare([row], [ROW])
    assert len(faults) == 1 and not fallen and what in faults[0] and "--write" in faults[0]
    faults, fallen = compare([ROW], [row])
    assert not faults and len(fallen) == 1 and "fallen" in fallen[0] and "--write" in fallen[0]


def test_another_unrolling_is_compared_by_tile() -> None:
    once = replace(ROW, units=1.0, usual=450, apart=10, pipes={name: n // 2 for name, n in ROW.pipes.items()})
    assert compare([once], [ROW]) == ([], [])


def test_rows_on_one_side_only_fail() -> None:
    other = replace(ROW, dims="1.3B")
    assert "the table has it" in compare([ROW], [ROW, other])[0][0]
    assert "the table lacks it" in compare([ROW, other], [ROW])[0][0]


def finish(*arguments: str, row: Row = ROW, compiler: str = "a", errors: tuple[str, ...] = ()) -> int:
    return sass.finish([row], errors, sass.arguments(arguments), compiler)


def test_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sass, "TABLE", tmp_path / "table.json")
    assert finish("--check") == 1 and "is missing" in capsys.readouterr().out
    assert finish("--write", errors=("boom",)) == 1 and not sass.TABLE.exists()
    assert finish("--write") == 0 and finish("--check") == 0
    assert finish("--check", row=replace(ROW, usual=899)) == 0 and "fallen" in capsys.readouterr().out
    assert finish("--check", row=replace(ROW, usual=901)) == 1 and "sass: 1 kernels counted, 1 faults" in (
        capsys.readouterr().out
    )
    assert finish("--check", row=replace(ROW, usual=901), compiler="b") == 0
    assert "counts are not compared" in capsys.readouterr().out
    assert finish("--check", errors=("boom",)) == 1


def test_writing_a_part_keeps_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sass, "TABLE", tmp_path / "table.json")
    other = replace(ROW, kernel="gelu")
    Table("a", (other, ROW)).write(sass.TABLE)
    rows = sass.TABLE.read_text().splitlines()[1:-1]
    assert [json.loads(row.rstrip(","))["kernel"] for row in rows] == ["attention", "gelu"]
    fewer = replace(ROW, usual=800)
    assert finish("--write", "--kernel", "attention", row=fewer) == 0
    assert Table.read(sass.TABLE) == Table("a", (fewer, other))
    assert finish("--write", "--kernel", "attention", compiler="b") == 1
    assert Table.read(sass.TABLE) == Table("a", (fewer, other))


# -- processes --------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = [sys.executable, "-m", "bench.sass", *arguments]
    return subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.usefixtures("compiler")
def test_products_of_a_real_kernel_take_the_time_of_their_flops(tmp_path: Path) -> None:
    run = command("--kernel", "attention_descriptor", "--jobs", "1", "--dump", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    # 4 * 64 * 128 * 128 FLOPs for each of two warps, a fourth on each tensor core, which makes 1024 in a cycle.
    bounds = run.stdout.partition("largest")[2].splitlines()[1].split()
    assert bounds[0] == "attention_descriptor" and "2048" in bounds
    assert any("HGMMA" in path.read_text() for path in tmp_path.glob("attention_descriptor*.sass"))


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_no_count_has_grown() -> None:
    run = command("--check")
    if "counts are not compared" in run.stdout:
        pytest.skip(run.stdout.splitlines()[-2])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
