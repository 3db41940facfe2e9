"""The simulator against runs of the real line: stages that only wait, and a tiny model by its own telemetry."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from liverelay.engine.config import StreamConfig
from liverelay.engine.engine import Engine
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.relay.messages import Block, Event
from liverelay.engine.relay.pipeline import Pipeline, local_pipeline
from liverelay.engine.relay.plan import StagePlan, parse_plan
from liverelay.engine.relay.simulator import Outcome, Visit
from liverelay.engine.relay.stage import LineSpec, Stage
from liverelay.engine.relay.times import StageTimes
from liverelay.engine.telemetry import Telemetry
from tests.rollout_twin import Wanted, random_block
from tests.simulated import run


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> Iterator[tuple[Engine, LineSpec]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = Engine.load(checkpoint, device="cpu", dtype=torch.float32, stream=StreamConfig())
    config, geometry = engine.dit.config, Geometry(8, 8, engine.dit.config.head_dim)
    audio = (1, config.audio_states, config.audio_dim, engine.stream.block_frames)
    yield engine, LineSpec.make(geometry, engine.stream, audio, vae=engine.vae.config)
    torch.set_num_threads(before)


class Pretender(Stage):
    """A stage whose work is to wait as long as it is told to."""

    times = StageTimes((0.0,) * 4, 0.0)

    def open(self, number: int, tensors: Any) -> Any:
        time.sleep(1e-3 * self.times.open_ms(self.plan))

    def prepare_sink(self, number: int, reference: Any) -> None:
        time.sleep(1e-3 * self.times.sink_ms(self.plan))
        self.shadow_of = number

    def denoise(self, number: int, block: Block, on_step: Any = None) -> None:
        time.sleep(1e-3 * self.times.block_ms(StagePlan(self.plan.steps, "", ""), block.block))

    def decode(self, number: int, block: int) -> torch.Tensor:
        time.sleep(1e-3 * self.times.vae_ms * self.plan.vae_share)
        return torch.zeros(1, 1, 1, 3, dtype=torch.uint8)


def real_run(line: Pipeline, blocks: int, sessions: list[tuple[Any, Wanted]]) -> list[list[float]]:
    """Seconds at which each session's blocks were there; every session asks ahead like `Session.frames`."""
    begun, serials = time.perf_counter(), []
    finished: list[list[float]] = [[] for _ in sessions]

    def come(given: Any, block: Wanted) -> Iterator[Any]:
        serial, tensors = line.open(given), {"latent": block.noise, "audio": block.audio}
        serials.append(serial)
        for number in range(blocks):
            yield line.request(serial, number, tensors, block.distances)

    def drive(times: list[float], wanted: list[Any], more: Iterator[Any]) -> None:
        while wanted:
            wanted.pop(0).result(timeout=60)
            times.append(time.perf_counter() - begun)
            wanted += itertools.islice(more, 1)

    comers = [come(*session) for session in sessions]
    asked = [list(itertools.islice(more, line.depth)) for more in comers]
    threads = [threading.Thread(target=drive, args=given) for given in zip(finished, asked, comers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for serial in serials:
        line.close_session(serial)
    return finished


def tensors_of(parts: tuple[Engine, LineSpec], rng: torch.Generator) -> tuple[Any, Wanted]:
    engine, spec = parts
    given = {"text": torch.randn(7, engine.dit.config.text_dim, generator=rng)}
    given |= {"reference": torch.randn(16, 1, 8, 8, generator=rng), "motion": torch.randn(16, 19, 8, 8, generator=rng)}
    return given, random_block(spec, rng)


def close_to(real: list[list[float]], simulated: list[Outcome]) -> dict[str, tuple[float, float]]:
    """Real and simulated: blocks in a second of all sessions, seconds to the first frame of the first and last one."""
    ends = sorted(t for times in real for t in times), sorted(t for o in simulated for t in o.finished_s)
    half = len(ends[0]) // 4
    rates = [(len(each) - 1 - half) / (each[-1] - each[half]) for each in ends]
    firsts = [[times[0] for times in each] for each in (real, [o.finished_s for o in simulated])]
    first, last = [min(each) for each in firsts], [max(each) for each in firsts]
    return {name: (pair[0], pair[1]) for name, pair in (("rate", rates), ("first", first), ("last", last))}


CASES = [
    ("0+1,2+3+vae", 1, (9, 12, 8, 14), 20), ("0,1,2,3,vae", 2, (24, 15, 30, 18), 21),
    ("0,1+2,3,vae", 3, (30, 9, 12, 25), 35), ("0,1,2,3,vae1,vae2", 1, (20, 15, 20, 18), 60),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sessions", "steps", "vae"), CASES, ids=[case[0] for case in CASES])
def test_a_real_line_of_waits_goes_as_simulated(
    parts: tuple[Engine, LineSpec], rng: torch.Generator, text: str, sessions: int, steps: tuple[int, ...], vae: int
) -> None:
    (engine, spec), blocks = parts, 60 // sessions + 20
    for slower in (1.0, 2.0, 4.0):  # somebody else may have had the machine: then its share is made smaller
        ms = [slower * each for each in (*steps, vae)]
        times = StageTimes(tuple(ms[:4]), ms[4], slower * 30, slower * 60, attention_ms=slower * 5)
        _, simulated, _ = run(text, times, [Visit(0, blocks)] * sessions)
        plan = parse_plan(text, ["cpu"] * (text.count(",") + 1))
        stages = [Pretender(part, spec, engine.dit, engine.vae, torch.float32) for part in plan.stages]
        for stage in stages:
            stage.times = times
        line = local_pipeline(plan, spec, stages, places=sessions)
        found = close_to(real_run(line, blocks, [tensors_of(parts, rng) for _ in range(sessions)]), simulated)
        line.close()
        print(found)
        if all(abs(real - ours) <= 0.1 * ours for real, ours in found.values()):
            return
    pytest.fail(str(found))


@dataclass(frozen=True)
class Told(StageTimes):
    """What a run's telemetry says: milliseconds by stage and block, and of openings and sinks by stage."""

    blocks: dict[tuple[str, int], float] = field(default_factory=dict)
    others: dict[tuple[str, str], float] = field(default_factory=dict)

    def block_ms(self, stage: StagePlan, block: int = 10) -> float:
        """The reference is told of when the steps are done; how much of a stage they take is not."""
        found = self.blocks.get((stage.name, block))
        return 0.6 * self.blocks[f"{stage.name}+vae", block] if found is None else found

    def open_ms(self, stage: StagePlan) -> float:
        return self.others[stage.name, "open"]

    def sink_ms(self, stage: StagePlan) -> float:
        return self.others[stage.name, "prepare_sink"]


def told(file: Path, others: dict[tuple[str, str], list[float]]) -> Told:
    """Means over the sessions. The last stage has nobody to wait for: what follows its work is telling the leader."""
    blocks: dict[tuple[str, int], list[float]] = {}
    for record in map(json.loads, file.read_text().splitlines()):
        if "compute_ms" in record:
            ms = record["compute_ms"] + (record["wait_out_ms"] if record["stage"].endswith("vae") else 0.0)
            blocks.setdefault((record["stage"], record["block"]), []).append(ms)
    means = [{key: sum(ms) / len(ms) for key, ms in each.items()} for each in (blocks, others)]
    return Told((1.0,) * 4, 1.0, blocks=means[0], others=means[1])  # type: ignore[arg-type]


def watch(stage: Stage, name: str, seen: dict[tuple[str, str], list[float]]) -> None:
    """Note how many milliseconds a stage's method takes."""
    work = getattr(stage, name)

    def timed(*arguments: Any) -> Any:
        begun = time.perf_counter()
        result = work(*arguments)
        seen.setdefault((stage.plan.name, name), []).append(1e3 * (time.perf_counter() - begun))
        return result

    setattr(stage, name, timed)


@pytest.mark.slow
@pytest.mark.parametrize("sessions", [1, 2])
def test_a_real_model_goes_as_its_own_stage_times_say(
    parts: tuple[Engine, LineSpec], rng: torch.Generator, sessions: int, tmp_path: Path
) -> None:
    """Two stages with one thread each. What they took, waits for a busy core included, is simulated."""
    engine, spec = parts
    text, blocks, file = "0+1,2+3+vae", 60 // sessions, tmp_path / "telemetry.jsonl"
    for left in (3, 2, 1, 0):
        plan = parse_plan(text, ["cpu"] * 2)
        events: list[Event] = []
        others: dict[tuple[str, str], list[float]] = {}
        stages = [Stage(part, spec, engine.dit, engine.vae, torch.float32) for part in plan.stages]
        for stage in stages:
            watch(stage, "open", others)
            watch(stage, "prepare_sink", others)
        line = local_pipeline(plan, spec, stages, places=sessions, observe=events.append)
        real_run(line, 5, [tensors_of(parts, rng) for _ in range(sessions)])  # what is slow once is done
        events.clear()
        others.clear()
        real = real_run(line, blocks, [tensors_of(parts, rng) for _ in range(sessions)])
        line.close()
        telemetry = Telemetry(plan, lines=file)
        for event in events:
            telemetry.observe(event)
        telemetry.close()
        _, simulated, _ = run(text, told(file, others), [Visit(0, blocks)] * sessions)
        found = close_to(real, simulated)
        print(found)
        if all(abs(mine - ours) <= 0.1 * ours for mine, ours in found.values()):
            return
        assert left, found
