"""`attention`: softmax(q k^T / sqrt(d)) v over the dense arena `[sink | ring]`, one pass, no mask.

q, out [T, H, d]; k, v [N, H, d], of which the first `valid` rows count; their number is read from the device, so that
one captured launch serves every fill level of the ring. Online softmax in base 2, float32 accumulators; the
probabilities are rounded to the working dtype before the second product, as in every flash attention.
Bytes: (2 T + 2 valid) H d * element size; FLOPs: 4 T valid H d. Source: spec dit.md 7.3.

Two kernels with a persistent schedule (as many programs as fit; each walks over tiles of queries, head by head, so
that a head's keys stay in the L2 cache): one reads tiles through pointers (any GPU, any head size), the other through
tensor descriptors, which sm_90 and later load without spending registers on addresses.

The text's queries still lack their RMS norm: `q_factor` [T] holds 1 / rms of each. A tile of queries is multiplied with
its factors when it has been loaded, and rounded as by the norm. A kernel whose queries do not pass through registers
multiplies the logits instead.

`attention_fp8`: the same of e4m3 codes. A head's queries have one scale, its keys another, and all values a third. The
first two are multiplied into the factor of the logits, and v's scale is applied to the result, so that no scale is
looked up for a key. v's tokens are contiguous (kernels/values.py). Probabilities fill e4m3's range: their row's largest
becomes 256. FP8 sums on sm_90 keep some 14 bits, so each tile's is added up in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import tma, torch_ops
from liverelay.kernels.contract import FP8, Place, Scales, transposed
from liverelay.kernels.launch import arch, check, next_power_of_two, processors, refuse, run
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random

LOG2_E = 1.4426950408889634


@triton.jit
def softmax_step(q, k, v, mixed, highest, total, scale, left, TILE_N: tl.constexpr, MASKED: tl.constexpr,
                 FP8: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Take one tile of keys [d, TILE_N] and values [TILE_N, d] into the running softmax; `left` rows of it count.

    scale turns logits into exponents of 2; it is positive.
    """
    LIFT: tl.constexpr = 8.0 if FP8 else 0.0  # the logarithm of the largest share, near e4m3's largest number
    logits = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        logits = tl.where(tl.arange(0, TILE_N)[None, :] < left, logits, float("-inf"))
    above = tl.maximum(highest, tl.max(logits, axis=1) * scale)
    shrink = tl.exp2(highest - above)
    shares = tl.exp2(logits * scale - (above - LIFT)[:, None])
    if FP8:
        mixed = mixed * shrink[:, None] + tl.dot(shares.to(v.dtype), v)
    else:
        mixed = tl.dot(shares.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    return mixed, above, total * shrink + tl.sum(shares, axis=1)


@triton.jit
def scale_of(q_scales, k_scales, head, qk_scale, FP8: tl.constexpr):
    """What turns a head's logits into exponents of 2."""
    if FP8:
        qk_scale *= tl.load(q_scales + head) * tl.load(k_scales + head)
    return qk_scale


@triton.jit
def scaled_queries(q, q_factor, token, tokens, HAS_Q_FACTOR: tl.constexpr):
    """A tile of queries times its factors, rounded as a norm's result is."""
    if HAS_Q_FACTOR:
        q = (q * tl.load(q_factor + token, mask=token < tokens, other=0.0)[:, None]).to(q.dtype)
    return q


@triton.jit
def attention_pointer_kernel(
    q, k, v, out, scalars, q_factor, q_scales, k_scales, q_token, q_head, k_token, k_head, v_token, v_head, v_place,
    out_token, out_head, tokens, heads, rows, qk_scale, v_scale, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, HAS_PLACE: tl.constexpr, HAS_Q_FACTOR: tl.constexpr, FP8: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    valid = tl.load(scalars + 1) if HAS_PLACE else rows
    tiles_m = tl.cdiv(tokens, TILE_M)
    place = tl.arange(0, HEAD_TILE)
    column = tl.arange(0, TILE_N)
    inner = place < HEAD_DIM
    k_places = place[:, None] + column[None, :] * k_token
    v_places = column[:, None] * v_token + place[None, :] * v_place
    for tile in tl.range(tl.program_id(0), tiles_m * heads, tl.num_programs(0)):
        head = (tile // tiles_m).to(tl.int64)
        token = (tile % tiles_m) * TILE_M + tl.arange(0, TILE_M).to(tl.int64)
        outer = token < tokens
        q_tile = tl.load(
            q + head * q_head + token[:, None] * q_token + place[None, :],
            mask=outer[:, None] & inner[None, :], other=0.0,
        )  # fmt: skip
        q_tile = scaled_queries(q_tile, q_factor, token, tokens, HAS_Q_FACTOR)
        scale = scale_of(q_scales, k_scales, head, qk_scale, FP8)
        # A scalar that moves and offsets that stay: a tile of moving pointers would cost 128 registers.
        k_rows = k + head * k_head
        v_rows = v + head * v_head
        mixed = tl.zeros([TILE_M, HEAD_TILE], tl.float32)
        highest = tl.full([TILE_M], float("-inf"), tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
        whole = valid // TILE_N * TILE_N
        for _ in tl.range(0, whole, TILE_N):
            if HEAD_DIM == HEAD_TILE:
                k_tile, v_tile = tl.load(k_rows + k_places), tl.load(v_rows + v_places)
            else:
                k_tile = tl.load(k_rows + k_places, mask=inner[:, None], other=0.0)
                v_tile = tl.load(v_rows + v_places, mask=inner[None, :], other=0.0)
            mixed, highest, total = softmax_step(
                q_tile, k_tile, v_tile, mixed, highest, total, scale, TILE_N, TILE_N, False, FP8, PRECISION
            )
            k_rows += TILE_N * k_token
            v_rows += TILE_N * v_token
        left = valid - whole
        if left > 0:
            k_tile = tl.load(k_rows + k_places, mask=inner[:, None] & (column[None, :] < left), other=0.0)
            v_tile = tl.load(v_rows + v_places, mask=inner[None, :] & (column[:, None] < left), other=0.0)
            mixed, highest, total = softmax_step(
                q_tile, k_tile, v_tile, mixed, highest, total, scale, left, TILE_N, True, FP8, PRECISION
            )
        result = (mixed * (v_scale / total)[:, None]).to(out.dtype.element_ty)
        at = out + head * out_head + token[:, None] * out_token + place[None, :]
        tl.store(at, result, mask=outer[:, None] & inner[None, :])


@triton.jit
def attention_descriptor_kernel(
    q, k, v, out, scalars, q_factor, q_scales, k_scales, tokens, heads, rows, qk_scale, v_scale, HEAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, HAS_PLACE: tl.constexpr, HAS_Q_FACTOR: tl.constexpr, FP8: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    valid = tl.load(scalars + 1) if HAS_PLACE else rows
    tiles_m = tl.cdiv(tokens, TILE_M)
    for tile in tl.range(tl.program_id(0), tiles_m * heads, tl.num_programs(0)):
        head = tile // tiles_m
        column = head * HEAD_DIM
        first = (tile % tiles_m) * TILE_M
        token = first + tl.arange(0, TILE_M)
        q_tile = scaled_queries(q.load([first, column]), q_factor, token, tokens, HAS_Q_FACTOR)
        scale = scale_of(q_scales, k_scales, head, qk_scale, FP8)
        mixed = tl.zeros([TILE_M, HEAD_DIM], tl.float32)
        highest = tl.full([TILE_M], float("-inf"), tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
        whole = valid // TILE_N * TILE_N
        for row in tl.range(0, whole, TILE_N):
            v_tile = v.load([column, row]).T if FP8 else v.load([row, column])
            mixed, highest, total = softmax_step(
                q_tile, k.load([row, column]).T, v_tile, mixed, highest, total, scale, TILE_N, TILE_N, False, FP8,
                PRECISION,
            )  # fmt: skip
        left = valid - whole
        if left > 0:
            # Rows past the valid ones hold whatever the ring held before: weight 0 times NaN would be NaN.
            v_tile = v.load([column, whole]).T if FP8 else v.load([whole, column])
            v_tile = tl.where((tl.arange(0, TILE_N) < left)[:, None], v_tile, 0.0)
            mixed, highest, total = softmax_step(
                q_tile, k.load([whole, column]).T, v_tile, mixed, highest, total, scale, left, TILE_N, True, FP8,
                PRECISION,
            )  # fmt: skip
        out.store([first, column], (mixed * (v_scale / total)[:, None]).to(out.dtype))


def checked(
    name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scales: Scales | None, q_factor: Tensor | None
) -> tuple[int, int, int, int]:
    """tokens, heads, head size, rows of the arena; ValueError where the arguments do not fit."""
    (tokens, heads, head_dim), rows = q.shape, k.shape[0]
    shape, dtypes = (rows, heads, head_dim), {q.dtype, k.dtype, v.dtype}
    tensors = {"q": (q, (tokens, heads, head_dim)), "k": (k, shape), "out": (out, tuple(q.shape))}
    if q_factor is not None:
        tensors["q_factor"] = (q_factor, (tokens,))
        if scales is not None:
            refuse(name, "queries in FP8 have one scale for each head, no factors of their own")
    if scales is None:
        tensors["v"], dtypes = (v, shape), dtypes | {out.dtype}
    else:
        tensors |= {"the scale of q": (scales.q, (heads,)), "the scale of k": (scales.k, (heads,))}
        if v.shape != k.shape or (rows > 1 and v.stride(0) != 1):
            refuse(name, f"v has shape {list(v.shape)} and strides {list(v.stride())}, expected {list(shape)}, 1 first")
    check(name, tensors)
    if head_dim > 256 or not rows or len(dtypes) > 1 or (scales is None) == (q.dtype == FP8):
        refuse(name, f"head size {head_dim}, {rows} rows, dtypes {[str(part.dtype) for part in (q, k, v, out)]}")
    return tokens, heads, head_dim, rows


def scale_arguments(q: Tensor, scales: Scales | None, q_factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """Factors of queries, of heads' queries and of their keys, and v's scale, as kernels take them: q for none."""
    q_scales, k_scales, v_scale = (q, q, 1.0) if scales is None else (scales.q, scales.k, scales.v)
    return q if q_factor is None else q_factor, q_scales, k_scales, v_scale


def _pointer_tiles(q: Tensor, head_tile: int) -> tuple[int, int, int]:
    """Tile of queries, tile of keys and stages that fit the device's registers and shared memory."""
    exact, fp8 = q.dtype == torch.float32, q.dtype == FP8
    small_memory = arch(q) in (86, 89) or exact or head_tile > 128
    tile_m, tile_n, stages = (64, 32, 2) if exact or head_tile > 128 else (128, 64, 2 if small_memory else 3)
    if exact and head_tile > 32:  # float32 products without tensor cores keep whole operands in registers
        tile_m, tile_n = (32, 32) if head_tile == 64 else (16, 16)
    elif arch(q) >= 100:
        tile_n = 32  # with 64 the sums and the keys' addresses do not fit the registers there
    if fp8:
        tile_n = 32 if arch(q) >= 100 else 64
    if arch(q) < 0:  # 64 KiB of shared memory, and Triton 3.6 cannot pipeline these loads for AMD
        stages = 1
    # The interpreter's time goes by tiles, whatever their size.
    return (tile_m, tile_n, stages) if arch(q) else (128, 128, 1)


def attention_pointer(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, scales: Scales | None = None,
    q_factor: Tensor | None = None,
) -> Tensor:
    """Attention over the arena through pointers: any head size up to 256, any GPU."""
    tokens, heads, head_dim, rows = checked("attention", q, k, v, out, scales, q_factor)
    head_tile = max(32 if scales else 16, next_power_of_two(head_dim))
    tile_m, tile_n, stages = _pointer_tiles(q, head_tile)
    tiles = triton.cdiv(tokens, tile_m) * heads
    *factors, v_scale = scale_arguments(q, scales, q_factor)
    run(
        attention_pointer_kernel, min(tiles, processors(q)), q, k, v, out, q if place is None else place.scalars,
        *factors, *q.stride()[:2], *k.stride()[:2], *v.stride(), *out.stride()[:2], tokens, heads, rows,
        head_dim**-0.5 * LOG2_E, v_scale, HEAD_DIM=head_dim, HEAD_TILE=head_tile, TILE_M=tile_m, TILE_N=tile_n,
        HAS_PLACE=place is not None, HAS_Q_FACTOR=q_factor is not None, FP8=scales is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out


def attention_descriptor(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, scales: Scales | None = None,
    q_factor: Tensor | None = None,
) -> Tensor:
    """Attention over the arena through tensor descriptors (TMA): 8 and 16 bits, head sizes 32, 64, 128; sm_90 on."""
    name = "attention through descriptors"
    tokens, heads, head_dim, rows = checked(name, q, k, v, out, scales, q_factor)
    dense = [part.is_contiguous() for part in (q, k, out, *([v] if scales is None else []))]
    if not takes_descriptors(q) or not all(dense):
        refuse(name, f"needs contiguous tensors of 8 or 16 bits, head size 32, 64 or 128, not {q.dtype} {head_dim}")
    tile_m, tile_n, stages = (128, 64, 3) if arch(q) >= 100 else (128, 128, 2)

    def describe(what: str, tensor: Tensor, tile: int) -> Any:
        return tma.descriptor(name, what, tensor.flatten(1), [tile, head_dim], stored=tensor is out)

    if scales is None:
        values = describe("v", v, tile_n)
    else:
        values = tma.descriptor(name, "v", channels(name, v), [head_dim, tile_n])
    tiles = triton.cdiv(tokens, tile_m) * heads
    *factors, v_scale = scale_arguments(q, scales, q_factor)
    run(
        attention_descriptor_kernel, min(tiles, processors(q)), describe("q", q, tile_m), describe("k", k, tile_n),
        values, describe("out", out, tile_m), q if place is None else place.scalars, *factors, tokens, heads, rows,
        head_dim**-0.5 * LOG2_E, v_scale, HEAD_DIM=head_dim, TILE_M=tile_m, TILE_N=tile_n, HAS_PLACE=place is not None,
        HAS_Q_FACTOR=q_factor is not None, FP8=scales is not None, PRECISION="tf32", num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out


def channels(name: str, v: Tensor) -> Tensor:
    """v [N, H, d] of FP8 attention as [H d, N]; ValueError where the heads' channels do not follow each other."""
    if v.stride(1) != v.shape[2] * v.stride(2):
        refuse(name, f"the channels of v do not follow each other (strides {list(v.stride())})")
    return v.flatten(1).t()


def takes_descriptors(q: Tensor) -> bool:
    """Whether the descriptor kernel computes this head size and dtype."""
    return q.shape[2] in (32, 64, 128) and q.dtype in (torch.bfloat16, torch.float16, FP8)


def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, scales: Scales | None = None,
    q_factor: Tensor | None = None,
) -> Tensor:
    """The kernel that suits the device: through descriptors from sm_100 on, else through pointers.

    On an H100 pointers are faster (2.1 against 2.4 ms at 14B); where the engine measures, it takes the fastest of all.
    """
    launch = attention_descriptor if arch(q) >= 100 and takes_descriptors(q) else attention_pointer
    return launch(q, k, v, out, place, scales, q_factor)


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, scales: Scales | None = None,
    q_factor: Tensor | None = None,
) -> dict[str, Tensor]:
    """Float64, no rounding."""
    valid = k.shape[0] if place is None else place.valid
    real = [q.double(), k[:valid].double(), v[:valid].double()]
    if scales is not None:
        real = [real[0] * scales.q.double()[:, None], real[1] * scales.k.double()[:, None], real[2] * scales.v]
    if q_factor is not None:
        real[0] = real[0] * q_factor.double()[:, None, None]
    logits = torch.einsum("thd,nhd->htn", real[0], real[1]) * q.shape[2] ** -0.5
    return {"out": torch.einsum("htn,nhd->thd", logits.softmax(-1), real[2])}


def make_inputs(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    tokens, heads, head_dim, rows, valid = (dims[n] for n in ("tokens", "heads", "head_dim", "rows", "valid"))
    q = random((tokens, heads, head_dim), dtype, rng, device)
    k, v = (random((rows, heads, head_dim), dtype, rng, device) for _ in range(2))
    k[valid:], v[valid:] = float("nan"), float("nan")  # what lies behind the valid rows must not matter
    out = poisoned((tokens, heads, head_dim), dtype, device)
    place = Place.make(device).fill(0, valid, False) if dims["placed"] else None
    kwargs = {"q_factor": random((tokens,), torch.float32, rng, device).exp()} if dims.get("q_factors") else {}
    return Case((q, k, v, out, place), kwargs, {"out": out})


def make_fp8(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    """As `make_inputs` in codes; heads of different size, so that a scale in the wrong place is seen."""
    tokens, heads, head_dim, rows, valid = (dims[n] for n in ("tokens", "heads", "head_dim", "rows", "valid"))
    q, k = (random((n, heads, head_dim), FP8, rng, device) for n in (tokens, rows))
    v = transposed((rows, heads, head_dim), device)
    v.copy_(random((rows, heads, head_dim), FP8, rng, device))
    q_scale, k_scale = ((random((heads,), torch.float32, rng, device) / 3).exp() for _ in range(2))
    scales = Scales(q_scale, k_scale, 0.05)
    k[valid:], v[valid:] = float("nan"), float("nan")
    out = poisoned((tokens, heads, head_dim), dtype, device)
    place = Place.make(device).fill(0, valid, False) if dims["placed"] else None
    return Case((q, k, v, out, place, scales), {}, {"out": out})


def cost(dims: Dims, dtype: torch.dtype) -> Cost:
    width = dims["heads"] * dims["head_dim"]
    elements = 2 * width * (dims["tokens"] + dims["valid"])
    return Cost(elements * dtype.itemsize, 4 * dims["tokens"] * dims["valid"] * width)


def cost_fp8(dims: Dims, dtype: torch.dtype) -> Cost:
    """One byte a code, and the result in the working dtype."""
    tokens, valid = dims["tokens"], dims["valid"]
    moved = dims["heads"] * dims["head_dim"] * (tokens + 2 * valid + tokens * dtype.itemsize)
    return Cost(moved, cost(dims, dtype).flops)


def _dims(**dims: int) -> Dims:
    return {**dims, "placed": 1}


_SMALL = {
    "tiny-model": _dims(tokens=72, heads=2, head_dim=32, rows=200, valid=130),
    "one-key": _dims(tokens=3, heads=2, head_dim=64, rows=9, valid=1),
    "whole-tiles": _dims(tokens=130, heads=1, head_dim=128, rows=256, valid=256),
    "text": dict(tokens=9, heads=2, head_dim=64, rows=77, valid=77, placed=0, q_factors=1),
}
_ODD = {
    "d96": _dims(tokens=33, heads=2, head_dim=96, rows=70, valid=67),
    "d6": _dims(tokens=7, heads=3, head_dim=6, rows=40, valid=33),
}
_PRODUCTION = {
    "14B 704x384": _dims(tokens=3168, heads=40, head_dim=128, rows=15312, valid=15312),
    "14B text": _dims(tokens=3168, heads=40, head_dim=128, rows=512, valid=512, q_factors=1),
}
_ARENA = {"14B 704x384": _PRODUCTION["14B 704x384"]}
_COMMON = (reference_attention, torch_ops.attention)
SPECS = [
    KernelSpec("attention", attention_pointer, *_COMMON, make_inputs, cost, _SMALL | _ODD, _PRODUCTION, dot=True),
    KernelSpec(
        "attention_descriptor", attention_descriptor, *_COMMON, make_inputs, cost, _SMALL, _PRODUCTION,
        dtypes=(torch.bfloat16,), min_arch=90, dot=True,
    ),
    KernelSpec(
        "attention_fp8", attention_pointer, *_COMMON, make_fp8, cost_fp8, _SMALL | _ODD, _ARENA,
        dtypes=(torch.bfloat16,), min_arch=89, dot=True,
    ),
    KernelSpec(
        "attention_fp8_descriptor", attention_descriptor, *_COMMON, make_fp8, cost_fp8, _SMALL, _ARENA,
        dtypes=(torch.bfloat16,), min_arch=90, dot=True,
    ),
]  # fmt: skip
