"""A line over several processes: rank r runs stage r, rank 0 leads. Started by torchrun, one process for each stage.

Blocks go from rank to rank (relay/remote.py). Commands and answers go between the leader and each rank over a socket,
whose end shows at once that a process has died; a word every second shows that one still lives, and how long it has
been at its work. Whoever sees the line broken ends its own process with an error that names the stage.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from liverelay.engine.errors import LiveRelayError, StageLost
from liverelay.engine.relay.group import START_S, Abort, Beat, Build, End, Group, Ready
from liverelay.engine.relay.messages import Command, Event, Failed, Stop
from liverelay.engine.relay.native_loop import make_local_link, make_loop
from liverelay.engine.relay.pipeline import LocalWorker, Observer, Pipeline
from liverelay.engine.relay.plan import Plan
from liverelay.engine.relay.room import Room
from liverelay.engine.relay.stage import LineSpec, Stage

SLOW_STARTS = 30  # times the timeout, for work that loads, compiles and captures
WARM_BLOCKS = 16  # answers of a stage until it has met all ring slots and fill levels
HANG_UP_S = 2.0  # that a rank is waited for when it was told to end
LAST_WORDS_S = 0.5  # that a process which is told to end waits for the reason
MakeStage = Callable[[LineSpec], Stage]


def portable(error: BaseException, name: str) -> LiveRelayError:
    """An error that another process can take, and that says where it came from."""
    if isinstance(error, StageLost):  # it names the stage
        return error
    kind = "" if isinstance(error, LiveRelayError) else f"{type(error).__name__}: "
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return StageLost(f"stage {name}: {kind}{text}")


# -- a rank that does not lead ----------------------------------------------------------------------------------------


class RankServer:
    """Runs one stage for the leader until it says `End`."""

    def __init__(self, group: Group, plan: Plan, make_stage: MakeStage) -> None:
        self.group, self.plan, self._make_stage = group, plan, make_stage
        self.name = plan.stages[group.rank].name
        self.channel = group.channels[0]
        self._worker: LocalWorker | None = None
        self._blocks = 0
        group.busy = self._beat

    def run(self) -> None:
        """Serve. StageLost when the line breaks, with the leader's reason where it gave one."""
        self.channel.put(Ready())
        try:
            while not isinstance(message := self._next(self.group.timeout_s), End):
                self._do(message)
        except KeyboardInterrupt:  # torchrun ends all ranks when one has died, before the leader can say which
            with contextlib.suppress(TimeoutError):
                until = time.monotonic() + LAST_WORDS_S
                while (left := until - time.monotonic()) > 0:
                    self._do(self._next(left))
            raise
        self.group.close()
        self.channel.close()

    def _next(self, timeout_s: float) -> Any:
        try:
            return self.channel.get(timeout_s)
        except EOFError:
            raise StageLost(f"stage {self.name} ends: the leader (stage {self.plan.stages[0].name}) is gone") from None
        except TimeoutError:
            if timeout_s < self.group.timeout_s:
                raise
            raise StageLost(
                f"stage {self.name} ends: the leader (stage {self.plan.stages[0].name}) was silent for "
                f"{self.group.timeout_s:g} s"
            ) from None

    def _do(self, message: Any) -> None:
        if isinstance(message, Abort):
            raise StageLost(message.text)
        if isinstance(message, Build):
            self._build(message.spec)
        elif isinstance(message, Stop) and self._worker is not None:
            self._worker.put(message)
            self._worker.close(broken=False)
            self._worker = None
        elif isinstance(message, Command) and self._worker is not None:
            self._worker.put(message)

    def _build(self, spec: LineSpec) -> None:
        fault = ""
        try:
            stage = self._make_stage(spec)
        except Exception as error:
            fault, stage = str(portable(error, self.name)), None
        if stage is not None:
            links = self.group.links(self.plan, stage)
            loop = make_loop(self.group.rank, stage, *links, self._emit)
            self._worker = LocalWorker(loop, [link for link in links if link is not None])
        self.channel.put(Ready(fault, None if stage is None else stage.room()))

    def _emit(self, event: Event) -> None:
        if isinstance(event, Failed):
            event = Failed(event.stage, event.serial, portable(event.error, self.name))
        self._blocks += 1
        self.channel.put(event)

    def _beat(self) -> Beat:
        since = self._worker.loop.working_since if self._worker is not None else None
        return Beat(0.0 if since is None else time.monotonic() - since, self._blocks)


# -- the leader -------------------------------------------------------------------------------------------------------


class RemoteWorker:
    """A stage in another process, as the leader sees it."""

    def __init__(self, leader: Leader, rank: int) -> None:
        self._leader, self.rank = leader, rank
        self.name = leader.plan.stages[rank].name
        self.channel = leader.group.channels[rank - 1]
        self.ready: queue.SimpleQueue[Ready] = queue.SimpleQueue()
        self._room = Room("", 0, None)
        self.over = False
        self._thread = threading.Thread(target=self._read, name=f"rank {rank}", daemon=True)
        self._thread.start()

    def put(self, command: Command) -> None:
        self.channel.put(command)

    def room(self) -> Room:
        """As it was when the rank built its stage, before any session: the rank's memory is the line's alone."""
        return self._room

    def close(self, *, broken: bool) -> None:
        """Nothing to wait for: the rank ends the line by itself and serves another one."""

    def end(self) -> None:
        """Let the rank end. It hangs up first: what it says to a socket that is closed would take `End` from it."""
        self.over = True
        self.channel.put(End())
        self._thread.join(HANG_UP_S)
        self.channel.close()

    def _read(self) -> None:
        timeout_s = self._leader.group.timeout_s
        while True:
            try:
                message = self.channel.get(timeout_s)
            except EOFError:
                return self._lost("has ended")
            except TimeoutError:
                return self._lost(f"was silent for {timeout_s:g} s")
            if isinstance(message, Beat):
                allowed = timeout_s * (SLOW_STARTS if message.blocks < WARM_BLOCKS else 1)
                if message.busy_s > allowed:
                    return self._lost(f"has been at one block for {message.busy_s:.0f} s")
            elif isinstance(message, Ready):
                if message.room is not None:
                    self._room = replace(message.room, device=f"{message.room.device} of stage {self.name}")
                self.ready.put(message)
            else:
                self._leader.take(message)

    def _lost(self, what: str) -> None:
        if not self.over:
            self._leader.lose(self.rank, f"stage {self.name} (rank {self.rank}) {what}")


class Leader:
    """Rank 0: builds lines over all ranks, watches them, and tells everybody when one is lost."""

    def __init__(self, group: Group, plan: Plan) -> None:
        self.group, self.plan = group, plan
        self.error: StageLost | None = None
        self._line: Pipeline | None = None
        self._own: LocalWorker | None = None
        group.busy = self._beat
        self.workers: list[RemoteWorker] = []
        for rank in range(1, group.world):
            self.workers.append(RemoteWorker(self, rank))
        self._wait_ready()

    def _wait_ready(self) -> None:
        """Until every rank has answered; StageLost or the rank's own fault."""
        for worker in self.workers:
            waited = time.monotonic()
            while True:
                if self.error is not None:
                    raise self.error
                try:
                    fault = worker.ready.get(timeout=0.2).fault
                    break
                except queue.Empty:
                    if time.monotonic() - waited > START_S:
                        raise StageLost(f"stage {worker.name} (rank {worker.rank}) did not get ready") from None
            if fault:
                raise StageLost(fault)

    def build(self, spec: LineSpec, stage: Stage, *, places: int, observe: Observer | None = None) -> Pipeline:
        """A line over all ranks. InputError while another one has sessions: the ranks hold one resolution at a time."""
        if self._line is not None:
            self._line.close()
        for worker in self.workers:
            worker.channel.put(Build(spec))
        _, target = self.group.links(self.plan, stage)
        shapes = spec.parcel_of(self.plan.stages[0])
        entry = make_local_link(shapes, stage.device, stage.dtype, [stage.device])
        line = Pipeline(self.plan, spec, entry, places=places, observe=observe)
        self._own = LocalWorker(make_loop(0, stage, entry, target, line.handle), [target])
        line.workers = [self._own, *self.workers]
        self._wait_ready()
        self._line = line
        return line

    def take(self, event: Event) -> None:
        """A rank's answer."""
        if isinstance(event, Failed) and event.serial < 0:
            self.lose(event.stage, str(event.error))
        elif self._line is not None:
            self._line.handle(event)

    def lose(self, rank: int, text: str) -> None:
        """The line is broken: everybody ends with this text."""
        if self.error is None:
            self.error = StageLost(text)
            for worker in self.workers:
                if worker.rank != rank:
                    worker.channel.put(Abort(text))
            if self._line is not None:
                self._line.handle(Failed(rank, -1, self.error))

    def last_words(self) -> None:
        """After an interrupt: StageLost if it came because a rank has died."""
        until = time.monotonic() + LAST_WORDS_S
        while self.error is None and time.monotonic() < until:
            time.sleep(0.05)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Let all ranks end."""
        self.group.close()
        if self._line is not None:
            self._line.close()
        for worker in self.workers:
            worker.end()

    def _beat(self) -> Beat:
        """Says that the leader lives, and looks after its own stage."""
        since = self._own.loop.working_since if self._own is not None else None
        if since is not None and time.monotonic() - since > self.group.timeout_s * SLOW_STARTS:
            self.lose(0, f"stage {self.plan.stages[0].name} (rank 0) has been at one block for too long")
        return Beat()
