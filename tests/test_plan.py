"""Plans: what is one, what is refused, and the split that makes the slowest stage fastest."""

from __future__ import annotations

import pytest
import torch

from liverelay.engine.devices import numbered
from liverelay.engine.errors import InputError
from liverelay.engine.relay.plan import Plan, StagePlan, balanced_plan, parse_plan


@pytest.mark.parametrize(
    "text",
    ["0+1+2+3+vae", "0,1,2,3,vae", "0+1,2+3,vae", "0+1+2,3+vae", "0,1,2,3,vae1,vae2", "0+1,2+3+vae1,vae2"],
)
def test_a_plan_is_read_and_written(text: str) -> None:
    devices = [f"cuda:{n}" for n in range(text.count(",") + 1)]
    plan = parse_plan(text, devices)
    assert str(plan) == text and plan.devices == tuple(devices) and plan.steps == 4


@pytest.mark.parametrize(
    "text", ["", "vae", "0+1+2+3", "1,0,vae", "0,0+1,vae", "0+vae,1+vae", "0+1,3+vae", "vae+0,1", "0,,vae", "0;1,vae"]
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_plan(text, ["cpu"] * (text.count(",") + 1))


@pytest.mark.parametrize(
    "text",
    ["0+1,2+3,vae2", "0+1,2+3+vae1", "0+1,2+3,vae2,vae1", "0+1,2+vae1,3+vae2", "vae1,0+1,vae2", "0+1,vae,vae1,vae2",
     "0+1,vae1,vae1,vae2", "0+1,vae1+vae2", "0+1,vae3"],
)  # fmt: skip
def test_the_pieces_of_a_vae_are_neighbours_in_order(text: str) -> None:
    with pytest.raises(InputError, match=r"vae1(,| and )vae2") as refused:
        parse_plan(text, ["cpu"] * (text.count(",") + 1))
    assert "\n" not in str(refused.value)


def test_a_stage_for_each_device_is_wanted() -> None:
    with pytest.raises(InputError, match="2 stages for 3 devices"):
        parse_plan("0+1,2+3+vae", ["cpu"] * 3)
    with pytest.raises(InputError, match="in order"):
        Plan((StagePlan((1,), "vae", "cpu"),))


@pytest.mark.parametrize(
    ("count", "share", "text"),
    [
        (1, 0.5, "0+1+2+3+vae"), (2, 0.5, "0+1,2+3+vae"), (3, 0.5, "0,1+2,3+vae"), (5, 0.5, "0,1,2,3,vae"),
        (4, 0.0, "0,1,2,3+vae"), (7, 0.5, "0,1,2,3,vae"), (2, 3.0, "0+1+2+3,vae"), (5, 3.0, "0+1,2+3,vae1,vae2"),
    ],
)  # fmt: skip
def test_the_slowest_stage_is_as_fast_as_can_be(count: int, share: float, text: str) -> None:
    plan = balanced_plan([str(n) for n in range(count)], 4, share)
    slowest = max(len(stage.steps) + share * stage.vae_share for stage in plan.stages)
    expected = parse_plan(text, [str(n) for n in range(text.count(",") + 1)])
    assert slowest == max(len(stage.steps) + share * stage.vae_share for stage in expected.stages)
    assert len(plan.stages) == len(expected.stages)


def test_a_gpu_without_a_number_is_the_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for name, number in (("cuda", 2), ("cuda:0", 0), ("cuda:1", 1)):
        assert numbered(name) == torch.device("cuda", number)
    assert numbered("cpu") == torch.device("cpu")
