"""The leader of a line of stages: sessions come and go, their blocks are dispatched in turn, results come back.

The stages run in threads of this process or in processes of their own; the leader sees them as somebody who takes
commands and answers with events. All stages get the same commands in the same order, so blocks need no header.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from liverelay.engine.errors import BusyError, LiveRelayError
from liverelay.engine.progress import uninterrupted
from liverelay.engine.relay.dispatch import Dispatcher
from liverelay.engine.relay.handoff import Link, LocalLink, Shapes
from liverelay.engine.relay.loop import StageLoop
from liverelay.engine.relay.messages import (
    Block,
    Clean,
    Close,
    Command,
    Done,
    Event,
    Failed,
    Finished,
    Load,
    Open,
    Save,
    Saved,
    Sink,
    Stepped,
    Stop,
    Tensors,
)
from liverelay.engine.relay.native_loop import make_local_link, make_loop
from liverelay.engine.relay.plan import Plan
from liverelay.engine.relay.room import Room, check_room
from liverelay.engine.relay.scheduler import Scheduler
from liverelay.engine.relay.stage import LineSpec, Stage, check_latents

_serials = itertools.count()  # of the sessions of all lines: whoever observes several tells them apart
_open_lines: weakref.WeakSet[Pipeline] = weakref.WeakSet()
STUCK_S = 1.0  # that a stage of a broken line is waited for
Observer = Callable[[Event], None]
MakeLink = Callable[[Shapes, torch.device, torch.dtype], Link]


class Worker(Protocol):
    """A stage as the leader sees it."""

    def put(self, command: Command) -> None:
        """Send a command; never waits."""

    def room(self) -> Room:
        """What the stage knows of its memory; never waits."""

    def close(self, *, broken: bool) -> None:
        """Wait until the stage has ended, after `Stop`; broken: it may be stuck, do not wait for long."""


class LocalWorker:
    """A stage in a thread of this process.

    remote: its links to other processes, over which all blocks that were dispatched must have gone before they are
    closed; without them a stage that ends drops what is still on the line.
    """

    def __init__(self, loop: StageLoop, remote: Sequence[Link] = ()) -> None:
        self.loop, self._remote = loop, remote
        self._thread = threading.Thread(target=loop.run, name=f"stage {loop.stage.plan.name}", daemon=True)
        self._thread.start()

    def put(self, command: Command) -> None:
        self.loop.put(command)

    def room(self) -> Room:
        return self.loop.stage.room()

    def close(self, *, broken: bool) -> None:
        links = [self.loop.source, *self._remote]
        if broken or not self._remote:
            for link in links:
                link.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(STUCK_S if broken else None)
        for link in links:
            link.close()


@dataclass
class Client:
    """A session as the leader knows it."""

    place: int
    serial: int
    results: dict[int, Future[Any]] = field(default_factory=dict)  # by block
    parcels: dict[int, tuple[Mapping[str, Tensor], Block]] = field(default_factory=dict)  # wanted, not dispatched
    finished: dict[int, Any] = field(default_factory=dict)  # frames of blocks that still lack an answer
    kept: set[int] = field(default_factory=set)  # blocks whose latents after each step were asked for
    steps: dict[int, int] = field(default_factory=dict)  # how many of them have come
    reference: Tensor | None = None  # the model's own first latent frame, until a stage has it in its arena
    saved: dict[int, Saved] = field(default_factory=dict)
    saving: Future[dict[int, Saved]] | None = None
    error: BaseException | None = None


class Pipeline:
    """A line of stages of one resolution. Sessions are opened on it, and ask for their blocks.

    workers: the stages; entry: the link into the first; places: sessions at a time; observe: sees every event.
    """

    def __init__(
        self, plan: Plan, spec: LineSpec, entry: LocalLink, *, places: int = 1, observe: Observer | None = None
    ) -> None:
        self.plan, self.spec, self.entry = plan, spec, entry
        self.workers: Sequence[Worker] = ()
        self.scheduler = Scheduler(places)
        self._turns = Dispatcher(self.scheduler, len(plan.stages), spec.stream.blocks_per_clip)
        self.error: BaseException | None = None
        self._broken = False  # by a stage, which may be stuck
        self._observe = observe
        self._lock = threading.RLock()
        self._clients: dict[int, Client] = {}
        self._free = list(range(places))[::-1]  # the one used last comes first: it has its memory
        self._abandoned: deque[int] = deque()
        _open_lines.add(self)

    @property
    def sessions(self) -> int:
        """How many are open."""
        with self._lock:
            self._close_abandoned()
            return len(self._clients)

    @property
    def depth(self) -> int:
        """Blocks that one session has to have under way to keep all stages busy."""
        return self._turns.depth

    # -- sessions --------------------------------------------------------------------------------------------------

    def open(self, tensors: Tensors, *, rate: float = 0.0, state: tuple[Tensors, dict[str, int]] | None = None) -> int:
        """Begin a session, from the start or from a saved state; returns its serial number.

        tensors: as in messages.Open. rate: blocks that it needs in a second, 0 for a file; state: of `Stage.save` of
        all stages, with `new_reference` if it is known. BusyError when there is no place, memory or time for it.
        """
        check_latents(tensors, self.spec.geometry)
        with self._lock:
            self._check()
            self._close_abandoned()
            try:
                serial = next(_serials)
                reference = None if state is None else state[0].get("new_reference")
                self._turns.open(serial, rate, known=reference is not None)
            except ValueError as error:
                raise BusyError(f"no session can be opened: {error}") from None
            try:
                taken = [client.place for client in self._clients.values()]
                check_room([worker.room for worker in self.workers], taken, self._free[-1])
            except BaseException:
                self._turns.close(serial)
                raise
            client = self._clients[serial] = Client(self._free.pop(), serial, reference=reference)
            names = (client.place, serial)
            if state is None:
                self._tell(Open(*names, tensors))
            else:
                self._tell(Load(*names, tensors | state[0], state[1]))
            return serial

    def abandon(self, serial: int) -> None:
        """As `close_session`, some time later; may be called by the garbage collector, in the middle of anything."""
        self._abandoned.append(serial)

    def _close_abandoned(self) -> None:
        while self._abandoned:
            self.close_session(self._abandoned.popleft())

    def close_session(self, serial: int) -> None:
        """End a session; blocks that were asked for are forgotten."""
        with self._lock:
            client = self._clients.pop(serial, None)
            if client is None:
                return
            self._turns.close(serial)
            _give_up(client, LiveRelayError("the session is closed"))
            if self.error is None:
                self._tell(Close(client.place, serial))
            self._free.append(client.place)

    def request(
        self, serial: int, block: int, parts: Mapping[str, Tensor], distances: Sequence[int], *,
        deadline: float = math.inf, keep: bool = False,
    ) -> Future[Any]:
        """Ask for a session's next block: its frames, bytes [n, H, W, 3], or with `keep` also latents by step.

        parts: as in a parcel, `latent` being the noise. deadline: when its first frame is due.
        """
        parts = self.entry.prepare(parts)
        with self._lock:
            client = self._client(serial)
            future: Future[Any] = Future()
            client.results[block] = future
            if keep:
                client.kept.add(block)
            client.parcels[block] = (parts, Block(client.place, serial, block, tuple(distances), keep))
            self._turns.request(serial, block, deadline)
            self._dispatch()
            return future

    def save(self, serial: int) -> Future[dict[int, Saved]]:
        """A session's state at every stage, by the stage's number. Its blocks that were asked for must have come."""
        with self._lock:
            client = self._client(serial)
            if client.results or (client.saving is not None and not client.saving.done()):
                raise LiveRelayError("a session cannot be saved while blocks of it, or another save, are under way")
            client.saved, client.saving = {}, Future()
            self._tell(Save(client.place, serial))
            return client.saving

    def reference(self, serial: int) -> Tensor | None:
        """The session's new reference, once it is known."""
        with self._lock:
            return self._client(serial).reference

    def close(self) -> None:
        """End all stages. Sessions that are still open are lost."""
        with self._lock:
            self.error = self.error or LiveRelayError("the engine is closed")
            for client in self._clients.values():
                _give_up(client, self.error)
        for worker in self.workers:
            worker.put(Stop())
        for worker in self.workers:
            worker.close(broken=self._broken)
        self.workers = ()  # not before: a call that was cut off can be made again
        self.entry.close()

    # -- dispatch --------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send what is due."""
        while self.error is None and (due := self._turns.next()) is not None:
            request, sink = due
            client = self._clients[request.session]  # type: ignore[index]
            parts, command = client.parcels.pop(request.block)
            if sink:
                self._prepare_sink(client)
            self._tell(command)
            self.entry.send(_AsParcel(parts))  # type: ignore[arg-type]

    def _prepare_sink(self, client: Client) -> None:
        assert client.reference is not None
        self._tell(Sink(client.place, client.serial, {"reference": client.reference}))

    def _tell(self, command: Command) -> None:
        for worker in self.workers:
            worker.put(command)

    def _client(self, serial: int) -> Client:
        self._check()
        client = self._clients.get(serial)
        if client is None:
            raise LiveRelayError("the session is closed")
        if client.error is not None:
            raise client.error
        return client

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    # -- answers ---------------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Take a stage's answer; called from any thread."""
        if self._observe is not None:
            self._observe(event)
        with self._lock:
            if isinstance(event, Done):
                self.scheduler.timed(event.stage, event.computed - event.begun)
                self._turns.done(event.stage)
                self._dispatch()
            elif isinstance(event, Failed) and event.serial < 0:
                self._fail(event)
            else:
                client = self._clients.get(event.serial)  # type: ignore[attr-defined]
                if client is not None:
                    self._answer(client, event)

    def _answer(self, client: Client, event: Event) -> None:
        if isinstance(event, Finished):
            client.finished[event.block] = event.frames
            self._complete(client, event.block)
        elif isinstance(event, Stepped):
            client.steps[event.block] = client.steps.get(event.block, 0) + 1
            self._complete(client, event.block)
        elif isinstance(event, Clean):
            client.reference = event.reference
            self._complete(client, 0)
            if self._turns.clean(client.serial):
                self._prepare_sink(client)
            self._dispatch()
        elif isinstance(event, Saved):
            client.saved[event.stage] = event
            if client.saving is not None and len(client.saved) == len(self.workers):
                _settle(client.saving, client.saved)
        elif isinstance(event, Failed):
            client.error = event.error
            _give_up(client, event.error)

    def _complete(self, client: Client, block: int) -> None:
        """Settle a block when all its answers are there: they come from several stages, in any order."""
        lacks_steps = block in client.kept and client.steps.get(block, 0) < self.plan.steps
        if block not in client.finished or lacks_steps or (block == 0 and client.reference is None):
            return
        client.kept.discard(block)
        client.steps.pop(block, None)
        _settle(client.results.pop(block, None), client.finished.pop(block))

    def _fail(self, event: Failed) -> None:
        """A stage is gone, and the line with it: everybody who waits is told."""
        if self.error is None:
            self.error, self._broken = event.error, True
            for client in self._clients.values():
                _give_up(client, event.error)


@atexit.register
def _close_lines() -> None:
    """Threads that compute while the interpreter ends would take it down."""
    with contextlib.suppress(KeyboardInterrupt), uninterrupted():
        for line in list(_open_lines):
            line.close()


class _AsParcel:
    """Parts that are given one by one, sent like a stage's own parcel."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self.parts = parts


def _settle(future: Future[Any] | None, result: Any) -> None:
    if future is None or future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)


def _give_up(client: Client, error: BaseException) -> None:
    """Tell everybody who waits for something of this session."""
    for future in [*client.results.values(), client.saving]:
        _settle(future, error)


def local_pipeline(
    plan: Plan, spec: LineSpec, stages: Sequence[Stage], *, places: int = 1, observe: Observer | None = None,
    make_link: MakeLink | None = None, native: bool | None = None,
) -> Pipeline:
    """All stages in threads of this process. make_link: of the links between them; native: as for `make_loop`."""
    devices = [stage.device for stage in stages]
    parcels = [(stage.spec.parcel_of(stage.plan), stage.device, stage.parcel.flat.dtype) for stage in stages]
    entry = make_local_link(*parcels[0], devices[:1], native)
    links: list[Link] = [entry]
    for i, parcel in enumerate(parcels[1:]):
        links.append(make_link(*parcel) if make_link else make_local_link(*parcel, devices[i : i + 1], native))
    pipeline = Pipeline(plan, spec, entry, places=places, observe=observe)
    ways = zip(stages, links, [*links[1:], None], strict=True)
    pipeline.workers = [LocalWorker(make_loop(i, *way, pipeline.handle, native=native)) for i, way in enumerate(ways)]
    return pipeline
