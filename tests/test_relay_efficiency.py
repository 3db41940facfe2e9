"""A line of stages of equal time makes nearly one block in that time: handoffs as large as the 14B's hide behind it."""

from __future__ import annotations

import pytest

from bench.relay_efficiency import WaitingStage, blocks_per_s, line_of, measure
from liverelay.engine.relay.plan import balanced_plan

TRIES = 3  # other processes of a shared machine cost more than the pipeline does


def test_every_stage_works_on_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        WaitingStage, "denoise", lambda self, number, block, on_step=None: worked.append((self.plan.name, block.block))
    )
    plan = balanced_plan(["cpu"] * 2, 4, 1.0)
    with line_of(plan, 0.0, 1, None) as line:
        assert line is not None
        blocks_per_s(line, 7, 1)
    assert sorted(worked) == [(stage.name, block) for stage in plan.stages for block in range(7)]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["local", "gloo"])
@pytest.mark.parametrize("stages", [2, 5])
def test_a_line_works_at_the_pace_of_its_slowest_stage(stages: int, transport: str) -> None:
    found = []
    for _ in range(TRIES):
        found.append(measure(stages, transport, ms=100, blocks=200)["efficiency"])
        if found[-1] >= 0.97:
            break
    assert 0.97 <= found[-1] <= 1, found
