"""`attention_specialised`: the attention of kernels/attention.py for sm_90, where warps have different work (Gluon).

Math: softmax(q k^T / sqrt(d)) v over the first `valid` rows of k and v; online softmax in base 2, float32 accumulators,
probabilities rounded to the working dtype before the second product. q, out [T, H, d]; k, v [N, H, d].
Bytes: (2 T + 2 valid) H d * element size; FLOPs: 4 T valid H d. Source: spec dit.md 7.3.

A program has 128 queries in shared memory. One warp loads (TMA); two groups of four warps have 64 queries each. A group
starts q k^T of the next tile of keys and p v of this one together, and computes the softmax of the next tile while p v
still runs. Programs are persistent: each walks over tiles of queries, head by head; loads of the next one start while
the last one ends. The last tile of keys comes first, so that only code before the inner loop masks.

Protocol. Every buffer has barriers `full` (bytes of a copy; the consumers wait) and `empty` (arrivals of its readers,
after the products that read it have ended; the producer waits). Use n of a buffer with S stages has phase n // S & 1
of `full`; the producer waits for the phase before it of `empty`, which a new barrier counts as passed. Rows of v past
`valid` may hold NaN, and 0 * NaN is NaN: that one tile is copied under the barrier `raw`, the producer writes zeros
into those rows, fences, and arrives at `full` itself. The output is stored by TMA; its buffer is written again after
the store has read it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from liverelay.kernels import attention
from liverelay.kernels.contract import Place
from liverelay.kernels.launch import arch, processors, refuse, run
from liverelay.kernels.spec import arch_name

# Triton 3.9 has other names for both, and keeps the old ones to say so.
copy_in = getattr(tma, "async_load", tma.async_copy_global_to_shared)
copy_out = getattr(tma, "async_store", tma.async_copy_shared_to_global)
STAGES = {32: 4, 64: 4, 128: 2}  # of keys and of values, by head size: what 227 KiB of shared memory hold
TILE_N = 128
HALF = gl.constexpr(64)  # queries of a group of four warps: the height of one wgmma
REGISTERS = gl.constexpr([232, 40])  # of a thread of the second group and of the producer; the first group has 232 too


@gluon.jit
def emptied(empty, step, STAGES: gl.constexpr):
    """The stage of a step, once its readers have ended."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
    return stage


@gluon.jit
def load_tile(descriptor, row, column, queue, step, STAGES: gl.constexpr):
    """Copy one tile of keys or values into its stage; queue: buffers, full, empty."""
    buffers, full, empty = queue
    stage = emptied(empty, step, STAGES)
    mbarrier.expect(full.index(stage), descriptor.block_type.nbytes)
    copy_in(descriptor, [row, column], full.index(stage), buffers.index(stage))


@gluon.jit
def load_last_values(descriptor, row, column, queue, raw, step, turn, left, TILE_N: gl.constexpr,
                     HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """As `load_tile`, with zeros from row `left` on."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [1, 1], [1, 0])
    buffers, full, empty = queue
    stage = emptied(empty, step, STAGES)
    tile = buffers.index(stage)
    mbarrier.expect(raw, descriptor.block_type.nbytes)
    copy_in(descriptor, [row, column], raw, tile)
    mbarrier.wait(raw, turn)
    for first in gl.static_range(0, TILE_N, 8):  # few registers, and most rows of most tiles need nothing
        if first + 8 > left:
            rows = tile.slice(first, 8)
            place = first + gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
            values = rows.load(LAYOUT)
            rows.store(gl.where((place < left)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()  # before the tensor cores' own reads
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def produce(q, k, v, raw, queues, work, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp. Order as the consumers need it: keys of the next step before values of this one."""
    queries, keys, values = queues
    q_s, q_full, q_empty = queries
    tiles_m, tiles, valid = work
    last = gl.maximum(gl.cdiv(valid, TILE_N) - 1, 0)
    left = valid - last * TILE_N
    step = 0  # tiles of values so far
    turn = 0  # parity of the tiles of queries so far
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        column = tile // tiles_m * HEAD_DIM
        first = tile % tiles_m * (2 * HALF)
        load_tile(k, last * TILE_N, column, keys, step, STAGES)
        for which in gl.static_range(2):
            mbarrier.wait(q_empty.index(which), turn ^ 1)
            mbarrier.expect(q_full.index(which), q.block_type.nbytes)
            copy_in(q, [first + which * HALF, column], q_full.index(which), q_s.index(which))
        for back in range(0, last + 1):
            if back < last:
                load_tile(k, (last - 1 - back) * TILE_N, column, keys, step + 1, STAGES)
            if (back == 0) & (left < TILE_N):
                load_last_values(v, last * TILE_N, column, values, raw, step, turn, left, TILE_N, HEAD_DIM, STAGES)
            else:
                load_tile(v, (last - back) * TILE_N, column, values, step, STAGES)
            step += 1
        turn ^= 1


@gluon.jit
def consume(WHICH: gl.constexpr, out, out_s, queues, work, qk_scale, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Four warps that compute half WHICH of every tile of queries."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_N, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MIXED, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, MIXED)
    queries, keys, values = queues
    q_s, q_full, q_empty = queries
    k_s, k_full, k_empty = keys
    v_s, v_full, v_empty = values
    tiles_m, tiles, valid = work
    q = q_s.index(WHICH)
    last = gl.maximum(gl.cdiv(valid, TILE_N) - 1, 0)
    left = valid - last * TILE_N
    nothing = gl.zeros([HALF, TILE_N], gl.float32, layout=LOGITS)
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        # The last tile of keys, alone: nothing to scale yet, and the only one that may have to be masked.
        stage = step % STAGES
        mbarrier.wait(q_full.index(WHICH), turn)
        mbarrier.wait(k_full.index(stage), step // STAGES & 1)
        asked = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=(asked,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        inner = gl.arange(0, TILE_N, layout=gl.SliceLayout(0, LOGITS)) < left
        logits = gl.where(inner[None, :], logits, float("-inf"))
        highest = gl.max(logits, 1)
        shares = gl.exp2(logits * qk_scale - (highest * qk_scale)[:, None])
        total = gl.sum(shares, 1)
        weights = gl.convert_layout(shares.to(q_s.dtype), WEIGHTS)
        mixed = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=MIXED)
        mbarrier.wait(k_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=last > 0)
        for back in range(0, last):
            stage = step % STAGES
            after = (step + 1) % STAGES
            asked = warpgroup_mma(q, k_s.index(after).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), step // STAGES & 1)
            mixing = warpgroup_mma(weights, v_s.index(stage), mixed, is_async=True)
            logits = warpgroup_mma_wait(1, deps=(asked,))
            mbarrier.arrive(k_empty.index(after), count=1)
            above = gl.maximum(highest, gl.max(logits, 1))
            scaled = above * qk_scale
            shrink = gl.exp2(highest * qk_scale - scaled)
            shares = gl.exp2(logits * qk_scale - scaled[:, None])
            total = total * shrink + gl.sum(shares, 1)
            highest = above
            # The wait for the next keys stands here because ptxas moves no instruction over its loop. Without it the
            # second product is waited for first and the softmax comes after it: nothing would overlap.
            mbarrier.wait(k_full.index((step + 2) % STAGES), (step + 2) // STAGES & 1, pred=back + 1 < last)
            mixed = warpgroup_mma_wait(0, deps=(mixing,))
            mbarrier.arrive(v_empty.index(stage), count=1)
            mixed = mixed * gl.convert_layout(shrink, ROW)[:, None]
            weights = gl.convert_layout(shares.to(q_s.dtype), WEIGHTS)
            step += 1
        mbarrier.arrive(q_empty.index(WHICH), count=1)
        stage = step % STAGES
        mbarrier.wait(v_full.index(stage), step // STAGES & 1)
        mixing = warpgroup_mma(weights, v_s.index(stage), mixed, is_async=True)
        mixed = warpgroup_mma_wait(0, deps=(mixing,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        result = mixed * gl.convert_layout(1.0 / total, ROW)[:, None]
        tma.store_wait(0)
        out_s.index(WHICH).store(result.to(out_s.dtype))
        fence_async_shared()
        row = tile % tiles_m * (2 * HALF) + WHICH * HALF
        copy_out(out, [row, tile // tiles_m * HEAD_DIM], out_s.index(WHICH))
        step += 1
        turn ^= 1
    tma.store_wait(0)


@gluon.jit
def attention_specialised_kernel(
    q, k, v, out, scalars, tokens, heads, rows, qk_scale, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, HAS_PLACE: gl.constexpr,
):  # fmt: skip
    valid = gl.load(scalars + 1) if HAS_PLACE else rows
    tiles_m = gl.cdiv(tokens, 2 * HALF)
    tiles = tiles_m * heads
    q_s = gl.allocate_shared_memory(q.dtype, [2, HALF, HEAD_DIM], q.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, TILE_N, HEAD_DIM], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES, TILE_N, HEAD_DIM], v.layout)
    out_s = gl.allocate_shared_memory(out.dtype, [2, HALF, HEAD_DIM], out.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):  # each half has one reader
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):  # both halves read every tile of keys and values
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    mbarrier.init(raw, count=1)
    fence_async_shared()
    queries = (q_s, q_full, q_empty)
    keys = (k_s, k_full, k_empty)
    values = (v_s, v_full, v_empty)
    queues = (queries, keys, values)
    work = (tiles_m, tiles, valid)
    gl.warp_specialize(
        [
            (consume, (0, out, out_s, queues, work, qk_scale, TILE_N, HEAD_DIM, STAGES)),
            (consume, (1, out, out_s, queues, work, qk_scale, TILE_N, HEAD_DIM, STAGES)),
            (produce, (q, k, v, raw, queues, work, TILE_N, HEAD_DIM, STAGES)),
        ],
        [4, 1], REGISTERS,
    )  # fmt: skip


def attention_specialised(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None) -> Tensor:
    """Attention over the arena by loading and computing warps (wgmma, TMA): 16 bits, head sizes 32, 64, 128; sm_90."""
    name = "specialised attention"
    tokens, heads, head_dim, rows = attention.checked(name, q, k, v, out, None)
    dtypes = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
    dense = all(part.is_contiguous() for part in (q, k, v, out))
    if head_dim not in STAGES or not dense or q.dtype not in dtypes:
        refuse(name, f"needs contiguous tensors of 16 bits, a head size of 32, 64 or 128, not {q.dtype} {head_dim}")
    if arch(q) not in (0, 90):
        refuse(name, f"needs sm_90, not {arch_name(arch(q))}")

    def describe(tensor: Tensor, tile: int) -> Any:
        layout = gl.NVMMASharedLayout.get_default_for([tile, head_dim], dtypes[q.dtype])
        return TensorDescriptor.from_tensor(tensor.flatten(1), [tile, head_dim], layout)

    tiles = triton.cdiv(tokens, 2 * HALF.value) * heads
    run(
        attention_specialised_kernel, min(tiles, processors(q)), describe(q, HALF.value), describe(k, TILE_N),
        describe(v, TILE_N), describe(out, HALF.value), q if place is None else place.scalars, tokens, heads, rows,
        head_dim**-0.5 * attention.LOG2_E, TILE_N=TILE_N, HEAD_DIM=head_dim, STAGES=STAGES[head_dim],
        HAS_PLACE=place is not None, num_warps=4,
    )  # fmt: skip
    return out


_DESCRIPTOR = next(spec for spec in attention.SPECS if spec.name == "attention_descriptor")
_SMALL = {
    "some-tiles": dict(tokens=300, heads=3, head_dim=64, rows=700, valid=650, placed=1),
    "one-whole": dict(tokens=129, heads=2, head_dim=128, rows=128, valid=128, placed=0),
}
SPECS = [
    replace(
        _DESCRIPTOR, name="attention_specialised", launch=attention_specialised,
        small={**_DESCRIPTOR.small, **_SMALL}, max_arch=90,
    ),
]  # fmt: skip
