"""The loop of one stage: commands in order, blocks from the link, answers to the leader. One thread runs it.

On a GPU the loop launches a block while the one before it is still computed and tells of a block when its event has
come; nothing waits for the device in between.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liverelay.engine.relay.handoff import Link, LinkClosed
from liverelay.engine.relay.messages import (
    Block,
    Clean,
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
)
from liverelay.engine.relay.stage import Stage, set_device

Emit = Callable[[Event], None]
AHEAD = 1  # blocks that are launched and not waited for yet, while another one is launched


class StageLoop:
    """Runs a stage. `put` may be called from any thread; `run` is the thread's body and returns after `Stop`.

    index: the stage's number in the plan; source: where its blocks come from; target: where they go, None for the
    last stage; emit: takes answers, from the loop's thread.
    """

    def __init__(self, index: int, stage: Stage, source: Link, target: Link | None, emit: Emit) -> None:
        self.index, self.stage, self.source, self.target, self.emit = index, stage, source, target, emit
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._since: float | None = None
        self._launched: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()

    @property
    def working_since(self) -> float | None:
        """When the command that is worked on was begun, on the clock `time.monotonic`; the watchdog looks."""
        return self._since

    def put(self, command: Command) -> None:
        if isinstance(command, Block):
            self.source.expect()
        self.inbox.put(command)

    def run(self) -> None:
        """Work until `Stop`. What goes wrong with a session is told and the loop goes on; its links' end ends it."""
        try:
            set_device(self.stage.device)
            with torch.inference_mode():
                while not isinstance(command := self._next(), Stop):
                    self._do(command)
                self._settle(0)
        except LinkClosed:
            pass
        except BaseException as error:
            self.emit(Failed(self.index, -1, error))
        finally:
            self._since = None

    def _next(self) -> Command:
        """The next command; what was launched is waited for where there is none yet."""
        self._since = None
        if self._launched:
            try:
                return self.inbox.get_nowait()
            except queue.Empty:
                self._settle(0)
        return self.inbox.get()

    def _do(self, command: Command) -> None:
        if isinstance(command, Block):
            return self._block(command)
        self._since = time.monotonic()
        self._serve(command)

    def _serve(self, command: Command) -> None:
        """Anything but a block."""
        stage, place = self.stage, command.place
        try:
            if isinstance(command, Open | Load):
                stage.open(place, command.tensors)
            if isinstance(command, Load):
                stage.load(place, command.tensors, command.numbers)
            elif isinstance(command, Sink):
                stage.prepare_sink(place, command.tensors["reference"])
            elif isinstance(command, Save):
                self._settle(0)
                self.emit(Saved(self.index, command.serial, *stage.save(place)))
        except Exception as error:
            self.emit(Failed(self.index, command.serial, error))

    def _block(self, command: Block) -> None:
        asked = time.perf_counter()
        self.source.receive(self.stage.parcel)
        begun, self._since = time.perf_counter(), time.monotonic()
        started, answers = self._event(), list[Callable[[], Event]]()
        try:
            answers = self._compute(command)
        except Exception as error:  # the block goes on along the line, whose order is fixed; nobody takes its result
            self.emit(Failed(self.index, command.serial, error))
        computed, ended = self._event(), time.perf_counter()
        if self.target is not None:
            self.target.send(self.stage.outgoing)

        def tell() -> None:
            now = time.perf_counter()
            done, start = (ended, begun) if computed is None or started is None else (
                now, now - 1e-3 * started.elapsed_time(computed))  # fmt: skip
            for answer in answers:
                self.emit(answer())
            self.emit(Done(self.index, command.serial, command.block, asked, start, done, time.perf_counter()))

        if computed is None:
            tell()
        else:
            self._launched.append((computed, tell))
            self._settle(AHEAD)

    def _compute(self, command: Block) -> list[Callable[[], Event]]:
        """Launch the stage's work on the parcel; returns what is to be told when it is done."""
        stage, serial, block = self.stage, command.serial, command.block
        answers: list[Callable[[], Event]] = []

        def keep(step: int, latent: Tensor) -> None:
            self.emit(Stepped(self.index, serial, block, step, latent.clone()))

        stage.denoise(command.place, command, keep if command.keep else None)
        if stage.last_step and block == 0:
            clean = on_host(stage.parcel.parts["latent"][:, :1].clone())
            answers.append(lambda: Clean(self.index, serial, clean))
        video = stage.decode(command.place, block) if stage.plan.decode else None
        if stage.plan.makes_video:
            frames = None if video is None else on_host(video)
            answers.append(
                lambda: Finished(self.index, serial, block, None if frames is None else frames.numpy().copy())
            )
        return answers

    def _event(self) -> Any:
        if self.stage.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self, left: int) -> None:
        """Wait until no more than `left` launched blocks are under way, and tell of those that are done."""
        while len(self._launched) > left:
            event, tell = self._launched.popleft()
            event.synchronize()
            tell()


def on_host(tensor: Tensor) -> Tensor:
    """The tensor itself where it is on the host; from a GPU a copy that is there when the GPU gets so far. It is in
    pinned memory, which is scarce and comes round: what is to be kept is copied out of it."""
    return tensor.to("cpu", non_blocking=True)
