# mypy: ignore-errors
"""Runs Gluon kernels as they are written without a GPU, and finds faults of their synchronisation.

Where Triton's interpreter runs (TRITON_INTERPRET=1), `launch.run` starts Gluon kernels here.

Triton's interpreter knows no Gluon. Here the Python bodies of the jit functions run with other globals: values are
torch tensors (bfloat16 rounds as torch's casts do), partitions of `warp_specialize` run in turns (kernels/
gluon_machine.py), in an order that a seed gives. A TMA copy arrives any time after it was asked for, a wgmma reads its
shared memory any time between its start and its wait (in order within a partition), a TMA store reads its source any
time before its wait. Shared memory starts as NaN. `Fault` is raised for
- races: a tile read before its copy was waited for, or written while a wgmma, a TMA store or another partition may
  still read it; reads of memory that nobody wrote;
- shared memory written by instructions (a barrier's init included) and then used by TMA or wgmma without a
  `fence_async_shared` between them;
- a result of wgmma that is used before its wait; stores, wgmmas or copies that nobody waited for at the end; arrivals
  beyond a barrier's count; every partition waiting (a deadlock);
- a descriptor, the start of a copy or its place in shared memory that breaks a rule of TMA (kernels/tma.py); buffers
  start at whole swizzles there, as Triton's allocator places them.
Not modelled: layouts, what swizzles do, places of barriers, numbers of registers, and threads within a partition, where
the compiler sets its own barriers. All of that is seen in what the compiler makes of the kernel.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from liverelay.kernels import gluon_machine as gm
from liverelay.kernels.gluon_machine import RUNNING, Block, Fault, bare, here

_seed = [0]


@contextlib.contextmanager
def order(seed: int) -> Iterator[None]:
    """Within this, kernels run in the order that the seed gives (0 otherwise)."""
    _seed.append(seed)
    try:
        yield
    finally:
        _seed.pop()


def run(kernel, programs, args, meta):
    """Run all programs of a kernel, one after the other, on CPU tensors."""
    parameters = inspect.signature(kernel.fn).parameters
    given = inspect.signature(kernel.fn).bind(*args, **{name: meta[name] for name in meta if name in parameters})
    ready = {name: prepared(value) for name, value in given.arguments.items()}
    for program in range(programs):
        machine = gm.Machine(program, programs, _seed[-1])
        RUNNING.append(machine)
        try:
            machine.add("the program", functools.partial(Function(kernel), **ready))
            machine.run()
        except Fault as fault:
            raise Fault(f"{kernel.fn.__name__}: {fault} (order {_seed[-1]}, program {program})") from fault
        finally:
            RUNNING.pop()


def prepared(value):
    """An argument of the launch as the kernel sees it."""
    if isinstance(value, TensorDescriptor):
        return gm.Descriptor(value)
    return gm.Pointer.of(value) if isinstance(value, torch.Tensor) else value


class Function:
    """A jit function that calls this file's primitives in place of Gluon's, and `Function`s in place of others."""

    def __init__(self, jit, names=None):
        if names is None:  # shared by the functions of a file, which call each other
            names = {}
            for name, value in jit.fn.__globals__.items():
                own = isinstance(value, GluonJITFunction) and value.fn.__globals__ is jit.fn.__globals__
                names[name] = Function(value, names) if own else translated(value)
        self.name = jit.fn.__name__
        self.call = FunctionType(jit.fn.__code__, names, self.name, jit.fn.__defaults__)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def translated(value):
    """A global of a kernel: constants become their values, Gluon's names ours."""
    if isinstance(value, GluonJITFunction):
        return Function(value)
    return value.value if isinstance(value, gl.constexpr) else OURS.get(id(value), value)


# -- gl ---------------------------------------------------------------------------------------------------------------


def on_blocks(act, scalar=None):
    """A function of blocks and numbers; `scalar` where all are numbers."""

    def apply(*args):
        if scalar and not any(isinstance(arg, Block) for arg in args):
            return scalar(*args)
        return Block(act(*(bare(arg) for arg in args)))

    return apply


def as_tensors(act):
    """Numbers among the arguments become tensors, as torch.maximum wants."""
    return lambda *args: act(*(torch.as_tensor(arg) for arg in args))


def full(shape, value, dtype, layout=None):
    return Block(torch.full(list(shape), value, dtype=dtype))


def load(pointer, mask=None, other=0):
    here()
    at = torch.as_tensor(pointer.at)
    wanted = torch.ones_like(at, dtype=torch.bool) if mask is None else bare(mask)
    if not ((at >= 0) & (at < pointer.tensor.numel()))[wanted].all():
        raise Fault(f"load of element {pointer.at} of {pointer.tensor.numel()}")
    found = torch.where(wanted, pointer.tensor[at.where(wanted, 0)], other)
    return Block(found) if found.dim() else found.item()


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    """The two pieces of PTX that kernels use: four float32 to e4m3 codes in the first of four words, and back."""
    data = bare(*args)
    if "cvt.rn.satfinite.e4m3x2.f32" in asm:
        words = torch.zeros(data.shape, dtype=torch.int32)
        words[..., ::pack] = data.to(torch.float8_e4m3fn).view(torch.int32)
        return Block(words)
    if asm == "mov.b32 $0, $1;":
        return Block(data[..., ::pack].contiguous().view(dtype))
    raise Fault(f"PTX that nobody has taught the machine: {asm}")


def allocate_shared_memory(element_ty, shape, layout, value=None):
    name = f"buffer {len(RUNNING[-1].names)}"
    RUNNING[-1].names.append(name)
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        return gm.Barriers([gm.Barrier(f"barrier {at} of {name}") for at in range(shape[0])])
    memory = gm.Memory.make(element_ty, list(shape), name)
    if value is not None:
        memory.store(value)
    return memory


def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs):
    """The first function runs in the warps that were there, each other one in its own; all end before it returns."""
    if not len(functions_and_args) - 1 == len(worker_num_warps) == len(worker_num_regs):
        raise Fault("warp_specialize: as many warps and registers as workers are wanted")
    parent, machine = here(), RUNNING[-1]
    parts = [machine.add(f"{function.name} {at}", functools.partial(function, *args), parent)
             for at, (function, args) in enumerate(functions_and_args)]  # fmt: skip
    parent.pause(lambda: all(part.over for part in parts), "its partitions")
    for part in parts:
        parent.known |= part.known
        parent.fenced |= part.fenced
    return parts[0].result


LANGUAGE = SimpleNamespace(
    allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize, load=load, full=full,
    inline_asm_elementwise=inline_asm_elementwise,
    zeros=lambda shape, dtype, layout=None: full(shape, 0, dtype),
    zeros_like=lambda block: Block(torch.zeros_like(block.data)),
    arange=lambda start, end, layout=None: Block(torch.arange(start, end, dtype=torch.int32)),
    convert_layout=lambda value, layout, assert_trivial=False: value,
    program_id=lambda axis: RUNNING[-1].program if axis == 0 else 0,
    num_programs=lambda axis: RUNNING[-1].programs if axis == 0 else 1,
    static_range=range, cdiv=lambda a, b: -(-a // b), constexpr=gl.constexpr,
    where=on_blocks(torch.where), exp2=on_blocks(torch.exp2), maximum=on_blocks(as_tensors(torch.maximum), max),
    minimum=on_blocks(as_tensors(torch.minimum), min),
    max=lambda block, axis: Block(block.data.amax(axis)), sum=lambda block, axis: Block(block.data.sum(axis)),
)  # fmt: skip
for _dtype in ("int32", "int64", "float16", "bfloat16", "float32"):
    setattr(LANGUAGE, _dtype, getattr(torch, _dtype))
LANGUAGE.float8e4nv = torch.float8_e4m3fn
for _layout in ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout"):
    setattr(LANGUAGE, _layout, getattr(gl, _layout))


# -- mbarrier ---------------------------------------------------------------------------------------------------------


def init(barrier, count):
    barrier.one.init(here(), count)


def expect(barrier, size, pred=True):
    if pred:
        barrier.one.arrive(here(), 1, size)


def arrive(barrier, *, count=1, pred=True):
    if pred:
        barrier.one.arrive(here(), count)


def wait(barrier, phase, pred=True, deps=()):
    if pred:
        barrier.one.wait(here(), phase)


def fence_async_shared(cluster=False):
    partition = here()
    partition.fenced |= partition.known


# -- TMA --------------------------------------------------------------------------------------------------------------


def async_copy_global_to_shared(descriptor, coordinates, barrier, result, pred=True):
    if not pred:
        return
    partition, machine = here(), RUNNING[-1]
    bit, (outer, inner) = machine.event(), descriptor.box(coordinates, result)
    barrier.one.check(partition, partition.fenced)
    result.touch(partition, bit, "copy", write=True)
    result.data.fill_(float("nan"))  # it may be written from now on
    result.written.fill_(False)
    machine.copies |= bit

    def happen():
        result.data.zero_()
        result.data[inner] = descriptor.tensor[outer]
        result.written.fill_(True)
        barrier.one.receive(descriptor.block_type.nbytes, bit)

    gm.Operation(machine, partition, bit, happen)


def async_copy_shared_to_global(descriptor, coordinates, source):
    partition, machine = here(), RUNNING[-1]
    bit, (outer, inner) = machine.event(), descriptor.box(coordinates, source, stored=True)
    source.touch(partition, bit, "TMA store", write=False)

    def happen():
        descriptor.tensor[outer] = source.data[inner]

    partition.stores.append(gm.Operation(machine, partition, bit, happen))


def ended(operations, left):
    """Wait until no more than `left` of a partition's operations are under way; returns those."""
    partition = here()
    count = max(0, len(operations) - left)
    for operation in operations[:count]:
        operation.finish(RUNNING[-1])
        partition.known |= operation.bit
    return operations[count:]


def store_wait(pendings):
    partition = here()
    partition.stores = ended(partition.stores, pendings)


# -- wgmma ------------------------------------------------------------------------------------------------------------


def cut(total):
    """What the tensor cores of sm_90 keep of a sum of FP8 products after each 32 of them: 14 bits, cut off."""
    mantissa, exponent = torch.frexp(total)
    return torch.ldexp((mantissa * 2**14).trunc(), exponent - 14)


def warpgroup_mma(a, b, acc, *, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
    partition, machine = here(), RUNNING[-1]
    bit = machine.event()
    for part in (a, b):
        if isinstance(part, gm.Memory):
            part.touch(partition, bit, "wgmma", write=False)
    held = a if isinstance(a, gm.Memory) else Block(bare(a))

    def happen():
        total = acc.value if isinstance(acc, gm.Operation) else acc.data
        if [held.shape[0], b.shape[1]] != list(total.shape) or held.dtype != b.dtype:
            raise Fault(f"wgmma of {held.shape} {held.dtype}, {b.shape} {b.dtype} into {list(total.shape)}")
        total = total if use_acc else torch.zeros_like(total)
        if held.dtype != torch.float8_e4m3fn:
            return total + held.data.float() @ b.data.float()
        for left, right in zip(held.data.float().split(32, 1), b.data.float().split(32, 0), strict=True):
            total = cut(total + left @ right)
        return total

    operation = gm.Operation(machine, partition, bit, happen, ordered=True)
    partition.products.append(operation)
    return operation if is_async else warpgroup_mma_wait(0, deps=(operation,))


def warpgroup_mma_wait(num_outstanding=0, deps=None):
    partition = here()
    partition.products = ended(partition.products, num_outstanding)
    if any(dep in partition.products for dep in deps):
        raise Fault(f"{partition.name}: waiting for all but {num_outstanding} wgmmas does not give this result")
    results = tuple(Block(dep.value) if isinstance(dep, gm.Operation) else dep for dep in deps)
    return results[0] if len(results) == 1 else results


BARRIER = SimpleNamespace(
    init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=hopper.mbarrier.MBarrierLayout
)
TMA = SimpleNamespace(
    async_copy_global_to_shared=async_copy_global_to_shared, async_copy_shared_to_global=async_copy_shared_to_global,
    async_load=async_copy_global_to_shared, async_store=async_copy_shared_to_global, store_wait=store_wait,
)  # fmt: skip
OURS = {
    id(gl): LANGUAGE, id(hopper.mbarrier): BARRIER, id(hopper.tma): TMA,
    id(hopper.fence_async_shared): fence_async_shared, id(hopper.warpgroup_mma): warpgroup_mma,
    id(hopper.warpgroup_mma_wait): warpgroup_mma_wait,
}  # fmt: skip
for _name, _function in vars(TMA).items():  # kernels may import them one by one
    if hasattr(hopper.tma, _name):
        OURS[id(getattr(hopper.tma, _name))] = _function
