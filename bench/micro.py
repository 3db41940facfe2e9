"""`python -m bench.micro`: every kernel of the registry against the machine's ceilings, plain PyTorch and libraries.

Every size of a kernel is first checked by itself on this device (bench/kernel_check.py): the timed ones against plain
PyTorch, small ones against the float64 reference. A size that is red is red alone; the others get their times. On a GPU
checks are in processes of their own, so that a kernel that crashes spoils no other. Columns: bench/README.md. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from liverelay.engine.config import set_process_defaults

set_process_defaults()  # before torch is imported

import torch  # noqa: E402

from bench import timing  # noqa: E402
from bench.ceilings import Ceilings, ceilings  # noqa: E402
from bench.kernel_check import check_all, check_here, make_case, sizes, working_dtype  # noqa: E402
from bench.suite_runner import PART_SECONDS  # noqa: E402
from bench.timing import one_line  # noqa: E402
from liverelay.kernels import attention_backends, torch_ops  # noqa: E402
from liverelay.kernels.launch import INTERPRETED, padded_rows  # noqa: E402
from liverelay.kernels.registry import KERNELS  # noqa: E402
from liverelay.kernels.spec import GFX942, Case, Dims, KernelSpec, arch_name  # noqa: E402

CONTENDERS = ("kernel", "padded", "plain", "library", "compile")  # padded: row kernels without chunks


@dataclass
class Row:
    """One kernel at one size. state: ok, red, skipped or plain only; the tables are by contender. A small size has a
    row only where it is red: it is not timed."""

    kernel: str
    dims: str
    dtype: str
    state: str = "ok"
    note: str = ""
    bytes: float = 0.0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def best_library(self) -> str | None:
        there = [name for name in self.seconds if name not in ("kernel", "plain", "compile")]
        return min(there, key=lambda name: self.seconds[name], default=None)

    def bound(self, ceilings: Ceilings) -> str:
        """What limits it at best: the time its bytes take, or that of its operations."""
        return "memory" if self.bytes / ceilings.copy >= self.flops / ceilings.matmul else "compute"


@dataclass(frozen=True)
class Plan:
    """What the command line chose. deadline: on time.monotonic's clock; isolate: checks in processes of their own;
    contenders: whose times are taken, of CONTENDERS."""

    device: torch.device
    dims: str
    seconds: float
    compile_seconds: float
    deadline: float
    isolate: bool
    contenders: tuple[str, ...] = CONTENDERS

    @property
    def kernels_run(self) -> bool:
        return self.device.type == "cuda" or INTERPRETED

    def left(self) -> float:
        return self.deadline - time.monotonic()


# -- times -------------------------------------------------------------------------------------------------------------


def cases(spec: KernelSpec, dims: Dims, device: torch.device) -> list[Case]:
    """As many copies of one call's tensors as keep the next call's data out of the GPU's cache."""
    first = make_case(spec, dims, device)
    if device.type != "cuda":
        return [first]
    needed = max(spec.cost(dims, working_dtype(spec)).bytes, 1.0)
    return [first, *(copy.deepcopy(first) for _ in range(min(63, int(timing.COLD_BYTES / needed))))]


def contend(row: Row, name: str, call: Callable[[Case], Any], given: list[Case], plan: Plan) -> None:
    """Time one contender; where it cannot run, say why."""
    try:
        result = timing.measure([lambda c=c: call(c) for c in given], device=plan.device, seconds=plan.seconds)
    except Exception as error:
        row.notes[name] = one_line(error)
        return
    row.seconds[name], row.spread[name] = result.seconds, result.spread
    if result.clocks:
        row.clocks[name] = result.clocks
    if result.note:
        row.notes[name] = result.note


def time_row(spec: KernelSpec, row: Row, dims: Dims, plan: Plan) -> None:
    """Kernel, plain PyTorch, for attention the libraries, and for a row kernel the same with padded rows."""
    given = cases(spec, dims, plan.device)
    with torch.inference_mode():
        if row.state == "ok" and "kernel" in plan.contenders:
            contend(row, "kernel", lambda c: spec.launch(*c.args, **c.kwargs), given, plan)
        if "plain" in plan.contenders:
            contend(row, "plain", lambda c: spec.plain(*c.args, **c.kwargs), given, plan)
        attends = spec.plain is torch_ops.attention and len(given[0].args) == 5  # no library takes our FP8 scales
        if attends and "library" in plan.contenders:
            for name, call in attention_backends.candidates(plan.device, False).items():
                contend(row, name, lambda c, call=call: call(*c.args, **c.kwargs), given, plan)
        if row.state == "ok" and "padded" in plan.contenders and plan.kernels_run:
            with padded_rows() as widths:
                spec.launch(*given[0].args, **given[0].kwargs)
                if widths:
                    contend(row, "padded", lambda c: spec.launch(*c.args, **c.kwargs), given, plan)


def time_compiled(spec: KernelSpec, row: Row, dims: Dims, plan: Plan) -> None:
    """torch.compile of plain PyTorch, where it is ready within its time box."""
    torch._dynamo.reset()  # else the eighth size of one function silently runs uncompiled
    compiled = torch.compile(spec.plain, dynamic=False)
    given = cases(spec, dims, plan.device)
    try:
        with timing.time_box(max(1.0, min(plan.compile_seconds, plan.left()))), torch.inference_mode():
            compiled(*given[0].args, **given[0].kwargs)
            timing.wait(plan.device)
    except Exception as error:
        row.notes["compile"] = one_line(error)
        return
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):  # else it runs uncompiled, silently
        contend(row, "compile", lambda c: compiled(*c.args, **c.kwargs), given, plan)


Faults = dict[tuple[str, str], str]  # by kernel and size, '' for none


def first_rows(specs: list[KernelSpec], plan: Plan, faults: Faults) -> list[tuple[KernelSpec, Row, Dims]]:
    """A row for each kernel and size to be timed, with its state, and one for each small size that is red."""
    arch = 0
    if plan.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(plan.device)
        arch = GFX942 if torch.version.hip else 10 * major + minor
    rows = []
    for spec in specs:
        dtype, timed = working_dtype(spec), dict(sizes(spec, plan.dims))
        for name, dims in {**timed, **spec.small}.items():
            fault = faults.get((spec.name, name), "not checked")
            if name not in timed and (not spec.on(arch) or fault in ("", "not checked")):
                continue
            cost = spec.cost(dims, dtype)
            row = Row(spec.name, name, str(dtype).removeprefix("torch."), bytes=cost.bytes, flops=cost.flops)
            if not plan.kernels_run:
                row.state, row.note = "plain only", "no GPU"
            elif not spec.on(arch):
                needed = f"sm_{spec.min_arch}" + (f" to sm_{spec.max_arch}" if spec.max_arch else "")
                row.state, row.note = "skipped", f"needs {needed}, this is {arch_name(arch)}"
            elif fault and "kernel" in plan.contenders:
                row.state, row.note = "red", fault
            rows.append((spec, row, dims))
    return rows


# -- what is printed ---------------------------------------------------------------------------------------------------

HEAD = ("kernel", "dims", "us", "+-%", "GB/s", "%copy", "TFLOP/s", "%mm", "bound", "x plain", "x compile", "x library")


def cells(row: Row, ceilings: Ceilings) -> list[str]:
    """One line of the table. Ratios above 1: our kernel is faster. Without a kernel's time, the figures are plain's,
    else those of `torch.compile`."""
    ours = next((name for name in ("kernel", "plain", "compile") if name in row.seconds), "")
    name = row.kernel if ours == "kernel" else f"{row.kernel} ({row.state if row.state != 'ok' else ours or 'no time'})"
    if not ours:
        return [name, row.dims, *["-"] * (len(HEAD) - 2)]
    took = row.seconds[ours]

    def ratio(other: str | None) -> str:
        return f"{row.seconds[other] / took:.2f}" if other in row.seconds and ours == "kernel" else "-"

    library = row.best_library
    return [
        name, row.dims, f"{1e6 * took:.1f}", f"{100 * row.spread[ours]:.0f}", f"{row.bytes / took / 1e9:.0f}",
        f"{100 * row.bytes / took / ceilings.copy:.0f}", f"{row.flops / took / 1e12:.2f}",
        f"{100 * row.flops / took / ceilings.matmul:.0f}", row.bound(ceilings), ratio("plain"), ratio("compile"),
        ratio(library) + (f" {library}" if library else ""),
    ]  # fmt: skip


def headline(rows: list[Row], ceilings: Ceilings) -> str:
    """The run in one line."""
    timed = [row for row in rows if "kernel" in row.seconds]
    red = sorted({f"{row.kernel} [{row.dims}]" for row in rows if row.state == "red"})
    memory = sorted(r.bytes / r.seconds["kernel"] / ceilings.copy for r in timed if r.bound(ceilings) == "memory")
    if not timed and not red:
        return f"{sum(bool(row.seconds) for row in rows)} of {len(rows)} rows timed, none of our kernels"
    text = f"{len(timed)} of {len(rows)} rows timed" + (f", RED: {', '.join(red)}" if red else ", none red")
    middle = f"{100 * memory[len(memory) // 2]:.0f}" if memory else "-"
    return f"{text}; memory-bound kernels at {middle}% of copy (median)"


def report(rows: list[Row], ceilings: Ceilings) -> str:
    """Table, then each note with the rows that it belongs to."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        said = [f"{row.state}: {row.note}"] if row.note and row.state != "plain only" else []
        for note in [*said, *(f"{name}: {note}" for name, note in row.notes.items())]:
            notes.setdefault(note, []).append(f"{row.kernel} [{row.dims}]")
    lines = [timing.table(HEAD, [cells(row, ceilings) for row in rows if row.seconds or row.state != "red"]), ""]
    for note, where in notes.items():
        more = f" and {len(where) - 2} more" if len(where) > 2 else ""
        lines.append(f"{', '.join(where[:2])}{more}: {note}")
    return "\n".join(lines)


def points(rows: list[Row]) -> list[tuple[str, str, float, float]]:
    """What `timing.roofline` draws."""
    return [
        (row.kernel, name, row.flops / row.bytes, row.flops / took)
        for row in rows for name, took in row.seconds.items() if name in ("plain", "kernel") and row.flops
    ]  # fmt: skip


def run(specs: list[KernelSpec], plan: Plan, path: Path | None) -> tuple[list[Row], Ceilings]:
    """Ceilings, checks, times; the file is written anew after every row."""
    limits = ceilings(plan.device, min(0.2, plan.seconds))
    machine = timing.machine(plan.device)
    print(f"{machine.get('gpu', machine['cpu'])}; torch {machine['torch']}, triton {machine['triton']}")
    print(f"ceilings: {limits.text}", *(f"({note})" for note in limits.notes), flush=True)
    checks = plan.kernels_run and "kernel" in plan.contenders
    todo = first_rows(specs, plan, check_all(specs, plan) if checks else {})
    rows = [row for _, row, _ in todo]

    def keep() -> None:
        content = {"machine": machine, "ceilings": asdict(limits), "headline": headline(rows, limits)}
        timing.save(path, content | {"rows": [asdict(row) for row in rows]})

    steps: list[tuple[str, Callable[..., None]]] = [("kernel", time_row)] if plan.contenders != ("compile",) else []
    compiles = plan.compile_seconds >= 1 and "compile" in plan.contenders and not INTERPRETED
    steps += [("compile", time_compiled)] if compiles else []
    for name, step in steps:
        for spec, row, dims in todo:
            if row.state not in ("ok", "plain only"):
                continue
            if plan.left() < 0:
                row.notes[name] = "skipped: no time left"
                continue
            try:
                step(spec, row, dims, plan)
            except Exception as error:  # such as no memory for the inputs
                row.notes[name] = one_line(error)
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
            keep()
    keep()
    return rows, limits


def merged(results: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of several runs' JSON as one table: the contenders that each of them timed."""
    rows: dict[tuple[str, str], Row] = {}
    for result in results:
        for kept in result["rows"]:
            new = Row(**kept)
            row = rows.setdefault((new.kernel, new.dims), new)
            if row is not new:
                for name in ("seconds", "spread", "notes", "clocks"):
                    getattr(row, name).update(getattr(new, name))
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--but", default="", help="only kernels whose name does not hold this")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="whose times are taken (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here, after every row")
    parser.add_argument("--plot", type=Path, help="write a roofline picture here")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement")
    parser.add_argument("--dims", choices=("production", "small"), default="production")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--compile-seconds", type=float, default=25, help="time box of one torch.compile, 0: none")
    budget = float(os.environ.get(PART_SECONDS, 1e6))
    parser.add_argument("--budget", type=float, default=budget, help="seconds after which what is left is skipped")
    parser.add_argument("--isolate", action=argparse.BooleanOptionalAction, help="checks in own processes")
    parser.add_argument("--check", metavar="KERNEL", help="only check this kernel; status 1 when a size is red")
    parser.add_argument("--sizes", metavar="NAME;...", help="with --check: only these sizes (all)")
    arguments = parser.parse_args(argv)
    device = timing.pick_device(arguments.device)
    if INTERPRETED and device.type == "cuda":
        parser.error("TRITON_INTERPRET=1 is for CPUs: unset it, or give --device cpu")
    if arguments.check:
        spec = next((spec for spec in KERNELS if spec.name == arguments.check), None)
        if spec is None:
            parser.error(f"no kernel is called '{arguments.check}'")
        return check_here(spec, arguments.dims, device, arguments.sizes)
    isolate = device.type == "cuda" if arguments.isolate is None else arguments.isolate
    deadline = time.monotonic() + arguments.budget
    contenders = tuple(arguments.contenders.split(","))
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        parser.error(f"no contender is called '{unknown[0]}'; there is: {', '.join(CONTENDERS)}")
    plan = Plan(device, arguments.dims, arguments.seconds, arguments.compile_seconds, deadline, isolate, contenders)
    specs = [spec for spec in KERNELS if arguments.kernel in spec.name]
    specs = [spec for spec in specs if not arguments.but or arguments.but not in spec.name]
    if not specs:
        parser.error(f"no kernel's name holds '{arguments.kernel}' and not '{arguments.but}'")
    if not plan.kernels_run:
        print("no GPU: Triton's kernels cannot run here; only plain PyTorch is timed (TRITON_INTERPRET=1 checks them)")
    elif INTERPRETED:
        print("Triton's interpreter: the kernels are checked; their times mean nothing")
    rows, limits = run(specs, plan, arguments.json)
    print(report(rows, limits))
    if arguments.plot:
        print(timing.roofline(points(rows), limits, arguments.plot))
    print(headline(rows, limits))
    print(json.dumps({"ceilings": asdict(limits), "rows": [asdict(row) for row in rows]}))
    return 1 if any(row.state == "red" or ("kernel" in row.notes and row.state == "ok") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
