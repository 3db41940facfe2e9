"""The GPU suite's own pieces, and all of it once on the CPU: on the day of a GPU it has to work the first time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import gpu_suite, line_14b, micro, report, stage_14b, timing
from bench.gpu_suite import Part, conclude, run_parts
from liverelay.engine.models.sizes import block_step_flops
from liverelay.kernels.registry import KERNELS

CPU = torch.device("cpu")
PRINTS = (sys.executable, "-c", "print('3 passed, 1 skipped in 0.1s')")
HANGS = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
FAILS = (sys.executable, "-c", "import sys; print('why'); sys.exit(3)")
LIMITS = timing.Ceilings(copy=1e12, matmul=1e14, fp8=0.0, matmul_dtype="bfloat16")


def read(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text())
    return content


# -- the runner --------------------------------------------------------------------------------------------------------


def test_every_part_is_reported_and_one_that_fails_or_hangs_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        Part("fails", (PRINTS, FAILS), 0, 1.0), Part("hangs", (HANGS,), 1, 1.0), Part("absent", (("/no/such",),), 2),
        Part("good", (PRINTS, PRINTS), 3, 20.0),
    ]  # fmt: skip
    started = time.monotonic()
    outcomes = run_parts(parts, tmp_path, 66.0, {"machine": {"cpu": "x"}})
    assert time.monotonic() - started < 40
    assert [outcome.state for outcome in outcomes] == ["failed", "timed out", "failed", "passed"]
    assert conclude(outcomes) == 1
    assert "why" in (tmp_path / "fails.log").read_text()
    assert "begun" in (tmp_path / "hangs.log").read_text()
    assert outcomes[2].headline == "cannot start /no/such: No such file or directory"
    assert outcomes[3].headline == "6 passed, 2 skipped"
    kept = read(tmp_path / "suite.json")
    assert kept["machine"] == {"cpu": "x"}
    assert [part["state"] for part in kept["parts"]] == [outcome.state for outcome in outcomes]  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("*.part"))
    table = capsys.readouterr().out
    assert all(part.name in table for part in parts)


def test_a_part_that_is_stopped_keeps_the_results_it_had(tmp_path: Path) -> None:
    code = "import sys, time; open(sys.argv[1], 'w').write('{\"headline\": \"half\"}'); time.sleep(60)"
    part = Part("half", ((sys.executable, "-c", code, str(tmp_path / "half.json")),), result="half.json")
    (outcome,) = run_parts([part], tmp_path, 4.0, {})
    assert (outcome.state, outcome.headline, outcome.result) == ("timed out", "half", {"headline": "half"})


def test_shards_run_every_test_once(tmp_path: Path) -> None:
    tests = tmp_path / "test_numbers.py"
    tests.write_text("import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test_n(n): pass\n")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu_suite", str(tests))
    part = Part("shards", (command,) * 2, environment={"PYTHONPATH": str(gpu_suite.ROOT)}, sharded=True)
    (outcome,) = run_parts([part], tmp_path, 60.0, {})
    assert outcome.state == "passed" and outcome.headline == "5 passed"


@pytest.mark.parametrize("gpu", [False, True])
def test_the_suite_needs_no_installation(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVERELAY_GOLDEN", "somewhere")
    parts = {part.name: part for part in gpu_suite.suite("14b", gpu, tmp_path, 540)}
    for part in parts.values():
        assert part.environment["PYTHONPATH"].startswith(str(gpu_suite.ROOT / ".links"))
        assert ("TRITON_INTERPRET" in part.environment) == (not gpu and part.name != "tests")
    assert Path(parts["tests"].environment["LIVERELAY_GOLDEN"]) == Path("somewhere").absolute()
    assert ("production" in parts["micro"].commands[0]) == gpu


# -- times and tables --------------------------------------------------------------------------------------------------


def test_measure_gives_the_median_of_calls_taken_in_turn() -> None:
    calls: list[int] = []
    naps = [lambda i=i: (calls.append(i), time.sleep(0.002)) for i in range(2)]
    took = timing.measure(naps, device=CPU, seconds=0.1)
    assert 0.002 <= took.seconds < 0.05 and took.how == "clock" and took.samples >= 3
    assert calls.count(0) == calls.count(1)


class FakeCuda:
    """Enough of torch.cuda for `measure` to run through; graphs replay what was called while they were captured."""

    def __init__(self, patch: pytest.MonkeyPatch, *, captures: bool) -> None:
        self.captures, self.replays, self.graphs = captures, 0, 0
        for name in ("synchronize", "current_stream", "Stream", "stream", "graph", "CUDAGraph", "Event"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(timing, "_cold_buffer", lambda device: torch.empty(1))
        self.time = 0.0

    def synchronize(self, device: object = None) -> None:
        pass

    def current_stream(self, device: object = None) -> FakeCuda:
        return self

    def Stream(self, device: object = None) -> FakeCuda:
        return self

    def wait_stream(self, stream: object) -> None:
        pass

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: object, stream: object = None) -> Iterator[None]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graphs += 1
        yield

    def CUDAGraph(self) -> FakeCuda:
        return self

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        pass

    def Event(self, enable_timing: bool = False) -> FakeCuda:
        return FakeEvent(self)  # type: ignore[return-value]


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.time += 0.5  # ms
        self.at = self.cuda.time

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("calls", [1, 3])
def test_measure_on_a_gpu_replays_a_graph_or_says_why_not(
    captures: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, count = FakeCuda(monkeypatch, captures=captures), [0]

    def call() -> None:
        count[0] += 1

    took = timing.measure(call if calls == 1 else [call] * calls, device=torch.device("cuda"), seconds=0.01)
    if captures:
        repeat = 1 if calls == 1 else round(2e-3 / 0.5e-3)
        assert (took.how, took.note, cuda.graphs) == ("graph", "", 1) and cuda.replays > took.samples
        assert took.seconds == pytest.approx(0.5e-3 / calls / repeat)
    else:
        assert took.how == "events" and "not permitted" in took.note and count[0] > calls * took.samples
        assert took.seconds == pytest.approx(0.5e-3 / calls)


def test_time_box_ends_what_takes_too_long() -> None:
    with pytest.raises(timing.TimeBoxError), timing.time_box(0.05):
        time.sleep(5)
    with timing.time_box(0.05):
        pass
    time.sleep(0.1)  # the alarm is off


def test_machine_and_ceilings_are_json() -> None:
    measured = timing.ceilings(CPU, 0.02)
    assert measured.copy > 1e8 and measured.matmul > 1e8 and "copy" in measured.text
    assert json.loads(json.dumps(timing.machine(CPU) | vars(measured)))["torch"] == torch.__version__


def test_table_aligns_its_columns() -> None:
    assert timing.table(("a", "bb"), [("xyz", "1")]) == "a    bb\nxyz   1"


def test_saved_results_are_whole_or_not_there(tmp_path: Path) -> None:
    timing.save(tmp_path / "a.json", {"a": 1})
    timing.save(None, {"a": 2})
    assert read(tmp_path / "a.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_rows_show_shares_of_both_ceilings_and_ratios() -> None:
    row = micro.Row("k", "d", "bfloat16", bytes=1e9, flops=1e10)
    row.seconds = {"kernel": 2e-3, "plain": 6e-3, "sdpa-cudnn": 1e-3, "sdpa-flash": 4e-3}
    row.spread = dict.fromkeys(row.seconds, 0.01)
    shown = dict(zip(micro.HEAD, micro.cells(row, LIMITS), strict=True))
    assert (shown["us"], shown["GB/s"], shown["%copy"], shown["bound"]) == ("2000.0", "500", "50", "memory")
    assert (shown["TFLOP/s"], shown["%mm"], shown["x plain"]) == ("5.00", "5", "3.00")
    assert (shown["x compile"], shown["x library"]) == ("-", "0.50 sdpa-cudnn")
    red = micro.Row("bad", "d", "bfloat16", state="red", note="wrong", bytes=1.0)
    assert "RED: bad" in micro.headline([row, red], LIMITS)
    assert "bad [d]: red: wrong" in micro.report([row, red], LIMITS)


def test_roofline_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in timing.roofline([], LIMITS, tmp_path / "p.png")


# -- checks before times -----------------------------------------------------------------------------------------------


def test_a_wrong_kernel_is_red_on_small_and_on_timed_dims() -> None:
    spec = next(spec for spec in KERNELS if spec.name == "gelu")
    right = dataclasses.replace(spec, launch=spec.plain, production=spec.small)
    assert micro.check(right, "production", CPU) == ""
    wrong = dataclasses.replace(right, launch=lambda x, out, *rest: out.copy_(x))
    assert "error" in micro.check(wrong, "small", CPU)
    lazy = dataclasses.replace(right, launch=lambda x, out, *rest: out)
    assert "unwritten" in micro.check(lazy, "small", CPU)
    late = dataclasses.replace(wrong, small={})
    assert "differs from plain PyTorch" in micro.check(late, "production", CPU)


def test_a_check_that_crashes_is_red_and_names_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = micro.Plan(CPU, "small", 0.01, 0.0, time.monotonic() + 60, True)
    missing = dataclasses.replace(KERNELS[0], name="no such kernel")
    assert "ended with 1" in micro.check_isolated(missing, plan)


def test_without_a_gpu_only_plain_pytorch_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if micro.INTERPRETED or torch.cuda.is_available():
        pytest.skip("the kernels can run here")
    path = tmp_path / "micro.json"
    arguments = ["--kernel", "attention", "--dims", "small", "--seconds", "0.01", "--compile-seconds", "0"]
    assert micro.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "only plain PyTorch is timed" in printed
    assert json.loads(printed.splitlines()[-1])["rows"]
    assert {row["state"] for row in read(path)["rows"]} == {"plain only"}  # type: ignore[attr-defined]


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_operations_of_the_full_size_are_those_of_the_budget() -> None:
    config, size = stage_14b.PRESETS["14b"]
    geometry = stage_14b.Geometry(*size, config.head_dim)
    attention, others = block_step_flops(config, geometry)
    assert (geometry.block_tokens, geometry.arena_tokens) == (3168, 15312)
    assert (round(attention / 1e12), round(others / 1e12)) == (40, 81)
    assert 25e9 < stage_14b.element_wise_bytes(config, geometry, 2) < 35e9


def test_random_weights_do_not_depend_on_the_order_they_are_asked_for() -> None:
    config = stage_14b.PRESETS["tiny"][0]
    one, other = (stage_14b.RandomWeights(config, CPU) for _ in range(2))
    keys = list(one)
    first = {key: one[key] for key in keys[:9]}
    for key in reversed(keys[:9]):
        assert torch.equal(other[key], first[key]) and tuple(first[key].shape) == one.shapes[key]


def test_the_devices_part_of_a_step_repeats_it_until_the_host_decides_anew() -> None:
    config, size = stage_14b.PRESETS["tiny"]
    with torch.inference_mode():
        bench = stage_14b.Bench(config, stage_14b.Geometry(*size, config.head_dim), CPU, torch.float32)
        dit, start = bench.make("torch"), bench.start
        eager = bench.step(dit, start).clone()
        assert torch.equal(bench.compute(dit), eager)
        later = start + bench.geometry.ring_frames  # the same slot, other angles
        assert not torch.equal(bench.step(dit, later), eager)


def test_parts_add_up_to_the_block_step() -> None:
    found = stage_14b.parts({"linear": 3.0, "self-attention": 2.0, "gelu": 1.0, "embed": 0.5, "total": 7.0})
    assert list(found.values()) == [3.0, 2.0, 1.0, 1.0, 7.0]


def test_outputs_that_differ_are_a_fault() -> None:
    result = {"dtype": "torch.float32", "fp8": "", "backends": {"torch": {}, "triton": {"difference": 0.01}}}
    assert stage_14b.faults(result) == ["triton differs from the first backend by 0.01"]
    result["backends"] = {"torch": {"error": "no memory"}, "triton": {"graph_difference": float("nan")}}
    assert len(stage_14b.faults(result)) == 2


def test_tiny_stage_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stage.json"
    arguments = ["--preset", "tiny", "--device", "cpu", "--backends", "torch", "--seconds", "0.02"]
    assert stage_14b.main([*arguments, "--compile-seconds", "0", "--json", str(path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    split = result["backends"]["torch"]["parts_s"]
    assert all(split[name] > 0 for name in (*stage_14b.PARTS, "block-step")) and result["plain"]["layers_s"] > 0
    assert "FPS" in str(read(path)["headline"])


# -- the line ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", ["", pytest.param("all", marks=pytest.mark.slow)])
def test_tiny_line_on_the_cpu(fp8: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "line.json"
    arguments = ["--preset", "tiny", "--device", "cpu", "--seconds", "0.02", "--blocks", "2", "--json", str(path)]
    assert line_14b.main([*arguments, *(["--fp8", fp8] if fp8 else [])]) == 0
    printed = capsys.readouterr().out
    result, kept = json.loads(printed.splitlines()[-1]), read(path)
    assert kept["parts"] == result["parts"] and "FPS" in str(kept["headline"])
    stage, line, loop = (result["parts"][name] for name in ("stage", "line", "loop"))
    assert stage["equal"] and stage["eager"]["s"] > 0 and stage["captured"]["s"] > 0
    assert line["steady_fps"] > 0 and line["figures"]["blocks"] == line_14b.STEADY + 2
    split = line["vae"]["parts_s"]
    assert {"residual 64x128", "up 8x16", "to_uint8", "rest"} <= set(split)
    assert loop["equal"] and loop["NCCL to itself"]["steady_fps"] > 0
    assert line_14b.report(result) in printed


def test_a_line_that_differs_allocates_or_fails_is_a_fault() -> None:
    parts = {"stage": {"equal": False}, "line": {"allocated": {"num_alloc_retries": 1}}, "loop": {"error": "no NCCL"}}
    result = {"fp8": "", "dtype": "torch.bfloat16", "parts": parts}
    assert len(line_14b.faults(result)) == 3 and line_14b.headline(result).count("FAULT") == 3
    skipped = {"fp8": "all", "dtype": "torch.bfloat16", "parts": {"line": {"skipped": "needs 87 GiB"}}}
    assert not line_14b.faults(skipped) and "needs 87 GiB" in line_14b.report(skipped)


def test_the_report_has_the_tables_of_every_part(tmp_path: Path) -> None:
    shown = {"fp8": "all", "dtype": "torch.bfloat16", "parts": {"line": {"skipped": "needs 87 GiB"}}}
    parts = [{"name": "tests", "headline": "7 passed"}, {"name": "line-all", "result": shown}]
    suite = {"machine": {"gpu": "GPU X", "torch": "1", "triton": "2"}, "parts": parts}
    text = report.page(suite, "x", tmp_path)
    assert "# GPU X" in text and "- tests: 7 passed" in text and "needs 87 GiB" in text


@pytest.mark.slow
def test_the_whole_suite_runs_dry_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: run the suite itself")
    assert gpu_suite.main(["--out", str(tmp_path), "--preset", "tiny", "--minutes", "25"]) == 0
    table = capfd.readouterr().out.rpartition("headline")[2].strip().splitlines()
    assert [line.split()[:2] for line in table] == [
        [name, "passed"] for name in gpu_suite.TURNS
    ]
    kept = read(tmp_path / "suite.json")
    results = {part["name"]: part["result"] for part in kept["parts"]}  # type: ignore[attr-defined]
    assert {row["kernel"] for row in results["micro"]["rows"]} == {spec.name for spec in KERNELS}
    assert set(results["stage"]["backends"]) == {"torch", "triton", "fastest"}
    assert set(results["line-all"]["parts"]) == {"stage", "line", "loop"}
    assert {path.suffix for path in tmp_path.iterdir()} <= {".log", ".json", ".png"}
