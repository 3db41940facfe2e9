# mypy: ignore-errors
"""The machine behind kernels/gluon_interpreter.py: partitions and their scheduler, shared memory, barriers.

Every partition is a thread, one thread runs at a time, and a seeded scheduler picks who goes on at every operation.
What is asynchronous on the device happens whenever the scheduler picks it. Faults do not have to meet an unlucky order
to be seen: every access to shared memory is an event, every partition, barrier phase and copy knows a set of events (as
bits of an integer) that are over for it, and an access that does not know an older one it conflicts with is a race.
"""

from __future__ import annotations

import math
import operator
import random
import threading
from types import SimpleNamespace

import torch

from liverelay.kernels.tma import View

WEIGHTS = (0.01, 0.1, 1.0, 1.0, 10.0)  # how readily a partition or an operation is picked
RUNNING: list[Machine] = []  # the innermost is the one that runs


class Fault(RuntimeError):
    """The kernel breaks a rule of the device; the text names the order's seed."""


class Stopped(BaseException):
    """Ends the threads that are left after a fault."""


# -- who runs, and what is over for whom -------------------------------------------------------------------------------


class Partition:
    """A thread of the program. known: events that are over for it; fenced: those that TMA and wgmma see as well."""

    def __init__(self, machine, name, work, parent=None):
        self.machine, self.name, self.work, self.result = machine, name, work, None
        self.known, self.fenced = (parent.known, parent.fenced) if parent else (0, 0)
        self.turn, self.until, self.waits_for, self.over = threading.Semaphore(0), None, "", False
        self.weight = machine.rng.choice(WEIGHTS)
        self.products, self.stores = [], []  # not waited for yet, in order
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        self.turn.acquire()
        try:
            if not self.machine.fault:
                self.result = self.work()
                unfinished = "wgmma" if self.products else "TMA store" if self.stores else ""
                if unfinished:
                    raise Fault(f"{self.name} ends with a {unfinished} that it did not wait for")
        except Stopped:
            pass
        except BaseException as fault:
            self.machine.fault = self.machine.fault or fault
        self.over = True
        self.machine.back.release()

    def pause(self, until=None, waits_for=""):
        """Let the others go on, and come back when the condition holds."""
        self.until, self.waits_for = until, waits_for
        self.machine.back.release()
        self.turn.acquire()
        if self.machine.fault:
            raise Stopped
        self.until = None

    def ready(self):
        return not self.over and (self.until is None or self.until())


class Operation:
    """Something asynchronous; `bit` is its event, `happen` what it does."""

    def __init__(self, machine, partition, bit, happen, ordered=False):
        self.partition, self.bit, self.happen, self.ordered, self.done = partition, bit, happen, ordered, False
        self.weight = machine.rng.choice(WEIGHTS)
        self.value = None
        machine.pending.append(self)

    def finish(self, machine):
        if not self.done:
            self.done = True
            machine.pending.remove(self)
            self.value = self.happen()


class Machine:
    """One program: its partitions, what is under way, and the scheduler."""

    def __init__(self, program, programs, seed):
        self.program, self.programs = program, programs
        self.rng = random.Random(f"{seed} {program}")
        self.partitions, self.pending, self.names, self.events, self.copies = [], [], [], 0, 0
        self.current = self.fault = None
        self.back = threading.Semaphore(0)

    def event(self):
        self.events += 1
        return 1 << self.events

    def add(self, name, work, parent=None):
        partition = Partition(self, name, work, parent)
        self.partitions.append(partition)
        partition.thread.start()
        return partition

    def go_on(self, partition):
        self.current = partition
        partition.turn.release()
        self.back.acquire()

    def run(self):
        """Until everybody has ended; raises the first fault."""
        while not self.fault and not all(partition.over for partition in self.partitions):
            blocked = set()
            choices = [partition for partition in self.partitions if partition.ready()]
            for operation in self.pending:
                if not operation.ordered or operation.partition not in blocked:
                    choices.append(operation)
                blocked |= {operation.partition} if operation.ordered else set()
            if not choices:
                waiting = "; ".join(f"{p.name}: {p.waits_for}" for p in self.partitions if not p.over)
                self.fault = Fault(f"deadlock: {waiting}")
                break
            chosen = self.rng.choices(choices, [choice.weight for choice in choices])[0]
            try:
                chosen.finish(self) if isinstance(chosen, Operation) else self.go_on(chosen)
            except Exception as fault:  # of an operation, such as bytes that a barrier does not expect
                self.fault = fault
        for partition in self.partitions:
            if self.fault and not partition.over:
                self.go_on(partition)
        seen = 0
        for partition in self.partitions:
            seen |= partition.known
        if not self.fault and self.copies & ~seen:
            self.fault = Fault("the program ends with copies that nobody waited for")
        if self.fault:
            raise self.fault


def here():
    """The partition that runs, after the others had their chance."""
    partition = RUNNING[-1].current
    partition.pause()
    return partition


# -- values, shared memory, barriers -----------------------------------------------------------------------------------


class Block:
    """A tensor in registers; never changed in place."""

    type = SimpleNamespace(layout=None)

    def __init__(self, data):
        self.data, self.dtype, self.shape = data, data.dtype, list(data.shape)

    def to(self, dtype):
        return Block(self.data.to(dtype))

    def __getitem__(self, index):
        return Block(self.data[index])

    def reshape(self, shape):
        return Block(self.data.reshape(shape))

    def permute(self, dims):
        return Block(self.data.permute(dims))


def bare(value):
    if isinstance(value, Operation):
        raise Fault("the result of a wgmma is used before its wait")
    return value.data if isinstance(value, Block) else value


def _both_ways(act):
    """The two operators of a block and something else that apply `act`."""

    def forth(self, other):
        return Block(act(self.data, bare(other)))

    def back(self, other):
        return Block(act(bare(other), self.data))

    return forth, back


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "lshift"):
    _forth, _back = _both_ways(getattr(operator, _name))
    setattr(Block, f"__{_name.strip('_')}__", _forth)
    setattr(Block, f"__r{_name.strip('_')}__", _back)


class Memory:
    """A shared buffer, or a view of it: data, its place within the buffer (a range for each of its dimensions)."""

    def __init__(self, data, written, place, accesses, name):
        self.data, self.written, self.place, self.accesses, self.name = data, written, place, accesses, name
        self.dtype, self.shape = data.dtype, list(data.shape)

    @classmethod
    def make(cls, dtype, shape, name):
        data = torch.full(shape, math.nan).to(dtype)
        return cls(data, torch.zeros(shape, dtype=torch.bool), tuple((0, size) for size in shape), [], name)

    def _part(self, act, place):
        return Memory(act(self.data), act(self.written), place, self.accesses, self.name)

    def index(self, at):
        if not 0 <= at < self.shape[0]:
            raise Fault(f"index {at} of {self.name}, which has {self.shape[0]}")
        first = len(self.place) - self.data.dim()
        start = self.place[first][0] + at
        return self._part(lambda part: part[at], (*self.place[:first], (start, start + 1), *self.place[first + 1 :]))

    def slice(self, start, length, dim=0):
        at = len(self.place) - self.data.dim() + dim
        first = self.place[at][0] + start
        place = (*self.place[:at], (first, first + length), *self.place[at + 1 :])
        return self._part(lambda part: part.narrow(dim, start, length), place)

    def permute(self, dims):  # only ever the operand of a product: its place stays in the buffer's order
        return self._part(lambda part: part.permute(dims), self.place)

    def reshape(self, shape):  # only ever the target of a copy
        return self._part(lambda part: part.view(shape), self.place)

    def _reinterpret(self, dtype, shape, layout):  # only its first dimension is ever cut
        times = dtype.itemsize // self.dtype.itemsize
        words = Memory(self.data.view(dtype), self.written[..., ::times], self.place, self.accesses, self.name)
        if words.shape != list(shape):
            raise Fault(f"{self.name} as {dtype} is {words.shape}, not {list(shape)}")
        return words

    def touch(self, partition, bit, what, write, instruction=False):
        """Record an access and check it against the older ones. instruction: not by TMA or wgmma."""
        for place, old, what_old, wrote, by_instruction in self.accesses:
            if not (write or wrote) or any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(place, self.place)):  # noqa: B905
                continue
            if not old & partition.known:
                raise Fault(f"race: {what} of {self.name} {self.place} by {partition.name} with {what_old}")
            if wrote and by_instruction and not instruction and not old & partition.fenced:
                raise Fault(f"no fence: {what} of {self.name} by {partition.name} after {what_old}")
        if write:
            self.accesses[:] = [access for access in self.accesses if not all(
                b[0] <= a[0] and a[1] <= b[1] for a, b in zip(access[0], self.place))]  # noqa: B905  # fmt: skip
        elif not self.written.all():
            raise Fault(f"race: {what} of {self.name} {self.place} by {partition.name} before anybody wrote it")
        self.accesses.append((self.place, bit, f"a {what} by {partition.name}", write, instruction))

    def load(self, layout):
        partition = here()
        bit = RUNNING[-1].event()
        self.touch(partition, bit, "load", write=False, instruction=True)
        partition.known |= bit
        return Block(self.data.clone())

    def store(self, value):
        partition = here()
        bit = RUNNING[-1].event()
        if bare(value).shape != self.data.shape or value.dtype != self.dtype:
            raise Fault(f"store of {value.dtype} {value.shape} into {self.name}: {self.dtype} {self.shape}")
        self.touch(partition, bit, "store", write=True, instruction=True)
        partition.known |= bit
        self.data.copy_(bare(value))
        self.written.fill_(True)


class Barrier:
    """mbarrier: arrivals and bytes that its phase still lacks, phases over, and what whoever waited for one knows."""

    def __init__(self, name):
        self.name, self.count, self.start = name, None, 0

    def init(self, partition, count):
        self.start = RUNNING[-1].event()
        self.count = self.missing = count
        self.bytes = self.phase = 0
        self.known = self.fenced = self.coming = self.coming_fenced = 0
        partition.known |= self.start

    def check(self, partition, mask):
        if self.count is None or not self.start & mask:
            raise Fault(f"{partition.name} uses {self.name}, whose init it cannot see")

    def arrive(self, partition, count, more_bytes=0):
        self.check(partition, partition.known)
        if count > self.missing:
            raise Fault(f"{self.name}: {partition.name} arrives, and only {self.missing} arrivals are left")
        self.missing -= count
        self.bytes += more_bytes
        self.coming |= partition.known
        self.coming_fenced |= partition.fenced
        self.turn()

    def receive(self, size, bit):
        self.bytes -= size
        self.coming |= bit
        self.turn()

    def turn(self):
        """Begin the next phase if this one has all."""
        if self.missing or self.bytes:
            return
        self.phase += 1
        self.missing = self.count
        self.known |= self.coming
        self.fenced |= self.coming_fenced
        self.coming = self.coming_fenced = 0

    def wait(self, partition, parity):
        self.check(partition, partition.known)
        if parity not in (0, 1):
            raise Fault(f"{self.name}: {partition.name} waits for phase {parity}")
        what = f"{self.name}, parity {parity}, {self.missing} arrivals and {self.bytes} bytes missing"
        partition.pause(lambda: self.phase & 1 != parity, what)
        partition.known |= self.known
        partition.fenced |= self.fenced


class Barriers:
    """Shared memory that holds barriers."""

    def __init__(self, items):
        self.items = items

    def index(self, at):
        if not 0 <= at < len(self.items):
            raise Fault(f"index {at} of {len(self.items)} barriers")
        return Barriers([self.items[at]])

    @property
    def one(self):
        (item,) = self.items
        return item


class Pointer:
    """An address within a tensor of global memory, or a block of them."""

    def __init__(self, tensor, at=0):
        self.tensor, self.at = tensor, at

    @classmethod
    def of(cls, tensor):
        """The address of a tensor whose strides may leave gaps."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.as_strided((reach,), (1,)))

    def __add__(self, count):
        return Pointer(self.tensor, self.at + bare(count))


class Descriptor:
    """TMA's view of a tensor in global memory: boxes beyond its end are filled with zeros, and cut when stored."""

    def __init__(self, given):
        self.given, self.shape, self.dtype = given, list(given.block_shape), given.base.dtype
        self.view, self.layout = View.of(given), given.layout
        for fault in self.view.faults():
            raise Fault(f"a descriptor of {self.dtype} {list(given.shape)}: {fault}")
        self.block_type = SimpleNamespace(nbytes=math.prod(self.shape) * self.dtype.itemsize, shape=self.shape)

    @property
    def tensor(self):
        return self.given.base.as_strided(self.given.shape, self.given.strides)

    def box(self, coordinates, memory, stored=False):
        """Slices of the tensor and of a box in shared memory; Fault where the device could not copy between them."""
        at = memory.data.storage_offset() * memory.dtype.itemsize
        found = [self.view.start_fault(coordinates[-1]), self.view.memory_fault(at)]
        if fault := next(filter(None, [*found, self.view.store_fault() if stored else ""]), ""):
            raise Fault(f"{fault} ({self.dtype} {list(self.given.shape)} at {list(coordinates)}, {memory.name})")
        if memory.shape != self.shape or memory.dtype != self.dtype or not memory.data.is_contiguous():
            raise Fault(f"a box {self.shape} of {self.dtype} and {memory.name}: {memory.shape} of {memory.dtype}")
        ranges = [(at, max(0, at), min(at + size, whole), size)
                  for at, size, whole in zip(coordinates, self.shape, self.given.shape, strict=True)]  # fmt: skip
        outer = tuple(slice(low, max(low, high)) for _, low, high, _ in ranges)
        return outer, tuple(slice(low - at, max(low, high) - at) for at, low, high, _ in ranges)
