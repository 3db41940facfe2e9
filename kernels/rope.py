"""`qk_norm_rope`: what stands between the projection of q and k and attention, in one pass.

    y = R(R(x * rsqrt(mean(x^2) + eps)) * w)              over the full width D, x a row of q or of k
    out = R(rotate(y)),  (a, b) -> (a c - b s, a s + b c)  for adjacent pairs, float32
    k goes to arena row `first + t`; the sink's reference keys are rotated anew where their position moved.

qk [T, 2D]; q [T, H, d]; arena [N, H, d]; cos, sin [T, d/2] float32 holding float16 values. The first row and whether
the reference moved are read from the device (`Place.scalars`), so that a captured launch serves every ring slot.
For FP8 attention q and the arena are e4m3: the rotated row in float32, 16 neighbours at a time through a Hadamard
transform (`torch_ops.hadamard`), divided by the scale of its head (`Scales`), whose bound leaves nothing to saturate.
A row stays in registers between its sum and its norm, as a tuple of pieces that fill it: 8 heads each at 14B
(`launch.tiling`), or one of two parts of these. Parts take turns, 8 neighbours at a time, so that a thread, which has 8
neighbours of a piece, has the 16 of a transform.
Bytes: 4 T D (+ 2 P D where the reference moves) * element size. FLOPs: 11 for each element of q and k.
Source: spec dit.md 3, 4 and 7.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.contract import FP8, Place, Scales, hadamard_block
from liverelay.kernels.launch import check, next_power_of_two, refuse, run, tiling
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random
from liverelay.kernels.torch_ops import Table


@triton.jit
def place_of(index, part: tl.constexpr, NEAR: tl.constexpr, PARTS: tl.constexpr):
    """Where in a head an element of one of its parts stands: parts take turns, NEAR neighbours at a time."""
    if PARTS == 1:
        return index
    return index // NEAR * (NEAR * PARTS) + part * NEAR + index % NEAR


@triton.jit
def piece_of(shape: tl.constexpr, live, index: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
             NEAR: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """Places in a row of a piece [ROWS, heads, elements], and which are there: all, where pieces fill the row.

    The parts of the first heads are the first pieces, those of the next heads follow.
    """
    head = index // PARTS * shape[1] + tl.arange(0, shape[1])[None, :, None]
    element = tl.arange(0, shape[2])[None, None, :]
    inside = tl.full((1, shape[1], shape[2]), True, tl.int1)
    if PIECES * shape[1] * shape[2] != HEADS * HEAD_DIM:
        inside = (head < HEADS) & (element < HEAD_DIM // PARTS)
    return head * HEAD_DIM + place_of(element, index % PARTS, NEAR, PARTS), live & inside


@triton.jit
def load_pieces(start, shape: tl.constexpr, live, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NEAR: tl.constexpr,
                PARTS: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """Rows as a tuple of pieces, zero where nothing is. start: addresses of the rows."""
    pieces: tl.tuple = ()
    for i in tl.static_range(PIECES):
        places, mask = piece_of(shape, live, i, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
        pieces += (tl.load(start + places, mask=mask, other=0.0),)
    return pieces


@triton.jit
def normed_pieces(pieces, weight, live, eps, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NEAR: tl.constexpr,
                  PARTS: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """RMS norm over all heads with the published two roundings; float32 holding values of the working dtype."""
    rounded = pieces[0].dtype
    squares = tl.zeros(pieces[0].shape, tl.float32)
    for i in tl.static_range(PIECES):
        squares += pieces[i].to(tl.float32) * pieces[i].to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tl.sum(squares, axis=2), axis=1)[:, None, None] / (HEADS * HEAD_DIM) + eps)
    weights = load_pieces(weight, pieces[0].shape, live, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
    normed: tl.tuple = ()
    for i in tl.static_range(PIECES):
        value = (pieces[i].to(tl.float32) * inverse).to(rounded).to(tl.float32) * weights[i].to(tl.float32)
        normed += (value.to(rounded).to(tl.float32),)
    return normed


@triton.jit
def rotated_pieces(pieces, cos, sin, row, live, HEAD_DIM: tl.constexpr, NEAR: tl.constexpr, PARTS: tl.constexpr,
                   PIECES: tl.constexpr):  # fmt: skip
    """Rotate the adjacent pairs of all pieces; cos, sin [rows, d/2]."""
    shape: tl.constexpr = (pieces[0].shape[0], pieces[0].shape[1], pieces[0].shape[2] // 2, 2)
    pair = tl.arange(0, pieces[0].shape[2] // 2)[None, None, :]
    turned: tl.tuple = ()
    for i in tl.static_range(PIECES):
        place = row * (HEAD_DIM // 2) + place_of(pair, i % PARTS, NEAR // 2, PARTS)
        c = tl.load(cos + place, mask=live & (pair < HEAD_DIM // 2 // PARTS), other=0.0)
        s = tl.load(sin + place, mask=live & (pair < HEAD_DIM // 2 // PARTS), other=0.0)
        a, b = tl.split(tl.reshape(pieces[i].to(tl.float32), shape))
        turned += (tl.reshape(tl.join(a * c - b * s, a * s + b * c), pieces[0].shape),)
    return turned


@triton.jit
def near_hadamard(x, NEAR: tl.constexpr):
    """The Hadamard transform of each NEAR neighbours of a piece, without its factor."""
    bits: tl.constexpr = 3 if NEAR == 8 else 2 if NEAR == 4 else 1 if NEAR == 2 else 0
    for _ in tl.static_range(bits):  # the last bit of a neighbour's number becomes the first
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // NEAR, NEAR // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 2, 4, 3)), x.shape)
    return x


@triton.jit
def hadamard_heads(pieces, scales, HEADS: tl.constexpr, NEAR: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr):
    """Whole heads, a tuple of [ROWS, heads, d], as `torch_ops.hadamard` makes them, in units of their scales [H]."""
    shape: tl.constexpr = pieces[0].shape
    made: tl.tuple = ()
    for i in tl.static_range(0, PIECES, PARTS):
        head = i // PARTS * shape[1] + tl.arange(0, shape[1])
        unit = ((NEAR * PARTS) ** -0.5 / tl.load(scales + head, mask=head < HEADS, other=1.0))[None, :, None]
        value = near_hadamard(pieces[i], NEAR) * unit
        if PARTS == 2:
            other = near_hadamard(pieces[i + 1], NEAR) * unit
            both = tl.reshape(tl.join(value + other, value - other), (shape[0], shape[1], shape[2] // NEAR, NEAR, 2))
            value = tl.reshape(tl.permute(both, (0, 1, 2, 4, 3)), (shape[0], shape[1], 2 * shape[2]))
        made += (value,)
    return made


@triton.jit
def store_row(pieces, start, scales, live, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NEAR: tl.constexpr,
              PARTS: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """Store rows in the dtype of start, their addresses; where NEAR is a number, transformed and in units of scales."""
    if NEAR:
        pieces = hadamard_heads(pieces, scales, HEADS, NEAR, PARTS, PIECES)
    for i in tl.static_range(PIECES // PARTS):
        places, mask = piece_of(pieces[0].shape, live, i, HEADS, HEAD_DIM, NEAR, 1, PIECES // PARTS)
        tl.store(start + places, pieces[i].to(start.dtype.element_ty), mask=mask)


@triton.jit
def qk_norm_rope_kernel(
    qk, q_weight, k_weight, cos, sin, q_out, arena, q_scales, k_scales, raw_out, reference, reference_cos,
    reference_sin, scalars, qk_stride, tokens, reference_rows, own_programs, eps, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HAS_RAW: tl.constexpr, ROWS: tl.constexpr, HEADS_TILE: tl.constexpr,
    PART_TILE: tl.constexpr, NEAR: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SHAPE: tl.constexpr = (ROWS, HEADS_TILE, PART_TILE)
    if program < own_programs:
        row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        live = (row < tokens) | (ROWS == 1)  # a program of one row has one
        q = load_pieces(qk + row * qk_stride, SHAPE, live, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
        q = normed_pieces(q, q_weight, live, eps, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
        q = rotated_pieces(q, cos, sin, row, live, HEAD_DIM, NEAR, PARTS, PIECES)
        store_row(q, q_out + row * WIDTH, q_scales, live, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
        k = load_pieces(qk + row * qk_stride + WIDTH, SHAPE, live, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
        k = normed_pieces(k, k_weight, live, eps, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
        if HAS_RAW:
            for i in tl.static_range(PIECES):
                places, mask = piece_of(SHAPE, live, i, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
                tl.store(raw_out + row * WIDTH + places, k[i].to(raw_out.dtype.element_ty), mask=mask)
        k = rotated_pieces(k, cos, sin, row, live, HEAD_DIM, NEAR, PARTS, PIECES)
        row += tl.load(scalars)  # the slot's first
        store_row(k, arena + row * WIDTH, k_scales, live, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
    else:
        row = ((program - own_programs) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        live = (row < reference_rows) & (tl.load(scalars + 2) != 0)
        k = load_pieces(reference + row * WIDTH, SHAPE, live, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)
        k = rotated_pieces(k, reference_cos, reference_sin, row, live, HEAD_DIM, NEAR, PARTS, PIECES)
        store_row(k, arena + row * WIDTH, k_scales, live, HEADS, HEAD_DIM, NEAR, PARTS, PIECES)


def qk_norm_rope(
    qk: Tensor, weights: tuple[Tensor, Tensor], table: Table, outs: tuple[Tensor, ...], place: Place, *,
    eps: float, reference: tuple[Tensor, Table] | None = None, scales: Scales | None = None,
) -> None:
    """RMS norm of q and k over the full width, RoPE, the write of k into its ring slot, the sink's rolling keys."""
    q_out, arena, *raw = outs
    tokens, heads, head_dim = q_out.shape
    rows = 0 if reference is None else reference[0].shape[0]
    _check(qk, weights, table, outs, reference, scales)
    of_heads = table if scales is None else (scales.q, scales.k)
    kept, (cos, sin) = (q_out, table) if reference is None else reference
    block = 0 if scales is None else hadamard_block(head_dim)
    parts = 2 if block == 16 else 1  # a thread holds 8 neighbours of each part
    part_tile = next_power_of_two(head_dim // parts)
    tiles = tiling(parts * part_tile * next_power_of_two(heads))
    heads_tile, tile_rows = max(1, tiles["TILE"] // (parts * part_tile)), tiles["ROWS"]
    pieces = parts * triton.cdiv(heads, heads_tile)
    own = triton.cdiv(tokens, tile_rows)
    run(
        qk_norm_rope_kernel, own + triton.cdiv(rows, tile_rows), qk, *weights, *table, q_out, arena, *of_heads,
        raw[0] if raw else q_out, kept, cos, sin, place.scalars, qk.stride(0), tokens, rows, own, eps,
        HEADS=heads, HEAD_DIM=head_dim, HAS_RAW=bool(raw), ROWS=tile_rows, HEADS_TILE=heads_tile, PART_TILE=part_tile,
        NEAR=block // parts, PARTS=parts, PIECES=pieces, num_warps=max(1, tiles["num_warps"] // parts), num_stages=1,
    )  # fmt: skip


def _check(
    qk: Tensor, weights: tuple[Tensor, Tensor], table: Table, outs: tuple[Tensor, ...],
    reference: tuple[Tensor, Table] | None, scales: Scales | None,
) -> None:
    """ValueError where shapes, strides or dtypes do not fit."""
    (q_out, arena, *raw), name = outs, "qk_norm_rope"
    tokens, heads, head_dim = shape = q_out.shape
    width, half, rows = heads * head_dim, head_dim // 2, arena.shape[0]
    tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "qk": (qk, (tokens, 2 * width)), "the weight of q": (weights[0], (width,)),
        "the weight of k": (weights[1], (width,)), "cos": (table[0], (tokens, half)), "sin": (table[1], (tokens, half)),
        "q": (q_out, tuple(shape)), "the arena": (arena, (rows, heads, head_dim)),
    }  # fmt: skip
    if raw:
        tensors["k before RoPE"] = (raw[0], tuple(shape))
    if reference is not None:
        count = reference[0].shape[0]
        tensors["the reference"] = (reference[0], (count, heads, head_dim))
        tensors |= {f"reference table {i}": (part, (count, half)) for i, part in enumerate(reference[1])}
    if scales is not None:
        tensors |= {"the scale of q": (scales.q, (heads,)), "the scale of k": (scales.k, (heads,))}
    dense = [label for label in tensors if label not in ("qk", "the weight of q", "the weight of k")]
    check(name, tensors)
    for label in dense:
        if not tensors[label][0].is_contiguous():
            refuse(name, f"{label} is not contiguous (strides {list(tensors[label][0].stride())})")
    if q_out.dtype != arena.dtype or (q_out.dtype == FP8) != (scales is not None):
        given = "without" if scales is None else "with"
        refuse(name, f"q is {q_out.dtype} and the arena {arena.dtype}, {given} scales; e4m3 has them")


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_qk_norm_rope(
    qk: Tensor, weights: tuple[Tensor, Tensor], table: Table, outs: tuple[Tensor, ...], place: Place, *,
    eps: float, reference: tuple[Tensor, Table] | None = None, scales: Scales | None = None,
) -> dict[str, Tensor]:
    """Float64, no rounding. Rows of the arena that are not written keep what they hold."""
    q_out, arena, *raw = outs

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

    normed = []
    for part, weight in zip(qk.double().chunk(2, dim=1), weights, strict=True):
        scaled = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + eps) * weight.double()
        normed.append(scaled.view(q_out.shape))

    def stored(x: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return x
        return (torch_ops.hadamard(x) / scale.double()[:, None]).clamp(-448, 448)

    q_scale, k_scale = (None, None) if scales is None else (scales.q, scales.k)
    exact = {"q": stored(rotate(normed[0], *table), q_scale), "arena": arena.double().clone()}
    exact["arena"][place.row : place.row + len(qk)] = stored(rotate(normed[1], *table), k_scale)
    if reference is not None and place.moved:
        exact["arena"][: len(reference[0])] = stored(rotate(reference[0].double(), *reference[1]), k_scale)
    return exact | ({"k_raw": normed[1]} if raw else {})


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
    table = _angles(tokens, head_dim // 2, rng, device)
    place = Place.make(device).fill(rows - tokens, rows, bool(dims["moved"]))
    kwargs: dict[str, object] = {"eps": 1e-6}
    if quantize:  # the smallest make the largest elements saturate
        q_scale, k_scale = (random((heads,), torch.float32, rng, device).exp() / 100 for _ in range(2))
        kwargs["scales"] = Scales(q_scale, k_scale, 1.0)
    if frame:
        reference = random((frame, heads, head_dim), dtype, rng, device)
        kwargs["reference"] = (reference, _angles(frame, head_dim // 2, rng, device))
    else:
        outputs["k_raw"] = poisoned((tokens, heads, head_dim), dtype, device)
    return Case((qk, weights, table, tuple(outputs.values()), place), kwargs, outputs)


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
    plain = cost(dims, dtype, 1)
    each = hadamard_block(dims["head_dim"]).bit_length()  # an addition for each bit, and the scale
    return Cost(plain.bytes, plain.flops + 2 * each * dims["tokens"] * dims["heads"] * dims["head_dim"])


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
