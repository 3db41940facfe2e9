"""`python -m bench.gpu_suite`: everything that wants a GPU, in one command of bounded length.

Tests of the kernels, of the stage loop and against kept and published tensors, the engine's own stages and a whole
line at full size, the full-size block-step, microbenchmarks: each part in processes of its own with its own time box,
so that neither a failure nor a hang stops the others. OUT gets suite.json, written anew after every part, and one log
for each part. Nothing needs to be installed but what the parts import.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
SHARD = "LIVERELAY_TEST_SHARD"  # "i/n": this process runs every n-th collected test, from i on
# Of each part: its turn, and its share of the time. What was measured least comes first, in case the time runs out.
TURNS = {
    "kernels": (0, 5.0), "tests": (0, 5.0), "line": (1, 4.0), "line-all": (2, 5.0), "line-bf16": (3, 1.5),
    "stage": (4, 2.2), "fp8": (5, 1.3), "fp8-all": (6, 1.0), "micro": (7, 4.0),
}  # fmt: skip
NOTHING_COLLECTED = 5  # pytest's exit status
TESTS = ("tests/test_golden.py", "tests/test_regression.py", "tests/gpu")
ECHO = 5000  # characters of each log that are printed: what reads our output may keep little of it


@dataclass(frozen=True)
class Part:
    """Commands that run side by side and pass or fail together. Parts with the same turn run at the same time.

    weight: share of the time that is left; environment: on top of ours; result: a JSON file that the part may write.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    turn: int = 0
    weight: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    result: str | None = None
    sharded: bool = False


@dataclass
class Outcome:
    """What became of a part. state: passed, failed or timed out."""

    name: str
    state: str
    seconds: float
    headline: str
    statuses: list[int | None]
    result: Any = None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """As a pytest plugin (-p bench.gpu_suite): keep this process's share of the tests."""
    if share := os.environ.get(SHARD):
        first, of = map(int, share.split("/"))
        kept = items[first::of]
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % of != first])
        items[:] = kept


# -- running -----------------------------------------------------------------------------------------------------------


class Running:
    """A part under way: its processes, each in a process group of its own, and their logs."""

    def __init__(self, part: Part, out: Path, seconds: float) -> None:
        self.part, self.out, self.started = part, out, time.monotonic()
        self.deadline, self.ended = self.started + seconds, 0.0
        self.logs = [out / f"{part.name}.{i}.part" for i in range(len(part.commands))]
        self.files: list[IO[bytes]] = [log.open("wb") for log in self.logs]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.statuses: list[int | None] = [None] * len(part.commands)
        self.error = ""
        for i, command in enumerate(part.commands):
            shard = {SHARD: f"{i}/{len(part.commands)}"} if part.sharded else {}
            try:
                self.processes.append(subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | part.environment | shard, stdin=subprocess.DEVNULL,
                    stdout=self.files[i], stderr=subprocess.STDOUT, start_new_session=True,
                ))  # fmt: skip
            except OSError as error:
                self.error = f"cannot start {command[0]}: {error.strerror}"
                break

    def poll(self) -> bool:
        """Whether all has ended; ends it when its time is over."""
        self.statuses[: len(self.processes)] = [process.poll() for process in self.processes]
        if not self.error and None in self.statuses and time.monotonic() < self.deadline:
            return False
        self.stop()
        self.ended = self.ended or time.monotonic()
        return True

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def outcome(self) -> Outcome:
        """Puts the logs together and reads what the part left."""
        for file in self.files:
            file.close()
        texts = [log.read_text(errors="replace") for log in self.logs]
        (self.out / f"{self.part.name}.log").write_text("\n".join(text.rstrip() for text in texts) + "\n")
        for log in self.logs:
            log.unlink()
        result = None
        if self.part.result and (path := self.out / self.part.result).is_file():
            with contextlib.suppress(ValueError):
                result = json.loads(path.read_text())
            path.unlink()
        good = [0, NOTHING_COLLECTED] if self.part.sharded else [0]
        passed = all(status in good for status in self.statuses) and 0 in self.statuses
        state = "passed" if passed else "timed out" if None in self.statuses and not self.error else "failed"
        said = headline(texts, result) if not self.error else self.error
        return Outcome(self.part.name, state, self.ended - self.started, said, self.statuses, result)


def headline(texts: Sequence[str], result: Any) -> str:
    """A part in one line: what its result says, else pytest's counts, else the last line of its log."""
    if isinstance(result, dict) and "headline" in result:
        return str(result["headline"])
    counts: dict[str, int] = {}
    for text in texts:
        last = next((line for line in reversed(text.splitlines()) if re.search(r" in [\d.]+s", line)), "")
        for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last):
            counts[word] = counts.get(word, 0) + int(count)
    if counts:
        return ", ".join(f"{count} {word}" for word, count in sorted(counts.items(), key=lambda pair: pair[0]))
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def run_parts(parts: Sequence[Part], out: Path, seconds: float, about: dict[str, Any]) -> list[Outcome]:
    """Turn after turn; what a turn leaves of its time goes to the later ones. suite.json is written after each."""
    end, outcomes = time.monotonic() + seconds, list[Outcome]()
    turns = sorted({part.turn for part in parts})
    for turn in turns:
        now = [part for part in parts if part.turn == turn]
        later = sum(max(p.weight for p in parts if p.turn == t) for t in turns if t > turn)
        weight = max(part.weight for part in now)
        box = max(1.0, (end - time.monotonic()) * weight / (weight + later))
        running = [Running(part, out, box) for part in now]
        print(f"{', '.join(part.name for part in now)}: at most {box:.0f} s", flush=True)
        try:
            while not all([one.poll() for one in running]):  # every one is asked, so that each has its end
                time.sleep(0.05)
        finally:
            for one in running:
                one.stop()
        for one in running:
            outcomes.append(one.outcome())
            echo(out / f"{one.part.name}.log", outcomes[-1])
        save(out, outcomes, about)
    return outcomes


def echo(log: Path, outcome: Outcome) -> None:
    """The end of a part's log, without the machine's line."""
    lines = [line for line in log.read_text().splitlines() if not line.startswith("{")]
    print(f"\n== {outcome.name}: {outcome.state}, {outcome.seconds:.0f} s\n" + "\n".join(lines)[-ECHO:], flush=True)


def save(out: Path, outcomes: Sequence[Outcome], about: dict[str, Any]) -> None:
    content = about | {"parts": [asdict(outcome) for outcome in outcomes]}
    part = out / "suite.json.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, out / "suite.json")


# -- what is run -------------------------------------------------------------------------------------------------------


def suite(preset: str, gpu: bool, out: Path, seconds: float) -> list[Part]:
    """The parts. Without a GPU, Triton's interpreter runs the kernels, and nothing is timed for its time's sake."""
    python, cores = sys.executable, os.cpu_count() or 2
    base = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / ".links"), os.environ.get("PYTHONPATH")]))}
    base |= {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    base |= {} if gpu else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    tests = base | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if golden := os.environ.get("LIVERELAY_GOLDEN"):
        tests["LIVERELAY_GOLDEN"] = str(Path(golden).absolute())
    pytest = (python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow")
    sharded = (*pytest, "-p", "bench.gpu_suite")
    shards = min(10, max(1, cores * 2 // 3)) if gpu else min(2, cores)
    there = tuple(path for path in TESTS if (ROOT / path).exists())
    plain = {name: value for name, value in tests.items() if name != "TRITON_INTERPRET"}
    size = "production" if gpu else "small"
    micro = ["--dims", size, "--budget", f"{0.18 * seconds:.0f}", "--plot", str(out / "roofline.png")]
    micro += [] if gpu else ["--device", "cpu", "--seconds", "0.02"]
    stage = ["--preset", preset, "--seconds", "1.5" if gpu else "0.2"]
    stage += ["--compile-seconds", "30"] if gpu else ["--compile-seconds", "0", "--device", "cpu"]
    line = ["--preset", preset, *([] if gpu else ["--device", "cpu", "--seconds", "0.05", "--blocks", "2"])]
    products, both = (["--compile-seconds", "0", "--fp8", what] for what in ("products", "all"))
    both += ["--backends", "triton,fastest"] if gpu else []  # plain PyTorch takes seconds for a step

    def part(name: str, module: str, *flags: str) -> Part:
        command = (python, "-m", f"bench.{module}", *flags, "--json", str(out / f"{name}.json"))
        return Part(name, (command,), *TURNS[name], base, f"{name}.json")

    return [
        Part("kernels", ((*sharded, "tests/kernels"),) * shards, *TURNS["kernels"], tests, sharded=True),
        Part("tests", ((*sharded, *there),) * min(4, shards), *TURNS["tests"], plain, sharded=True),
        part("line", "line_14b", *line, "--fp8", "products", "--parts", "stage,line"),
        part("line-all", "line_14b", *line, "--fp8", "all"),
        part("line-bf16", "line_14b", *line, "--parts", "stage,line"),
        part("stage", "stage_14b", *stage),
        part("fp8", "stage_14b", *stage, *products),
        part("fp8-all", "stage_14b", *stage, *both),
        part("micro", "micro", *micro),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=(__doc__ or "").splitlines()[0])
    out_default = Path(os.environ.get("OUT") or ROOT / "out" / "suite")
    parser.add_argument("--out", type=Path, default=out_default, help="folder of the results ($OUT, else out/suite)")
    parser.add_argument("--preset", choices=("14b", "tiny"), help="default: 14b on a GPU, else tiny")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole suite")
    parser.add_argument("--only", default="", help="parts to run, with commas between")
    arguments = parser.parse_args(argv)
    seconds, started = 60 * arguments.minutes, time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended with us
    from bench.timing import machine, pick_device  # brings torch, which --help does not need

    device = pick_device(None)
    gpu, out = device.type == "cuda", arguments.out.absolute()
    preset = arguments.preset or ("14b" if gpu else "tiny")
    out.mkdir(parents=True, exist_ok=True)
    about = {"preset": preset, "minutes": arguments.minutes, "machine": machine(device)}
    parts = suite(preset, gpu, out, seconds)
    if arguments.only:
        parts = [part for part in parts if part.name in arguments.only.split(",")]
    if not parts:
        parser.error(f"no part is called '{arguments.only}'")
    print(f"{about['machine'].get('gpu', 'no GPU: a dry run')}; preset {preset}; results in {out}", flush=True)
    outcomes = run_parts(parts, out, seconds - (time.monotonic() - started), about)
    return conclude(outcomes)


def conclude(outcomes: Sequence[Outcome]) -> int:
    """The final table; 0 when all parts passed."""
    print(f"\n{'part':9}  {'state':9}  {'s':>4}  headline")
    for outcome in outcomes:
        print(f"{outcome.name:9}  {outcome.state:9}  {outcome.seconds:4.0f}  {outcome.headline}")
    return 0 if outcomes and all(outcome.state == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
