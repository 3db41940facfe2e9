"""The planner: times and where they come from, memory, the fastest plan that fits, fast links, what would fit else."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import types
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest

from liverelay.engine.cli import main
from liverelay.engine.errors import InputError
from liverelay.engine.models.sizes import (
    PUBLISHED,
    block_step_flops,
    decode_flops,
    decode_step_flops,
    prefill_flops,
)
from liverelay.engine.models.vae_config import CUT, FIRST, PIECES, SECOND, VAEConfig
from liverelay.engine.relay.links import GIB, NVLINK, PCIE, SYSTEM, Machine, look
from liverelay.engine.relay.plan import balanced_plan, parse_plan
from liverelay.engine.relay.planner import Task, best_plan, forecasts, stage_memory, total
from liverelay.engine.relay.times import (
    ESTIMATE,
    GIVEN,
    MEASURED,
    StageTimes,
    bundled_times,
    card,
    geometry_of,
    read_times,
)

H100_MEMORY = card("h100").memory


def bundled(task: Task) -> StageTimes:
    return bundled_times(task.size, task.fp8, name="h100")


def h100s(count: int) -> Machine:
    return Machine.assumed(count, H100_MEMORY)


def test_operations_are_those_of_the_budget() -> None:
    geometry = geometry_of((704, 384))
    assert [round(flops / 1e12, 1) for flops in block_step_flops(PUBLISHED, geometry)] == [39.7, 81.1]
    assert decode_flops(VAEConfig(), geometry) == pytest.approx(27.5e12, rel=0.01)
    sink, block = prefill_flops(PUBLISHED, geometry), block_step_flops(PUBLISHED, geometry)
    assert sink[0] / block[0] == pytest.approx(2640**2 / (3168 * 15312))
    assert 0.78 < sink[1] / block[1] < 2640 / 3168  # no sound is injected


def test_times_grow_with_the_size_as_the_operations_do() -> None:
    small, large = bundled_times((512, 256)), bundled_times((1024, 512))  # four times the tokens
    square = small.attention_ms
    linear = small.step_ms[0] - square
    assert large.attention_ms == pytest.approx(16 * square)
    assert large.step_ms[0] - large.attention_ms == pytest.approx(4 * linear, rel=0.05)  # the rest is constant
    assert large.vae_ms == pytest.approx(4 * small.vae_ms, rel=0.03)  # the middle's attention is small


def test_the_first_blocks_of_a_session_are_shorter_by_the_empty_part_of_the_ring() -> None:
    times, stage = StageTimes((100.0,) * 4, 30.0, attention_ms=29.0), parse_plan("0+1+2+3+vae", ["cpu"]).stages[0]
    rows = [5.5, 8.5, 11.5, 14.5, 14.5]
    assert [times.block_ms(stage, n) for n in range(5)] == pytest.approx([430 - 4 * 29 * (1 - r / 14.5) for r in rows])
    assert times.block_ms(stage) == pytest.approx(430)


@pytest.mark.parametrize("fp8", ["", "products", "attention", "all"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_no_other_plan_that_fits_is_faster(count: int, fp8: str, seed: int) -> None:
    numbers = random.Random(seed)
    times = StageTimes(tuple(numbers.uniform(50, 200) for _ in range(4)), numbers.uniform(20, 300))
    machine = Machine.assumed(count, round(numbers.uniform(60, 200)) * GIB)
    task = Task((704, 384), fp8, numbers.randint(1, 2))
    every = [f for f in forecasts(machine, task, times) if max(map(total, f.memory)) <= machine.devices[0].memory]
    if not every:
        with pytest.raises(InputError, match="does not fit"):
            best_plan(machine, task, lambda task: times)
        return
    best = best_plan(machine, task, lambda task: times)
    assert best.fits and max(best.stage_ms) == pytest.approx(min(max(f.stage_ms) for f in every))
    assert best.fps == pytest.approx(12e3 / max(best.stage_ms))
    assert best.latency_s == pytest.approx(1e-3 * (sum(times.step_ms) + times.vae_ms + sum(best.handoffs_ms)))
    assert all(len(f.plan.stages) >= len(best.plan.stages) for f in every if max(f.stage_ms) == max(best.stage_ms))


def test_plans_of_the_published_line() -> None:
    plans = [str(best_plan(h100s(n), Task(fp8="all"), bundled).plan) for n in range(1, 7)]
    assert plans == ["0+1+2+3+vae", "0+1,2+3+vae", "0,1+2,3+vae", "0,1,2,3+vae", "0,1,2,3,vae", "0,1,2,3,vae"]


@pytest.mark.parametrize(
    ("count", "vae_ms", "plan"),
    [(7, 150.0, "0,1,2,3,vae1,vae2"), (6, 150.0, "0,1,2,3,vae1,vae2"), (5, 150.0, "0,1,2,3,vae"),
     (6, 100.0, "0,1,2,3,vae"), (4, 350.0, "0+1,2+3,vae1,vae2")],
)  # fmt: skip
def test_a_vae_that_is_slowest_is_split_where_that_helps(count: int, vae_ms: float, plan: str) -> None:
    times = StageTimes((100.0,) * 4, vae_ms, prime_ms=200.0, states={"vae_ms": MEASURED})
    best = best_plan(h100s(count), Task(fp8="all"), lambda task: times)
    assert str(best.plan) == plan
    assert str(balanced_plan(best.plan.devices, 4, vae_ms / 100)) == plan
    if best.plan.split:
        (first, second), stages = best.stage_ms[-2:], best.plan.stages[-2:]
        assert first + second == pytest.approx(vae_ms) and max(first, second) < 0.52 * vae_ms
        assert [times.state(stage) for stage in stages] == [ESTIMATE] * 2
        assert times.open_ms(stages[1]) == 200 and 0 < times.open_ms(stages[0]) < 100
        assert best.handoffs_ms[-1] > best.handoffs_ms[-2]


def test_the_cut_of_the_vae_is_where_the_larger_piece_is_smallest() -> None:
    for size in ((704, 384), (1280, 704), (256, 256)):
        flops = decode_step_flops(VAEConfig(), geometry_of(size))
        first = [sum(flops[: cut + 1]) / sum(flops) for cut in range(len(flops))]
        assert min(range(len(flops)), key=lambda cut: max(first[cut], 1 - first[cut])) == CUT
        assert (PIECES[FIRST], PIECES[SECOND]) == pytest.approx((first[CUT], 1 - first[CUT]), abs=0.01)


def test_a_slow_link_is_not_between_the_pieces_of_the_vae() -> None:
    count, task = 6, Task()
    links = [[SYSTEM if {i, j} == {4, 5} else PCIE for j in range(count)] for i in range(count)]
    machine = Machine(h100s(count).devices, tuple(map(tuple, links)))
    found = best_plan(machine, task, bundled, "0,1,2,3,vae1,vae2")
    assert found.machine.handoffs[-1] == PCIE and found.handoffs_ms[-1] == PCIE.handoff_ms(task.features_bytes)
    assert task.features_bytes == 2 * 3 * 4 * 192 * 192 * 352


def test_memory_grows_by_the_same_for_every_session_and_places_are_what_fits() -> None:
    for forecast in forecasts(h100s(3), Task(), bundled_times()):
        def needed(n: int, forecast: Any = forecast) -> float:
            task = Task(sessions=n)
            return max(total(stage_memory(s, task, first=not i)) for i, s in enumerate(forecast.plan.stages))

        places = forecast.places()
        assert needed(places + 1) > H100_MEMORY and (not places or needed(places) <= H100_MEMORY)


def test_what_would_fit_does_fit(seed: int) -> None:
    numbers, found = random.Random(seed), 0
    for _ in range(12):
        task = Task((64 * numbers.randint(8, 20), 64 * numbers.randint(6, 12)), "", numbers.randint(1, 4))
        machine = h100s(numbers.randint(1, 4))
        try:
            best_plan(machine, task, bundled)
            continue
        except InputError as error:
            told = str(error).partition("what would fit: ")[2]
        for change in filter(None, told.split(", or ")):
            found += 1
            name, value = change.split()
            changed = task
            if name == "--fp8":
                changed = replace(task, fp8=value)
            elif name == "--sessions":
                changed = replace(task, sessions=int(value))
            elif name == "--size":
                width, height = map(int, value.split("x"))
                changed = replace(task, size=(width, height))
            assert best_plan(h100s(int(value)) if name == "--gpus" else machine, changed, bundled).fits, told
    assert found


# -- links -------------------------------------------------------------------------------------------------------------


def test_the_order_keeps_handoffs_on_the_fastest_links(seed: int) -> None:
    numbers, size = random.Random(seed), 10**6
    for _ in range(20):
        count, wanted = numbers.randint(2, 6), 0
        links = [[NVLINK] * count for _ in range(count)]
        for i in range(count):
            for j in range(i):
                links[i][j] = links[j][i] = numbers.choice((NVLINK, PCIE, SYSTEM))
        machine = Machine(Machine.assumed(count, GIB).devices, tuple(map(tuple, links)))
        wanted = numbers.randint(1, count)
        least = min(
            sum(links[a][b].handoff_ms(size) for a, b in pairwise(order))
            for order in permutations(range(count), wanted)
        )
        picked = machine.pick([size] * (wanted - 1))
        assert len({device.name for device in picked.devices}) == wanted
        assert sum(link.handoff_ms(size) for link in picked.handoffs) == pytest.approx(least)


def fake_nvml(nvlink: set[tuple[int, int]], ancestors: dict[tuple[int, int], int], names: list[Any]) -> Any:
    nvml = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def p2p(a: int, b: int, what: int) -> int:
        if not nvlink:
            raise NVMLError("not supported")
        return 0 if (min(a, b), max(a, b)) in nvlink else 1

    nvml.__dict__.update(
        NVMLError=NVMLError, NVML_P2P_CAPS_INDEX_NVLINK=2, NVML_P2P_STATUS_OK=0, NVML_TOPOLOGY_HOSTBRIDGE=30,
        NVML_TOPOLOGY_NODE=40, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetName=lambda i: names[i], nvmlDeviceGetP2PStatus=p2p,
        nvmlDeviceGetMemoryInfo=lambda i: types.SimpleNamespace(total=80 * GIB),
        nvmlDeviceGetTopologyCommonAncestor=lambda a, b: ancestors.get((min(a, b), max(a, b)), 50),
    )
    return nvml


def test_a_machine_is_seen_through_nvml_and_planned_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvml = fake_nvml({(0, 2), (1, 3)}, {(0, 1): 30, (2, 3): 40}, [b"Quick GPU", "Quick GPU", "Quick GPU", "Quick GPU"])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine = look()
    assert machine is not None and machine.here and machine.devices[0].model == "Quick GPU"
    assert [link.name for link in machine.links[0]] == ["NVLink", "PCIe", "NVLink", "PCIe between CPU sockets"]
    assert machine.links[2][3].name == "PCIe within a NUMA node"
    assert main(["plan", "--gpus", "2", "--card", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["device"] for stage in found["stages"]] == ["cuda:0", "cuda:2"]
    assert "--devices cuda:0,cuda:2 --plan 0+1,2+3+vae" in found["commands"][0]
    assert main(["plan", "--fp8"]) == 0  # all of this machine's
    said = capsys.readouterr().out
    order = "cuda:2,cuda:0,cuda:1,cuda:3"
    assert order in said and "this machine has Quick GPU: measure its times" in said


def test_without_nvlink_and_without_nvml(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(set(), {(0, 1): 20}, ["A", "B"]))
    machine = look()
    assert machine is not None and machine.links[0][1].name == "PCIe"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert look() is None
    assert main(["plan"]) == 1
    assert "no GPU was found here" in capsys.readouterr().err


# -- the command and its files -----------------------------------------------------------------------------------------


def test_neither_planner_nor_simulator_imports_torch() -> None:
    code = (
        "import sys; from liverelay.engine.cli import main;"
        "main(['plan', '--gpus', '5']); main(['simulate', '--gpus', '5', '--seconds', '5']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plan_says_what_is_measured_and_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "6", "--fp8", "--card", "h100"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert re.search(r"^  3 +cuda:3 +146\.4 +\(measured\)", said, re.M)
    assert re.search(r"^  vae +cuda:4 +98\.2 +\(estimate\)", said, re.M)
    assert "speed        82.0 FPS, 3.28x real time (by the slowest stage, 0: measured)" in lines
    assert "3 live of 25 FPS by time, 3 by memory" in said
    assert "1 of 6 devices stay free" in said and "a split of the VAE would not help" in said
    assert any(line.startswith("run          torchrun --standalone --nproc-per-node 5 ") for line in lines)


def test_a_plan_that_does_not_fit_says_what_is_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "1", "--card", "h100"]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert not shown.out and "GiB of 79.2 on cuda:0 (weights 30.5, arenas" in line
    assert "what would fit: --fp8 attention, or --gpus 2, or --size" in line


def test_given_times_are_used_and_scaled_to_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"step_ms": [50, 60, 70, 80], "vae_ms": 100, "encode_ms": 500}))
    assert main(["plan", "--gpus", "5", "--fp8", "--times", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["ms"] for stage in found["stages"]] == [50, 60, 70, 80, 100]
    assert {stage["state"] for stage in found["stages"]} == {GIVEN} and found["fps"] == pytest.approx(120)
    opening = found["times"]["prefill_ms"] + sum([50, 60, 70, 80, 100]) + sum(found["handoffs_ms"]) + 500
    assert found["first_frame_after_opening_s"] == pytest.approx(1e-3 * opening)

    file.write_text(json.dumps({"step_ms": 100, "vae_ms": 40, "attention_ms": 30, "size": "512x256"}))
    assert read_times(file, (512, 256)).step_ms == (100,) * 4
    large = read_times(file, (1024, 512))
    assert large.step_ms[0] == pytest.approx(4 * 70 + 16 * 30) and large.attention_ms == pytest.approx(16 * 30)
    assert large.vae_ms == pytest.approx(160, rel=0.03) and large.states["step_ms"] == ESTIMATE


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--gpus 8 --times {file}", "2 of 8 devices stay free: 6 stages are all there are"),
        ("--gpus 6 --card h100", "a split of the VAE would not help, because a step takes longer (200 > 98 ms)"),
        ("--gpus 6 --times {file} --plan 0,1,2,3,vae", "1 of 6 devices stay free: the plan was given"),
    ],
)
def test_devices_that_stay_free_are_explained(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"step_ms": 50, "vae_ms": 100}))
    assert main(["plan", *flags.format(file=file).split()]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"), ("[1]", "table of times"), ('{"step_ms": 200}', "lacks vae_ms"),
        ('{"step_ms": [1, 2], "vae_ms": 3}', "2 times in step_ms"), ('{"step_ms": -2, "vae_ms": 3}', "= -2"),
        ('{"step_ms": 100, "vae_ms": NaN}', "vae_ms = NaN"), ('{"step_ms": 0, "vae_ms": 1}', "= 0"),
        ('{"step_ms": true, "vae_ms": 1}', "= true"), ('{"step_ms": 9, "vae_ms": 9, "x": 1}', "says 'x'"),
        ('{"step_ms": 9, "vae_ms": 9, "size": "10x10"}', "size = "),
        ('{"step_ms": 9, "vae_ms": 9, "attention_ms": 10}', "part of step_ms"),
    ],
)  # fmt: skip
def test_broken_times_are_refused_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "times.json"
    file.write_text(text)
    assert main(["plan", "--gpus", "2", "--times", str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and str(file) in line


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("--gpus 0", 2), ("--gpus nan", 2), ("--gpus 2 --size 100", 2), ("--gpus 2 --size 100x100", 1),
        ("--gpus 2 --sessions 100", 1), ("--gpus 2 --plan 0,1,2,3,vae", 1), ("--gpus 2 --plan 0+1,2", 1),
        ("--gpus 9999", 1), ("--gpus 2 --sessions 1001", 1), ("--gpus 2 --times missing.json", 1),
        ("--gpus 2 --memory 0", 2), ("--gpus 2 --card h300", 2), ("--gpus 3 --memory 10", 1),
    ],
)  # fmt: skip
def test_bad_input_to_plan_ends_in_one_line(flags: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["plan", *flags.split()]) == status == 1
    except SystemExit as end:
        assert end.code == status == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.splitlines()[-1].startswith("liverelay")
