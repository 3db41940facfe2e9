"""`python -m bench.sass [--check | --write]`: counts what the sm_90 kernels' machine code executes, with no GPU.

Launches of the registry's production dims are compiled as bench/aot.py compiles them. A count that is larger than in
bench/sass_table.json, which is committed, fails the check.

Attention: the loop over keys, which is the innermost one with matrix products. Where there are several (each consumer
of a specialised kernel is a copy), the one with most instructions stands for all. `usual` is the shortest way from the
loop's head back to it through all products, `apart` the rest of the loop: spins on a barrier and what an `if` may
skip. So a turn takes `usual` instructions at least, and no more than the sum unless it spins. What a loop around this
one does once for several tiles is not counted. Counts are for a tile of 64 queries by 128 keys, of one of the four
warps that share it; how many tiles a turn makes follows from the FLOPs of its products, however it is unrolled.

Kernels of rows (no products, tokens among the dims): all that can be reached; `apart` is what stands in a loop, since
its turns are not known. Counts are compared by element, of tokens * width. Global loads and stores are counted by
width: 128 bits are due everywhere.

Cycles are bounds from below for one of an SM's four schedulers with two warps, each pipe taken alone. A scheduler
issues one instruction in a cycle. Of a warp's 32 lanes a pipe takes in a cycle a fourth of what the CUDA C++ Best
Practices Guide gives an SM (12.1.1, column 9.0): FP32 32, integers, logic and comparisons (the ALU) 16, MUFU 4.
bench/machine_code.py tells which pipe executes what.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.aot import Selection, compile_all, jobs_of, unready
from bench.fake_gpu import Job, Result, read_job, spec_of
from bench.machine_code import (
    NAMES,
    Block,
    accesses,
    code_of,
    loops,
    parse,
    pipes_of,
    product_loops,
    reachable,
    usual_way,
)

TABLE = Path(__file__).with_name("sass_table.json")
RENEW = "run `python -m bench.sass --write` and commit bench/sass_table.json"
ARCH, WARP, WARPS = 90, 32, 2  # WARPS: that compute, in a scheduler; attention has eight on an SM
QUERIES, KEYS = 64, 128  # counts are given for a tile of this size


# -- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Counts of one kernel.

    unit: what they are compared by, `tile` or `element`; units: how many of them a turn of the loop makes, or a
    thread; usual, apart: instructions; pipes: the usual ones by pipe; tensor_cycles: of the usual products, of one
    warp; accesses: instructions of the whole kernel by kind and bits, such as `load 128`.
    """

    kernel: str
    dims: str
    dtype: str
    function: str
    unit: str
    units: float
    usual: int
    apart: int
    tensor_cycles: int
    pipes: Mapping[str, int]
    accesses: Mapping[str, int]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.kernel, self.dims, self.dtype, self.function

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.dims}] {self.dtype} ({self.function})"

    @property
    def figures(self) -> dict[str, float]:
        """What may only fall."""
        narrow = sum(count for name, count in self.accesses.items() if not name.endswith(" 128"))
        figures = {"instructions": self.usual, "instructions apart": self.apart, "MUFU instructions": self.pipes["xu"]}
        per = {f"{name} a {self.unit}": round(count / self.units, 3) for name, count in figures.items()}
        return per | {"loads and stores of less than 128 bits": narrow}

    @property
    def cycles(self) -> dict[str, float]:
        """Of a scheduler for a tile of each of its warps: issuing, and each pipe that could be the slowest."""
        pipes = self.pipes
        cycles = {
            "issue": self.usual, "tensor": self.tensor_cycles, "xu": 8 * pipes["xu"],
            "alu": 2 * (pipes["alu"] + pipes["convert"]), "fma": pipes["fma"] + pipes["imad"],
        }  # fmt: skip
        return {name: WARPS * count / self.units for name, count in cycles.items()}


def loop_figures(blocks: Sequence[Block], head_dim: int) -> dict[str, Any]:
    """Fields of a Row from `unit` on, of the loop over keys; ValueError where there is none."""
    found = []
    for loop in product_loops(blocks):
        code = code_of(blocks, usual_way(blocks, loop))
        tiles = sum(instruction.flops for instruction in code) / (4 * QUERIES * KEYS * head_dim)
        apart = len(code_of(blocks, loop[1])) - len(code)
        cycles = sum(instruction.tensor_cycles for instruction in code)
        found.append(dict(units=tiles, usual=len(code), apart=apart, tensor_cycles=cycles, pipes=pipes_of(code)))
    if not found:
        raise ValueError("no loop with matrix products")
    most = max(found, key=lambda one: (one["usual"] / one["units"], one["apart"]))
    return dict(unit="tile", accesses=accesses(code_of(blocks, reachable(blocks)))) | most


def whole_figures(blocks: Sequence[Block], elements: float) -> dict[str, Any]:
    """Fields of a Row from `unit` on, of a kernel whose threads make so many elements each."""
    live = reachable(blocks)
    turning = set[int]().union(*loops(blocks).values())
    code, apart = code_of(blocks, live - turning), code_of(blocks, turning)
    return dict(unit="element", units=elements, usual=len(code), apart=len(apart), tensor_cycles=0,
                pipes=pipes_of(code), accesses=accesses(code + apart))  # fmt: skip


# -- what is compiled -------------------------------------------------------------------------------------------------


def jobs(specs: Sequence[Any], kernel: str) -> list[Job]:
    """Attention and kernels of rows in production dims, of the registry's rows whose name has the text."""
    found = [job for spec in specs for job in jobs_of(spec, Selection((ARCH,), kernel)) if job.production]
    dims = {spec.name: spec.production for spec in specs}
    return [job for job in found if ("attention" in job.kernel if job.dot else rows_of(dims[job.kernel][job.dims]))]


def rows_of(dims: Mapping[str, int]) -> int:
    """Rows of a kernel of rows; 0 for another one."""
    return dims.get("tokens", 0) or dims.get("frames", 0) * dims.get("frame_tokens", 0)


def disassemble(cubin: bytes) -> str:
    """The text of Triton's own nvdisasm."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_job(job: Job, folder: Path | None = None) -> Result:
    """Compile and count; the machine code goes into the folder, too."""

    def read(label: str, launch: Any) -> Row:
        text = disassemble(launch.compiled.asm["cubin"])
        if folder:
            name = re.sub(r"[^\w.]+", "-", f"{job.kernel} {job.dims} {job.dtype} {label}.sass")
            (folder / name).write_text(text)
        dims = spec_of(job).production[job.dims]
        if job.dot:
            figures = loop_figures(parse(text), dims["head_dim"])
        else:
            width = dims["width"] if "width" in dims else dims["heads"] * dims["head_dim"]
            threads = launch.programs * launch.compiled.metadata.num_warps * WARP
            figures = whole_figures(parse(text), rows_of(dims) * width / threads)
        return Row(job.kernel, job.dims, job.dtype, label, **figures)

    return read_job(job, read)


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Committed counts, and the compiler that they are of: another one has other counts."""

    compiler: str
    rows: tuple[Row, ...]

    @staticmethod
    def read(path: Path) -> Table | None:
        """None where there is no table yet."""
        if not path.exists():
            return None
        raw = json.loads(path.read_text())
        return Table(raw["compiler"], tuple(Row(**row) for row in raw["rows"]))

    def write(self, path: Path) -> None:
        """Sorted and one row a line, so that a diff shows the rows that changed."""
        rows = ",\n".join(json.dumps(asdict(row)) for row in sorted(self.rows, key=lambda row: row.key))
        path.write_text(f'{{"compiler": {json.dumps(self.compiler)}, "rows": [\n{rows}\n]}}\n')


def compare(rows: Iterable[Row], committed: Iterable[Row]) -> tuple[list[str], list[str]]:
    """Faults, and what has only fallen; both sides must have the same rows."""
    now, before = {row.key: row for row in rows}, {row.key: row for row in committed}
    faults, fallen = [], []
    for key in sorted(now.keys() | before.keys()):
        if key not in now:
            faults.append(f"{before[key].name}: the table has it, the kernels do not; {RENEW}")
        elif key not in before:
            faults.append(f"{now[key].name}: the table lacks it; {RENEW}")
        else:
            old = before[key].figures
            for what, new in now[key].figures.items():
                text = f"{now[key].name}: {new:g} {what}, the table has {old.get(what, 0):g}"
                if new > old.get(what, 0):
                    faults.append(f"{text}; mend it or {RENEW}")
                elif new < old[what]:
                    fallen.append(f"{text}: it has fallen; {RENEW}")
    return faults, fallen


# -- command ----------------------------------------------------------------------------------------------------------

SHOWN = [name for name in NAMES if name != "other"]
TILES = f"{'kernel':<27} {'dims':<12} {'tiles':>5} {'usual':>6} {'apart':>5} |" + "".join(f"{n:>8}" for n in SHOWN)
BOUNDS = f"{'kernel':<27} {'dims':<12} {'issue':>6} {'tensor':>6} {'xu':>6} {'alu':>6} {'fma':>6}  largest"
ROWS = f"{'kernel':<29} {'dims':<12} {'usual':>5} {'apart':>5} {'an element':>10}  loads and stores of so many bits"


def report(rows: Sequence[Row]) -> Iterator[str]:
    tiles, others = ([row for row in rows if (row.unit == "tile") == wanted] for wanted in (True, False))
    if tiles:
        yield f"\nInstructions of a warp for {QUERIES} queries x {KEYS} keys; tiles: of one turn of the loop\n{TILES}"
    for row in tiles:
        counts = "".join(f"{row.pipes[name] / row.units:>8g}" for name in SHOWN)
        each = f"{row.usual / row.units:>6g} {row.apart / row.units:>5g}"
        yield f"{row.kernel:<27} {row.dims:<12} {row.units:>5g} {each} |{counts}"
    if tiles:
        yield f"\nCycles of a scheduler for a tile of each of its {WARPS} warps, at least\n{BOUNDS}"
    for row in tiles:
        cycles = row.cycles
        most = max(cycles, key=lambda name: cycles[name])
        yield f"{row.kernel:<27} {row.dims:<12}" + "".join(f" {cycles[n]:>6g}" for n in cycles) + f"  {most}"
    if others:
        yield f"\nKernels of rows\n{ROWS}"
    for row in others:
        counts = ", ".join(f"{name}: {count}" for name, count in row.accesses.items())
        yield f"{row.kernel:<29} {row.dims:<12} {row.usual:>5} {row.apart:>5} {row.usual / row.units:>10.2f}  {counts}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels whose name has this text")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (2)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="fail where a count is larger than the committed one")
    either.add_argument("--write", action="store_true", help="write bench/sass_table.json")
    parser.add_argument("--dump", type=Path, metavar="FOLDER", help="where the machine code goes")
    given = parser.parse_args(argv)
    if given.jobs < 1:
        parser.error("--jobs takes 1 or more")
    if given.dump:
        try:
            given.dump.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot make the folder {given.dump}: {error.strerror}")
    return given


def finish(rows: Sequence[Row], errors: Sequence[str], given: argparse.Namespace, compiler: str) -> int:
    """Write and check as asked for; the exit status."""
    faults, fallen = list(errors), list[str]()
    try:
        table = Table.read(TABLE)
    except (ValueError, KeyError, TypeError) as error:
        print(f"sass: bench/{TABLE.name} is damaged ({error!r}): take the committed one again", file=sys.stderr)
        return 2
    kept = [row for row in table.rows if given.kernel not in row.kernel] if table else []
    if given.write and not errors:
        if kept and table and table.compiler != compiler:
            faults.append(f"not written: the other rows are of {table.compiler}; run --write without --kernel")
        else:
            Table(compiler, (*kept, *rows)).write(TABLE)
            print(f"sass: wrote {TABLE}")
    elif given.check and table is None:
        faults.append(f"bench/{TABLE.name} is missing: {RENEW}")
    elif given.check and table and table.compiler != compiler:
        print(f"sass: the table is of {table.compiler}, this is {compiler}: counts are not compared")
    elif given.check and table and not errors:
        faults, fallen = compare(rows, [row for row in table.rows if given.kernel in row.kernel])
    for text in (*faults, *fallen):
        print(text)
    print(f"sass: {len(rows)} kernels counted, {len(faults)} faults")
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if fault := unready("nvdisasm"):
        print(f"sass: {fault}", file=sys.stderr)
        return 2
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    from liverelay.kernels.registry import KERNELS

    work = jobs(KERNELS, given.kernel)
    if not work:
        print(f"sass: no kernel with '{given.kernel}' in its name is counted", file=sys.stderr)
        return 2
    results = list(compile_all(work, given.jobs, partial(count_job, folder=given.dump)))
    rows = [row for result in results for row in result.rows]
    print("\n".join(report(rows)).strip())
    version = re.search(r"V([\d.]+)", get_ptxas_version(ARCH))
    compiler = f"triton {triton.__version__}, ptxas {version[1] if version else 'unknown'}"
    return finish(rows, [f"{r.job.name}: {r.error}" for r in results if r.error], given, compiler)


if __name__ == "__main__":
    raise SystemExit(main())
