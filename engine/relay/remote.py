"""Links between processes: torch.distributed point to point, gloo on CPUs and NCCL on GPUs.

Every link has a process group of its own, used by one thread at each end. Receives are posted as soon as the leader
has said that a block will come, into one of two static buffers; sends leave the stage's thread (gloo) or its stream
(NCCL) at once. The first message of a pair sets the connection up, which takes up to a second: `warm_up` sends one.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from liverelay.engine.relay.dispatch import BUFFERS
from liverelay.engine.relay.handoff import LinkClosed, Parcel, Shapes

Buffers = queue.SimpleQueue["Parcel | None"]


class GlooEnd:
    """One end of a link in this process. peer: rank of the other end; sends, or receives, never both.

    A thread waits in each send and receive, because gloo's own handles do not tell when they are done.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, peer: int, group: Any, *, sends: bool) -> None:
        self._peer, self._group, self._sends = peer, group, sends
        self._free: Buffers = queue.SimpleQueue()
        self._full: Buffers = queue.SimpleQueue()
        self._posted: queue.SimpleQueue[bool] = queue.SimpleQueue()  # one for each block that is to be moved
        for _ in range(BUFFERS):
            self._free.put(Parcel(shapes, "cpu", dtype))
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"link to rank {peer}", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Exchange one message; both ends call it."""
        word = torch.zeros(1)
        if self._sends:
            dist.send(word, self._peer, group=self._group)
        else:
            dist.recv(word, self._peer, group=self._group)

    def expect(self) -> None:
        self._posted.put(True)

    def receive(self, into: Parcel) -> None:
        parcel = self._take(self._full)
        into.fill(parcel.parts)
        self._free.put(parcel)

    def send(self, parcel: Parcel) -> None:
        target = self._take(self._free)
        target.fill(parcel.parts)
        self._full.put(target)
        self._posted.put(True)

    def close(self) -> None:
        self._posted.put(False)
        self._free.put(None)
        self._full.put(None)

    def _take(self, source: Buffers) -> Parcel:
        parcel = source.get()
        if parcel is None:
            source.put(None)
            raise LinkClosed
        return parcel

    def _work(self) -> None:
        """The thread: moves one block for each that was posted."""
        try:
            while self._posted.get():
                parcel = self._take(self._full if self._sends else self._free)
                if self._sends:
                    dist.send(parcel.flat, self._peer, group=self._group)
                    self._free.put(parcel)
                else:
                    dist.recv(parcel.flat, self._peer, group=self._group)
                    self._full.put(parcel)
        except LinkClosed:
            pass
        except RuntimeError as error:  # the peer is gone: the leader sees that too, and says who
            self.error = error
            self.close()


class NcclEnd:
    """The same for NCCL, on a stream of its own: nothing waits for the device."""

    def __init__(
        self, shapes: Shapes, device: torch.device, dtype: torch.dtype, peer: int, group: Any, *, sends: bool
    ) -> None:
        self._peer, self._group, self._sends, self._device = peer, group, sends, device
        self._stream = torch.cuda.Stream(device)
        made = self._mark(torch.cuda.current_stream(device))
        self._free = deque((Parcel(shapes, device, dtype), made) for _ in range(BUFFERS))
        self._full: queue.SimpleQueue[tuple[Parcel, torch.cuda.Event] | None] = queue.SimpleQueue()
        self._due = 0  # receives that wait for a buffer
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Exchange one message; both ends call it."""
        self._move(torch.zeros(1, device=self._device))
        self._stream.synchronize()

    def expect(self) -> None:
        with self._lock:
            self._due += 1
            self._post()

    def _post(self) -> None:
        """Post receives into the buffers that are free."""
        while self._due and self._free:
            self._due -= 1
            parcel, free = self._free.popleft()
            self._stream.wait_event(free)
            self._move(parcel.flat)
            self._full.put((parcel, self._mark(self._stream)))

    def receive(self, into: Parcel) -> None:
        item = self._full.get()
        if item is None:
            self._full.put(None)
            raise LinkClosed
        parcel, arrived = item
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        into.fill(parcel.parts)
        with self._lock:
            self._free.append((parcel, self._mark(stream)))
            self._post()

    def send(self, parcel: Parcel) -> None:
        target, sent = self._free.popleft()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(sent)
        target.fill(parcel.parts)
        self._stream.wait_event(self._mark(stream))
        self._move(target.flat)
        self._free.append((target, self._mark(self._stream)))

    def close(self) -> None:
        self._full.put(None)

    def _move(self, tensor: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            if self._sends:
                dist.send(tensor, self._peer, group=self._group)
            else:
                dist.recv(tensor, self._peer, group=self._group)

    @staticmethod
    def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event
