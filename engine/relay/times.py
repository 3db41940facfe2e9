"""How long each part of a block's work takes: measured on a card, scaled to other sizes, or given by a file.

Every figure carries where it comes from, so that an estimate is never shown as a measurement. Pure Python, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from liverelay.engine.config import StreamConfig
from liverelay.engine.errors import InputError
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.sizes import PUBLISHED, block_step_flops, decode_flops, prefill_flops, prime_flops
from liverelay.engine.models.vae_config import VAEConfig
from liverelay.engine.relay.card_times import CARDS, NEWEST
from liverelay.engine.relay.plan import StagePlan

MEASURED, ESTIMATE, GIVEN = "measured", "estimate", "given"
MEASURED_SIZE = (704, 384)
SHARES = tuple((2.5 + min(3 * (block + 1), 12)) / 14.5 for block in range(4))  # of the arena that a block attends to
_NAMES = ("step_ms", "attention_ms", "vae_ms", "prefill_ms", "prime_ms", "encode_ms")


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds on one device. states: for each name where the figure comes from (MEASURED, ESTIMATE, ...).

    step_ms: one block-step with a full ring, for each step of the schedule; attention_ms: the part of each that grows
    with the ring. vae_ms: decoding a block. prefill_ms: a sink, once for each stage; prime_ms: a new session's decoder.
    encode_ms: the image, before a session is opened.
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
        return max(states, key=(MEASURED, GIVEN, ESTIMATE).index)


def geometry_of(size: tuple[int, int]) -> Geometry:
    """Of a video's (width, height) in pixels."""
    return Geometry(size[1] // 8, size[0] // 8, PUBLISHED.head_dim)


@dataclass(frozen=True)
class Card:
    """One kind of GPU and what was measured on it (`card_times.CARDS` says how). memory: bytes."""

    model: str
    memory: int
    results: str
    steps: Mapping[str, Mapping[str, Any]]
    vae_ms: float | None
    encode_ms: float | None
    prefill_ms: float | None
    prime_ms: float | None


def card(name: str = NEWEST) -> Card:
    """The card of that name. Raises InputError for one that was not measured."""
    if name not in CARDS:
        raise InputError(f"no times of a card '{name}' are known; there is: {', '.join(CARDS)}")
    return Card(**CARDS[name])


def card_of(models: Iterable[str]) -> str:
    """The card that GPUs of these models are, as in "NVIDIA H100 80GB HBM3"; the newest where it is none or several."""
    found = {name for model in models for name in CARDS if name in model.lower()}
    return found.pop() if len(found) == 1 else NEWEST


def bundled_times(
    size: tuple[int, int] = MEASURED_SIZE, fp8: str = "", steps: int = 4, name: str = NEWEST
) -> StageTimes:
    """Of the 14B model on a card, for a size (width, height) and what is in FP8 (a word or "").

    Products and element-wise kernels are linear in a frame's tokens P, self-attention is quadratic, the rest is
    constant: ms(P) = (products + element-wise) * F(P) / F(P0) + attention * A(P) / A(P0) + rest, with F and A of
    `block_step_flops`. A prefill is counted in the same way from its own operations. Decoding and priming go with
    `decode_flops`, encoding with the pixels. What was not measured on this card is as on the newest one.
    """
    gpu, other = card(name), card()
    for word in ("", "all") if fp8 == "attention" else (fp8,):
        if word not in gpu.steps:
            what = f"with {word} in FP8" if word else "in bfloat16"
            raise InputError(f"no block-step {what} was measured on an {gpu.model}; give its times with --times")
    step = gpu.steps["" if fp8 == "attention" else fp8]
    (products, attention, rows, rest), whole, known = step["parts_ms"], step["whole_ms"], step["measured"]
    if fp8 == "attention":  # never measured alone: bfloat16 with the attention of "all"
        in_fp8 = gpu.steps["all"]["parts_ms"][1]
        whole, attention, known = whole - attention + in_fp8, in_fp8, False
    graph = whole / (products + attention + rows + rest)  # the parts are of eager steps
    here, there = geometry_of(size), geometry_of(MEASURED_SIZE)
    (attend, others), (attend_0, others_0) = (block_step_flops(PUBLISHED, g) for g in (here, there))
    decode = decode_flops(VAEConfig(), here) / decode_flops(VAEConfig(), there)

    def whole_ms(attend: float, others: float) -> float:
        return graph * ((products + rows) * others / others_0 + attention * attend / attend_0 + rest)

    vae_ms, prefill_ms = gpu.vae_ms or other.vae_ms or 0.0, whole_ms(*prefill_flops(PUBLISHED, here))
    if gpu.prefill_ms:
        prefill_ms *= gpu.prefill_ms / whole_ms(*prefill_flops(PUBLISHED, there))
    pixels = math.prod(size) / math.prod(MEASURED_SIZE)
    measured = {
        "step_ms": known, "vae_ms": gpu.vae_ms, "prefill_ms": gpu.prefill_ms, "prime_ms": gpu.prime_ms,
        "encode_ms": gpu.encode_ms,
    }  # fmt: skip
    states = {part: MEASURED if found and size == MEASURED_SIZE else ESTIMATE for part, found in measured.items()}
    return StageTimes(
        (whole_ms(attend, others),) * steps, decode * vae_ms, prefill_ms,
        decode * (gpu.prime_ms or other.prime_ms or _prime_ms(vae_ms)), graph * attention * attend / attend_0,
        pixels * (gpu.encode_ms or other.encode_ms or 0.0), states,
    )  # fmt: skip


def _prime_ms(vae_ms: float) -> float:
    """By its share of the operations, which is nearly the same for all sizes."""
    config, geometry = VAEConfig(), geometry_of(MEASURED_SIZE)
    return vae_ms * prime_flops(config, geometry, StreamConfig().prime_latents) / decode_flops(config, geometry)


def vae_share() -> float:
    """Time of decoding a block, in block-steps in the working dtype, as measured on the newest card."""
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
