"""What TMA takes: the rules of a tensor map and of a copy, and the one place where launchers make tensor descriptors.

A GPU answers some broken rules with an error of the driver, and others with an "illegal instruction" in the middle of
the kernel, after which nothing in that process works any more. So every rule is held here, on plain numbers.

Of a tensor map (cuTensorMapEncodeTiled), all checked by `View.faults`:
- one to five dimensions, each of 1 to 2^32 elements (2^31 - 1 here, because Triton passes sizes as int32);
- the address is a multiple of 16 bytes;
- every stride but the innermost is a multiple of 16 bytes and less than 2^40; the innermost elements are contiguous;
- the box has 1 to 256 elements in each dimension, and a multiple of 16 bytes in the innermost;
- swizzle is by 32, 64 or 128 bytes or not at all, and the box's innermost dimension is no longer than that. Triton cuts
  a block into boxes of exactly that length, so a block's is a multiple of it.
Strides need no order and views may overlap. Triton always sets the elements' strides within a box to 1 and leaves
interleaving off, so their rules cannot be broken.

Of a copy:
- its start in the innermost dimension is a multiple of 16 bytes (`start_fault`): the address must be one, also where
  the map has one dimension only and the start is all there is to it. Starts below 0 and beyond the end are allowed;
- a store writes whole pieces of 16 bytes, so the innermost dimension has to be a multiple of them, or the store goes on
  past its end (`store_fault`);
- shared memory starts at a multiple of 128 bytes, or of eight rows of a swizzle (`memory_fault`); a barrier, of 8.
  Triton's allocator sees to both where a whole buffer, or one entry of its first dimension, is the target.

Who checks: launchers here; the ahead-of-time gate once more, with the boxes and the swizzle that the compiler chose
(`compiled_faults`). Neither sees the starts of single copies, which exist in the kernel alone: those are checked in the
interpreters, Gluon's copies in kernels/gluon_machine.py, Triton's loads and stores in kernels/interpreter.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from liverelay.kernels.launch import refuse

PIECE = 16  # bytes that TMA moves at a time
SWIZZLES = (0, 32, 64, 128)  # in the order of the driver's enumeration


@dataclass(frozen=True)
class View:
    """A tensor map. address, itemsize and swizzle (0: none) in bytes; shape, strides and block in elements, outermost
    first."""

    address: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    swizzle: int = 0

    @classmethod
    def of(cls, descriptor: Any) -> View:
        """Of a descriptor of Gluon, which has a layout, or of Triton, whose swizzle only the compiler chooses."""
        base, layout = descriptor.base, getattr(descriptor, "layout", None)
        return cls(
            base.data_ptr(), base.dtype.itemsize, tuple(descriptor.shape), tuple(descriptor.strides),
            tuple(descriptor.block_shape), layout.swizzle_byte_width if layout is not None else 0,
        )  # fmt: skip

    def faults(self) -> Iterator[str]:
        """Every rule of a tensor map that is broken, in words."""
        rank, inner = len(self.shape), self.block[-1] * self.itemsize if self.block else 0
        if not 1 <= rank <= 5 or len(self.strides) != rank or len(self.block) != rank:
            yield f"it has {rank} dimensions, {len(self.strides)} strides, {len(self.block)} of the box; 1 to 5 go"
            return
        if self.address % PIECE:
            yield f"it starts {self.address % PIECE} bytes past a multiple of {PIECE}"
        if self.strides[-1] != 1:
            yield f"its innermost dimension is not contiguous (strides {list(self.strides)})"
        for stride in (stride * self.itemsize for stride in self.strides[:-1]):
            if stride % PIECE or not 0 <= stride < 1 << 40:
                yield f"a stride of {stride} bytes is no multiple of {PIECE} from 0 to 2^40"
        if not all(1 <= size < 1 << 31 for size in self.shape):
            yield f"its shape {list(self.shape)} is not of 1 to 2^31 - 1 elements"
        if not all(1 <= size <= 256 for size in self.block):
            yield f"a box {list(self.block)} is not of 1 to 256 elements each way"
        if inner % PIECE:
            yield f"a box of {inner} bytes in the innermost dimension is no multiple of {PIECE}"
        if self.swizzle not in SWIZZLES or (self.swizzle and inner % self.swizzle):
            yield f"a box of {inner} bytes in the innermost dimension does not go with a swizzle of {self.swizzle}"

    def start_fault(self, start: int) -> str:
        """Why no copy may start at this element of the innermost dimension; empty: it may."""
        past = start * self.itemsize % PIECE
        return f"a copy starts at element {start}, {past} bytes past a multiple of {PIECE}" if past else ""

    def store_fault(self) -> str:
        """Why nothing may be stored through it; empty: it may."""
        length = self.shape[-1] * self.itemsize
        return f"a store goes past the innermost {length} bytes, no multiple of {PIECE}" if length % PIECE else ""

    def memory_fault(self, offset: int) -> str:
        """Why a box cannot lie at this many bytes from the start of its buffer in shared memory; empty: it can."""
        unit = max(128, 8 * self.swizzle)
        return f"a box lies {offset} bytes into shared memory, no multiple of {unit}" if offset % unit else ""


def descriptor(
    kernel: str, what: str, tensor: Tensor, block: Sequence[int], layout: Any = None, *, stored: bool = False
) -> Any:
    """A descriptor of a tensor or of a view of it: Gluon's where a layout of shared memory is given, else Triton's.

    stored: the kernel writes through it. ValueError in one line, with the kernel and `what` the tensor is, where TMA
    cannot take it.
    """
    made = View(
        tensor.data_ptr(), tensor.dtype.itemsize, tuple(tensor.shape), tuple(tensor.stride()), tuple(block),
        0 if layout is None else layout.swizzle_byte_width,
    )  # fmt: skip
    found = [*made.faults(), made.store_fault() if stored else ""]
    if fault := next(filter(None, found), ""):
        refuse(kernel, f"TMA cannot take {what}: {fault}")
    shape, strides = list(tensor.shape), list(tensor.stride())
    if layout is None:
        make = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
        return make(tensor, shape, strides, list(block))
    make = importlib.import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
    return make(tensor, shape, strides, list(block), layout)


def compiled_faults(arguments: Sequence[Any], maps: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Faults of a compiled launch's descriptors, with what the compiler made of each in place of what was asked for.

    arguments: of the launch, in order; maps: the kernel's `tensordesc_meta`, one for each descriptor among them, or
    none where descriptors become pointers (before sm_90).
    """
    given = [argument for argument in arguments if hasattr(argument, "block_shape")]
    if maps and len(maps) != len(given):
        yield f"{len(given)} tensor descriptors, the compiled kernel has {len(maps)}"
    for at, (one, map_) in enumerate(zip(given, maps, strict=False)):
        asked = View.of(one)
        view = View(
            asked.address, map_["elem_size"], asked.shape, asked.strides, tuple(map_["block_size"]),
            SWIZZLES[map_["swizzle"]],
        )  # fmt: skip
        yield from (f"TMA cannot take descriptor {at}: {fault}" for fault in view.faults())
