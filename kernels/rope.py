"""`qk_norm_rope`: what stands between the projection of q and k and attention, in one pass.

    y = R(R(x * rsqrt(mean(x^2) + eps)) * w)              over the full width D, x a row of q or of k
    out = R(rotate(y)),  (a, b) -> (a c - b s, a s + b c)  for adjacent pairs, float32
    k goes to arena row `first + t`; the sink's reference keys are rotated anew where their position moved.

qk [T, 2D]; q [T, H, d]; arena [N, H, d]; cos, sin [T, d/2] float32 holding float16 values. The first row and whether
the reference moved are read from the device (`Place.scalars`), so that a captured launch serves every ring slot.
Bytes: 4 T D (+ 2 P D where the reference moves) * element size. FLOPs: 11 for each element of q and k.
Source: spec dit.md 3, 4 and 7.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.contract import Place
from liverelay.kernels.launch import check, run, tiling
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random
from liverelay.kernels.torch_ops import Table


@triton.jit
def rotate_rows(x, cos, sin, row, live, HALF: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
                ROWS: tl.constexpr):  # fmt: skip
    """Rotate the adjacent pairs of a tile of rows of whole heads; cos, sin [rows, d/2]."""
    pair = tl.arange(0, TILE // 2)[None, :]
    inside = live & (pair < WIDTH // 2)
    c = tl.load(cos + row * HALF + pair % HALF, mask=inside, other=0.0)
    s = tl.load(sin + row * HALF + pair % HALF, mask=inside, other=0.0)
    a, b = tl.split(tl.reshape(x, [ROWS, TILE // 2, 2]))
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), [ROWS, TILE])


@triton.jit
def norm_rows(x, weight, offsets, inside, eps, WIDTH: tl.constexpr):
    """RMS norm of a tile of rows with the published two roundings; float32 holding values of the working dtype."""
    rounded = x.dtype
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=1)[:, None] / WIDTH + eps)
    w = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    return (normed.to(rounded).to(tl.float32) * w).to(rounded).to(tl.float32)


@triton.jit
def qk_norm_rope_kernel(
    qk, q_weight, k_weight, cos, sin, q_out, arena, raw_out, reference, reference_cos, reference_sin, scalars,
    qk_stride, tokens, reference_rows, own_programs, eps, HALF: tl.constexpr, HAS_RAW: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    offsets = tl.arange(0, TILE)[None, :]
    inside = offsets < WIDTH
    if program < own_programs:
        row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = row < tokens
        mask = live & inside
        source = qk + row * qk_stride + offsets
        q = norm_rows(tl.load(source, mask=mask, other=0.0), q_weight, offsets, inside, eps, WIDTH)
        q = rotate_rows(q, cos, sin, row, live, HALF, WIDTH, TILE, ROWS)
        tl.store(q_out + row * WIDTH + offsets, q.to(q_out.dtype.element_ty), mask=mask)
        k = norm_rows(tl.load(source + WIDTH, mask=mask, other=0.0), k_weight, offsets, inside, eps, WIDTH)
        if HAS_RAW:
            tl.store(raw_out + row * WIDTH + offsets, k.to(raw_out.dtype.element_ty), mask=mask)
        k = rotate_rows(k, cos, sin, row, live, HALF, WIDTH, TILE, ROWS)
        place = tl.load(scalars).to(tl.int64) + row
        tl.store(arena + place * WIDTH + offsets, k.to(arena.dtype.element_ty), mask=mask)
    else:
        row = ((program - own_programs) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = (row < reference_rows) & (tl.load(scalars + 2) != 0)
        mask = live & inside
        k = tl.load(reference + row * WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
        k = rotate_rows(k, reference_cos, reference_sin, row, live, HALF, WIDTH, TILE, ROWS)
        tl.store(arena + row * WIDTH + offsets, k.to(arena.dtype.element_ty), mask=mask)


def qk_norm_rope(
    qk: Tensor, weights: tuple[Tensor, Tensor], table: Table, outs: tuple[Tensor, Tensor], place: Place, *,
    eps: float, k_raw: Tensor | None = None, reference: tuple[Tensor, Table] | None = None,
) -> None:
    """RMS norm of q and k over the full width, RoPE, the write of k into its ring slot, the sink's rolling keys."""
    q_out, arena = outs
    tokens, heads, head_dim = q_out.shape
    width, half = heads * head_dim, head_dim // 2
    shape, name = (tokens, heads, head_dim), "qk_norm_rope"
    tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "qk": (qk, (tokens, 2 * width)), "the weight of q": (weights[0], (width,)),
        "the weight of k": (weights[1], (width,)), "cos": (table[0], (tokens, half)), "sin": (table[1], (tokens, half)),
        "q": (q_out.flatten(1), (tokens, width)), "the arena": (arena, (arena.shape[0], heads, head_dim)),
    }  # fmt: skip
    if k_raw is not None:
        tensors["k_raw"] = (k_raw, shape)
    rows = 0
    if reference is not None:
        rows = reference[0].shape[0]
        tensors["the reference"] = (reference[0], (rows, heads, head_dim))
        tensors |= {f"reference {i}": (part, (rows, half)) for i, part in enumerate(reference[1])}
    check(name, tensors)
    dense = [("q", q_out), ("the arena", arena), ("k_raw", k_raw), ("cos", table[0]), ("sin", table[1])]
    if reference is not None:
        dense += [("the reference", reference[0]), *(("a reference table", part) for part in reference[1])]
    for label, tensor in dense:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: {label} is not contiguous (strides {list(tensor.stride())})")
    kept, (cos, sin) = (q_out, table) if reference is None else reference
    tiles = tiling(width)
    own = triton.cdiv(tokens, tiles["ROWS"])
    run(
        qk_norm_rope_kernel, own + triton.cdiv(rows, tiles["ROWS"]), qk, *weights, *table, q_out, arena,
        q_out if k_raw is None else k_raw,
        kept, cos, sin, place.scalars, qk.stride(0), tokens, rows, own, eps, HALF=half, HAS_RAW=k_raw is not None,
        **tiles,
    )  # fmt: skip


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_qk_norm_rope(
    qk: Tensor, weights: tuple[Tensor, Tensor], table: Table, outs: tuple[Tensor, Tensor], place: Place, *,
    eps: float, k_raw: Tensor | None = None, reference: tuple[Tensor, Table] | None = None,
) -> dict[str, Tensor]:
    """Float64, no rounding. Rows of the arena that are not written keep what they hold."""
    q_out, arena = outs

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

    normed = []
    for part, weight in zip(qk.double().chunk(2, dim=1), weights, strict=True):
        scaled = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + eps) * weight.double()
        normed.append(scaled.view(q_out.shape))
    exact = {"q": rotate(normed[0], *table), "arena": arena.double().clone()}
    exact["arena"][place.row : place.row + len(qk)] = rotate(normed[1], *table)
    if reference is not None and place.moved:
        exact["arena"][: len(reference[0])] = rotate(reference[0].double(), *reference[1])
    return exact | ({} if k_raw is None else {"k_raw": normed[1]})


def _angles(rows: int, half: int, rng: torch.Generator, device: torch.device) -> Table:
    angle = torch.rand(rows, half, generator=rng) * 6.28
    cos, sin = (part.half().float().to(device) for part in (angle.cos(), angle.sin()))
    return cos, sin


def make_inputs(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    tokens, heads, head_dim, rows = (dims[name] for name in ("tokens", "heads", "head_dim", "arena"))
    width, frame = heads * head_dim, dims["reference"]
    qk = random((tokens, 2 * width), dtype, rng, device)
    weights = (random((width,), dtype, rng, device), random((width,), dtype, rng, device))
    q_out = poisoned((tokens, heads, head_dim), dtype, device)
    arena = random((rows, heads, head_dim), dtype, rng, device)
    table = _angles(tokens, head_dim // 2, rng, device)
    place = Place.make(device).fill(rows - tokens, rows, bool(dims["moved"]))
    kwargs: dict[str, object] = {"eps": 1e-6}
    outputs = {"q": q_out, "arena": arena}
    if frame:
        reference = random((frame, heads, head_dim), dtype, rng, device)
        kwargs["reference"] = (reference, _angles(frame, head_dim // 2, rng, device))
    else:
        kwargs["k_raw"] = outputs["k_raw"] = poisoned((tokens, heads, head_dim), dtype, device)
    return Case((qk, weights, table, (q_out, arena), place), kwargs, outputs)


def cost(dims: Dims, dtype: torch.dtype) -> Cost:
    width = dims["heads"] * dims["head_dim"]
    moved = 2 * dims["reference"] * width * dims["moved"]
    kept = 0 if dims["reference"] else dims["tokens"] * width
    elements = 4 * dims["tokens"] * width + moved + kept
    return Cost(elements * dtype.itemsize + 4 * dims["tokens"] * dims["head_dim"], 22 * dims["tokens"] * width)


SPECS = [
    KernelSpec(
        "qk_norm_rope", qk_norm_rope, reference_qk_norm_rope, torch_ops.qk_norm_rope, make_inputs, cost,
        small={
            "tiny-model": dict(tokens=18, heads=4, head_dim=32, arena=40, reference=6, moved=1),
            "not-moved": dict(tokens=5, heads=3, head_dim=64, arena=11, reference=4, moved=0),
            "prefill": dict(tokens=7, heads=2, head_dim=96, arena=7, reference=0, moved=0),
            "one-head": dict(tokens=1, heads=1, head_dim=128, arena=3, reference=1, moved=1),
            "tiny-head": dict(tokens=6, heads=5, head_dim=6, arena=9, reference=2, moved=1),
            "wide": dict(tokens=2, heads=40, head_dim=128, arena=5, reference=1, moved=1),
        },
        production={
            "14B 704x384": dict(tokens=3168, heads=40, head_dim=128, arena=15312, reference=1056, moved=1),
        },
    )
]  # fmt: skip
