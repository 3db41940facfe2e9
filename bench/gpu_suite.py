"""`python -m bench.gpu_suite`: everything that wants a GPU, in one command of bounded length.

First whether all is right: the compiled module, kernels by family, the stage loop, kept and published tensors. Then
what it takes, one measurement after the other, those that are worth most first. OUT gets suite.json, which always holds
all that was measured so far, suite.log and roofline.png. Nothing needs to be installed but what the parts import.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.suite_runner import ROOT, Outcome, Part, Task, run_parts
from bench.suite_tests import MOST, SHARE, families

# Each part's turn, and its share of the time: the seconds that it is expected to take at full size.
TURNS = {
    "build": (0, 120.0), "kernels": (0, 120.0), "tests": (0, 120.0), "ceilings": (1, 12.0), "attention": (2, 40.0),
    "line": (3, 90.0), "vae": (4, 12.0), "products": (5, 12.0), "opening": (6, 50.0), "stage-all": (7, 25.0),
    "loop": (8, 40.0), "micro": (9, 35.0), "line-bf16": (10, 25.0), "stage-bf16": (11, 20.0),
    "line-products": (12, 25.0), "stage-products": (13, 20.0), "compile": (14, 60.0),
    "compile-stage": (15, 35.0),
}  # fmt: skip
DRY_TESTS = 3  # a family has no more without a GPU: `make test` runs them all in Triton's interpreter
SHARES = 3  # processes for the tests of one file on a GPU
TEST_FILES = ("tests/test_golden.py", "tests/test_regression.py")


def suite(preset: str, gpu: bool, work: Path) -> list[Part]:
    """The parts. Without a GPU, Triton's interpreter runs the kernels, and nothing is timed for its time's sake.

    work: the folder that the parts write their results to.
    """
    base = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / ".links"), os.environ.get("PYTHONPATH")]))}
    base |= {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE", "LIVERELAY_CEILINGS": str(work / "ceilings.json")}
    base |= dict.fromkeys(("LIVERELAY_CACHE", "LIVERELAY_TEST_CACHE"), str(work / "cache"))  # attentions are tried once
    base |= {} if gpu else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    device = [] if gpu else ["--device", "cpu"]
    sized = ["--preset", preset, *device]
    stage = [*sized, "--compile-seconds", "0", "--seconds", "1.2" if gpu else "0.1"]
    # The first of two backends is what the other's output is held against; plain FP8 attention takes seconds a step.
    torch, triton = (["--backends", f"{name},fastest"] if gpu else [] for name in ("torch", "triton"))
    compiles = ["--backends", "fastest", "--compile-seconds", "30"] if gpu else []
    line = [*sized, *(["--seconds", "1.0", "--blocks", "8"] if gpu else ["--seconds", "0.05", "--blocks", "2"])]
    micro = ["--dims", "production" if gpu else "small", *device, "--seconds", "0.15" if gpu else "0.02"]
    ours = [*micro, "--contenders", "kernel,padded,plain,library"]

    def part(name: str, module: str, *flags: str) -> Part:
        result = work / f"{name}.json"
        command = (sys.executable, "-m", f"bench.{module}", *flags, "--json", str(result))
        return Part(name, (Task(name, command),), *TURNS[name], base, result=result)

    return [
        *checks(gpu, base),
        part("ceilings", "ceilings", *device, "--seconds", "0.2" if gpu else "0.02"),
        part("attention", "micro", *ours, "--kernel", "attention"),
        part("line", "line_14b", *line, "--fp8", "all", "--parts", "stage,line,apart"),
        part("vae", "vae_split", *sized, "--seconds", "1.0" if gpu else "0.05"),
        part("products", "products", *sized, "--seconds", "0.15" if gpu else "0.02"),
        part("opening", "opening", *sized, "--fp8", "all"),
        part("stage-all", "stage_14b", *stage, *triton, "--fp8", "all"),
        part("loop", "line_14b", *line, "--fp8", "all", "--parts", "loop"),
        part("micro", "micro", *ours, "--but", "attention"),
        part("line-bf16", "line_14b", *line, "--parts", "stage,line"),
        part("stage-bf16", "stage_14b", *stage, *torch),
        part("line-products", "line_14b", *line, "--fp8", "products", "--parts", "stage,line"),
        part("stage-products", "stage_14b", *stage, *torch, "--fp8", "products"),
        part("compile", "micro", *micro, "--contenders", "compile"),
        part("compile-stage", "stage_14b", *stage, *compiles),
    ]


def checks(gpu: bool, base: dict[str, str]) -> list[Part]:
    """What tells right from wrong, side by side: the compiled module, kernels, and what needs the module behind it."""
    cores = os.cpu_count() or 2
    environment = base | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if golden := os.environ.get("LIVERELAY_GOLDEN"):
        environment["LIVERELAY_GOLDEN"] = str(Path(golden).absolute())
    plain = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
    pytest = (sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow")
    shared = (*pytest, "-p", "bench.suite_tests")
    some = {} if gpu else {MOST: str(DRY_TESTS)}
    kernels = [Task(name, (*shared, "tests/kernels"), {SHARE: name, **some}) for name in families()]
    files = [*TEST_FILES, *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")))]
    tests = [
        Task(f"{Path(file).stem}-{i}", (*shared, file), {SHARE: f"{i}/{count}"})
        for file in files for count in [SHARES if gpu else 1] for i in range(count)
    ]  # fmt: skip
    side = {"side_by_side": min(8, cores)}
    turn, weight = TURNS["kernels"]
    return [
        Part("build", (Task("build", (sys.executable, "-m", "bench.build")),), turn, weight, base),
        Part("kernels", tuple(kernels), turn, weight, environment, **side, tests=True, no_skips=gpu),
        Part("tests", tuple(tests), turn, weight, plain, **side, after="build", tests=True, no_skips=gpu),
    ]


def picture(out: Path, outcomes: Sequence[Outcome]) -> str:
    """The roofline of all kernels that were timed; what became of it, in words."""
    results = [outcome.result for outcome in outcomes if isinstance(outcome.result, dict) and "rows" in outcome.result]
    if not results:
        return "no plot: no kernel was timed"
    try:
        from bench import micro, timing
        from bench.ceilings import Ceilings

        limits = Ceilings.read(results[0]["ceilings"])
        return timing.roofline(micro.points(micro.merged(results)), limits, out / "roofline.png")
    except Exception as error:  # the table that follows is worth more than a picture
        return f"no plot: {error!r}"


def conclude(outcomes: Sequence[Outcome], about: dict[str, Any], out: Path) -> int:
    """The final tables, printed and into suite.log; 0 when all parts passed and nothing is worse than the last time."""
    from bench.suite_values import WORSE, compared

    lines = [f"\n{'part':14}  {'state':9}  {'s':>4}  headline"]
    lines += [f"{o.name:14}  {o.state:9}  {o.seconds:4.0f}  {o.headline}" for o in outcomes]
    text, red = compared(about | {"parts": [{"result": outcome.result} for outcome in outcomes]})
    bad = [outcome.name for outcome in outcomes if outcome.state != "passed"]
    lines += ["", text, ""]
    lines += [f"RED, worse by more than {100 * WORSE:.0f}%: {', '.join(red)}"] if red else []
    lines += [f"NOT PASSED: {', '.join(bad)}"] if bad else ["all parts passed"]
    with (out / "suite.log").open("a") as log:
        log.write("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if outcomes and not bad and not red else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=(__doc__ or "").splitlines()[0])
    out_default = Path(os.environ.get("OUT") or ROOT / "out" / "suite")
    parser.add_argument("--out", type=Path, default=out_default, help="folder of the results ($OUT, else out/suite)")
    parser.add_argument("--preset", choices=("14b", "tiny"), help="default: 14b on a GPU, else tiny")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole suite (8)")
    parser.add_argument("--only", default="", help=f"parts to run, with commas between, of {', '.join(TURNS)}")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.minutes < float("inf"):
        parser.error(f"{arguments.minutes:g} is not a sensible number of minutes")
    seconds, started = 60 * arguments.minutes, time.monotonic()
    chosen = list(filter(None, arguments.only.split(",")))
    if unknown := [name for name in chosen if name not in TURNS]:
        parser.error(f"no part is called '{unknown[0]}'; there is: {', '.join(TURNS)}")
    sys.path.insert(0, str(ROOT / ".links"))  # where liverelay is found without being installed
    for number in (signal.SIGTERM, signal.SIGINT):  # so that what runs is ended with us
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    from bench.timing import machine, pick_device  # brings torch, which --help does not need

    device = pick_device(None)
    gpu, out = device.type == "cuda", arguments.out.absolute()
    preset = arguments.preset or ("14b" if gpu else "tiny")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make the folder {out}: {error.strerror}")
    about = {"preset": preset, "minutes": arguments.minutes, "machine": machine(device)}
    print(f"{about['machine'].get('gpu', 'no GPU: a dry run')}; preset {preset}; results in {out}", flush=True)
    with tempfile.TemporaryDirectory(prefix="liverelay-suite-") as folder:
        work = Path(folder)
        parts = [part for part in suite(preset, gpu, work) if not chosen or part.name in chosen]
        outcomes = run_parts(parts, out, work, seconds - (time.monotonic() - started), about)
    print(picture(out, outcomes))
    return conclude(outcomes, about, out)


if __name__ == "__main__":
    raise SystemExit(main())
