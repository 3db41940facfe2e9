"""What the pipeline loses: stages that only wait, with handoffs as large as the 14B's, against one over their time.

`python -m bench.relay_efficiency` runs threads of this process and processes over gloo, with two and with five stages.
Every stage takes the same time, so an ideal line makes 1 / time blocks in a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from liverelay.engine.config import RankEnvironment, StreamConfig, leave
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.relay.group import Group
from liverelay.engine.relay.messages import Block
from liverelay.engine.relay.pipeline import Pipeline, local_pipeline
from liverelay.engine.relay.plan import Plan, balanced_plan
from liverelay.engine.relay.ranks import Leader, RankServer
from liverelay.engine.relay.stage import LineSpec, OnStep, Place, Stage
from liverelay.engine.telemetry import Telemetry

LATENT = (48, 88)  # of 704x384
AUDIO = (1, 25, 1024, 12)  # features of a block that travel with its latent


class WaitingStage(Stage):
    """Takes its time for a block and computes nothing."""

    def __init__(self, index: int, plan: Plan, spec: LineSpec, seconds: float) -> None:
        super().__init__(plan.stages[index], spec, None, None, torch.bfloat16)
        self.seconds = seconds

    def open(self, number: int, tensors: dict[str, torch.Tensor]) -> Place:
        return self.places.setdefault(number, Place(self))

    def denoise(self, number: int, block: Block, on_step: OnStep | None = None) -> None:
        time.sleep(self.seconds)


def make_spec() -> LineSpec:
    return LineSpec.make(Geometry(*LATENT, 128), StreamConfig(), AUDIO)


@contextlib.contextmanager
def line_of(plan: Plan, seconds: float, places: int, trace: Path | None) -> Iterator[Pipeline | None]:
    """The line in threads, or over the ranks that torchrun started; None in a rank that has served."""
    spec, ranks = make_spec(), RankEnvironment.read()
    watch = Telemetry(plan, trace=trace) if trace is not None and (ranks is None or not ranks.rank) else None
    options = {"places": places, "observe": None if watch is None else watch.observe}
    if ranks is None:
        stages = [WaitingStage(i, plan, spec, seconds) for i in range(len(plan.stages))]
        line = local_pipeline(plan, spec, stages, **options)
        yield line
        line.close()
        return _end(watch)
    group = Group(ranks, "gloo")
    if ranks.rank:
        RankServer(group, plan, lambda spec: WaitingStage(ranks.rank, plan, spec, seconds)).run()
        yield None
        return
    leader = Leader(group, plan)
    yield leader.build(spec, WaitingStage(0, plan, spec, seconds), **options)
    leader.close()
    _end(watch)


def _end(watch: Telemetry | None) -> None:
    if watch is not None:
        watch.close()


def blocks_per_s(line: Pipeline, blocks: int, sessions: int) -> float:
    """Between the first and the last result of sessions that always have blocks waiting."""
    h, w = LATENT
    given = {"reference": torch.zeros(16, 1, h, w), "motion": torch.zeros(16, 19, h, w)}
    serials = [line.open(given) for _ in range(sessions)]
    parts = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in line.spec.parcel.items()}
    futures = [line.request(serial, block, parts, (4, 4, 4, 4)) for block in range(blocks) for serial in serials]
    futures[0].result()
    started = time.perf_counter()
    for future in futures:
        future.result()
    rate = (len(futures) - 1) / (time.perf_counter() - started)
    for serial in serials:
        line.close_session(serial)
    return rate


def measure(
    stages: int, transport: str, ms: float, blocks: int, *, sessions: int = 1, trace: Path | None = None
) -> dict[str, Any]:
    """One line's rate and its share of the ideal one."""
    if transport == "gloo" and RankEnvironment.read() is None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(stages), "-m",
                   "bench.relay_efficiency", "--stages", str(stages), "--transports", "gloo", "--ms", str(ms),
                   "--blocks", str(blocks), "--sessions", str(sessions), *(["--trace", str(trace)] if trace else [])]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        return json.loads(run.stdout.splitlines()[-1])[0]
    plan = balanced_plan(["cpu"] * stages, 4, 1.0)
    with line_of(plan, ms / 1e3, sessions, trace) as line:
        if line is None:
            return {}
        rate = blocks_per_s(line, blocks, sessions)
    size = sum(torch.Size(shape).numel() for shape in line.spec.parcel.values()) * 2
    return {"stages": stages, "transport": transport, "stage_ms": ms, "blocks": blocks, "handoff_bytes": size,
            "blocks_per_s": round(rate, 3), "efficiency": round(rate * ms / 1e3, 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default="2,5")
    parser.add_argument("--transports", default="local,gloo")
    parser.add_argument("--ms", type=float, default=50.0, help="that each stage takes for a block")
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="of the last line (see liverelay timeline)")
    a = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rows = [measure(int(stages), transport, a.ms, a.blocks, sessions=a.sessions, trace=a.trace)
            for transport in a.transports.split(",") for stages in a.stages.split(",")]  # fmt: skip
    ranks = RankEnvironment.read()
    if ranks is None:
        for row in rows:
            print(f"{row['stages']} stages, {row['transport']:5s}: {row['blocks_per_s']:.2f} blocks/s, "
                  f"{100 * row['efficiency']:.1f}% of 1 / {row['stage_ms']:g} ms, "
                  f"handoffs of {row['handoff_bytes'] / 1e3:.0f} KB")  # fmt: skip
    if ranks is None or ranks.rank == 0:
        print(json.dumps(rows))
    if ranks is not None:
        leave(0)


if __name__ == "__main__":
    main()
