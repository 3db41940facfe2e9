"""Links over NCCL on streams that are only modelled: data arrives, and no two streams touch a buffer unordered.

Every stream has a clock; events carry clocks from one to another. An operation on a buffer must come behind those that
it could disturb by such a way, or a real device could run both at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from liverelay.engine.relay import handoff, remote
from liverelay.engine.relay.handoff import LinkClosed, Parcel
from liverelay.engine.relay.remote import NcclEnd, SelfLoop

SHAPES = {"latent": (2, 3), "audio": (4,)}
Clock = dict[int, int]
CUDA = torch.device("cuda")


class Stream:
    def __init__(self, *_: object) -> None:
        self.clock: Clock = {}

    def wait_event(self, event: Event) -> None:
        self.clock = joined(self.clock, event.clock)

    def synchronize(self) -> None:
        Device.host = joined(Device.host, self.clock)


class Event:
    def __init__(self) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


def joined(one: Clock, other: Clock) -> Clock:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in one.keys() | other.keys()}


class Device:
    """The streams' order, and who touched which storage last: (writes, stream, time)."""

    current = Stream()
    host: ClassVar[Clock] = {}  # what the host has waited for
    touched: ClassVar[dict[int, list[tuple[bool, int, int]]]] = {}
    wire: ClassVar[deque[Tensor]] = deque()

    @classmethod
    def operate(cls, *, reads: Tensor | None = None, writes: Tensor | None = None) -> None:
        stream = cls.current
        stream.clock = joined(stream.clock, cls.host)
        stream.clock[id(stream)] = now = stream.clock.get(id(stream), 0) + 1
        for tensor, is_write in ((reads, False), (writes, True)):
            if tensor is None:
                continue
            before = cls.touched.setdefault(tensor.untyped_storage().data_ptr(), [])
            for was_write, where, when in before:
                if is_write or was_write:
                    assert stream.clock.get(where, 0) >= when, "two streams touch a buffer, and nothing orders them"
            before.append((is_write, id(stream), now))


class Traced(Parcel):
    def __init__(self, shapes: Any, device: object, dtype: torch.dtype) -> None:
        super().__init__(shapes, "cpu", dtype)
        Device.operate(writes=self.flat)

    def fill(self, source: Any) -> None:
        Device.operate(reads=source["latent"], writes=self.flat)
        super().fill(source)


def send(tensor: Tensor, *_: object, **__: object) -> None:
    Device.operate(reads=tensor)
    Device.wire.append(tensor.clone())


def receive(tensor: Tensor, *_: object, **__: object) -> None:
    Device.operate(writes=tensor)
    tensor.copy_(Device.wire.popleft())


def batch(operations: list[Callable[[], None]]) -> list[Any]:
    for operation in operations:
        operation()
    return [SimpleNamespace(wait=lambda: None)]


@contextlib.contextmanager
def on(stream: Stream) -> Iterator[None]:
    before, Device.current = Device.current, stream
    yield
    Device.current = before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    Device.current, Device.host, Device.touched, Device.wire = Stream(), {}, {}, deque()
    fakes: dict[str, Any] = {"Stream": Stream, "Event": Event, "stream": on}
    fakes["current_stream"] = lambda device=None: Device.current
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(remote, "Parcel", Traced)
    dist = SimpleNamespace(send=send, recv=receive, isend=send, irecv=receive, batch_isend_irecv=batch)
    dist.get_rank = lambda: 0
    dist.P2POp = lambda operation, tensor, *_: lambda: operation(tensor)
    monkeypatch.setattr(remote, "dist", dist)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))


def fresh(rng: torch.Generator, parcel: Parcel) -> Tensor:
    """A stage writes its next result into its parcel."""
    Device.operate(writes=parcel.flat)
    return parcel.flat.copy_(torch.randn(parcel.flat.shape, generator=rng)).clone()


def test_a_sender_never_overtakes_its_own_copies(device: None, rng: torch.Generator) -> None:
    link = NcclEnd(SHAPES, CUDA, torch.float32, 1, None, sends=True)
    link.warm_up()
    Device.wire.clear()
    own, given = Traced(SHAPES, CUDA, torch.float32), []
    for _ in range(7):
        given.append(fresh(rng, own))
        link.send(own)
    assert all(map(torch.equal, Device.wire, given)) and len(Device.wire) == 7


def test_a_receiver_never_overtakes_its_own_copies(device: None, rng: torch.Generator) -> None:
    link, own = NcclEnd(SHAPES, CUDA, torch.float32, 0, None, sends=False), Traced(SHAPES, CUDA, torch.float32)
    given = [torch.randn(own.flat.shape, generator=rng) for _ in range(7)]
    Device.wire.extend(given)
    for _ in range(3):
        link.expect()  # one more than there are buffers
    for number, parcel in enumerate(given):
        link.receive(own)
        assert torch.equal(own.flat, parcel)
        Device.operate(reads=own.flat)
        if number < 4:
            link.expect()
    link.close()
    with pytest.raises(LinkClosed):
        link.receive(own)


def test_a_loop_to_oneself_never_overtakes_its_own_copies(device: None, rng: torch.Generator) -> None:
    link = SelfLoop(SHAPES, CUDA, torch.float32, None)
    link.warm_up()
    left, right = (Traced(SHAPES, CUDA, torch.float32) for _ in range(2))
    given: deque[Tensor] = deque()
    receiving = Stream()  # of the other stage
    receiving.wait_event(link._mark(Device.current))
    for ahead in (2, 1, 2, 2):
        while len(given) < ahead:
            given.append(fresh(rng, left))
            link.send(left)
        with on(receiving):
            link.receive(right)
            Device.operate(reads=right.flat)
        assert torch.equal(right.flat, given.popleft())
    link.close()
    with pytest.raises(LinkClosed), on(receiving):
        for _ in range(2):
            link.receive(right)
    with pytest.raises(LinkClosed):
        for _ in range(3):
            link.send(left)


def test_the_model_sees_a_missing_order(device: None) -> None:
    parcel, other = Traced(SHAPES, CUDA, torch.float32), Stream()
    with pytest.raises(AssertionError, match="nothing orders them"), on(other):
        Device.operate(reads=parcel.flat)


def test_parts_from_outside_stay_as_they_are_on_a_cpu(rng: torch.Generator) -> None:
    given = {"latent": torch.randn(2, 3, generator=rng)}
    assert handoff.LocalLink(SHAPES, "cpu", torch.float32).prepare(given) is given
