"""Links between neighbouring stages: what travels with a block, and the transport within one process.

A link has two static buffers, so a stage can be given its next block while it works on one, and a sender waits only
when the receiver is two blocks behind. Other transports: relay/ranks.py.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from liverelay.engine.relay.dispatch import BUFFERS

Shapes = Mapping[str, tuple[int, ...]]


class LinkClosed(Exception):
    """The other end is gone, or the pipeline stops."""


class Parcel:
    """What travels with a block, by name, in one flat buffer [n] of the working dtype: the latent [16, F, h, w] and,
    to a stage that denoises, the audio features [S, states, A, 4 F] (and a pose [16, F, h, w], where there is one).
    Between the two pieces of a VAE it is features [n, C, h', w'] alone, in the dtype of their activations."""

    def __init__(self, shapes: Shapes, device: torch.device | str, dtype: torch.dtype) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), device=device, dtype=dtype)
        parts = zip(shapes.items(), self.flat.split(sizes), strict=True)
        self.parts: dict[str, Tensor] = {name: part.view(shape) for (name, shape), part in parts}

    def fill(self, source: Mapping[str, Tensor]) -> None:
        """Copy the parts that this parcel has."""
        for name, part in self.parts.items():
            part.copy_(source[name], non_blocking=True)


class Link(Protocol):
    """One way from a stage to the next. `receive` and `send` wait at most for a buffer, never for the device."""

    def expect(self) -> None:
        """One more block will come: receive it into a free buffer as soon as there is one."""

    def receive(self, into: Parcel) -> None:
        """Copy the next block into the stage's own parcel. LinkClosed when none will come."""

    def send(self, parcel: Parcel) -> None:
        """Give a block to the next stage. LinkClosed when it is gone."""

    def close(self) -> None:
        """Wake whoever waits; they get LinkClosed."""


class LocalLink:
    """Within one process: from thread to thread, and from GPU to GPU where the stages' devices differ."""

    def __init__(self, shapes: Shapes, device: torch.device | str, dtype: torch.dtype) -> None:
        self._names, self._gpu, self._dtype = tuple(shapes), torch.device(device).type == "cuda", dtype
        self._free: queue.SimpleQueue[tuple[Parcel, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[Parcel, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put((Parcel(shapes, device, dtype), None))

    def prepare(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Parts that are given from outside, so that `send` waits for no device: pinned and of the link's dtype."""
        if not self._gpu:
            return parts
        given = {name: parts[name].to(dtype=self._dtype) for name in self._names}
        return {name: part if part.is_cuda else part.pin_memory() for name, part in given.items()}

    def expect(self) -> None:
        """Nothing to do: the sender writes into our buffers itself."""

    def receive(self, into: Parcel) -> None:
        parcel = self._take(self._full)
        into.fill(parcel.parts)
        self._free.put((parcel, _mark(parcel)))

    def send(self, parcel: Parcel) -> None:
        target = self._take(self._free)
        target.fill(parcel.parts)
        self._full.put((target, _mark(target)))

    def close(self) -> None:
        self._free.put(None)
        self._full.put(None)

    @staticmethod
    def _take(source: queue.SimpleQueue[tuple[Parcel, torch.cuda.Event | None] | None]) -> Parcel:
        item = source.get()
        if item is None:
            source.put(None)  # for whoever comes next
            raise LinkClosed
        parcel, ready = item
        if ready is not None:
            torch.cuda.current_stream(parcel.flat.device).wait_event(ready)
        return parcel


def _mark(parcel: Parcel) -> torch.cuda.Event | None:
    """The point on the device's stream from which on the parcel may be used by another stream."""
    if not parcel.flat.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(parcel.flat.device))
    return event
