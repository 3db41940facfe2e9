"""How long each part of a block's work takes: measured on one GPU, scaled to other sizes, or given by a file.

Every figure carries where it comes from, so that a target is never shown as a measurement. Pure Python, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from liverelay.engine.config import StreamConfig
from liverelay.engine.errors import InputError
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.sizes import PUBLISHED, block_step_flops, decode_flops, prefill_flops, prime_flops
from liverelay.engine.models.vae_config import VAEConfig
from liverelay.engine.relay.plan import StagePlan

MEASURED, ESTIMATE, TARGET, GIVEN = "measured", "estimate", "target", "given"
MEASURED_ON = "NVIDIA H100 80GB HBM3"
MEASURED_MEMORY = 85_017_493_504  # bytes of that GPU
MEASURED_SIZE = (704, 384)
# One block-step with a full ring, in ms: products with text and sound, self-attention, element-wise kernels, the rest
# (parts_s of the backend `fastest`, eager), and the whole as a replayed CUDA graph (its graph_s). From
# bench/results/h100-2026-11-24.json, parts stage, fp8 and fp8-all; a test compares.
STEP_PARTS_MS = {
    "": ((118.97, 68.566, 12.422, 2.7513), 199.97),
    "products": ((63.958, 66.424, 16.063, 5.2386), 146.36),
    "all": ((63.077, 87.133, 16.552, 3.4958), 166.06),
}
# Not measured on a GPU yet: the budget for decoding 12 frames (27.5 TFLOP of convolutions).
VAE_TARGET_MS = 90.0
SHARES = tuple((2.5 + min(3 * (block + 1), 12)) / 14.5 for block in range(4))  # of the arena that a block attends to
_NAMES = ("step_ms", "attention_ms", "vae_ms", "prefill_ms", "prime_ms", "encode_ms")


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds on one device. states: for each name where the figure comes from (MEASURED, ESTIMATE, ...).

    step_ms: one block-step with a full ring, for each step of the schedule; attention_ms: the part of each that grows
    with the ring. vae_ms: decoding a block. prefill_ms: a sink, once for each stage; prime_ms: a new session's decoder.
    encode_ms: image and prompt, before a session is opened.
    """

    step_ms: tuple[float, ...]
    vae_ms: float
    prefill_ms: float = 0.0
    prime_ms: float = 0.0
    attention_ms: float = 0.0
    encode_ms: float = 0.0
    states: Mapping[str, str] = field(default_factory=dict)

    def block_ms(self, stage: StagePlan, block: int = len(SHARES)) -> float:
        """A stage's work on a block: the first blocks of a session attend to a part of the arena only."""
        missing = 1.0 - SHARES[min(block, len(SHARES) - 1)]
        steps = sum(self.step_ms[step] - missing * self.attention_ms for step in stage.steps)
        return steps + self.vae_ms * stage.vae_share

    def open_ms(self, stage: StagePlan) -> float:
        """A stage's work on a new session; whoever makes the video warms up with all of the VAE."""
        share = 1.0 if stage.makes_video else stage.vae_share
        return (self.prefill_ms if stage.steps else 0.0) + self.prime_ms * share

    def sink_ms(self, stage: StagePlan) -> float:
        """A stage's work on the sink of a new reference."""
        return self.prefill_ms if stage.steps else 0.0

    def state(self, *stages: StagePlan) -> str:
        """The least sure of the figures that these stages' times are made of; a piece of the VAE is estimated."""
        names = [name for stage in stages for name, has in (("step_ms", stage.steps), ("vae_ms", stage.decode)) if has]
        states = [self.states.get(name, GIVEN) for name in names]
        states += [ESTIMATE for stage in stages if 0 < stage.vae_share < 1]
        return max(states, key=(MEASURED, GIVEN, ESTIMATE, TARGET).index)


def geometry_of(size: tuple[int, int]) -> Geometry:
    """Of a video's (width, height) in pixels."""
    return Geometry(size[1] // 8, size[0] // 8, PUBLISHED.head_dim)


def bundled_times(size: tuple[int, int] = MEASURED_SIZE, fp8: str = "", steps: int = 4) -> StageTimes:
    """Of the 14B model on the GPU that was measured, for a size (width, height) and what is in FP8 (a word or "").

    Products and element-wise kernels are linear in a frame's tokens P, self-attention is quadratic, the rest is
    constant: ms(P) = (products + element-wise) * F(P) / F(P0) + attention * A(P) / A(P0) + rest, with F and A of
    `block_step_flops`. A prefill is counted in the same way from its own operations. Decoding goes with `decode_flops`.
    """
    (products, attention, rows, rest), whole = STEP_PARTS_MS["" if fp8 == "attention" else fp8]
    state = MEASURED
    if fp8 == "attention":  # never measured alone: bfloat16 with the attention of "all"
        whole, attention, state = whole - attention + STEP_PARTS_MS["all"][0][1], STEP_PARTS_MS["all"][0][1], ESTIMATE
    graph = whole / (products + attention + rows + rest)  # the parts are of eager steps
    here, there = geometry_of(size), geometry_of(MEASURED_SIZE)
    (attend, others), (attend_0, others_0) = (block_step_flops(PUBLISHED, g) for g in (here, there))
    sink_attend, sink_others = prefill_flops(PUBLISHED, here)

    def whole_ms(attend: float, others: float) -> float:
        return graph * ((products + rows) * others / others_0 + attention * attend / attend_0 + rest)

    vae = VAE_TARGET_MS * decode_flops(VAEConfig(), here) / decode_flops(VAEConfig(), there)
    state = state if size == MEASURED_SIZE else ESTIMATE
    states = {"step_ms": state, "vae_ms": TARGET, "prefill_ms": ESTIMATE, "prime_ms": ESTIMATE}
    return StageTimes(
        (whole_ms(attend, others),) * steps, vae, whole_ms(sink_attend, sink_others), _prime_ms(vae),
        graph * attention * attend / attend_0, states=states,
    )  # fmt: skip


def _prime_ms(vae_ms: float) -> float:
    """By its share of the operations, which is nearly the same for all sizes."""
    config, geometry = VAEConfig(), geometry_of(MEASURED_SIZE)
    return vae_ms * prime_flops(config, geometry, StreamConfig().prime_latents) / decode_flops(config, geometry)


def vae_share() -> float:
    """Time of decoding a block, in block-steps."""
    times = bundled_times()
    return times.vae_ms / times.step_ms[0]


def read_times(path: Path, size: tuple[int, int], steps: int = 4) -> StageTimes:
    """Times from a JSON file: step_ms (a number, or a list with one for each step) and vae_ms, and of the others what
    is known. `size` ("704x384") says what they were measured at; without it they are taken as they are.

    InputError where the file cannot be read or holds what no time can be.
    """
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise InputError(f'{path} does not hold a table of times, as in {{"step_ms": 200, "vae_ms": 90}}')
    measured_at = given.pop("size", None)
    unknown = [name for name in given if name not in _NAMES]
    if unknown:
        raise InputError(f"{path} says '{unknown[0]}'; there is: size, {', '.join(_NAMES)}")
    for name in ("step_ms", "vae_ms"):
        if name not in given:
            raise InputError(f"{path} lacks {name}")
    step_ms = given.pop("step_ms")
    step_ms = step_ms if isinstance(step_ms, list) else [step_ms] * steps
    if len(step_ms) != steps:
        raise InputError(f"{path} has {len(step_ms)} times in step_ms, the schedule {steps} steps")
    numbers = {f"step_ms[{i}]": value for i, value in enumerate(step_ms)} | given
    for name, value in numbers.items():
        _check(path, name, value, zero=name not in ("vae_ms",) and not name.startswith("step_ms"))
    if given.get("attention_ms", 0.0) > min(step_ms):
        raise InputError(f"{path}: attention_ms is a part of step_ms and cannot be more")
    times = _completed(tuple(map(float, step_ms)), {name: float(value) for name, value in given.items()})
    return times if measured_at is None else _scaled(times, _size(path, measured_at), size)


def _check(path: Path, name: str, value: Any, *, zero: bool) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if wrong or not (0 <= value <= 1e7) or (value == 0 and not zero):
        raise InputError(f"{path} says {name} = {json.dumps(value)}; a time is a number of milliseconds above 0")


def _size(path: Path, text: Any) -> tuple[int, int]:
    width, _, height = str(text).partition("x")
    try:
        size = int(width), int(height)
        geometry_of(size)
    except ValueError:
        raise InputError(f"{path} says size = {json.dumps(text)}; a size is WIDTHxHEIGHT, multiples of 64") from None
    return size


def _completed(step_ms: tuple[float, ...], given: Mapping[str, float]) -> StageTimes:
    """What was not given by its share of the products: 2.5 sink frames instead of a block's 3."""
    rest = {"prefill_ms": step_ms[0] * 2.5 / 3, "prime_ms": _prime_ms(given["vae_ms"])}
    states = dict.fromkeys(_NAMES, GIVEN) | {name: ESTIMATE for name in rest if name not in given}
    return StageTimes(step_ms, **(rest | dict(given)), states=states)


def _scaled(times: StageTimes, old: tuple[int, int], new: tuple[int, int]) -> StageTimes:
    """At another size, by the operations (see `bundled_times`); without attention_ms its share of them is taken."""
    if old == new:
        return times
    (attend, others), (attend_0, others_0) = (block_step_flops(PUBLISHED, geometry_of(s)) for s in (new, old))
    linear, square = others / others_0, attend / attend_0
    decode = decode_flops(VAEConfig(), geometry_of(new)) / decode_flops(VAEConfig(), geometry_of(old))

    def scaled(ms: float) -> float:
        part = times.attention_ms or ms * attend_0 / (attend_0 + others_0)
        return (ms - part) * linear + part * square

    return replace(
        times, step_ms=tuple(map(scaled, times.step_ms)), attention_ms=times.attention_ms * square,
        vae_ms=times.vae_ms * decode, prime_ms=times.prime_ms * decode, prefill_ms=times.prefill_ms * linear,
        states={name: ESTIMATE for name in times.states},
    )  # fmt: skip
