"""The GPU suite's runner: nothing that was measured is lost, whatever fails, hangs, is skipped or is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_suite, suite_tests, suite_values
from bench.suite_runner import LOST_GRAPHS, PART_SECONDS, Keeper, Outcome, Part, Task, run_parts
from bench.suite_values import Value, compared, values, worse

SAYS = (sys.executable, "-c", "print('3 passed, 1 skipped in 0.1s')")
HANGS = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
FAILS = (sys.executable, "-c", "import sys; print('why'); sys.exit(3)")
WRITES = "import sys, time; open(sys.argv[1], 'w').write('{\"headline\": \"half\"}'); time.sleep(60)"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def tasks(*commands: tuple[str, ...]) -> tuple[Task, ...]:
    return tuple(Task(str(i), command) for i, command in enumerate(commands))


def python(code: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *map(str, arguments))


def run(tmp_path: Path, *parts: Part, seconds: float = 60.0) -> list[Outcome]:
    (work := tmp_path / "work").mkdir()
    (out := tmp_path / "out").mkdir()
    return run_parts(parts, out, work, seconds, {"machine": {"cpu": "x"}})


def test_every_part_is_reported_and_one_that_fails_or_hangs_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        Part("fails", tasks(SAYS, FAILS), 0, 10.0), Part("hangs", tasks(HANGS), 1, 1.0),
        Part("absent", tasks(("/no/such",)), 2), Part("good", tasks(SAYS, SAYS), 3, 10.0),
    ]  # fmt: skip
    outcomes = run(tmp_path, *parts)
    assert [outcome.state for outcome in outcomes] == ["failed", "timed out", "failed", "passed"]
    assert outcomes[0].headline == "3 passed, 1 skipped; in 1"
    assert "cannot start /no/such: No such file or directory" in outcomes[2].headline
    assert outcomes[3].headline == "6 passed, 2 skipped"
    kept = read(tmp_path / "out" / "suite.json")
    assert kept["machine"] == {"cpu": "x"}
    assert [part["state"] for part in kept["parts"]] == [outcome.state for outcome in outcomes]
    log = (tmp_path / "out" / "suite.log").read_text()
    assert "why" in log and "begun" in log
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"suite.json", "suite.log"}
    about: dict[str, Any] = {"machine": {}, "preset": "tiny"}
    assert gpu_suite.conclude(outcomes, about, tmp_path / "out") == 1
    assert gpu_suite.conclude(outcomes[3:], about, tmp_path / "out") == 0
    table = capsys.readouterr().out
    assert all(part.name in table for part in parts) and "NOT PASSED: fails, hangs, absent" in table


def test_a_part_that_runs_out_of_time_keeps_the_results_it_had(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    path.write_text('{"headline": "half"}')
    (outcome,) = run(tmp_path, Part("half", tasks(HANGS), result=path), seconds=1.0)
    assert (outcome.state, outcome.headline, outcome.result) == ("timed out", "half", {"headline": "half"})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_suite_that_is_killed_has_written_what_its_parts_had_measured(number: signal.Signals, tmp_path: Path) -> None:
    half, out = tmp_path / "half.json", tmp_path / "out"
    out.mkdir()
    code = "\n".join([
        "import signal, sys", "from pathlib import Path", "from bench.suite_runner import Part, Task, run_parts",
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))", "out, half, code = sys.argv[1:]",
        "done = Part('done', (Task('done', (sys.executable, '-c', 'print(1)')),), 0)",
        "part = Part('half', (Task('half', (sys.executable, '-c', code, half)),), 1, result=Path(half))",
        "run_parts([done, part], Path(out), Path(half).parent, 120.0, {'machine': {}})",
    ])  # fmt: skip
    suite = subprocess.Popen(python(code, out, half, WRITES), cwd=gpu_suite.ROOT, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        kept: list[dict[str, Any]] = []
        while time.monotonic() < end and len(kept) < 2:
            time.sleep(0.1)
            kept = read(out / "suite.json")["parts"] if (out / "suite.json").exists() else []
        assert [part["state"] for part in kept] == ["passed", "running"]
        suite.send_signal(number)
        assert suite.wait(30) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    finally:
        suite.kill()
        end_children_of(half)
    kept = read(out / "suite.json")["parts"]
    assert [part["state"] for part in kept] == ["passed", "stopped" if number == signal.SIGTERM else "running"]
    assert kept[1]["result"] == {"headline": "half"} and kept[1]["headline"] == "half"


def test_a_suite_that_is_killed_at_once_leaves_no_results_of_an_earlier_one(tmp_path: Path) -> None:
    for name in ("suite.json", "suite.log", "roofline.png"):
        (tmp_path / name).write_text("earlier")
    Keeper(tmp_path, {"machine": {"cpu": "x"}})
    assert read(tmp_path / "suite.json") == {"machine": {"cpu": "x"}, "parts": []}
    assert (tmp_path / "suite.log").read_text() == "" and not (tmp_path / "roofline.png").exists()


def end_children_of(path: Path) -> None:
    """Whoever was given this path: a runner that was killed cannot end its parts."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(path) in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def test_a_part_waits_for_the_one_it_needs_and_never_has_more_tasks_at_a_time_than_it_may(tmp_path: Path) -> None:
    mark = "import sys, time; a = time.time(); time.sleep(0.4); open(sys.argv[1], 'w').write(f'{a} {time.time()}')"
    first = Part("first", tasks(python(mark, tmp_path / "first")))
    others = tasks(*(python(mark, tmp_path / f"later{i}") for i in range(3)))
    later = Part("later", others, side_by_side=1, after="first")
    assert [outcome.state for outcome in run(tmp_path, first, later)] == ["passed", "passed"]
    times = sorted(list(map(float, path.read_text().split())) for path in tmp_path.glob("[fl]*"))
    assert all(one[1] <= other[0] for one, other in pairwise(times)) and len(times) == 4
    alone = Part("alone", tasks(SAYS), after="nobody")
    (tmp_path / "again").mkdir()
    assert run(tmp_path / "again", alone)[0].state == "passed"


def test_a_task_knows_how_long_it_has(tmp_path: Path) -> None:
    says = python(f"import os; print('left', os.environ['{PART_SECONDS}'])")
    (outcome,) = run(tmp_path, Part("says", tasks(says)), seconds=30.0)
    assert 10 < float(outcome.headline.split()[1]) < 30


def test_lost_graphs_make_a_part_fail(tmp_path: Path) -> None:
    warns = python(f"import logging; logging.getLogger('x').warning('cuda:0: {LOST_GRAPHS}: why')")
    late = python("import time; time.sleep(1); " + warns[2])
    measured, tested = run(tmp_path, Part("measures", tasks(late)), Part("tests", tasks(warns), tests=True))
    assert measured.state == "failed" and "FAULT" in measured.headline and tested.state == "passed"


# -- tests within the suite --------------------------------------------------------------------------------------------

TESTS = """
import pytest

@pytest.mark.parametrize("n", range(5))
def test_n(n): pass

@pytest.mark.skipif(True, reason={reason!r})
def test_left_out(): pass
"""


def numbers_part(tmp_path: Path, reason: str, *shares: str) -> Part:
    (tmp_path / "test_numbers.py").write_text(TESTS.format(reason=reason))
    command = (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "bench.suite_tests")
    command = (*command, str(tmp_path / "test_numbers.py"))
    made = tuple(Task(f"share{i}", command, {suite_tests.SHARE: share}) for i, share in enumerate(shares))
    return Part("t", made, environment={"PYTHONPATH": str(gpu_suite.ROOT)}, tests=True, no_skips=True)


def test_shares_and_families_run_every_test_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (outcome,) = run(tmp_path / "a", numbers_part(tmp_path, "needs two GPUs", "0/2", "1/2"))
    assert outcome.state == "passed" and outcome.headline == "5 passed, 1 skipped"
    (outcome,) = run(tmp_path / "b", numbers_part(tmp_path, "needs two GPUs", "test_numbers", "norm"))
    assert outcome.state == "passed" and outcome.headline == "5 passed, 1 skipped"
    (tmp_path / "c").mkdir()
    monkeypatch.setenv(suite_tests.MOST, "2")
    (outcome,) = run(tmp_path / "c", numbers_part(tmp_path, "needs two GPUs", "0/2", "1/2"))
    assert outcome.state == "passed" and sum(int(word) for word in outcome.headline.split()[::2]) == 4


@pytest.mark.parametrize(
    ("reason", "state"),
    [("needs two GPUs", "passed"), ("x is not for sm_90", "passed"), ("the compiled module was not built", "failed"),
     ("could not import 'ftfy': No module named 'ftfy'", "passed"), ("could not import 'transformers': x", "failed"),
     ("no golden tensors here (set LIVERELAY_GOLDEN to their folder)", "failed")],
)  # fmt: skip
def test_a_skip_on_a_gpu_needs_a_good_reason(reason: str, state: str, tmp_path: Path) -> None:
    (outcome,) = run(tmp_path, numbers_part(tmp_path, reason, "0/1"))
    said = "SKIPPED" in outcome.headline and reason in outcome.headline
    assert outcome.state == state and said == (state == "failed")


def test_the_families_are_those_of_the_kernels() -> None:
    pytest.importorskip("triton")
    found = set(suite_tests.families())
    assert {"attention", "attention_gluon", "norm", "rope", "test_registry", "test_gluon"} <= found


@pytest.mark.parametrize("gpu", [False, True])
def test_the_suite_needs_no_installation(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("LIVERELAY_GOLDEN", "somewhere")
    parts = {part.name: part for part in gpu_suite.suite("14b", gpu, tmp_path)}
    assert list(parts) == list(gpu_suite.TURNS)
    for part in parts.values():
        assert part.environment["PYTHONPATH"].startswith(str(gpu_suite.ROOT / ".links"))
        assert ("TRITON_INTERPRET" in part.environment) == (not gpu and part.name != "tests")
        assert part.result is None or part.result.parent == tmp_path
        assert part.tests == (part.name in ("kernels", "tests")) and part.no_skips == (part.tests and gpu)
    assert Path(parts["tests"].environment["LIVERELAY_GOLDEN"]) == Path("somewhere").absolute()
    assert ("production" in parts["micro"].tasks[0].command) == gpu
    assert not any("--loop" in task.command for part in parts.values() for task in part.tasks)


@pytest.mark.parametrize(("arguments", "text"), [
    (["--only", "micro,nonsense"], "no part is called 'nonsense'"),
    (["--minutes", "-1"], "-1 is not a sensible number of minutes"),
    (["--minutes", "nan"], "nan is not a sensible number of minutes"),
    (["--out", __file__], f"cannot make the folder {__file__}: File exists"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path), *arguments])
    assert text in capsys.readouterr().err and not list(tmp_path.iterdir())


# -- values beside those of the last time ------------------------------------------------------------------------------


def limits(copy: float = 4e12) -> dict[str, Any]:
    return {"copy": copy, "matmul": 7e14, "fp8": 1.4e15, "matmul_dtype": "bfloat16", "notes": []}


def a_suite(us: float, fps: float) -> dict[str, Any]:
    row = {"kernel": "k", "dims": "d", "bytes": 4e7, "flops": 0.0, "seconds": {"kernel": us * 1e-6}}
    line = {"plan": "0+1+2+3,vae", "steady_fps": fps, "first_frame_s": 0.8}
    parts = [{"result": {"rows": [row], "ceilings": limits()}}, {"result": None},
             {"result": {"fp8": "all", "parts": {"apart": line}}}]  # fmt: skip
    return {"machine": {"gpu": "NVIDIA H200"}, "preset": "14b", "parts": parts}


def test_what_is_worse_than_the_last_time_is_red(tmp_path: Path) -> None:
    (tmp_path / "h200-2026-01-01.json").write_text(json.dumps(a_suite(1.0, 99.0)))
    (tmp_path / "h200-2026-11-01.json").write_text(json.dumps(a_suite(20.0, 18.0)))
    (tmp_path / "h100-2026-12-01.json").write_text(json.dumps(a_suite(1.0, 99.0)))
    for us, fps, red in ((20.5, 17.6, []), (21, 30, ["k [d]"]), (10, 17, ["line 0+1+2+3,vae, FP8 all"])):
        text, found = compared(a_suite(us, fps), tmp_path)
        assert found == red and text.count("RED") == len(red) and "h200-2026-11-01" in text
    (line,) = [line for line in text.splitlines() if line.startswith("k [d]")]
    assert line.split() == ["k", "[d]", "10", "us", "10", "100", "20", "-50.0"]
    tiny = a_suite(1e6, 1.0) | {"preset": "tiny"}
    assert compared(tiny, tmp_path)[1] == [] and compared({**tiny, "machine": {}}, tmp_path)[1] == []


def test_higher_and_lower_are_better_as_they_are() -> None:
    now = {"a": Value("a", 1.0, "ms"), "b": Value("b", 1.0, "FPS", True), "c": Value("c", 1.0, "ms")}
    before = {"a": Value("a", 2.0, "ms"), "b": Value("b", 2.0, "FPS", True)}
    assert worse(now, before) == ["b"] and worse(before, now) == ["a"]


def test_every_kind_of_result_that_is_kept_has_values() -> None:
    for path in suite_values.RESULTS.glob("*.json"):
        found = values(read(path))
        assert {"block-step, bf16", "block-step, FP8 all"} <= set(found) and all(v.value > 0 for v in found.values())
