"""The loop of one stage in Python: commands in order, blocks from the link, answers to the leader.

On a GPU the loop launches a block while the one before it is still computed; nothing waits for the device in between.
There it has two threads: one launches, the other tells of each block as soon as the device has finished it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liverelay.engine.devices import device_fault
from liverelay.engine.errors import StageLost
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
AHEAD = 1  # blocks that may be under way on the device while another one is launched


def stage_lost(stage: Stage, error: object) -> StageLost:
    """What ends a line whose stage has lost its GPU."""
    return StageLost(f"stage {stage.plan.name} has lost {stage.device}: {error}")


class Teller:
    """Tells of launched blocks, in order, each as soon as the device has finished it."""

    def __init__(self) -> None:
        self._launched: deque[tuple[Any, float, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._over = self._broken = False

    @property
    def waiting_since(self) -> float | None:
        """When the oldest block under way was launched, on the clock `time.monotonic`; None without one."""
        with self._changed:
            return self._launched[0][1] if self._launched else None

    def add(self, event: Any, tell: Callable[[], None]) -> None:
        """A block was launched, or there is something to tell after those that were.

        event: recorded on the device behind the block; None for what does not depend on the device.
        """
        with self._changed:
            self._launched.append((event, time.monotonic(), tell))
            self._changed.notify_all()

    def settle(self, left: int) -> None:
        """Wait until no more than `left` blocks are under way. LinkClosed where telling has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._broken or len(self._launched) <= left)
            if self._broken:
                raise LinkClosed

    def end(self) -> None:
        """No more blocks will come."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def run(self) -> None:
        """Tell until the end; what goes wrong is raised, and nothing more is told."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._launched or self._over)
                    if not self._launched:
                        return
                    event, _, tell = self._launched[0]
                if event is not None:
                    event.synchronize()
                tell()
                with self._changed:
                    self._launched.popleft()
                    self._changed.notify_all()
        except BaseException:
            with self._changed:
                self._broken = True
                self._changed.notify_all()
            raise


class StageLoop:
    """Runs a stage. `put` may be called from any thread; `run` is the thread's body and returns after `Stop`.

    index: the stage's number in the plan; source: where its blocks come from; target: where they go, None for the
    last stage; emit: takes answers, from the loop's threads.
    """

    def __init__(self, index: int, stage: Stage, source: Link, target: Link | None, emit: Emit) -> None:
        self.index, self.stage, self.source, self.target, self.emit = index, stage, source, target, emit
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._since: float | None = None
        self._teller: Teller | None = None  # on a GPU, while the loop runs

    @property
    def working_since(self) -> float | None:
        """When the command that is worked on was begun, on the clock `time.monotonic`; the watchdog looks."""
        teller = self._teller
        return self._since or (teller.waiting_since if teller is not None else None)

    def put(self, command: Command) -> None:
        if isinstance(command, Block):
            self.source.expect()
        self.inbox.put(command)

    @torch.inference_mode()  # whoever takes an answer may send the next block into a stage's buffers
    def run(self) -> None:
        """Work until `Stop`. What goes wrong with a session is told and the loop goes on; its links' end ends it."""
        if not self._asynchronous:
            return self._work()
        self._teller = Teller()
        worker = threading.Thread(target=self._work, name=f"{threading.current_thread().name} loop", daemon=True)
        worker.start()
        try:
            set_device(self.stage.device)
            self._teller.run()
        except BaseException as error:
            return self._fail(error)
        worker.join()

    def _work(self) -> None:
        """The commands, in order; device and inference mode are a thread's own."""
        try:
            set_device(self.stage.device)
            with torch.inference_mode():
                while not isinstance(command := self._next(), Stop):
                    self._do(command)
        except LinkClosed:
            pass
        except BaseException as error:
            self._fail(error)
        finally:
            self._since = None
            if self._teller is not None:
                self._teller.end()

    @property
    def _asynchronous(self) -> bool:
        """Whether work is launched rather than done when a call returns."""
        return self.stage.device.type == "cuda"

    def _fail(self, error: BaseException) -> None:
        """The stage is lost, and its line with it."""
        self.emit(Failed(self.index, -1, self._cause(error)))

    def _cause(self, error: BaseException) -> BaseException:
        """The error, or StageLost with the stage's name where its GPU is what was lost."""
        fault = "" if isinstance(error, StageLost) else device_fault(self.stage.device)
        return stage_lost(self.stage, fault) if fault else error

    def _answer(self, event: Event) -> None:
        """Tell of something in the thread that tells, behind the blocks that were launched: whoever takes it may close
        the line, which waits for this one."""
        if self._teller is None:
            self.emit(event)
        else:
            self._teller.add(None, lambda: self.emit(event))

    def _next(self) -> Command:
        self._since = None
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
                self._answer(Saved(self.index, command.serial, *stage.save(place)))
        except Exception as error:
            self._lose_session(command.serial, error)

    def _lose_session(self, serial: int, error: Exception) -> None:
        """What went wrong costs one session; StageLost where it cost the stage its GPU, and so every session."""
        if fault := device_fault(self.stage.device):
            raise stage_lost(self.stage, fault) from error
        self._answer(Failed(self.index, serial, error))

    def _block(self, command: Block) -> None:
        asked = time.perf_counter()
        self.source.receive(self.stage.parcel)
        begun, self._since = time.perf_counter(), time.monotonic()
        started, answers = self._event(), list[Callable[[], Event]]()
        try:
            answers = self._compute(command)
        except Exception as error:  # the block goes on along the line, whose order is fixed; nobody takes its result
            self._lose_session(command.serial, error)
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

        if self._teller is None:
            tell()
        else:
            self._teller.add(computed, tell)
            self._settle(AHEAD)

    def _compute(self, command: Block) -> list[Callable[[], Event]]:
        """Launch the stage's work on the parcel; returns what is to be told when it is done."""
        stage, serial, block = self.stage, command.serial, command.block
        answers: list[Callable[[], Event]] = []

        def keep(step: int, latent: Tensor) -> None:
            self._answer(Stepped(self.index, serial, block, step, latent.clone()))

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
        if not self._asynchronous:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self, left: int) -> None:
        """Wait until no more than `left` launched blocks are under way; the others have been told."""
        if self._teller is not None:
            self._teller.settle(left)


def on_host(tensor: Tensor) -> Tensor:
    """The tensor itself where it is on the host; from a GPU a copy that is there when the GPU gets so far. It is in
    pinned memory, which is scarce and comes round: what is to be kept is copied out of it."""
    return tensor.to("cpu", non_blocking=True)
