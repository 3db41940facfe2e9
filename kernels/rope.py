"""`qk_norm_rope`: what stands between the projection of q and k and attention, in one pass.

    y = R(R(x * rsqrt(mean(x^2) + eps)) * w)              over the full width D, x a row of q or of k
    out = R(rotate(y)),  (a, b) -> (a c - b s, a s + b c)  for adjacent pairs, float32
    k goes to arena row `first + t`; the sink's reference keys are rotated anew where their position moved.

qk [T, 2D]; q [T, H, d]; arena [N, H, d]; cos, sin [T, d/2] float32 holding float16 values. The first row and whether
the reference moved are read from the device (`Place.scalars`), so that a captured launch serves every ring slot.
For FP8 attention q and the arena are e4m3 and every head of a token has its scale, written in the same pass.
A row stays in registers between its sum and its norm, as a tuple of groups of heads: 5 of 8 at 14B (`launch.tiling`).
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
from liverelay.kernels.launch import check, next_power_of_two, refuse, run, tiling
from liverelay.kernels.quant import reference_rows, store_quantized
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random
from liverelay.kernels.torch_ops import Table


@triton.jit
def group_mask(live, first, index: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Which elements of a group of heads are there: nothing to compare where groups fill the width."""
    inside = tl.full(first.shape, True, tl.int1)
    if GROUPS * first.shape[1] * first.shape[2] != WIDTH:
        place = tl.arange(0, first.shape[2])[None, None, :]
        inside = (place < 2 * HALF) & (first + index * (2 * HALF * first.shape[1]) < WIDTH)
    return live & inside


@triton.jit
def load_groups(start, first, live, HALF: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Rows as a tuple of groups of heads [ROWS, heads, d], zero where nothing is. start: addresses of the rows."""
    groups: tl.tuple = ()
    for i in tl.static_range(GROUPS):
        places = start + first + i * (2 * HALF * first.shape[1])
        groups += (tl.load(places, mask=group_mask(live, first, i, HALF, WIDTH, GROUPS), other=0.0),)
    return groups


@triton.jit
def norm_groups(groups, weight, first, live, eps, HALF: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """RMS norm over all heads with the published two roundings; float32 holding values of the working dtype."""
    rounded = groups[0].dtype
    squares = tl.zeros(groups[0].shape, tl.float32)
    for i in tl.static_range(GROUPS):
        squares += groups[i].to(tl.float32) * groups[i].to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tl.sum(squares, axis=2), axis=1)[:, None, None] / WIDTH + eps)
    weights = load_groups(weight, first, live, HALF, WIDTH, GROUPS)
    normed: tl.tuple = ()
    for i in tl.static_range(GROUPS):
        value = (groups[i].to(tl.float32) * inverse).to(rounded).to(tl.float32) * weights[i].to(tl.float32)
        normed += (value.to(rounded).to(tl.float32),)
    return normed


@triton.jit
def store_groups(
    groups, start, first, live, scale_at, scale_stride, HALF: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Store rows in the dtype of start, their addresses; as e4m3 with one scale for each head of a row."""
    heads: tl.constexpr = first.shape[1]
    head = tl.arange(0, heads)[None, :, None]
    for i in tl.static_range(GROUPS):
        mask = group_mask(live, first, i, HALF, WIDTH, GROUPS)
        places = first + i * (2 * HALF * heads)
        if QUANTIZE:
            store_quantized(groups[i], mask, start, places, scale_at, (head + i * heads) * scale_stride, 2)
        else:
            tl.store(start + places, groups[i].to(start.dtype.element_ty), mask=mask)


@triton.jit
def rotate_groups(groups, cos, sin, row, live, HALF: tl.constexpr, GROUPS: tl.constexpr):
    """Rotate the adjacent pairs of groups of heads [ROWS, heads, d]; cos, sin [rows, d/2]."""
    rows: tl.constexpr = groups[0].shape[0]
    heads: tl.constexpr = groups[0].shape[1]
    size: tl.constexpr = groups[0].shape[2]
    pair = tl.arange(0, size // 2)[None, None, :]
    inside = live & (pair < HALF)
    c = tl.load(cos + row * HALF + pair, mask=inside, other=0.0)
    s = tl.load(sin + row * HALF + pair, mask=inside, other=0.0)
    turned: tl.tuple = ()
    for i in tl.static_range(GROUPS):
        a, b = tl.split(tl.reshape(groups[i].to(tl.float32), [rows, heads, size // 2, 2]))
        turned += (tl.reshape(tl.join(a * c - b * s, a * s + b * c), [rows, heads, size]),)
    return turned


@triton.jit
def qk_norm_rope_kernel(
    qk, q_weight, k_weight, cos, sin, q_out, arena, q_scale, k_scale, raw_out, reference, reference_cos, reference_sin,
    scalars, qk_stride, q_scale_stride, k_scale_stride, tokens, reference_rows, own_programs, eps, HALF: tl.constexpr,
    HAS_RAW: tl.constexpr, QUANTIZE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    HEADS_TILE: tl.constexpr, HEAD_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = tl.arange(0, HEADS_TILE)[None, :, None] * (2 * HALF) + tl.arange(0, HEAD_TILE)[None, None, :]
    if program < own_programs:
        row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        live = row < tokens
        source = qk + row * qk_stride
        q = load_groups(source, first, live, HALF, WIDTH, GROUPS)
        q = norm_groups(q, q_weight, first, live, eps, HALF, WIDTH, GROUPS)
        q = rotate_groups(q, cos, sin, row, live, HALF, GROUPS)
        store_groups(q, q_out + row * WIDTH, first, live, q_scale + row, q_scale_stride, HALF, WIDTH, GROUPS, QUANTIZE)
        k = load_groups(source + WIDTH, first, live, HALF, WIDTH, GROUPS)
        k = norm_groups(k, k_weight, first, live, eps, HALF, WIDTH, GROUPS)
        if HAS_RAW:
            store_groups(k, raw_out + row * WIDTH, first, live, k_scale, 0, HALF, WIDTH, GROUPS, False)
        k = rotate_groups(k, cos, sin, row, live, HALF, GROUPS)
        row += tl.load(scalars)  # the slot's first
        store_groups(k, arena + row * WIDTH, first, live, k_scale + row, k_scale_stride, HALF, WIDTH, GROUPS, QUANTIZE)
    else:
        row = ((program - own_programs) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        live = (row < reference_rows) & (tl.load(scalars + 2) != 0)
        k = load_groups(reference + row * WIDTH, first, live, HALF, WIDTH, GROUPS)
        k = rotate_groups(k, reference_cos, reference_sin, row, live, HALF, GROUPS)
        store_groups(k, arena + row * WIDTH, first, live, k_scale + row, k_scale_stride, HALF, WIDTH, GROUPS, QUANTIZE)


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
    head_tile = next_power_of_two(head_dim)
    tiles = tiling(head_tile * next_power_of_two(heads))
    heads_tile, tile_rows = max(1, tiles["TILE"] // head_tile), tiles["ROWS"]
    own = triton.cdiv(tokens, tile_rows)
    run(
        qk_norm_rope_kernel, own + triton.cdiv(rows, tile_rows), qk, *weights, *table, q_out, arena, q_scale, k_scale,
        q_out if k_raw is None else k_raw, kept, cos, sin, place.scalars,
        qk.stride(0), q_scale.stride(0), k_scale.stride(0), tokens, rows, own, eps,
        HALF=head_dim // 2, HAS_RAW=k_raw is not None, QUANTIZE=len(outs) > 2, WIDTH=heads * head_dim,
        GROUPS=triton.cdiv(heads, heads_tile), HEADS_TILE=heads_tile, HEAD_TILE=head_tile, ROWS=tile_rows,
        num_warps=tiles["num_warps"], num_stages=1,
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
