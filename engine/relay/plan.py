"""Which device does which part of a block's work: the stages of a pipeline, in order. Pure Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from liverelay.engine.errors import InputError

DECODE = "vae"


@dataclass(frozen=True)
class StagePlan:
    """One stage: neighbouring denoising steps, whether it decodes the clean latent, and its device."""

    steps: tuple[int, ...]
    decode: bool
    device: str

    @property
    def name(self) -> str:
        """`0+1`, `3+vae`, `vae`: unique within a plan."""
        return "+".join([*map(str, self.steps), *([DECODE] if self.decode else [])])


@dataclass(frozen=True)
class Plan:
    """Stages in the order of the line. InputError unless they hold every step once, in order, and the VAE last."""

    stages: tuple[StagePlan, ...]

    def __post_init__(self) -> None:
        steps = [step for stage in self.stages for step in stage.steps]
        decodes = [stage.decode for stage in self.stages]
        if not self.stages or steps != list(range(len(steps))) or not steps:
            raise InputError(f"the stages {self} do not hold the steps 0, 1, ... in order")
        if sum(decodes) != 1 or not decodes[-1] or any(not (stage.steps or stage.decode) for stage in self.stages):
            raise InputError(f"the stages {self} do not end with the {DECODE}, once")

    def __str__(self) -> str:
        return ",".join(stage.name for stage in self.stages)

    @property
    def steps(self) -> int:
        return sum(len(stage.steps) for stage in self.stages)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(stage.device for stage in self.stages)


def parse_plan(text: str, devices: Sequence[str]) -> Plan:
    """A plan from `0+1,2+3,vae`, a stage for each device in order. InputError for what is no plan."""
    names = text.split(",")
    if len(names) != len(devices):
        raise InputError(f"the plan {text} has {len(names)} stages for {len(devices)} devices; give one for each")
    stages = []
    for name, device in zip(names, devices, strict=True):
        parts = name.split("+")
        decode = parts[-1] == DECODE
        steps = parts[:-1] if decode else parts
        if not all(re.fullmatch(r"\d+", step) for step in steps):
            raise InputError(f"'{name}' is no stage; a stage is steps and {DECODE}, as in 0+1,2+3+{DECODE}")
        stages.append(StagePlan(tuple(map(int, steps)), decode, device))
    return Plan(tuple(stages))


def balanced_plan(devices: Sequence[str], steps: int, vae_share: float) -> Plan:
    """The split of the steps and the VAE over the devices whose slowest stage is fastest.

    vae_share: time of decoding a block, in block-steps. Of equal splits the one with the fewest stages on the way of
    a block is taken; devices that nothing is left for stay out of it.
    """
    if not devices:
        raise InputError("a plan needs at least one device")
    costs = [1.0] * steps + [vae_share]
    best: tuple[float, list[list[int]]] | None = None
    for count in range(1, min(len(devices), len(costs)) + 1):
        for cut in cuts(len(costs), count):
            slowest = max(sum(costs[i] for i in part) for part in cut)
            if best is None or slowest < best[0] - 1e-9:
                best = (slowest, cut)
    assert best is not None
    return plan_of(best[1], steps, devices)


def plan_of(cut: Sequence[Sequence[int]], steps: int, devices: Sequence[str]) -> Plan:
    """A plan from a cut of the steps and the VAE, which is the last piece of work."""
    stages = [
        StagePlan(tuple(i for i in part if i < steps), steps in part, device)
        for part, device in zip(cut, devices, strict=False)
    ]
    return Plan(tuple(stages))


def cuts(length: int, count: int) -> list[list[list[int]]]:
    """All ways to cut range(length) into `count` pieces that are not empty."""
    if count == 1:
        return [[list(range(length))]]
    found = []
    for first in range(1, length - count + 2):
        for rest in cuts(length - first, count - 1):
            found.append([list(range(first)), *[[first + i for i in part] for part in rest]])
    return found
