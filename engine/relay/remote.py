"""Links between processes: torch.distributed point to point, gloo on CPUs and NCCL on GPUs.

Every link has a process group of its own, used by one thread at each end. Receives are posted as soon as the leader
has said that a block will come, into one of two static buffers; sends leave the stage's thread (gloo) or its stream
(NCCL) at once. The first message of a pair sets the connection up, which takes up to a second: `warm_up` sends one.
One GPU alone exercises NCCL by sending to itself (`SelfLoop`).
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


Ready = tuple[Parcel, torch.cuda.Event]  # a buffer, and the point of a stream from which on it may be used


class NcclBuffers:
    """What both kinds of links over NCCL share: buffers that are moved on a stream of their own, so that nothing waits
    for the device, and the events between that stream and the stage's.

    The buffers live as long as the link, so the allocator need not know of the second stream (`record_stream`).
    """

    def __init__(self, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> None:
        self._shapes, self._device, self._dtype = shapes, device, dtype
        self._stream = torch.cuda.Stream(device)
        self._full: queue.SimpleQueue[Ready | None] = queue.SimpleQueue()

    def _make(self) -> list[Ready]:
        parcels = [Parcel(self._shapes, self._device, self._dtype) for _ in range(BUFFERS)]
        made = self._mark(torch.cuda.current_stream(self._device))  # behind their zeros
        return [(parcel, made) for parcel in parcels]

    def _load(self, free: Ready, parcel: Parcel) -> Parcel:
        """Copy a stage's parcel into a buffer; our stream goes on behind the copy."""
        (target, sent), stream = free, torch.cuda.current_stream(self._device)
        stream.wait_event(sent)
        target.fill(parcel.parts)
        self._stream.wait_event(self._mark(stream))
        return target

    def _unload(self, full: Ready | None, into: Parcel) -> Ready:
        """Copy what has arrived into a stage's parcel; the buffer is free behind the copy."""
        if full is None:
            self._full.put(None)
            raise LinkClosed
        (parcel, arrived), stream = full, torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        into.fill(parcel.parts)
        return parcel, self._mark(stream)

    @staticmethod
    def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event


class NcclEnd(NcclBuffers):
    """One end of a link between two GPUs, each with a process of its own (NCCL refuses two ranks on one GPU)."""

    def __init__(
        self, shapes: Shapes, device: torch.device, dtype: torch.dtype, peer: int, group: Any, *, sends: bool
    ) -> None:
        super().__init__(shapes, device, dtype)
        self._peer, self._group, self._sends = peer, group, sends
        self._free = deque(self._make())
        self._due = 0  # receives that wait for a buffer
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Exchange one message; both ends call it."""
        word = torch.zeros(1, device=self._device)
        self._stream.wait_event(self._mark(torch.cuda.current_stream(self._device)))
        self._move(word)
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
        free = self._unload(self._full.get(), into)
        with self._lock:
            self._free.append(free)
            self._post()

    def send(self, parcel: Parcel) -> None:
        target = self._load(self._free.popleft(), parcel)  # there is one: each send gives its buffer back at once
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


class SelfLoop(NcclBuffers):
    """A whole link over NCCL in one process: what one GPU can show of the way between two.

    NCCL sends to itself where the send and the receive are in one group call; `dist.send` refuses, a batch does not.
    """

    def __init__(self, shapes: Shapes, device: torch.device, dtype: torch.dtype, group: Any) -> None:
        super().__init__(shapes, device, dtype)
        self._group = group
        self._outgoing = deque(self._make())
        self._free: queue.SimpleQueue[Ready | None] = queue.SimpleQueue()
        for ready in self._make():
            self._free.put(ready)

    def warm_up(self) -> None:
        word = torch.zeros(2, device=self._device)
        self._stream.wait_event(self._mark(torch.cuda.current_stream(self._device)))
        self._move(word[:1], word[1:])
        self._stream.synchronize()

    def expect(self) -> None:
        """Nothing to do: the sender posts the receive beside its send."""

    def receive(self, into: Parcel) -> None:
        self._free.put(self._unload(self._full.get(), into))

    def send(self, parcel: Parcel) -> None:
        item = self._free.get()
        if item is None:
            self._free.put(None)
            raise LinkClosed
        source = self._load(self._outgoing.popleft(), parcel)
        target, free = item
        self._stream.wait_event(free)
        self._move(source.flat, target.flat)
        moved = self._mark(self._stream)
        self._outgoing.append((source, moved))
        self._full.put((target, moved))

    def close(self) -> None:
        self._free.put(None)
        self._full.put(None)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        rank = dist.get_rank()
        both = [dist.P2POp(dist.isend, source, rank, self._group), dist.P2POp(dist.irecv, target, rank, self._group)]
        with torch.cuda.stream(self._stream):
            for work in dist.batch_isend_irecv(both):
                work.wait()  # our stream's, not ours


def self_loop(shapes: Shapes, device: torch.device | str, dtype: torch.dtype) -> SelfLoop:
    """A link that is ready for use; the process's group of one rank is made with the first."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    link = SelfLoop(shapes, torch.device(device), dtype, dist.new_group([dist.get_rank()]))
    link.warm_up()
    return link
