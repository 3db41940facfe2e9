"""`python -m bench.aot [--check | --write]`: compiles every kernel for every architecture, on a machine with no GPU.

A kernel that spills, leaves the tensor cores unused or asks for more shared memory than a block may have still gives
right numbers, or fails on the one GPU that nobody tried. So every launch of the registry is compiled as it would run
(bench/fake_gpu.py), and its figures are held against fixed limits and against bench/aot_table.json, which is
committed: what a change does to registers and occupancy is then a diff that somebody reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.fake_gpu import LIMITS, Job, Result, Row, compile_job
from liverelay.kernels.spec import arch_name

TABLE = Path(__file__).with_name("aot_table.json")
RENEW = "run `python -m bench.aot --write` and commit bench/aot_table.json"
MORE_REGISTERS, MORE_SHARED = 8, 4096  # growth that is let pass: other orders of instructions, a little padding
FP8_ARCH = 89  # the first architecture that has FP8
Work = Callable[[Job], Result]
INSTRUCTIONS = ("wgmma", "tcgen05", "mma", "tma", "cp_async")


@dataclass(frozen=True)
class Table:
    """Committed figures, and the version of Triton that made them: another version has other ones."""

    triton: str
    rows: tuple[Row, ...]

    @staticmethod
    def read(path: Path) -> Table | None:
        """None where there is no table yet."""
        if not path.exists():
            return None
        raw = json.loads(path.read_text())
        return Table(raw["triton"], tuple(Row(**row | {"warnings": tuple(row["warnings"])}) for row in raw["rows"]))

    def write(self, path: Path) -> None:
        """Sorted and one row a line, so that a diff shows the rows that changed."""
        rows = ",\n".join(json.dumps(asdict(row)) for row in sorted(self.rows, key=lambda row: row.key))
        path.write_text(f'{{"triton": {json.dumps(self.triton)}, "rows": [\n{rows}\n]}}\n')


@dataclass(frozen=True)
class Selection:
    """Architectures, and a part of the kernels' names, that a run is about."""

    archs: tuple[int, ...] = tuple(LIMITS)
    kernel: str = ""

    def has(self, kernel: str, arch: int) -> bool:
        return arch in self.archs and self.kernel in kernel


# -- what to compile --------------------------------------------------------------------------------------------------


def jobs_of(spec: Any, selection: Selection) -> Iterator[Job]:
    """Production dims in the 16- and 8-bit dtypes, the first small dims in all: float32 serves tests, not production.

    spec is a KernelSpec; its module needs Triton, which the rest of this file does without.
    """
    named = {dtype: str(dtype).removeprefix("torch.") for dtype in spec.dtypes}
    fast = [name for name in named.values() if name != "float32"] or list(named.values())
    cases = [(dims, name, True) for dims in spec.production for name in fast]
    cases += [(dims, name, False) for dims in list(spec.small)[:1] for name in named.values()]
    for arch in selection.archs:
        for dims, dtype, production in cases:
            due = spec.on(arch) and (arch >= FP8_ARCH or not dtype.startswith("float8"))
            if due and selection.has(spec.name, arch):
                yield Job(spec.name, dims, dtype, arch, spec.hot, spec.dot, production)


def alone(job: Job, work: Work) -> Result:
    """Compile in a process of its own, which a crash of the compiler takes along."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool:
            return Result(job, error="the compiler's process died")


def compile_all(jobs: Sequence[Job], processes: int, work: Work = compile_job) -> Iterator[Result]:
    """Results in the order of the jobs."""
    rest = list(jobs)
    while rest:
        done = 0
        pool = ProcessPoolExecutor(min(processes, len(rest)), multiprocessing.get_context("spawn"))
        with contextlib.suppress(BrokenProcessPool), pool:
            for future in [pool.submit(work, job) for job in rest]:
                yield future.result()
                done += 1
        rest = rest[done:]
        if rest:  # one of the next few jobs crashed the compiler; alone, each can take only itself along
            yield alone(rest.pop(0), work)


# -- what must hold ---------------------------------------------------------------------------------------------------


def faults(result: Result) -> Iterator[str]:
    """What is wrong with a launch whatever the table says."""
    job = result.job
    if result.error:
        yield f"{job.name}: does not compile: {result.error}"
        return
    for row in result.rows:
        spills = row.spill_stores + row.spill_loads
        if job.hot and spills:
            yield (
                f"{row.name}: spills {row.spill_stores} bytes of stores and {row.spill_loads} of loads at"
                f" {row.registers} registers; take smaller tiles, more warps or fewer stages"
            )
        allowed = LIMITS[row.arch].shared_block
        if row.shared > allowed * 1024:
            yield (
                f"{row.name}: needs {kib(row.shared)} of shared memory, a block has at most {allowed} KiB;"
                " take fewer stages or smaller tiles there"
            )
    if job.dot and job.arch < 0 and not any(row.mma for row in result.rows):
        yield f"{job.name}: no mfma; the product needs tiles of 16 and more each way"
    if wants_wgmma(job) and not any(row.wgmma for row in result.rows):
        yield f"{job.name}: no wgmma; the product needs tiles of 64 rows and more and a multiple of 4 warps"


def wants_wgmma(job: Job) -> bool:
    """sm_90 has the fast product for 16- and 8-bit types; float32 is there to test."""
    return job.dot and job.arch == 90 and job.dtype != "float32"


def regressions(rows: Iterable[Row], committed: Iterable[Row]) -> Iterator[str]:
    """What is worse than in the table, which both must cover: a row on one side only is a fault, too."""
    now, before = {row.key: row for row in rows}, {row.key: row for row in committed}
    for key in sorted(now.keys() | before.keys()):
        if key not in now:
            yield f"{before[key].name}: the table has it, the kernels do not; {RENEW}"
        elif key not in before:
            yield f"{now[key].name}: the table lacks it; {RENEW}"
        else:
            yield from (f"{now[key].name}: {fault}; mend it or {RENEW}" for fault in worse(now[key], before[key]))


def worse(new: Row, old: Row) -> Iterator[str]:
    """How a row is worse than the committed one, beyond what is let pass."""
    if new.registers > old.registers + MORE_REGISTERS:
        yield f"{new.registers} registers, the table has {old.registers}"
    if new.shared > old.shared + MORE_SHARED:
        yield f"{kib(new.shared)} of shared memory, the table has {kib(old.shared)}"
    if new.ctas < old.ctas:
        yield f"{new.ctas} blocks on an SM (limited by {new.limit}), the table has {old.ctas}"
    if fresh := set(new.warnings) - set(old.warnings):
        yield f"ptxas warns {', '.join(sorted(fresh))}, which it did not"


def violations(results: Sequence[Result], table: Table | None, version: str, selection: Selection) -> list[str]:
    """All that keeps --check from passing; a table of another version of Triton is not compared."""
    found = [fault for result in results for fault in faults(result)]
    if table is None:
        return [*found, f"bench/{TABLE.name} is missing: {RENEW}"]
    if table.triton == version:
        failed = {result.job.name for result in results if result.error}
        kept = [row for row in table.rows if selection.has(row.kernel, row.arch) and job_name(row) not in failed]
        found += regressions((row for result in results for row in result.rows), kept)
    return found


def job_name(row: Row) -> str:
    return Job(row.kernel, row.dims, row.dtype, row.arch).name


def summary(results: Sequence[Result], selection: Selection) -> str:
    """The last line of a run without faults: the worst figures."""
    rows = [row for result in results for row in result.rows]
    archs = ",".join(map(short, selection.archs))
    spills = max(row.spill_stores + row.spill_loads for row in rows)
    text = f"aot: {len(rows)} compiled for {archs}: {f'at most {spills} bytes of' if spills else '0'} spills"
    text += f", at most {max(row.registers for row in rows)} registers"
    text += f", {kib(max(row.shared for row in rows))} shared memory"
    dots = [result for result in results if wants_wgmma(result.job)]
    if dots and all(any(row.wgmma for row in result.rows) for result in dots):
        text += ", all dots are wgmma on sm_90"
    return text


# -- what is printed --------------------------------------------------------------------------------------------------


def short(arch: int) -> str:
    """As --arch takes it: `90`, `gfx942`."""
    return arch_name(arch).removeprefix("sm_")


def kib(size: int) -> str:
    """Whole KiB, rounded up; bytes below one."""
    return f"{-(-size // 1024)} KiB" if size >= 1024 else f"{size} B"


def instructions(row: Row) -> str:
    """What moves and multiplies: `wgmma 24, cp.async 24`."""
    counts = ((name.replace("_", "."), getattr(row, name)) for name in INSTRUCTIONS)
    return ", ".join(f"{name} {count}" for name, count in counts if count) or "-"


HEAD = (
    f"{'kernel':<29} {'dims':<21} {'dtype':<9} {'arch':<6} {'regs':>4} {'spill':>7} {'shared':>7} {'warps':>5}"
    f" {'CTAs':>4} {'occ%':>4} {'limited by':<17} {'sec':>5}  instructions"
)


def lines(result: Result) -> Iterator[str]:
    """The lines of the table printed while it goes."""
    job = result.job
    start = f"{job.kernel:<29} {job.dims:<21} {job.dtype:<9} {arch_name(job.arch):<6}"
    if result.error:
        yield f"{start} FAILED {result.error[:150]}"
    for row in result.rows:
        spill = f"{row.spill_stores}/{row.spill_loads}"
        also = [row.function] * (len(result.rows) > 1) + list(row.warnings)
        yield (
            f"{start} {row.registers:>4} {spill:>7} {kib(row.shared):>7} {row.warps:>5} {row.ctas:>4}"
            f" {row.occupancy:>4} {row.limit:<17} {result.seconds:>5.1f}  {'  '.join([instructions(row), *also])}"
        )


def markdown(results: Sequence[Result], version: str) -> Iterator[str]:
    """The documentation's table, of the production dims."""
    yield f"Triton {version}; spills: bytes stored / loaded; blocks: on one SM at a time, and what limits them.\n"
    yield "| kernel | dims | dtype | arch | registers | spills | shared memory | warps | blocks | instructions |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    pairs = [(row, len(result.rows)) for result in results if result.job.production for row in result.rows]
    for row, kernels in sorted(pairs, key=lambda pair: pair[0].key):
        name = row.kernel if kernels == 1 else f"{row.kernel}: {row.function}"
        yield (
            f"| {name} | {row.dims} | {row.dtype} | {arch_name(row.arch)} | {row.registers} |"
            f" {row.spill_stores} / {row.spill_loads} | {kib(row.shared)} | {row.warps} |"
            f" {row.ctas} ({row.occupancy} %, {row.limit}) | {instructions(row)} |"
        )


# -- command ----------------------------------------------------------------------------------------------------------


def write(results: Sequence[Result], version: str, selection: Selection) -> str | None:
    """Write the table; rows outside the selection stay. The fault in one line where that cannot be."""
    old = Table.read(TABLE)
    kept = [row for row in old.rows if not selection.has(row.kernel, row.arch)] if old else []
    if any(result.error for result in results):
        return "not written: not everything compiles"
    if kept and old and old.triton != version:
        return f"not written: the other rows are of triton {old.triton}; run --write without --arch and --kernel"
    Table(version, (*kept, *(row for result in results for row in result.rows))).write(TABLE)
    return None


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default=",".join(map(short, LIMITS)), metavar="80,gfx942", help="architectures")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels whose name has this text")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (2)")
    parser.add_argument("--check", action="store_true", help="fail on spills, missing wgmma and regressions")
    parser.add_argument("--write", action="store_true", help="write bench/aot_table.json")
    parser.add_argument("--markdown", action="store_true", help="print the documentation's table, the rest to stderr")
    parsed = parser.parse_args(argv)
    known = {short(arch): arch for arch in LIMITS}
    if not set(parsed.arch.split(",")) <= known.keys():
        parser.error(f"--arch takes {', '.join(known)} with commas between them, not {parsed.arch}")
    parsed.arch = tuple(sorted({known[arch] for arch in parsed.arch.split(",")}, key=abs))
    if parsed.jobs < 1:
        parser.error("--jobs takes 1 or more")
    return parsed


def unready(*more: str) -> str | None:
    """Why nothing can be compiled here, in one line. more: other tools of Triton's that are needed."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so Triton interprets instead of compiling; unset it"
    for name in ("ptxas", "ptxas_blackwell", *more):
        try:
            Path(getattr(triton.knobs.nvidia, name).path).resolve(strict=True)
        except (RuntimeError, OSError, AttributeError) as fault:
            return f"no {name} with triton {triton.__version__}: {fault}"
    return None


def finish(results: Sequence[Result], given: argparse.Namespace, version: str, say: Callable[[str], None]) -> int:
    """Write and check as asked for; the exit status."""
    selection = Selection(given.arch, given.kernel)
    if given.write:
        if fault := write(results, version, selection):
            say(f"aot: {fault}")
            return 1
        say(f"aot: wrote {TABLE}")
    if given.check:
        table = Table.read(TABLE)
        if table and table.triton != version:
            say(f"aot: the table is of triton {table.triton}, this is {version}: regression checks are left out")
        found = violations(results, table, version, selection)
    else:
        found = [fault for result in results if result.error for fault in faults(result)]
    for fault in found:
        say(fault)
    say(f"aot: {len(found)} violation{'s' * (len(found) > 1)}" if found else summary(results, selection))
    return 1 if found else 0


def main(argv: Sequence[str] | None = None) -> int:
    given, start = arguments(argv), time.monotonic()
    if fault := unready():
        print(f"aot: {fault}", file=sys.stderr)
        return 2
    import triton

    from liverelay.kernels.registry import KERNELS

    def say(text: str) -> None:
        print(text, file=sys.stderr if given.markdown else sys.stdout, flush=True)

    selection, results = Selection(given.arch, given.kernel), []
    jobs = [job for spec in KERNELS for job in jobs_of(spec, selection)]
    if not jobs:
        print(f"aot: no kernel with '{given.kernel}' in its name has anything to compile there", file=sys.stderr)
        return 2
    say(f"triton {triton.__version__}, {len(jobs)} launches, {given.jobs} processes\n{HEAD}")
    for result in compile_all(jobs, given.jobs):
        results.append(result)
        for line in lines(result):
            say(line)
    say(f"{time.monotonic() - start:.0f} s")
    if given.markdown:
        print("\n".join(markdown(results, triton.__version__)))
    return finish(results, given, triton.__version__, say)


if __name__ == "__main__":
    raise SystemExit(main())
