"""What the GPU suite measures with, and all of it once on the CPU: on a GPU's day it has to work the first time."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import (
    ceilings,
    clocks,
    gpu_suite,
    line_14b,
    opening,
    products,
    report,
    stage_14b,
    step_bytes,
    timing,
    vae_split,
)
from liverelay.engine.models.sizes import block_step_flops, decode_flops
from liverelay.engine.models.vae_config import VAEConfig
from liverelay.kernels.registry import KERNELS

CPU = torch.device("cpu")
LIMITS = ceilings.Ceilings(copy=1e12, matmul=1e14, fp8=0.0, matmul_dtype="bfloat16")


def read(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text())
    return content


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
        patch.setattr(timing, "watched", lambda device: contextlib.nullcontext({"sm_mhz": 1500.0}))
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
    assert took.clocks == {"sm_mhz": 1500.0}
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


def test_machine_and_ceilings_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ceilings.json"
    assert ceilings.main(["--device", "cpu", "--seconds", "0.02", "--json", str(path)]) == 0
    kept = read(path)
    measured = ceilings.Ceilings.read(kept["ceilings"])  # type: ignore[arg-type]
    assert measured.copy > 1e8 and measured.matmul > 1e8 and measured.copy == max(measured.copies.values())
    assert f"({measured.copy_by})" in measured.text and measured.copies[measured.copy_by] == measured.copy
    assert kept["machine"]["torch"] == torch.__version__  # type: ignore[index]
    monkeypatch.setenv(ceilings.KEPT, str(path))  # a suite measures them once
    assert ceilings.ceilings(CPU, 1e6) == measured


def test_the_copy_ceiling_is_the_best_of_all_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"slow, 1 GiB, graph": 2.7e12, "quick, 0.25 GiB, events": 4.1e12, "late, 2 GiB, graph": 3.9e12}
    monkeypatch.setattr(ceilings, "copy_rates", lambda device, seconds: (rates, ["why"]))
    found = ceilings.ceilings(CPU, 0.01)
    assert found.copy == 4.1e12 and "4100 GB/s (quick, 0.25 GiB, events)" in found.text and found.notes == ("why",)


def test_clocks_are_those_of_the_time_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = clocks.Sampler()
    assert sampler.during(0.0, 9.0) == {}
    for at, clock in ((1.0, 1980.0), (2.0, 1500.0), (3.0, 1400.0), (4.0, 1300.0)):
        sampler.add((clock, clock / 2, 60.0 + at), at)
    assert sampler.during(2.0, 4.5) == {"sm_mhz": 1400, "watts": 700, "celsius": 64, "samples": 3}
    assert sampler.during(3.1, 3.3)["sm_mhz"] == 1400  # between two samples: the nearest
    assert clocks.parse("1980, 94.36, 36") == (1980, 94.36, 36) and clocks.parse("[N/A], 1, 2") is None
    monkeypatch.setattr(clocks, "sampler", lambda device: sampler)
    with clocks.watched(torch.device("cuda", 0)) as found:
        sampler.add((1000.0, 600.0, 70.0))
    assert found["sm_mhz"] == 1000 and clocks.text(found) == "1000 MHz, 600 W, 70 C"
    with clocks.watched(CPU) as found:
        pass
    assert found == {} and clocks.text(found) == ""


def test_table_aligns_its_columns() -> None:
    assert timing.table(("a", "bb"), [("xyz", "1")]) == "a    bb\nxyz   1"


def test_saved_results_are_whole_or_not_there(tmp_path: Path) -> None:
    timing.save(tmp_path / "a.json", {"a": 1})
    timing.save(None, {"a": 2})
    assert read(tmp_path / "a.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_roofline_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in timing.roofline([], LIMITS, tmp_path / "p.png")


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_operations_of_the_full_size_are_those_of_the_budget() -> None:
    config, size = stage_14b.PRESETS["14b"]
    geometry = stage_14b.Geometry(*size, config.head_dim)
    attention, others = block_step_flops(config, geometry)
    assert (geometry.block_tokens, geometry.arena_tokens) == (3168, 15312)
    assert (round(attention / 1e12), round(others / 1e12)) == (40, 81)


def test_element_wise_bytes_are_those_of_the_tensors_that_are_read_and_written() -> None:
    """Counted by hand, in rows of the width: norms 3 + 4 + 6, the text's norm 1, rotation 4; GELU 2 of its own."""
    config, size = stage_14b.PRESETS["14b"]
    geometry = stage_14b.Geometry(*size, config.head_dim)
    t, d, f, layers, heard = geometry.block_tokens, config.dim, config.ffn_dim, config.num_layers, 12
    plain = 2 * (layers * t * (18 * d + 2 * f) + layers * 2 * 1056 * d + heard * 4 * t * d + 2 * t * d)
    angles, factors = layers * 4 * t * config.head_dim, layers * 4 * t
    words = ("", "products", "all")
    found = {fp8: step_bytes.element_wise_bytes(config, geometry, torch.bfloat16, fp8) for fp8 in words}
    assert found[""] == plain + angles + factors
    # In one byte instead of two: three norms' outputs, GELU's; beside them two quantisations of attended rows.
    saved = t * (layers * (3 * d + f) + heard * d)  # the head's norm is none of them, the one before the first layer is
    assert found["products"] == found[""] - saved + 3 * (2 * layers + heard) * t * d
    codes = layers * d * (2 * t + 1056)
    assert found["all"] == found["products"] - codes + layers * 3 * t * d


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


@pytest.mark.parametrize("fp8", ["", "all"])
def test_attention_to_text_is_no_self_attention(fp8: str) -> None:
    config, size = stage_14b.PRESETS["tiny"]
    with torch.inference_mode():
        bench = stage_14b.Bench(config, stage_14b.Geometry(*size, config.head_dim), CPU, torch.float32, fp8=fp8)
        assert {"text attention", "self-attention"} <= stage_14b.split(bench, bench.make("torch"), steps=1).keys()


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


# -- the smaller measurements ------------------------------------------------------------------------------------------


def test_products_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "products.json"
    assert products.main(["--device", "cpu", "--preset", "tiny", "--seconds", "0.01", "--json", str(path)]) == 0
    found: Any = read(path)["products"]
    tokens, shapes = products.PRESETS["tiny"]
    plain = [row for row in found["rows"] if row["way"] == "working dtype"]
    assert [(row["m"], row["n"], row["k"]) for row in plain] == [(m, n, k) for m in tokens for n, k in shapes]
    assert all(row["flops"] == pytest.approx(2 * row["m"] * row["n"] * row["k"] / row["s"]) for row in plain)
    assert products.report(found) in capsys.readouterr().out


def test_convolutions_of_a_tiny_vae_have_its_operations(tmp_path: Path) -> None:
    path = tmp_path / "vae.json"
    assert vae_split.main(["--device", "cpu", "--preset", "tiny", "--seconds", "0.05", "--json", str(path)]) == 0
    found: Any = read(path)["vae"]
    config, size = VAEConfig(base_dim=vae_split.VAE_DIM["tiny"]), stage_14b.PRESETS["tiny"][1]
    expected = decode_flops(config, stage_14b.Geometry(*size, 32))
    assert found["flops"] == pytest.approx(expected, rel=0.03)  # the middle's attention is no convolution
    assert sum(one["s"] for one in found["classes"].values()) + found["rest_s"] >= found["eager_s"]
    assert vae_split.REST in vae_split.report(found, 1e12)


@pytest.mark.slow
def test_opening_sessions_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("transformers", "ftfy", "PIL"):
        pytest.importorskip(library)
    path = tmp_path / "opening.json"
    assert opening.main(["--device", "cpu", "--preset", "tiny", "--fp8", "all", "--json", str(path)]) == 0
    found: Any = read(path)["opening"]
    assert set(found["parts_s"]) == {"encode_s", "prefill_s", "prime_s", "stage_open_s", "block_0_s"}
    assert found["warm"]["first_frames_s"] > found["warm"]["open_s"] > 0
    assert found["gaps"]["beside_max_s"] >= found["gaps"]["beside_median_s"] > 0 and found["gaps"]["blocks_beside"] >= 1
    assert opening.report(found) in capsys.readouterr().out


def test_what_was_measured_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        device = CPU

        def measure(self) -> dict[str, float]:
            return {"open_s": 1.0}

        parts = measure

    def no_memory(opening: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(opening, "measure_gaps", no_memory)
    result: dict[str, Any] = {"clocks": {}}
    with pytest.raises(RuntimeError):
        opening.run(Broken(), result, tmp_path / "opening.json")  # type: ignore[arg-type]
    kept: Any = read(tmp_path / "opening.json")
    assert kept["opening"]["warm"] == {"open_s": 1.0} and "cold, warm" in kept["headline"]


def test_a_second_session_that_cannot_be_opened_is_a_fault_of_the_measurement() -> None:
    class Session:
        def __enter__(self) -> Any:
            return SimpleNamespace(frames=lambda: iter(range(30)))

        def __exit__(self, *_: object) -> None:
            pass

    def refused() -> None:
        raise RuntimeError("no session can be opened")

    alone: Any = SimpleNamespace(lacks_place=str, open=Session, measure=refused)
    with pytest.raises(RuntimeError, match="no session can be opened"):
        opening.measure_gaps(alone)


# -- all of it ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_suite_runs_dry_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: run the suite itself")
    assert gpu_suite.main(["--out", str(tmp_path), "--preset", "tiny", "--minutes", "40"]) == 0
    table = capfd.readouterr().out.rpartition("headline")[2].strip().splitlines()
    assert [line.split()[:2] for line in table[: len(gpu_suite.TURNS)]] == [
        [name, "passed"] for name in gpu_suite.TURNS
    ]
    kept = read(tmp_path / "suite.json")
    results = {part["name"]: part["result"] for part in kept["parts"]}  # type: ignore[attr-defined]
    rows = [row["kernel"] for name in ("attention", "micro") for row in results[name]["rows"]]
    assert sorted(rows) == sorted(spec.name for spec in KERNELS)
    assert set(results["line"]["parts"]) == {"stage", "line", "apart"} and set(results["loop"]["parts"]) == {"loop"}
    assert results["ceilings"]["ceilings"] == results["stage-all"]["ceilings"]
    assert {path.name for path in tmp_path.iterdir()} <= {"suite.json", "suite.log", "roofline.png"}
