"""What the leader tells the stages, and what they tell it. Everybody handles messages in the order they were sent.

A session is named by the place (memory) it has at every stage and by a serial number that is never used again, so
that an answer for a session that was closed meanwhile is known as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the simulator speaks the same words and has no tensors
    from torch import Tensor

Tensors = dict[str, "Tensor"]


@dataclass(frozen=True)
class Command:
    """To a stage. The fields of every command but `Stop` name a session."""

    place: int = -1
    serial: int = -1


@dataclass(frozen=True)
class Open(Command):
    """Begin a session. tensors: text [n, text_dim], reference [16, 1, h, w], motion [16, <= 19, h, w]."""

    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Block(Command):
    """Work on a block that comes over the link. distances: of the rolling sink, one for each step of the schedule."""

    block: int = 0
    distances: tuple[int, ...] = ()
    keep: bool = False  # answer with the latent after each step (`Stepped`)


@dataclass(frozen=True)
class Sink(Command):
    """Make the sink of a new reference in the shadow; the session's first block of its second clip takes it."""

    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Save(Command):
    """Answer with the session's state at this stage (`Saved`)."""


@dataclass(frozen=True)
class Load(Command):
    """As Open, then take a saved state of all stages: tensors by name, and the numbers beside them."""

    tensors: Tensors = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Close(Command):
    """The session has ended; its place will be given to another one."""


@dataclass(frozen=True)
class Stop(Command):
    """End the loop of the stage."""


@dataclass(frozen=True)
class Event:
    """From a stage, by its number in the plan."""

    stage: int


@dataclass(frozen=True)
class Done(Event):
    """A block has left the stage. Seconds of the stage's clock: asked for, begun, computed, handed on."""

    serial: int
    block: int
    asked: float
    begun: float
    computed: float
    ended: float


@dataclass(frozen=True)
class Clean(Event):
    """The first latent frame of a session's first clean block: the new reference [16, 1, h, w]."""

    serial: int
    reference: Tensor


@dataclass(frozen=True)
class Stepped(Event):
    """The latent after a step, where the block was to be kept."""

    serial: int
    block: int
    step: int
    latent: Tensor


@dataclass(frozen=True)
class Finished(Event):
    """The block's video, bytes [n, H, W, 3]; nothing where the line has no decoder."""

    serial: int
    block: int
    frames: Any


@dataclass(frozen=True)
class Saved(Event):
    """A session's state at one stage."""

    serial: int
    tensors: Tensors
    numbers: dict[str, int]


@dataclass(frozen=True)
class Failed(Event):
    """Something went wrong. serial: the session that is lost; -1: the stage is."""

    serial: int
    error: BaseException
