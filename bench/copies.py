"""Ways to copy memory within a GPU, of which the fastest is the ceiling that kernels are held against.

`copy_` of contiguous memory becomes a memcpy, which on an H200 is slower than a kernel from 1 GiB on (2.7 instead of
4.1 TB/s), so ours and PyTorch's element-wise kernels are tried as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # words of four bytes: 16 for each thread, so loads and stores of 16 bytes
PROGRAMS = 8  # the persistent form starts so many on each processor

Copy = Callable[[Tensor, Tensor], object]  # (source, target), int32 [n]


@triton.jit
def stream_copy(source, target, count, BLOCK: tl.constexpr):
    """target = source, [count] words; each program takes blocks as far apart as there are programs."""
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        words = tl.load(source + offsets, mask=offsets < count, eviction_policy="evict_first")
        tl.store(target + offsets, words, mask=offsets < count, eviction_policy="evict_first")


def launch(source: Tensor, target: Tensor, *, persistent: bool) -> None:
    """Copy int32 [n], n < 2^30 and a multiple of 4, by `stream_copy`. persistent: a fixed number of programs."""
    blocks = triton.cdiv(source.numel(), BLOCK)
    if persistent and source.is_cuda:
        blocks = min(blocks, PROGRAMS * torch.cuda.get_device_properties(source.device).multi_processor_count)
    elif persistent:
        blocks = min(blocks, 3)
    stream_copy[(blocks,)](source, target, source.numel(), BLOCK=BLOCK, num_warps=WARPS)


def ways() -> dict[str, Copy]:
    """All of them by name; each reads `source` and writes `target` once."""
    return {
        "copy_": lambda source, target: target.copy_(source),
        "torch.add": lambda source, target: torch.add(source, 1, out=target),
        "own kernel": lambda source, target: launch(source, target, persistent=False),
        "own kernel, persistent": lambda source, target: launch(source, target, persistent=True),
    }
