"""A line of stages of equal time makes nearly one block in that time: handoffs as large as the 14B's hide behind it."""

from __future__ import annotations

import pytest

from bench.relay_efficiency import measure

TRIES = 3  # other processes of a shared machine cost more than the pipeline does


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
