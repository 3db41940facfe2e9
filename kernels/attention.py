"""`attention`: softmax(q k^T / sqrt(d)) v over the dense arena `[sink | ring]`, one pass, no mask.

q, out [T, H, d]; k, v [N, H, d], of which the first `valid` rows count; their number is read from the device, so that
one captured launch serves every fill level of the ring. Online softmax in base 2, float32 accumulators; the
probabilities are rounded to the working dtype before the second product, as in every flash attention.
Bytes: (2 T + 2 valid) H d * element size; FLOPs: 4 T valid H d. Source: spec dit.md 7.3.

Two kernels with a persistent schedule (as many programs as fit; each walks over tiles of queries, head by head, so
that a head's keys stay in the L2 cache): one reads tiles through pointers (any GPU, any head size), the other through
tensor descriptors, which sm_90 and later load without spending registers on addresses.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from liverelay.kernels import torch_ops
from liverelay.kernels.contract import Place
from liverelay.kernels.launch import arch, check, next_power_of_two, processors, refuse, run
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random

LOG2_E = 1.4426950408889634


@triton.jit
def softmax_step(q, k, v, mixed, highest, total, qk_scale, left, TILE_N: tl.constexpr, MASKED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Take one tile of keys [d, TILE_N] and values [TILE_N, d] into the running softmax; `left` rows of it count."""
    logits = tl.dot(q, k, input_precision=PRECISION) * qk_scale
    if MASKED:
        logits = tl.where(tl.arange(0, TILE_N)[None, :] < left, logits, float("-inf"))
    above = tl.maximum(highest, tl.max(logits, axis=1))
    shrink = tl.exp2(highest - above)
    shares = tl.exp2(logits - above[:, None])
    mixed = tl.dot(shares.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    return mixed, above, total * shrink + tl.sum(shares, axis=1)


@triton.jit
def attention_pointer_kernel(
    q, k, v, out, scalars, q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    tokens, heads, rows, qk_scale, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, HAS_PLACE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    valid = tl.load(scalars + 1) if HAS_PLACE else rows
    tiles_m = tl.cdiv(tokens, TILE_M)
    place = tl.arange(0, HEAD_TILE)
    column = tl.arange(0, TILE_N)
    inner = place < HEAD_DIM
    k_places = place[:, None] + column[None, :] * k_token
    v_places = column[:, None] * v_token + place[None, :]
    for tile in tl.range(tl.program_id(0), tiles_m * heads, tl.num_programs(0)):
        head = (tile // tiles_m).to(tl.int64)
        token = (tile % tiles_m) * TILE_M + tl.arange(0, TILE_M).to(tl.int64)
        outer = token < tokens
        q_tile = tl.load(
            q + head * q_head + token[:, None] * q_token + place[None, :],
            mask=outer[:, None] & inner[None, :], other=0.0,
        )  # fmt: skip
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
                q_tile, k_tile, v_tile, mixed, highest, total, qk_scale, TILE_N, TILE_N, False, PRECISION
            )
            k_rows += TILE_N * k_token
            v_rows += TILE_N * v_token
        left = valid - whole
        if left > 0:
            k_tile = tl.load(k_rows + k_places, mask=inner[:, None] & (column[None, :] < left), other=0.0)
            v_tile = tl.load(v_rows + v_places, mask=inner[None, :] & (column[:, None] < left), other=0.0)
            mixed, highest, total = softmax_step(
                q_tile, k_tile, v_tile, mixed, highest, total, qk_scale, left, TILE_N, True, PRECISION
            )
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        at = out + head * out_head + token[:, None] * out_token + place[None, :]
        tl.store(at, result, mask=outer[:, None] & inner[None, :])


@triton.jit
def attention_descriptor_kernel(
    q, k, v, out, scalars, tokens, heads, rows, qk_scale, HEAD_DIM: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, HAS_PLACE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    valid = tl.load(scalars + 1) if HAS_PLACE else rows
    tiles_m = tl.cdiv(tokens, TILE_M)
    for tile in tl.range(tl.program_id(0), tiles_m * heads, tl.num_programs(0)):
        column = (tile // tiles_m) * HEAD_DIM
        first = (tile % tiles_m) * TILE_M
        q_tile = q.load([first, column])
        mixed = tl.zeros([TILE_M, HEAD_DIM], tl.float32)
        highest = tl.full([TILE_M], float("-inf"), tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
        whole = valid // TILE_N * TILE_N
        for row in tl.range(0, whole, TILE_N):
            k_tile, v_tile = k.load([row, column]), v.load([row, column])
            mixed, highest, total = softmax_step(
                q_tile, k_tile.T, v_tile, mixed, highest, total, qk_scale, TILE_N, TILE_N, False, PRECISION
            )
        left = valid - whole
        if left > 0:
            k_tile, v_tile = k.load([whole, column]), v.load([whole, column])
            # Rows past the valid ones hold whatever the ring held before: weight 0 times NaN would be NaN.
            v_tile = tl.where((tl.arange(0, TILE_N) < left)[:, None], v_tile, 0.0)
            mixed, highest, total = softmax_step(
                q_tile, k_tile.T, v_tile, mixed, highest, total, qk_scale, left, TILE_N, True, PRECISION
            )
        out.store([first, column], (mixed / total[:, None]).to(out.dtype))


def _checked(name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """tokens, heads, head size, rows of the arena; ValueError where the arguments do not fit."""
    (tokens, heads, head_dim), rows = q.shape, k.shape[0]
    shape = (rows, heads, head_dim)
    check(name, {"q": (q, (tokens, heads, head_dim)), "k": (k, shape), "v": (v, shape), "out": (out, tuple(q.shape))})
    if head_dim > 256 or not rows or len({part.dtype for part in (q, k, v, out)}) > 1:
        refuse(name, f"head size {head_dim}, {rows} rows, dtypes {[str(part.dtype) for part in (q, k, v, out)]}")
    return tokens, heads, head_dim, rows


def attention_pointer(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None) -> Tensor:
    """Attention over the arena through pointers: any head size up to 256, any GPU."""
    tokens, heads, head_dim, rows = _checked("attention", q, k, v, out)
    exact, head_tile = q.dtype == torch.float32, max(16, next_power_of_two(head_dim))
    small_memory = arch(q) in (86, 89) or exact or head_tile > 128
    tile_m, tile_n, stages = (64, 32, 2) if exact or head_tile > 128 else (128, 64, 2 if small_memory else 3)
    if exact and head_tile > 32:  # float32 products without tensor cores keep whole operands in registers
        tile_m, tile_n = (32, 32) if head_tile == 64 else (16, 16)
    elif head_tile != head_dim and arch(q) >= 100:
        tile_n = 32  # masks of an odd head size cost registers
    if not arch(q):  # the interpreter's time goes by tiles, whatever their size
        tile_m, tile_n = 128, 128
    tiles = triton.cdiv(tokens, tile_m) * heads
    run(
        attention_pointer_kernel, min(tiles, processors(q)), q, k, v, out, q if place is None else place.scalars,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], tokens, heads, rows,
        head_dim**-0.5 * LOG2_E, HEAD_DIM=head_dim, HEAD_TILE=head_tile, TILE_M=tile_m, TILE_N=tile_n,
        HAS_PLACE=place is not None, PRECISION="ieee" if exact else "tf32",
        num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out


def attention_descriptor(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None) -> Tensor:
    """Attention over the arena through tensor descriptors (TMA): 16-bit types, head sizes 32, 64, 128; sm_90 on."""
    name = "attention through descriptors"
    tokens, heads, head_dim, rows = _checked(name, q, k, v, out)
    if not takes_descriptors(q) or not all(part.flatten(1).is_contiguous() for part in (q, k, v, out)):
        refuse(name, f"needs contiguous 16-bit tensors with a head size of 32, 64 or 128, not {q.dtype} {head_dim}")
    tile_m, tile_n, stages = (128, 64, 3) if arch(q) >= 100 else (128, 128, 2)

    def describe(tensor: Tensor, tile: int) -> Any:
        return TensorDescriptor.from_tensor(tensor.flatten(1), [tile, head_dim])

    tiles = triton.cdiv(tokens, tile_m) * heads
    run(
        attention_descriptor_kernel, min(tiles, processors(q)), describe(q, tile_m), describe(k, tile_n),
        describe(v, tile_n), describe(out, tile_m), q if place is None else place.scalars, tokens, heads, rows,
        head_dim**-0.5 * LOG2_E, HEAD_DIM=head_dim, TILE_M=tile_m, TILE_N=tile_n, HAS_PLACE=place is not None,
        PRECISION="tf32", num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out


def takes_descriptors(q: Tensor) -> bool:
    """Whether the descriptor kernel computes this head size and dtype."""
    return q.shape[2] in (32, 64, 128) and q.dtype in (torch.bfloat16, torch.float16)


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None) -> Tensor:
    """The kernel that suits the device: through descriptors from sm_90 on, else through pointers."""
    launch = attention_descriptor if arch(q) >= 90 and takes_descriptors(q) else attention_pointer
    return launch(q, k, v, out, place)


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None
) -> dict[str, Tensor]:
    """Float64, no rounding."""
    valid = k.shape[0] if place is None else place.valid
    logits = torch.einsum("thd,nhd->htn", q.double(), k[:valid].double()) * q.shape[2] ** -0.5
    return {"out": torch.einsum("htn,nhd->thd", logits.softmax(-1), v[:valid].double())}


def make_inputs(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    tokens, heads, head_dim, rows, valid = (dims[n] for n in ("tokens", "heads", "head_dim", "rows", "valid"))
    q = random((tokens, heads, head_dim), dtype, rng, device)
    k, v = (random((rows, heads, head_dim), dtype, rng, device) for _ in range(2))
    k[valid:], v[valid:] = float("nan"), float("nan")  # what lies behind the valid rows must not matter
    out = poisoned((tokens, heads, head_dim), dtype, device)
    place = Place.make(device).fill(0, valid, False) if dims["placed"] else None
    return Case((q, k, v, out, place), {}, {"out": out})


def cost(dims: Dims, dtype: torch.dtype) -> Cost:
    width = dims["heads"] * dims["head_dim"]
    elements = 2 * width * (dims["tokens"] + dims["valid"])
    return Cost(elements * dtype.itemsize, 4 * dims["tokens"] * dims["valid"] * width)




def _dims(**dims: int) -> Dims:
    return {**dims, "placed": 1}


_SMALL = {
    "tiny-model": _dims(tokens=72, heads=2, head_dim=32, rows=200, valid=130),
    "one-key": _dims(tokens=3, heads=2, head_dim=64, rows=9, valid=1),
    "whole-tiles": _dims(tokens=130, heads=1, head_dim=128, rows=256, valid=256),
    "text": dict(tokens=9, heads=2, head_dim=64, rows=77, valid=77, placed=0),
}
_ODD = {
    "d96": _dims(tokens=33, heads=2, head_dim=96, rows=70, valid=67),
    "d6": _dims(tokens=7, heads=3, head_dim=6, rows=40, valid=33),
}
_PRODUCTION = {
    "14B 704x384": _dims(tokens=3168, heads=40, head_dim=128, rows=15312, valid=15312),
    "14B text": dict(tokens=3168, heads=40, head_dim=128, rows=512, valid=512, placed=0),
}
_COMMON = (reference_attention, torch_ops.attention, make_inputs, cost)
SPECS = [
    KernelSpec("attention", attention_pointer, *_COMMON, _SMALL | _ODD, _PRODUCTION, dot=True),
    KernelSpec(
        "attention_descriptor", attention_descriptor, *_COMMON, _SMALL, _PRODUCTION, dtypes=(torch.bfloat16,),
        min_arch=90, dot=True,
    ),
]  # fmt: skip
