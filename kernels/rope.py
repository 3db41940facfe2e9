"""`qk_norm_rope`: what stands between the projection of q and k and attention, in one pass.

    y = R(R(x * rsqrt(mean(x^2) + eps)) * w)              over the full width D, x a row of q or of k
    out = R(rotate(y)),  (a, b) -> (a c - b s, a s + b c)  for adjacent pairs, float32
    k goes to arena row `first + t`; the sink's reference keys are rotated anew where their position moved.

qk [T, 2D]; q [T, H, d]; arena [N, H, d]; cos, sin [T, d/2] float32 holding float16 values. The first row and whether
the reference moved are read from the device (`Place.scalars`), so that a captured launch serves every ring slot.
For FP8 attention q and the arena are e4m3 and every head of a token has its scale, written in the same pass.
Bytes: 4 T D (+ 2 P D where the reference moves) * element size. FLOPs: 11 for each element of q and k.
Source: spec dit.md 3, 4 and 7.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.contract import FP8, Place, head_scales
from liverelay.kernels.launch import ELEMENTS, check, next_power_of_two, refuse, run
from liverelay.kernels.quant import reference_rows, store_quantized
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random
from liverelay.kernels.torch_ops import Table


@triton.jit
def rotate_heads(x, cos, sin, row, live, HALF: tl.constexpr, ROWS: tl.constexpr, HEADS_TILE: tl.constexpr,
                 HEAD_TILE: tl.constexpr):  # fmt: skip
    """Rotate the adjacent pairs of a tile [ROWS, heads, head size]; cos, sin [rows, d/2]."""
    pair = tl.arange(0, HEAD_TILE // 2)[None, None, :]
    inside = live & (pair < HALF)
    c = tl.load(cos + row * HALF + pair, mask=inside, other=0.0)
    s = tl.load(sin + row * HALF + pair, mask=inside, other=0.0)
    a, b = tl.split(tl.reshape(x, [ROWS, HEADS_TILE, HEAD_TILE // 2, 2]))
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), [ROWS, HEADS_TILE, HEAD_TILE])


@triton.jit
def norm_rows(x, weight, offsets, inside, eps, WIDTH: tl.constexpr):
    """RMS norm over all heads with the published two roundings; float32 holding values of the working dtype."""
    rounded = x.dtype
    wide = x.to(tl.float32)
    square = tl.sum(tl.sum(wide * wide, axis=2), axis=1)[:, None, None]
    normed = wide * tl.rsqrt(square / WIDTH + eps)
    w = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    return (normed.to(rounded).to(tl.float32) * w).to(rounded).to(tl.float32)


@triton.jit
def store_heads(x, out, places, mask, scale_out, scale_places, QUANTIZE: tl.constexpr):
    """Store a tile in the dtype of out; as e4m3 with one scale for each head of a row."""
    if QUANTIZE:
        store_quantized(x, mask, out, places, scale_out, scale_places, 2)
    else:
        tl.store(out + places, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def qk_norm_rope_kernel(
    qk, q_weight, k_weight, cos, sin, q_out, arena, q_scale, k_scale, raw_out, reference, reference_cos, reference_sin,
    scalars, qk_stride, q_scale_stride, k_scale_stride, tokens, reference_rows, own_programs, eps, HALF: tl.constexpr,
    HAS_RAW: tl.constexpr, QUANTIZE: tl.constexpr, WIDTH: tl.constexpr, HEADS_TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = tl.arange(0, HEADS_TILE)[None, :, None]
    place = tl.arange(0, HEAD_TILE)[None, None, :]
    offsets = head * (2 * HALF) + place
    inside = (place < 2 * HALF) & (offsets < WIDTH)
    if program < own_programs:
        row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        live = row < tokens
        mask = live & inside
        source = qk + row * qk_stride + offsets
        q = norm_rows(tl.load(source, mask=mask, other=0.0), q_weight, offsets, inside, eps, WIDTH)
        q = rotate_heads(q, cos, sin, row, live, HALF, ROWS, HEADS_TILE, HEAD_TILE)
        store_heads(q, q_out, row * WIDTH + offsets, mask, q_scale, head * q_scale_stride + row, QUANTIZE)
        k = norm_rows(tl.load(source + WIDTH, mask=mask, other=0.0), k_weight, offsets, inside, eps, WIDTH)
        if HAS_RAW:
            tl.store(raw_out + row * WIDTH + offsets, k.to(raw_out.dtype.element_ty), mask=mask)
        k = rotate_heads(k, cos, sin, row, live, HALF, ROWS, HEADS_TILE, HEAD_TILE)
        slot = tl.load(scalars).to(tl.int64) + row
        store_heads(k, arena, slot * WIDTH + offsets, mask, k_scale, head * k_scale_stride + slot, QUANTIZE)
    else:
        row = ((program - own_programs) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        live = (row < reference_rows) & (tl.load(scalars + 2) != 0)
        mask = live & inside
        k = tl.load(reference + row * WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
        k = rotate_heads(k, reference_cos, reference_sin, row, live, HALF, ROWS, HEADS_TILE, HEAD_TILE)
        store_heads(k, arena, row * WIDTH + offsets, mask, k_scale, head * k_scale_stride + row, QUANTIZE)


def qk_norm_rope(
    qk: Tensor, weights: tuple[Tensor, Tensor], table: Table, outs: tuple[Tensor, ...], place: Place, *,
    eps: float, k_raw: Tensor | None = None, reference: tuple[Tensor, Table] | None = None,
) -> None:
    """RMS norm of q and k over the full width, RoPE, the write of k into its ring slot, the sink's rolling keys."""
    q_out, arena = outs[:2]
    tokens, heads, head_dim = q_out.shape
    rows = 0 if reference is None else reference[0].shape[0]
    _check(qk, weights, table, outs, k_raw, reference)
    q_scale, k_scale = outs[2:] or (table[0], table[0])
    kept, (cos, sin) = (q_out, table) if reference is None else reference
    head_tile, heads_tile = next_power_of_two(head_dim), next_power_of_two(heads)
    tile_rows = max(1, min(64, ELEMENTS // (head_tile * heads_tile)))
    own = triton.cdiv(tokens, tile_rows)
    run(
        qk_norm_rope_kernel, own + triton.cdiv(rows, tile_rows), qk, *weights, *table, q_out, arena, q_scale, k_scale,
        q_out if k_raw is None else k_raw, kept, cos, sin, place.scalars,
        qk.stride(0), q_scale.stride(0), k_scale.stride(0), tokens, rows, own, eps,
        HALF=head_dim // 2, HAS_RAW=k_raw is not None, QUANTIZE=len(outs) > 2, WIDTH=heads * head_dim,
        HEADS_TILE=heads_tile, HEAD_TILE=head_tile, ROWS=tile_rows,
        num_warps=min(16, max(1, tile_rows * head_tile * heads_tile // 2048)), num_stages=1,
    )  # fmt: skip


def _check(
    qk: Tensor, weights: tuple[Tensor, Tensor], table: Table, outs: tuple[Tensor, ...], k_raw: Tensor | None,
    reference: tuple[Tensor, Table] | None,
) -> None:
    """ValueError where shapes, strides or dtypes do not fit."""
    (q_out, arena), scales, name = outs[:2], outs[2:], "qk_norm_rope"
    tokens, heads, head_dim = shape = q_out.shape
    width, half, rows = heads * head_dim, head_dim // 2, arena.shape[0]
    tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "qk": (qk, (tokens, 2 * width)), "the weight of q": (weights[0], (width,)),
        "the weight of k": (weights[1], (width,)), "cos": (table[0], (tokens, half)), "sin": (table[1], (tokens, half)),
        "q": (q_out, tuple(shape)), "the arena": (arena, (rows, heads, head_dim)),
    }  # fmt: skip
    if k_raw is not None:
        tensors["k_raw"] = (k_raw, tuple(shape))
    if reference is not None:
        count = reference[0].shape[0]
        tensors["the reference"] = (reference[0], (count, heads, head_dim))
        tensors |= {f"reference table {i}": (part, (count, half)) for i, part in enumerate(reference[1])}
    dense = [label for label in tensors if label not in ("qk", "the weight of q", "the weight of k")]
    if scales:
        tensors |= {"the scale of q": (scales[0], (heads, tokens)), "the scale of k": (scales[1], (heads, rows))}
    check(name, tensors)
    for label in dense:
        if not tensors[label][0].is_contiguous():
            refuse(name, f"{label} is not contiguous (strides {list(tensors[label][0].stride())})")
    if len(scales) != (2 if q_out.dtype == FP8 else 0) or q_out.dtype != arena.dtype:
        refuse(name, f"q is {q_out.dtype} and the arena {arena.dtype} with {len(scales)} scales; e4m3 has two")


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_qk_norm_rope(
    qk: Tensor, weights: tuple[Tensor, Tensor], table: Table, outs: tuple[Tensor, ...], place: Place, *,
    eps: float, k_raw: Tensor | None = None, reference: tuple[Tensor, Table] | None = None,
) -> dict[str, Tensor]:
    """Float64, no rounding. Rows of the arena that are not written keep what they hold."""
    q_out, arena = outs[:2]

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

    normed = []
    for part, weight in zip(qk.double().chunk(2, dim=1), weights, strict=True):
        scaled = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + eps) * weight.double()
        normed.append(scaled.view(q_out.shape))
    exact = {"q": rotate(normed[0], *table), "arena": arena.double().clone()}
    if len(outs) > 2:
        exact["k_scale"] = outs[3].double().clone()
        exact |= {"q" if name == "out" else "q_scale": part for name, part in _quantized(exact["q"]).items()}

    def write(first: int, keys: Tensor) -> None:
        if len(outs) > 2:
            codes = _quantized(keys)
            keys, exact["k_scale"][:, first : first + len(keys)] = codes["out"], codes["scale"]
        exact["arena"][first : first + len(keys)] = keys

    write(place.row, rotate(normed[1], *table))
    if reference is not None and place.moved:
        write(0, rotate(reference[0].double(), *reference[1]))
    return exact | ({} if k_raw is None else {"k_raw": normed[1]})


def _quantized(x: Tensor) -> dict[str, Tensor]:
    """Codes before rounding [T, H, d] and scales [H, T] of every head of a token."""
    rows = reference_rows(x.flatten(0, 1))
    return {"out": rows["out"].view(x.shape), "scale": rows["scale"].view(x.shape[:2]).t()}


def _angles(rows: int, half: int, rng: torch.Generator, device: torch.device) -> Table:
    angle = torch.rand(rows, half, generator=rng) * 6.28
    cos, sin = (part.half().float().to(device) for part in (angle.cos(), angle.sin()))
    return cos, sin


def make_inputs(
    dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device, quantize: bool = False
) -> Case:
    tokens, heads, head_dim, rows = (dims[name] for name in ("tokens", "heads", "head_dim", "arena"))
    width, frame = heads * head_dim, dims["reference"]
    qk = random((tokens, 2 * width), dtype, rng, device)
    weights = (random((width,), dtype, rng, device), random((width,), dtype, rng, device))
    kept = FP8 if quantize else dtype
    outputs = {
        "q": poisoned((tokens, heads, head_dim), kept, device),
        "arena": random((rows, heads, head_dim), torch.float32, rng, device).to(kept),
    }
    if quantize:
        outputs["q_scale"] = head_scales((heads, tokens), device).fill_(float("nan"))
        outputs["k_scale"] = head_scales((heads, rows), device)
        outputs["k_scale"].copy_(random((heads, rows), torch.float32, rng, device).abs())
    outs = tuple(outputs.values())
    table = _angles(tokens, head_dim // 2, rng, device)
    place = Place.make(device).fill(rows - tokens, rows, bool(dims["moved"]))
    kwargs: dict[str, object] = {"eps": 1e-6}
    if frame:
        reference = random((frame, heads, head_dim), dtype, rng, device)
        kwargs["reference"] = (reference, _angles(frame, head_dim // 2, rng, device))
    else:
        kwargs["k_raw"] = outputs["k_raw"] = poisoned((tokens, heads, head_dim), dtype, device)
    return Case((qk, weights, table, outs, place), kwargs, outputs)


def make_quantized(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    return make_inputs(dims, dtype, rng, device, quantize=True)


def cost(dims: Dims, dtype: torch.dtype, stored: int = 0) -> Cost:
    """stored: bytes of an element of q and the arena where they are not of the working dtype."""
    width, tokens, size = dims["heads"] * dims["head_dim"], dims["tokens"], dtype.itemsize
    out, moved = stored or size, dims["reference"] * dims["moved"]
    raw = 0 if dims["reference"] else tokens * size
    elements = tokens * 2 * (size + out) + moved * (size + out) + raw
    return Cost(elements * width + 4 * tokens * dims["head_dim"], 22 * tokens * width)


def cost_quantized(dims: Dims, dtype: torch.dtype) -> Cost:
    plain, scales = cost(dims, dtype, 1), 4 * dims["heads"] * (2 * dims["tokens"] + dims["reference"] * dims["moved"])
    return Cost(plain.bytes + scales, plain.flops + 6 * dims["tokens"] * dims["heads"] * dims["head_dim"])


_SMALL = {
    "tiny-model": dict(tokens=18, heads=4, head_dim=32, arena=40, reference=6, moved=1),
    "not-moved": dict(tokens=5, heads=3, head_dim=64, arena=11, reference=4, moved=0),
    "prefill": dict(tokens=7, heads=2, head_dim=96, arena=7, reference=0, moved=0),
    "one-head": dict(tokens=1, heads=1, head_dim=128, arena=3, reference=1, moved=1),
    "tiny-head": dict(tokens=6, heads=5, head_dim=6, arena=9, reference=2, moved=1),
    "wide": dict(tokens=2, heads=40, head_dim=128, arena=5, reference=1, moved=1),
}
_PRODUCTION = {"14B 704x384": dict(tokens=3168, heads=40, head_dim=128, arena=15312, reference=1056, moved=1)}
_COMMON = (qk_norm_rope, reference_qk_norm_rope, torch_ops.qk_norm_rope)
SPECS = [
    KernelSpec("qk_norm_rope", *_COMMON, make_inputs, cost, _SMALL, _PRODUCTION),
    KernelSpec("qk_norm_rope_quant", *_COMMON, make_quantized, cost_quantized, _SMALL, _PRODUCTION, min_arch=89),
]
