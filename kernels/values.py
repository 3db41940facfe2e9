"""`store_values`: a block's values into the arena of FP8 attention, in which the tokens of a channel are contiguous.

    code = e4m3(clamp(v / scale, -448, 448)),  arena row `first + t`, transposed on the way

v [T, H, d] as projected; arena [N, H, d] e4m3 with stride 1 along its rows (storage [H, d, N]), because the tensor
cores take an FP8 operand only with the dimension of the sum contiguous, and the sum of attention's second product
runs over tokens. One scale for the layer: e4m3 is a float format, so a scale only has to keep values in range.
Bytes: T D (element size + 1); FLOPs: 3 for each element.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.contract import FP8, Place, transposed
from liverelay.kernels.launch import check, next_power_of_two, refuse, run
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, random

TOKENS = 128  # of a program, with one head


@triton.jit
def store_values_kernel(
    v, arena, scalars, v_stride, arena_head, arena_place, tokens, tiles, inverse, HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr, TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    token = (program % tiles) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    place = tl.arange(0, HEAD_TILE)
    source = v + token[:, None] * v_stride + head * HEAD_DIM + place[None, :]
    value = tl.load(source, mask=(token < tokens)[:, None] & (place < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    code = tl.trans((value * inverse).to(arena.dtype.element_ty))  # the conversion clamps
    row = tl.multiple_of(tl.load(scalars), ALIGNED).to(tl.int64) + token
    target = arena + head * arena_head + place[:, None] * arena_place + row[None, :]
    tl.store(target, code, mask=(place < HEAD_DIM)[:, None] & (token < tokens)[None, :])


def store_values(v: Tensor, arena: Tensor, place: Place, scale: float) -> None:
    """A block's values [T, H, d] as e4m3 into the arena of FP8 attention, whose tokens are contiguous."""
    (tokens, heads, head_dim), name = v.shape, "store_values"
    check(name, {"v": (v, (tokens, heads, head_dim))})
    rows, (row_stride, head_stride, place_stride) = arena.shape[0], arena.stride()
    if tuple(arena.shape[1:]) != (heads, head_dim) or arena.dtype != FP8 or (row_stride != 1 and rows > 1):
        found = f"shape {list(arena.shape)}, strides {list(arena.stride())}, {arena.dtype}"
        refuse(name, f"the arena has {found}, expected [N, {heads}, {head_dim}] in float8_e4m3fn with stride 1 first")
    if head_dim > 1 and v.stride(1) != head_dim:
        refuse(name, f"the heads of v are not contiguous (strides {list(v.stride())})")
    # One launch serves every slot of the ring, and reads its row on the device: slots end at whole blocks from the end.
    aligned = math.gcd(rows, tokens, 16)
    if not scale > 0 or place.row + tokens > rows or place.row % aligned:
        found = f"scale {scale}, {tokens} tokens from row {place.row} on in {rows} rows"
        refuse(name, f"{found}; expected a positive one, and a row that is a multiple of {aligned}")
    tiles = triton.cdiv(tokens, TOKENS)
    run(
        store_values_kernel, tiles * heads, v, arena, place.scalars, v.stride(0), head_stride, place_stride, tokens,
        tiles, 1.0 / scale, HEAD_DIM=head_dim, HEAD_TILE=next_power_of_two(head_dim), TOKENS=TOKENS,
        ALIGNED=aligned, num_warps=8, num_stages=1,
    )  # fmt: skip


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_store_values(v: Tensor, arena: Tensor, place: Place, scale: float) -> dict[str, Tensor]:
    """Codes before rounding, in float64. Rows that are not written keep what they hold."""
    exact = arena.double()
    exact[place.row : place.row + len(v)] = (v.double() / scale).clamp(-448, 448)
    return {"arena": exact}


def make_inputs(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    tokens, heads, head_dim, rows = (dims[name] for name in ("tokens", "heads", "head_dim", "arena"))
    v = random((tokens, heads, head_dim), dtype, rng, device)
    arena = transposed((rows, heads, head_dim), device)
    arena.copy_(random((rows, heads, head_dim), torch.float32, rng, device))
    place = Place.make(device).fill(rows - tokens, rows, False)
    return Case((v, arena, place, 0.007), {}, {"arena": arena})


def cost(dims: Dims, dtype: torch.dtype) -> Cost:
    elements = dims["tokens"] * dims["heads"] * dims["head_dim"]
    return Cost(elements * (dtype.itemsize + 1), 3 * elements)


SPECS = [
    KernelSpec(
        "store_values", store_values, reference_store_values, torch_ops.store_values, make_inputs, cost,
        small={
            "tiny-model": dict(tokens=18, heads=4, head_dim=32, arena=40),
            "odd": dict(tokens=129, heads=3, head_dim=96, arena=151),
            "tiny-head": dict(tokens=1, heads=5, head_dim=6, arena=1),
        },
        production={"14B 704x384": dict(tokens=3168, heads=40, head_dim=128, arena=15312)}, min_arch=89,
    )
]  # fmt: skip
