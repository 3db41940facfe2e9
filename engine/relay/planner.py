"""Which plan is best for some devices: its speed, its memory, what would fit where it does not. Pure Python, no torch.

Speed comes from times of the parts (relay/times.py): a line makes a block as often as its slowest stage can. Memory is
counted from the shapes of the published 14B model in bfloat16; what a library takes by itself is an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from liverelay.engine.config import StreamConfig
from liverelay.engine.errors import InputError
from liverelay.engine.models.sizes import (
    AUDIO_PARAMETERS,
    PUBLISHED,
    TEXT_PARAMETERS,
    arena_bytes,
    dit_bytes,
    dit_shapes,
    fp8_shapes,
    text_bytes,
    vae_bytes,
    vae_cache_bytes,
    vae_work_bytes,
    workspace_bytes,
)
from liverelay.engine.models.vae_config import FIRST, SECOND, VAEConfig, expected_shapes
from liverelay.engine.relay.dispatch import BUFFERS
from liverelay.engine.relay.links import GIB, Machine
from liverelay.engine.relay.plan import Plan, StagePlan, parse_plan, plans
from liverelay.engine.relay.scheduler import FULL_LOAD
from liverelay.engine.relay.times import StageTimes, geometry_of

ELEMENT = 2  # bytes: bfloat16
RESERVE = 2 * GIB  # an estimate: CUDA's context, work space of libraries, captured graphs, the allocator's gaps
FP8_WORDS = ("products", "attention", "all")
MOST_SESSIONS = 1000
STREAM = StreamConfig()


@dataclass(frozen=True)
class Task:
    """What a line is to do. size (width, height); fp8: a word of FP8_WORDS or ""; sessions that memory is kept for."""

    size: tuple[int, int] = (704, 384)
    fp8: str = ""
    sessions: int = 1

    @property
    def handoff_bytes(self) -> int:
        """Of a parcel: the latent of a block and the sound's features."""
        geometry, config = geometry_of(self.size), PUBLISHED
        latent = config.in_channels * geometry.frames_per_block * geometry.latent_h * geometry.latent_w
        return ELEMENT * (latent + config.audio_states * config.audio_dim * STREAM.block_frames)

    @property
    def features_bytes(self) -> int:
        """Of what the first piece of a VAE hands to the second."""
        geometry = geometry_of(self.size)
        return ELEMENT * prod(VAEConfig().handoff(geometry.frames_per_block, geometry.latent_h, geometry.latent_w))

    def handoffs(self, stages: int, *, split: bool) -> list[int]:
        """Bytes from each stage to the next."""
        sizes = [self.handoff_bytes] * (stages - 1)
        return [*sizes[1:], self.features_bytes] if split else sizes


TimesOf = Callable[[Task], StageTimes]


def stage_memory(stage: StagePlan, task: Task, *, first: bool) -> dict[str, int]:
    """Bytes that a stage needs on its device, by what for. first: it encodes sound and prompts, too."""
    geometry, config, vae = geometry_of(task.size), PUBLISHED, VAEConfig()
    products, attention = task.fp8 in ("products", "all"), task.fp8 in ("attention", "all")
    memory = {"weights": 0, "arenas": 0, "workspace": RESERVE, "vae": 0, "encoders": 0}
    if stage.steps:
        memory["weights"] = dit_bytes(fp8_shapes(config) if products else dit_shapes(config), ELEMENT)
        arena = arena_bytes(config, geometry, ELEMENT, fp8=attention)
        memory["arenas"] = task.sessions * (len(stage.steps) * arena + text_bytes(config, ELEMENT))
        memory["workspace"] += workspace_bytes(config, geometry, ELEMENT, fp8=products, fp8_attention=attention)
        memory["workspace"] += arena_bytes(config, geometry, ELEMENT, fp8=attention, sink_only=True)
    if stage.decode:
        memory["vae"] = vae_bytes(expected_shapes(vae), ELEMENT) + vae_work_bytes(vae, geometry)
        memory["vae"] += task.sessions * vae_cache_bytes(vae, geometry, ELEMENT, stage.decode)
    if stage.decode in (FIRST, SECOND):
        memory["vae"] += (BUFFERS + 1) * task.features_bytes
    if stage.decode == SECOND:  # a first piece's cache, to warm sessions up with
        memory["vae"] += vae_cache_bytes(vae, geometry, ELEMENT, FIRST)
    if first:
        memory["encoders"] = ELEMENT * (AUDIO_PARAMETERS + TEXT_PARAMETERS)
    return memory


@dataclass(frozen=True)
class Forecast:
    """A plan with what is expected of it. handoffs_ms: from each stage to the next."""

    plan: Plan
    task: Task
    times: StageTimes
    machine: Machine
    handoffs_ms: tuple[float, ...] = ()
    memory: tuple[dict[str, int], ...] = field(default=())

    @classmethod
    def make(cls, plan: Plan, task: Task, times: StageTimes, machine: Machine) -> Forecast:
        """machine: the plan's devices, in its order."""
        memory = tuple(stage_memory(stage, task, first=not i) for i, stage in enumerate(plan.stages))
        sizes = task.handoffs(len(plan.stages), split=plan.split)
        handoffs = tuple(link.handoff_ms(size) for link, size in zip(machine.handoffs, sizes, strict=True))
        return cls(plan, task, times, machine, handoffs, memory)

    @cached_property
    def stage_ms(self) -> tuple[float, ...]:
        return tuple(self.times.block_ms(stage) for stage in self.plan.stages)

    @property
    def blocks_per_s(self) -> float:
        return 1e3 / max(self.stage_ms)

    @property
    def fps(self) -> float:
        return self.blocks_per_s * STREAM.block_frames

    @property
    def latency_s(self) -> float:
        """Of a block on a line that has nothing else to do, with a full ring."""
        return 1e-3 * (sum(self.stage_ms) + sum(self.handoffs_ms))

    def first_frame_s(self, *, opened: bool) -> float:
        """Until a session's first block is there; opened: the session was before its sound came."""
        now = 0.0
        for stage, handoff in zip(self.plan.stages, (0.0, *self.handoffs_ms), strict=True):
            ready = 0.0 if opened else self.times.open_ms(stage)
            now = max(now + handoff, ready) + self.times.block_ms(stage, 0)
        return 1e-3 * (now if opened else now + self.times.encode_ms)

    def live_sessions(self, fps: float = STREAM.fps) -> int:
        """How many sessions of this rate the line has time for."""
        return int(FULL_LOAD * self.fps / fps + 1e-9)

    def places(self) -> int:
        """How many sessions there is memory for; 0: not even one."""
        most = MOST_SESSIONS
        for (i, stage), device in zip(enumerate(self.plan.stages), self.machine.devices, strict=True):
            none, one = (total(stage_memory(stage, replace(self.task, sessions=n), first=not i)) for n in (0, 1))
            most = min(most, max(0, device.memory - none) // (one - none))
        return most

    @property
    def overflow(self) -> float:
        """Needed memory by what there is, of the fullest device: above 1 the plan does not fit."""
        return max(total(m) / device.memory for m, device in zip(self.memory, self.machine.devices, strict=True))

    @property
    def fits(self) -> bool:
        return self.overflow <= 1.0


def total(memory: dict[str, int]) -> int:
    """All of a stage's memory."""
    return sum(memory.values())


def forecasts(machine: Machine, task: Task, times: StageTimes) -> Iterator[Forecast]:
    """Every plan on 1, 2, ... of the devices; more than the steps and two for the VAE have nothing to do."""
    steps = len(times.step_ms)
    for count in range(1, min(len(machine.devices), steps + 2) + 1):
        for split in (False, True)[:count]:  # one device has no two stages
            picked = machine.pick(task.handoffs(count, split=split))
            names = [device.name for device in picked.devices]
            for plan in plans(names, steps, split=split):
                yield Forecast.make(plan, task, times, picked)


def best_plan(machine: Machine, task: Task, times_of: TimesOf, plan: str | None = None) -> Forecast:
    """The fastest plan that fits, or the one that is asked for; of equal ones the one with the fewest stages.

    InputError says what would fit, or what is wrong with the plan.
    """
    times = times_of(task)
    if plan is None:
        found = list(forecasts(machine, task, times))
    else:
        count = plan.count(",") + 1
        if count > len(machine.devices):
            raise InputError(f"the plan {plan} has {count} stages for {len(machine.devices)} devices; give more --gpus")
        picked = machine.pick(task.handoffs(count, split=plan.endswith(SECOND)))
        parsed = parse_plan(plan, [device.name for device in picked.devices])
        if parsed.steps != len(times.step_ms):
            raise InputError(f"the plan {plan} has {parsed.steps} steps, the schedule {len(times.step_ms)}")
        found = [Forecast.make(parsed, task, times, picked)]
    fitting = [forecast for forecast in found if forecast.fits]
    if not fitting:
        least = min(found, key=lambda f: f.overflow)
        raise InputError(_refusal(least, machine, task, times_of, given=plan is not None))
    return min(fitting, key=lambda f: (round(max(f.stage_ms), 6), len(f.plan.stages)))


def _refusal(least: Forecast, machine: Machine, task: Task, times_of: TimesOf, *, given: bool) -> str:
    """What is too large in the plan that needs least, and every single change that would make one fit."""
    needs = [total(memory) / device.memory for memory, device in zip(least.memory, machine.devices, strict=False)]
    worst = needs.index(max(needs))
    memory, stage = least.memory[worst], least.plan.stages[worst]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items() if size)
    capacity = least.machine.devices[worst].memory
    asked = "" if given else ", which needs least"
    said = (
        f"it does not fit: with the plan {least.plan}{asked}, stage {stage.name} takes "
        f"{total(memory) / GIB:.1f} GiB of {capacity / GIB:.1f} on {stage.device} ({parts})"
    )
    changes = [change for change in _changes(machine, task, times_of) if change]
    return f"{said}; " + (
        f"what would fit: {', or '.join(changes)}" if changes else _together(machine, task, times_of)
    )


def _changes(machine: Machine, task: Task, times_of: TimesOf) -> Iterator[str]:
    def fits(changed: Task, devices: Machine = machine) -> bool:
        return any(forecast.fits for forecast in forecasts(devices, changed, times_of(changed)))

    wider = [word for word in FP8_WORDS if not task.fp8 or word == "all" != task.fp8]
    yield next((f"--fp8 {word}" for word in wider if fits(replace(task, fp8=word))), "")
    if task.sessions > 1:
        most = max((f.places() for f in forecasts(machine, task, times_of(task))), default=0)
        yield f"--sessions {most}" if most else ""
    memory, count = min(device.memory for device in machine.devices), len(machine.devices)
    more = range(count + 1, len(times_of(task).step_ms) + 2)
    yield next((f"--gpus {n}" for n in more if fits(task, Machine.assumed(n, memory))), "")
    yield next((f"--size {w}x{h}" for w, h in _smaller(task.size) if fits(replace(task, size=(w, h)))), "")


def _together(machine: Machine, task: Task, times_of: TimesOf) -> str:
    """All that saves memory at once: how many sessions would fit then; empty where not one does."""
    times = times_of(task := replace(task, fp8="all"))
    count, memory = len(times.step_ms) + 1, min(device.memory for device in machine.devices)
    devices = machine if len(machine.devices) >= count else Machine.assumed(count, memory)
    most = max(forecast.places() for forecast in forecasts(devices, task, times))
    said = f"--gpus {len(devices.devices)} --fp8 all --sessions {min(most, task.sessions)}"
    return f"no single change would fit, but {said} does" if most else f"not even --gpus {count} --fp8 all would fit"


def _smaller(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Smaller sizes of about the same shape down to a quarter of the pixels, the largest first."""
    shape = size[0] / size[1]
    found = [(w, h) for w in range(64, size[0] + 1, 64) for h in range(64, size[1] + 1, 64)
             if prod(size) / 4 <= w * h < prod(size) and 0.8 < w / h / shape < 1.25]  # fmt: skip
    return sorted(found, key=prod, reverse=True)
