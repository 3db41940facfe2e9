"""`attention_specialised`, also of FP8: kernels/attention.py for sm_90, where warps have different work (Gluon).

Shapes, math, bytes and FLOPs are those of kernels/attention.py.

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

FP8 (v [H d, N]) differs in two places. Sums of FP8 products keep some 14 bits, so the second product of each tile is a
sum of its own, added in float32 while the next first product runs. And weights leave the first product in other threads
than the second wants them in: of each 16 keys a thread has 2 t, 2 t + 1, 2 t + 8, 2 t + 9 where it needs 4 t to
4 t + 3. So keys are shuffled, which softmax does not mind: a view of five dimensions lets TMA put row 4 t + 2 h + j of
each 16 at 8 h + 2 t + j. Only in the last tile, which may end anywhere, do keys keep their order and weights move.
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

from liverelay.kernels import attention
from liverelay.kernels.contract import FP8, Place, Scales
from liverelay.kernels.launch import arch, processors, refuse, run
from liverelay.kernels.spec import arch_name
from liverelay.kernels.tma import descriptor as tma_descriptor

# Triton 3.9 has other names for both, and keeps the old ones to say so.
copy_in = getattr(tma, "async_load", tma.async_copy_global_to_shared)
copy_out = getattr(tma, "async_store", tma.async_copy_shared_to_global)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, FP8: gl.float8e4nv}
TILE_N = gl.constexpr(128)
HALF = gl.constexpr(64)  # queries of a group of four warps: the height of one wgmma
REGISTERS = gl.constexpr([232, 40])  # of a thread of the second group and of the producer; the first group has 232 too
# Four e4m3 codes as one number. A loop that carries codes would carry each byte in a register, and take them apart.
PACK = gl.constexpr("""{ .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $5, $4;    cvt.rn.satfinite.e4m3x2.f32 high, $7, $6;
    mov.b32 $0, {low, high};    mov.b32 $1, 0;    mov.b32 $2, 0;    mov.b32 $3, 0; }""")
UNPACK = gl.constexpr("mov.b32 $0, $1;")


@gluon.jit
def turn_of(step, STAGES: gl.constexpr):
    """The stage of a step and the phase of its barriers: bits of it, because STAGES is a power of two."""
    return step & (STAGES - 1), (step & STAGES) // STAGES


@gluon.jit
def emptied(empty, step, STAGES: gl.constexpr):
    """The stage of a step, once its readers have ended."""
    stage, phase = turn_of(step, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    return stage


@gluon.jit
def corner(descriptor, row, head, TURNED: gl.constexpr):
    """Where in memory a head's tile starts whose first token is `row`; TURNED: it is [channels, tokens]."""
    return (head * descriptor.block_type.shape[0], row) if TURNED else (row, head * descriptor.block_type.shape[1])


@gluon.jit
def load_tile(descriptor, row, head, queue, step, STAGES: gl.constexpr, TURNED: gl.constexpr):
    """Copy one tile of keys or values into its stage; queue: buffers, full, empty."""
    buffers, full, empty = queue
    stage = emptied(empty, step, STAGES)
    mbarrier.expect(full.index(stage), descriptor.block_type.nbytes)
    copy_in(descriptor, corner(descriptor, row, head, TURNED), full.index(stage), buffers.index(stage))


@gluon.jit
def load_keys(sources, row, head, queue, step, LAST: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr):
    """`load_tile` of keys, in FP8 shuffled, but for the last tile."""
    k, shuffled = sources
    if FP8 and not LAST:
        buffers, full, empty = queue
        stage = emptied(empty, step, STAGES)
        mbarrier.expect(full.index(stage), k.block_type.nbytes)
        tile = buffers.index(stage).reshape(shuffled.block_type.shape)
        copy_in(shuffled, [row // 16, 0, 0, 0, head * k.block_type.shape[1]], full.index(stage), tile)
    else:
        load_tile(k, row, head, queue, step, STAGES, False)


@gluon.jit
def clear_rows(tile, left):
    """Zeros in a tile [TILE_N, HEAD_DIM] of 16 bits from row `left` on."""
    HEAD_DIM: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [1, 1], [1, 0])
    for first in gl.static_range(0, TILE_N, 8):  # few registers, and most rows of most tiles need nothing
        if first + 8 > left:
            rows = tile.slice(first, 8)
            place = first + gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
            values = rows.load(LAYOUT)
            rows.store(gl.where((place < left)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def clear_columns(tile, left):
    """Zeros in a tile [HEAD_DIM, TILE_N] of 8 bits from column `left` on; four columns at a time are one number."""
    HEAD_DIM: gl.constexpr = tile.shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [512 // TILE_N, TILE_N // 16], [1, 1], [1, 0])
    WORDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=TILE_N, element_bitwidth=32)
    words = tile._reinterpret(gl.int32, [HEAD_DIM, TILE_N // 4], WORDS)
    kept = left - 4 * gl.arange(0, TILE_N // 4, layout=gl.SliceLayout(0, LAYOUT))
    mask = gl.where(kept > 3, -1, (1 << 8 * gl.minimum(gl.maximum(kept, 0), 3)) - 1)
    for first in gl.static_range(0, HEAD_DIM, 16):  # few registers
        rows = words.slice(first, 16)
        rows.store(rows.load(LAYOUT) & mask[None, :])


@gluon.jit
def load_last_values(v, row, head, queue, raw, step, turn, left, STAGES: gl.constexpr, FP8: gl.constexpr):
    """As `load_tile`, with zeros from token `left` of the tile on."""
    buffers, full, empty = queue
    stage = emptied(empty, step, STAGES)
    tile = buffers.index(stage)
    mbarrier.expect(raw, v.block_type.nbytes)
    copy_in(v, corner(v, row, head, FP8), raw, tile)
    mbarrier.wait(raw, turn)
    if FP8:
        clear_columns(tile, left)
    else:
        clear_rows(tile, left)
    fence_async_shared()  # before the tensor cores' own reads
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def produce(q, v, sources, raw, queues, work, STAGES: gl.constexpr, FP8: gl.constexpr):
    """The loading warp. Order as the consumers need it: keys of the next step before values of this one."""
    queries, keys, values = queues
    q_s, q_full, q_empty = queries
    tiles_m, tiles, last, left = work
    step = 0  # tiles of values so far
    turn = 0  # parity of the tiles of queries so far
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head = tile // tiles_m
        first = tile % tiles_m * (2 * HALF)
        load_keys(sources, last * TILE_N, head, keys, step, True, STAGES, FP8)
        for which in gl.static_range(2):
            mbarrier.wait(q_empty.index(which), turn ^ 1)
            mbarrier.expect(q_full.index(which), q.block_type.nbytes)
            copy_in(q, corner(q, first + which * HALF, head, False), q_full.index(which), q_s.index(which))
        for back in range(0, last + 1):
            if back < last:
                load_keys(sources, (last - 1 - back) * TILE_N, head, keys, step + 1, False, STAGES, FP8)
            if (back == 0) & (left < TILE_N):
                load_last_values(v, last * TILE_N, head, values, raw, step, turn, left, STAGES, FP8)
            else:
                load_tile(v, (last - back) * TILE_N, head, values, step, STAGES, FP8)
            step += 1
        turn ^= 1


@gluon.jit
def partial_sums(shares):
    """Row sums of the shares that each thread holds [HALF, 4]: four threads share a row."""
    return gl.sum(gl.sum(shares.reshape([HALF, TILE_N // 8, 4, 2]), 3), 1)


@gluon.jit
def rounded(shares, DTYPE: gl.constexpr, WEIGHTS: gl.constexpr, SHUFFLED: gl.constexpr, FP8: gl.constexpr):
    """Shares as the second product takes them. In FP8 the first of each four numbers holds codes."""
    if not FP8:
        return gl.convert_layout(shares.to(DTYPE), WEIGHTS)
    else:
        if SHUFFLED:  # in their keys' own order they are in the right threads
            shares = shares.reshape([HALF, TILE_N // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([HALF, TILE_N])
        shares = gl.convert_layout(shares, WEIGHTS, assert_trivial=SHUFFLED)
        return gl.inline_asm_elementwise(PACK, "=r,=r,=r,=r,f,f,f,f", [shares], gl.int32, True, 4)


@gluon.jit
def mix(weights, tile, mixed, FP8: gl.constexpr):
    """Start the second product: added to `mixed`, or in FP8, whose sums keep some 14 bits, a sum of its own."""
    if FP8:
        weights = gl.inline_asm_elementwise(UNPACK, "=r,r,r,r,r", [weights], tile.dtype, True, 4)
        return warpgroup_mma(weights, tile.permute((1, 0)), mixed, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(weights, tile, mixed, is_async=True)


@gluon.jit
def settled(mixed, product, fade, shrink, FP8: gl.constexpr):
    """What the last product left to do: its own sum is added to the others, or the one sum comes to a new level."""
    if FP8:
        return mixed * fade[:, None] + product, product
    else:
        return mixed, product * shrink[:, None]


@gluon.jit
def consume(WHICH: gl.constexpr, out, out_s, queues, work, scaling, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
            FP8: gl.constexpr, HAS_Q_FACTOR: gl.constexpr):  # fmt: skip
    """Four warps that compute half WHICH of every tile of queries."""
    DEPTH: gl.constexpr = 32 if FP8 else 16  # of one wgmma
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_N, DEPTH])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, DEPTH])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MIXED, k_width=4 if FP8 else 2)
    LIFT: gl.constexpr = 8.0 if FP8 else 0.0  # the largest share is 256, near the largest number of e4m3
    ROW: gl.constexpr = gl.SliceLayout(1, MIXED)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    q_s, q_full, q_empty = queues[0]
    k_s, k_full, k_empty = queues[1]
    v_s, v_full, v_empty = queues[2]
    tiles_m, tiles, last, left = work
    qk_scale, q_factor, q_scales, k_scales, tokens, v_scale = scaling
    q = q_s.index(WHICH)
    nothing = gl.zeros([HALF, TILE_N], gl.float32, layout=LOGITS)
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head = tile // tiles_m
        row = tile % tiles_m * (2 * HALF) + WHICH * HALF
        scale = qk_scale
        if FP8:
            scale *= gl.load(q_scales + head) * gl.load(k_scales + head)
        scale = gl.full([HALF], scale, gl.float32, layout=gl.SliceLayout(1, LOGITS))
        if HAS_Q_FACTOR:
            token = gl.minimum(gl.arange(0, HALF, layout=gl.SliceLayout(1, LOGITS)), tokens - 1 - row)
            scale *= gl.load(q_factor + row + token)  # it is positive
        # The last tile of keys, alone: nothing to scale yet, and the only one that may have to be masked.
        stage, phase = turn_of(step, STAGES)
        mbarrier.wait(q_full.index(WHICH), turn)
        mbarrier.wait(k_full.index(stage), phase)
        asked = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=(asked,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        logits = gl.where((gl.arange(0, TILE_N, layout=COLUMN) < left)[None, :], logits, float("-inf"))
        level = gl.max(logits, 1) * scale - LIFT
        shares = gl.exp2(logits * scale[:, None] - level[:, None])
        total = partial_sums(shares)
        weights = rounded(shares, q_s.dtype, WEIGHTS, False, FP8)
        mixed = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=MIXED)
        product = mixed
        # Two values, because of `fade = shrink`: begun as one, Triton 3.6 would hold `fade` for a constant of the loop.
        shrink = gl.full([HALF], 1.0, gl.float32, layout=ROW)
        fade = gl.full([HALF], 1.0, gl.float32, layout=ROW)
        after, phase_after = turn_of(step + 1, STAGES)
        mbarrier.wait(k_full.index(after), phase_after, pred=last > 0)
        for back in range(0, last):
            asked = warpgroup_mma(q, k_s.index(after).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mixed, product = settled(mixed, product, fade, shrink, FP8)  # in FP8 the product runs meanwhile
            fade = shrink
            mbarrier.wait(v_full.index(stage), phase)
            mixing = mix(weights, v_s.index(stage), product, FP8)
            logits = warpgroup_mma_wait(1, deps=(asked,))
            mbarrier.arrive(k_empty.index(after), count=1)
            peak = gl.max(logits, 1) * scale - LIFT
            above = gl.maximum(level, peak)
            shrink = gl.convert_layout(gl.exp2(level - above), ROW)
            shares = gl.exp2(logits * scale[:, None] - above[:, None])
            total *= gl.convert_layout(shrink[:, None], total.type.layout, assert_trivial=True)
            total += partial_sums(shares)
            level = above
            # The wait for the next keys stands here because ptxas moves no instruction over its loop. Without it the
            # second product is waited for first and the softmax comes after it: nothing would overlap.
            following, phase_following = turn_of(step + 2, STAGES)
            mbarrier.wait(k_full.index(following), phase_following, pred=back + 1 < last)
            product = warpgroup_mma_wait(0, deps=(mixing,))
            mbarrier.arrive(v_empty.index(stage), count=1)
            stage, phase, after, phase_after = after, phase_after, following, phase_following
            weights = rounded(shares, q_s.dtype, WEIGHTS, True, FP8)
            step += 1
        mbarrier.arrive(q_empty.index(WHICH), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mixed, product = settled(mixed, product, fade, shrink, FP8)
        mixing = mix(weights, v_s.index(stage), product, FP8)
        product = warpgroup_mma_wait(0, deps=(mixing,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        if FP8:
            product += mixed * shrink[:, None]
        result = product * gl.convert_layout(v_scale / gl.sum(total, 1), ROW)[:, None]
        tma.store_wait(0)
        out_s.index(WHICH).store(result.to(out_s.dtype))
        fence_async_shared()
        copy_out(out, [row, head * HEAD_DIM], out_s.index(WHICH))
        step += 1
        turn ^= 1
    tma.store_wait(0)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def attention_specialised_kernel(
    q, k, v, out, shuffled, scalars, q_factor, q_scales, k_scales, tokens, heads, rows, qk_scale, v_scale,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, HAS_PLACE: gl.constexpr, HAS_Q_FACTOR: gl.constexpr,
    FP8: gl.constexpr,
):  # fmt: skip
    valid = gl.load(scalars + 1) if HAS_PLACE else rows
    tiles_m = gl.cdiv(tokens, 2 * HALF)
    tiles = tiles_m * heads
    last = gl.maximum(gl.cdiv(valid, TILE_N) - 1, 0)  # tile of keys
    left = valid - last * TILE_N
    q_s = gl.allocate_shared_memory(q.dtype, [2, HALF, HEAD_DIM], q.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, TILE_N, HEAD_DIM], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES, v.block_type.shape[0], v.block_type.shape[1]], v.layout)
    out_s = gl.allocate_shared_memory(out.dtype, [2, HALF, HEAD_DIM], out.layout)
    raw = barriers(1, 1).index(0)
    queries = (q_s, barriers(2, 1), barriers(2, 1))  # each half has one reader
    keys = (k_s, barriers(STAGES, 1), barriers(STAGES, 2))  # both halves read every tile of keys and values
    values = (v_s, barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    queues = (queries, keys, values)
    work = (tiles_m, tiles, last, left)
    scaling = (qk_scale, q_factor, q_scales, k_scales, tokens, v_scale)
    gl.warp_specialize(
        [
            (consume, (0, out, out_s, queues, work, scaling, HEAD_DIM, STAGES, FP8, HAS_Q_FACTOR)),
            (consume, (1, out, out_s, queues, work, scaling, HEAD_DIM, STAGES, FP8, HAS_Q_FACTOR)),
            (produce, (q, v, (k, shuffled), raw, queues, work, STAGES, FP8)),
        ],
        [4, 1], REGISTERS,
    )  # fmt: skip


def descriptors(name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Any, ...]:
    """Of q, k, v, out and shuffled keys, as the kernel copies them; ValueError where TMA cannot."""
    (rows, heads, head_dim), half, tile_n = k.shape, HALF.value, TILE_N.value

    def describe(what: str, tensor: Tensor, block: list[int], **more: Any) -> Any:
        layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
        return tma_descriptor(name, what, tensor, block, layout, **more)

    keys = shuffled = describe("k", k.flatten(1), [tile_n, head_dim])
    if q.dtype != FP8:
        values = describe("v", v.flatten(1), [tile_n, head_dim])
    else:
        values, width = describe("v", attention.channels(name, v), [head_dim, tile_n]), heads * head_dim
        groups = (rows // 16, 2, 4, 2, width) if rows >= 16 else (1, 1, 1, 1, width)  # only the last tile has others
        turned = k.as_strided(groups, (16 * width, 2 * width, 4 * width, width, 1))
        shuffled = describe("the shuffled k", turned, [tile_n // 16, 2, 4, 2, head_dim])
    return (describe("q", q.flatten(1), [half, head_dim]), keys, values,
            describe("out", out.flatten(1), [half, head_dim], stored=True), shuffled)  # fmt: skip


def attention_specialised(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, scales: Scales | None = None,
    q_factor: Tensor | None = None,
) -> Tensor:
    """Attention by loading and computing warps (wgmma, TMA): 8 and 16 bits, head sizes 32, 64, 128; sm_90."""
    name = "specialised attention"
    tokens, heads, head_dim, rows = attention.checked(name, q, k, v, out, scales, q_factor)
    dense = all(part.is_contiguous() for part in (q, k, out, *([v] if scales is None else [])))
    if head_dim not in (32, 64, 128) or not dense or not {q.dtype, out.dtype} <= set(DTYPES):
        refuse(name, f"needs contiguous tensors of 8 or 16 bits, head size 32, 64 or 128, not {q.dtype} {head_dim}")
    if arch(q) not in (0, 90):
        refuse(name, f"needs sm_90, not {arch_name(arch(q))}")
    *factors, v_scale = attention.scale_arguments(q, scales, q_factor)
    stages = 2 if head_dim * q.element_size() > 128 else 4  # of keys and of values: what 227 KiB of shared memory hold
    run(
        attention_specialised_kernel, min(triton.cdiv(tokens, 2 * HALF.value) * heads, processors(q)),
        *descriptors(name, q, k, v, out), q if place is None else place.scalars, *factors, tokens, heads, rows,
        head_dim**-0.5 * attention.LOG2_E, v_scale, HEAD_DIM=head_dim, STAGES=stages, HAS_PLACE=place is not None,
        HAS_Q_FACTOR=q_factor is not None, FP8=scales is not None, num_warps=4,
    )  # fmt: skip
    return out


_SMALL = {
    "some-tiles": dict(tokens=300, heads=3, head_dim=64, rows=700, valid=650, placed=1),
    "one-whole": dict(tokens=129, heads=2, head_dim=128, rows=128, valid=128, placed=0),
}

SPECS = [
    replace(spec, name=spec.name.replace("descriptor", "specialised"), launch=attention_specialised,
            small={**spec.small, **_SMALL}, max_arch=90)
    for spec in attention.SPECS if "descriptor" in spec.name
]  # fmt: skip
