"""The loop of one stage in C++ (csrc/stage_loop.h), with interface and answers of its readable twin, `StageLoop`.

Stages on GPUs run here, all others in Python: on a CPU there are no graphs, so C++ would call Python for every block.

Two threads: one is in C++ and holds the interpreter's lock only while it calls Python for a job; the other tells the
leader, so nobody who takes an answer holds up the stage. Links within the process are C++ too (`NativeLink`), others
are called. What a stage computes is called, but for blocks whose graphs are all captured.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from liverelay.engine import native
from liverelay.engine.devices import device_fault
from liverelay.engine.errors import LiveRelayError
from liverelay.engine.relay.captured import Captured
from liverelay.engine.relay.dispatch import BUFFERS
from liverelay.engine.relay.handoff import Link, LinkClosed, LocalLink, Parcel, Shapes
from liverelay.engine.relay.loop import AHEAD, Emit, StageLoop, stage_lost
from liverelay.engine.relay.messages import Block, Command, Done, Event, Failed, Stop
from liverelay.engine.relay.stage import Stage, set_device

if TYPE_CHECKING:
    from liverelay.engine._C import StageLink, StageProgram
    from liverelay.engine._C import StageLoop as NativeLoop

HOST = -1  # instead of a GPU's number
Part = tuple[int, int, int]  # offset in a link's buffer, address of the stage's memory, bytes
Told = tuple[int, float, float, float, float, str]


def native_fault(device: torch.device) -> str:
    """Why stages on this device cannot run in C++; empty where they can."""
    module: Any = native.module()
    if not hasattr(module, "StageLoop"):
        return "the compiled module was not built: that needs a C++ compiler and cmake"
    if device.type == "cpu":
        return ""
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec"):
        return "this PyTorch does not hand out its CUDA graphs"
    return str(module.cuda_open())


def runs_native(device: torch.device) -> bool:
    """Whether this device's stages run in C++: those of a GPU, where that can be. The frames are the same."""
    return device.type == "cuda" and not native_fault(device)


def make_loop(
    index: int, stage: Stage, source: Link, target: Link | None, emit: Emit, *, native: bool | None = None
) -> StageLoop:
    """A stage's loop. native: tests and benchmarks force C++ (True) or Python; None: `runs_native`."""
    kind = NativeStageLoop if _chosen(stage.device, native) else StageLoop
    return kind(index, stage, source, target, emit)


def make_local_link(
    shapes: Shapes, device: torch.device, dtype: torch.dtype, devices: Sequence[torch.device],
    native: bool | None = None,
) -> LocalLink:
    """A link within this process. devices: of both ends; events of a native link belong to one device."""
    same = all(other == device for other in devices)
    return (NativeLink if same and _chosen(device, native) else LocalLink)(shapes, device, dtype)


def _chosen(device: torch.device, native: bool | None) -> bool:
    return runs_native(device) if native is None else native


class NativeLink(LocalLink):
    """As `LocalLink`: its buffers change hands in C++, so a native loop sends and receives without Python."""

    def __init__(self, shapes: Shapes, device: torch.device | str, dtype: torch.dtype) -> None:
        module: Any = native.module()
        super().__init__(shapes, device, dtype)
        self.parcels = [item[0] for _ in range(BUFFERS) if (item := self._free.get()) is not None]
        flat = self.parcels[0].flat
        self.device = flat.device
        index = flat.device.index if flat.is_cuda else HOST
        buffers = [parcel.flat.data_ptr() for parcel in self.parcels]
        self.native: StageLink = module.StageLink(buffers, flat.nbytes, index)

    def receive(self, into: Parcel) -> None:
        with self._on_device():
            buffer = self._checked(self.native.take_full(self._stream()))
            into.fill(self.parcels[buffer].parts)
            self.native.give_free(buffer, self._stream())

    def send(self, parcel: Parcel) -> None:
        with self._on_device():
            buffer = self._checked(self.native.take_free(self._stream()))
            self.parcels[buffer].fill(parcel.parts)
            self.native.give_full(buffer, self._stream())

    def close(self) -> None:
        self.native.close()

    def parts(self, own: Parcel, *, sends: bool) -> list[Part] | None:
        """What a stage moves between its parcel and a buffer; None where that is more than copies of bytes."""
        buffer = self.parcels[0]
        if own.flat.dtype != buffer.flat.dtype or own.flat.device != self.device:
            return None
        start, names = buffer.flat.data_ptr(), (buffer if sends else own).parts
        return [(buffer.parts[name].data_ptr() - start, own.parts[name].data_ptr(), own.parts[name].nbytes)
                for name in names]  # fmt: skip

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        """The leader's thread may be on another GPU, where the number of the default stream, 0, is that one's own."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    @staticmethod
    def _checked(buffer: int) -> int:
        if buffer < 0:
            raise LinkClosed
        return buffer


@dataclass
class Job:
    """A command under way. answers: what is told when it is done, in order."""

    command: Command
    called: bool = True  # Python computes it, so what the host knows of the stage is behind until it is done
    answers: list[Callable[[], Event]] = field(default_factory=list)
    give_back: Callable[[], None] = lambda: None


class NativeStageLoop(StageLoop):
    """Runs a stage. bound_s: seconds from which on a job is held to hang, which ends the line; 0: whoever asks
    `working_since` decides."""

    def __init__(
        self, index: int, stage: Stage, source: Link, target: Link | None, emit: Emit, *, bound_s: float = 0.0
    ) -> None:
        module: Any = native.module()
        super().__init__(index, stage, source, target, self._keep)
        self._tell, self._bound_s = emit, bound_s
        self._native: NativeLoop = module.StageLoop(AHEAD, bound_s)
        self._new_program: type[StageProgram] = module.StageProgram
        self._lock = threading.Lock()  # of what follows; nobody waits for anything else while holding it
        self._pending: deque[Command] = deque()
        self._jobs: dict[int, Job] = {}
        self._numbers, self._called = 0, 0
        self._answers: list[Callable[[], Event]] = []  # of the job that Python computes
        self._fault: BaseException | None = None
        self._captured = Captured(stage)

    @property
    def working_since(self) -> float | None:
        return self._native.working_since_s or None

    def put(self, command: Command) -> None:
        if isinstance(command, Block):
            self.source.expect()
        with self._lock:
            self._pending.append(command)
            self._pump()

    @torch.inference_mode()  # whoever takes an answer may send the next block into a stage's buffers
    def run(self) -> None:
        """Tell of jobs until `Stop`; the jobs have a thread of their own."""
        thread = threading.Thread(target=self._work, name=f"{threading.current_thread().name} loop", daemon=True)
        thread.start()
        try:
            while (told := self._native.take()) is not None:
                self._take(told)
        except BaseException as error:  # of whoever takes the answers, or of the device; the links' end ends the thread
            self._native.cancel()
            return self._tell(Failed(self.index, -1, self._cause(error)))
        thread.join()
        if self._fault is not None:
            self._tell(Failed(self.index, -1, self._cause(self._fault)))

    def _work(self) -> None:
        """The thread of the jobs; device and inference mode are a thread's own."""
        try:
            device = self.stage.device
            set_device(device)
            with torch.inference_mode():
                if device.type == "cuda":
                    self._native.run(device.index, torch.cuda.current_stream(device).cuda_stream)
                else:
                    self._native.run()
        except LinkClosed:
            pass
        except BaseException as error:
            self._fault = error
        finally:
            self._native.end()

    # -- from commands to jobs -------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Give the loop what is pending, in order. A block without Python is prepared from what the host knows of the
        stage, so it waits for jobs that Python computes."""
        while self._pending:
            command = self._pending[0]
            if isinstance(command, Stop):
                self._native.stop()
            else:
                job, program = Job(command), None
                if isinstance(command, Block):
                    if not self._called:
                        program = self._program(command, job)
                    elif self._captured.ready(command):
                        return
                job.called = program is None
                self._called += job.called
                self._jobs[self._numbers] = job
                if not self._native.put(self._numbers, program or self._call_program(job)):
                    self._jobs.clear()  # the loop has ended
                self._numbers += 1
            self._pending.popleft()

    def _program(self, block: Block, job: Job) -> StageProgram | None:
        """A block without Python, where that can be; sets the job's answers."""
        if not self._captured.ready(block):
            return None
        prepared = self._captured.prepare(self.index, block)
        job.answers, job.give_back = prepared.answers, prepared.give_back
        return self._around(prepared.add)

    def _call_program(self, job: Job) -> StageProgram:
        return self._around(lambda program: program.call(lambda: self._call(job)), isinstance(job.command, Block))

    def _around(self, work: Callable[[StageProgram], None], block: bool = True) -> StageProgram:
        """A job's work with its times, and the block's way in and out."""
        program = self._new_program()
        if block:
            self._move(program, self.source, sends=False)
        program.begun()
        work(program)
        program.computed()
        if block and self.target is not None:
            self._move(program, self.target, sends=True)
        return program

    def _move(self, program: StageProgram, link: Link, *, sends: bool) -> None:
        own = self.stage.outgoing if sends else self.stage.parcel
        parts = link.parts(own, sends=sends) if isinstance(link, NativeLink) else None
        if isinstance(link, NativeLink) and parts is not None:
            (program.send if sends else program.receive)(link.native, parts)
        else:
            program.call(lambda: (link.send if sends else link.receive)(own))

    # -- in the thread of the jobs ---------------------------------------------------------------------------------

    def _call(self, job: Job) -> None:
        self._answers, command = job.answers, job.command
        if not isinstance(command, Block):
            return self._serve(command)
        try:
            answers = self._compute(command)
        except Exception as error:  # the block goes on along the line, whose order is fixed; nobody takes its result
            return self._lose_session(command.serial, error)
        if self.stage.device.type == "cuda":
            job.answers += answers  # when the device got so far
        else:
            for answer in answers:
                self._keep(answer())

    def _keep(self, event: Event) -> None:
        self._answers.append(lambda: event)

    # -- in the thread that tells ----------------------------------------------------------------------------------

    def _take(self, told: Told) -> None:
        number, asked, begun, computed, ended, fault = told
        if number < 0:
            name = self.stage.plan.name
            error = LiveRelayError(f"stage {name} has been at one block for more than {self._bound_s:g} s")
            return self._tell(Failed(self.index, -1, error))
        with self._lock:
            job = self._jobs.pop(number)
            self._called -= job.called
            self._pump()
        command = job.command
        if fault and (lost := device_fault(self.stage.device)):
            raise stage_lost(self.stage, lost)
        if fault:
            self._tell(Failed(self.index, command.serial, LiveRelayError(f"stage {self.stage.plan.name}: {fault}")))
        else:
            for answer in job.answers:
                self._tell(answer())
        job.give_back()
        if isinstance(command, Block):
            self._tell(Done(self.index, command.serial, command.block, asked, begun, computed, ended))
