"""Which device does which part of a block's work: the stages of a pipeline, in order. Pure Python."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from liverelay.engine.errors import InputError
from liverelay.engine.models.vae_config import FIRST, PIECES, SECOND, WHOLE


@dataclass(frozen=True)
class StagePlan:
    """One stage: neighbouring denoising steps, which piece of the VAE's decoder it has (or ""), and its device."""

    steps: tuple[int, ...]
    decode: str
    device: str

    @property
    def work(self) -> list[str]:
        return [*map(str, self.steps), *([self.decode] if self.decode else [])]

    @property
    def name(self) -> str:
        """`0+1`, `3+vae`, `vae`: unique within a plan."""
        return "+".join(self.work)

    @property
    def vae_share(self) -> float:
        """Its part of decoding a block."""
        return PIECES.get(self.decode, 0.0)

    @property
    def makes_video(self) -> bool:
        return self.decode in (WHOLE, SECOND)


@dataclass(frozen=True)
class Plan:
    """Stages in the order of the line. InputError unless they hold every step once, in order, and then the VAE: whole,
    or its two pieces in two stages."""

    stages: tuple[StagePlan, ...]

    def __post_init__(self) -> None:
        steps = [step for stage in self.stages for step in stage.steps]
        work, order = [part for stage in self.stages for part in stage.work], [str(step) for step in steps]
        if not self.stages or steps != list(range(len(steps))) or not steps:
            raise InputError(f"the stages {self} do not hold the steps 0, 1, ... in order")
        if work not in ([*order, WHOLE], [*order, FIRST, SECOND]) or not all(stage.work for stage in self.stages):
            raise InputError(f"the stages {self} do not end with the {WHOLE}, once: whole, or as {FIRST} and {SECOND}")

    def __str__(self) -> str:
        return ",".join(stage.name for stage in self.stages)

    @property
    def steps(self) -> int:
        return sum(len(stage.steps) for stage in self.stages)

    @property
    def split(self) -> bool:
        """Whether the VAE is in two stages."""
        return self.stages[-1].decode == SECOND

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
        decode = parts[-1] if parts[-1] in PIECES else ""
        steps = parts[:-1] if decode else parts
        if not all(re.fullmatch(r"\d+", step) for step in steps):
            raise InputError(
                f"'{name}' is no stage; a stage is steps and {WHOLE}, or one piece of that, as in 0+1,2+3+{WHOLE} and "
                f"0+1,2+3+{FIRST},{SECOND}"
            )
        stages.append(StagePlan(tuple(map(int, steps)), decode, device))
    return Plan(tuple(stages))


def balanced_plan(devices: Sequence[str], steps: int, vae_share: float) -> Plan:
    """The split of the steps and the VAE over the devices whose slowest stage is fastest.

    vae_share: time of decoding a block, in block-steps. Of equal splits the one with the fewest stages on the way of
    a block is taken; devices that nothing is left for stay out of it.
    """
    if not devices:
        raise InputError("a plan needs at least one device")
    best: tuple[float, Plan] | None = None
    for count in range(1, len(devices) + 1):
        for plan in (*plans(devices[:count], steps), *plans(devices[:count], steps, split=True)):
            slowest = max(len(stage.steps) + vae_share * stage.vae_share for stage in plan.stages)
            if best is None or slowest < best[0] - 1e-9:
                best = (slowest, plan)
    assert best is not None
    return best[1]


def plans(devices: Sequence[str], steps: int, *, split: bool = False) -> Iterator[Plan]:
    """Every plan with a stage for each device; split: those with the VAE in two stages."""
    work = [*map(str, range(steps)), *([FIRST, SECOND] if split else [WHOLE])]
    for cut in cuts(len(work), len(devices)):
        if not split or len(cut[-1]) == 1:
            yield parse_plan(",".join("+".join(work[i] for i in part) for part in cut), devices)


def cuts(length: int, count: int) -> list[list[list[int]]]:
    """All ways to cut range(length) into `count` pieces that are not empty."""
    if count == 1:
        return [[list(range(length))]]
    found = []
    for first in range(1, length - count + 2):
        for rest in cuts(length - first, count - 1):
            found.append([list(range(first)), *[[first + i for i in part] for part in rest]])
    return found
