"""`residual_norm`: gated residuals, LayerNorm and its modulation in one pass over the rows; `rms_norm`, `inverse_rms`.

    s = x + sum_i y_i * gate_i                            float32
    x_out = R(s)                                          optional
    out = R(R'(LN(s or R(s))) * a + b),  a = scale or R(1 + scale)

R rounds to the working dtype (that of x); R' does so only where the published code casts the norm's result back.
x, y_i, out, x_out [T, D]; gate_i [D] float32; scale and shift [D] or, one row for each group of T / G tokens, [G, D].
Bytes: T * D * (1 + updates + written) * element size; FLOPs: about 8 for each element. Source: spec dit.md 3 and 6.

Recomputing s from the layer's input in each of a layer's three norms moves fewer bytes than keeping s in float32
between them (8 instead of 12 for each element and norm), and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.contract import Norm, Update
from liverelay.kernels.launch import check, refuse, run, tiling
from liverelay.kernels.quant import (
    check_quantized,
    chunk_mask,
    load_row,
    own_rows,
    quantized_outputs,
    reference_rows,
    store_quantized_row,
)
from liverelay.kernels.spec import Case, Cost, CostOf, Dims, KernelSpec, MakeCase, poisoned, random

MAX_UPDATES = 3


@triton.jit
def add_update(
    chunks, start, gate, live, GATED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """chunks + y * gate for rows given as chunks; start: addresses of the first chunk of y, gate: of the gate's."""
    values = load_row(start, live, WIDTH, TILE, CHUNKS)
    sums: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        value = values[i]
        if GATED:
            value *= tl.load(gate + i * TILE, mask=chunk_mask(live, i, WIDTH, TILE), other=0.0)
        sums += (chunks[i] + value,)
    return sums


@triton.jit
def normed_row(chunks, eps, live, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr):
    """LayerNorm without modulation. The squares are of centred values, which are in registers anyway.

    The mean of squares less the squared mean would be one reduction instead of two, and wrong where a row's mean is
    large. Combining each thread's mean and variance in pairs is right, and saves three of five barriers for 110 more
    instructions on top of 530 (sm_90, compiled, not timed); other rows of the multiprocessor fill a barrier's wait.
    """
    total = chunks[0]
    for i in tl.static_range(1, CHUNKS):
        total += chunks[i]
    mean = tl.sum(total, axis=1, keep_dims=True) / WIDTH
    centred: tl.tuple = ()
    squares = tl.zeros_like(total)
    for i in tl.static_range(CHUNKS):
        value = tl.where(chunk_mask(live, i, WIDTH, TILE), chunks[i] - mean, 0.0)
        centred += (value,)
        squares += value * value
    inverse = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / WIDTH + eps)
    normed: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        normed += (centred[i] * inverse,)
    return normed


@triton.jit
def rounded_row(chunks, dtype: tl.constexpr, CHUNKS: tl.constexpr):
    """Chunks rounded to the dtype, in float32 again."""
    rounded: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        rounded += (chunks[i].to(dtype).to(tl.float32),)
    return rounded


@triton.jit
def modulated_row(
    chunks, scale, shift, live, PLUS_ONE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """chunks * a + b; scale, shift: addresses of the first chunk of each."""
    results: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        mask = chunk_mask(live, i, WIDTH, TILE)
        a = tl.load(scale + i * TILE, mask=mask, other=0.0)
        b = tl.load(shift + i * TILE, mask=mask, other=0.0)
        if PLUS_ONE:
            a = (a.to(tl.float32) + 1.0).to(a.dtype)
        results += (chunks[i] * a.to(tl.float32) + b.to(tl.float32),)
    return results


@triton.jit
def store_row(chunks, start, live, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows given as chunks, rounded to what `start` points to."""
    for i in tl.static_range(CHUNKS):
        tl.store(start + i * TILE, chunks[i].to(start.dtype.element_ty), mask=chunk_mask(live, i, WIDTH, TILE))


@triton.jit
def residual_norm_kernel(
    x, y0, y1, y2, gate0, gate1, gate2, scale, shift, out, x_out,
    scale_out, x_stride, y0_stride, y1_stride, y2_stride, out_stride, x_out_stride, group_rows, group_stride, tokens,
    eps,
    WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, UPDATES: tl.constexpr,
    GATED0: tl.constexpr, GATED1: tl.constexpr, GATED2: tl.constexpr, GROUPED: tl.constexpr, PLUS_ONE: tl.constexpr,
    ROUND_INPUT: tl.constexpr, ROUND_NORM: tl.constexpr, HAS_X_OUT: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    row, live = own_rows(tokens, ROWS)
    lane = tl.arange(0, TILE)[None, :]
    rounded: tl.constexpr = x.dtype.element_ty
    total = load_row(x + row * x_stride + lane, live, WIDTH, TILE, CHUNKS)
    if UPDATES > 0:
        total = add_update(total, y0 + row * y0_stride + lane, gate0 + lane, live, GATED0, WIDTH, TILE, CHUNKS)
    if UPDATES > 1:
        total = add_update(total, y1 + row * y1_stride + lane, gate1 + lane, live, GATED1, WIDTH, TILE, CHUNKS)
    if UPDATES > 2:
        total = add_update(total, y2 + row * y2_stride + lane, gate2 + lane, live, GATED2, WIDTH, TILE, CHUNKS)
    if HAS_X_OUT:
        store_row(total, x_out + row * x_out_stride + lane, live, WIDTH, TILE, CHUNKS)
    if ROUND_INPUT:
        total = rounded_row(total, rounded, CHUNKS)
    normed = normed_row(total, eps, live, WIDTH, TILE, CHUNKS)
    if ROUND_NORM:
        normed = rounded_row(normed, rounded, CHUNKS)
    place = lane + (row.to(tl.int32) // group_rows) * group_stride if GROUPED else lane
    results = modulated_row(normed, scale + place, shift + place, live, PLUS_ONE, WIDTH, TILE, CHUNKS)
    out_at = out + row * out_stride + lane
    if QUANTIZE:
        store_quantized_row(results, out_at, scale_out + row, live, WIDTH, TILE, CHUNKS)
    else:
        store_row(results, out_at, live, WIDTH, TILE, CHUNKS)


@triton.jit
def inverse_rms_row(chunks, eps, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of rows given as chunks, zero where nothing is; [ROWS, 1]."""
    squares = chunks[0] * chunks[0]
    for i in tl.static_range(1, CHUNKS):
        squares += chunks[i] * chunks[i]
    return tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / WIDTH + eps)


@triton.jit
def rms_norm_kernel(
    x, weight, out, x_stride, out_stride, tokens, eps, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row, live = own_rows(tokens, ROWS)
    lane = tl.arange(0, TILE)[None, :]
    chunks = load_row(x + row * x_stride + lane, live, WIDTH, TILE, CHUNKS)
    inverse = inverse_rms_row(chunks, eps, WIDTH, CHUNKS)
    for i in tl.static_range(CHUNKS):
        mask = chunk_mask(live, i, WIDTH, TILE)
        w = tl.load(weight + lane + i * TILE, mask=mask, other=0.0).to(tl.float32)
        result = (chunks[i] * inverse).to(x.dtype.element_ty).to(tl.float32) * w
        tl.store(out + row * out_stride + lane + i * TILE, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def inverse_rms_kernel(
    x, out, x_stride, tokens, eps, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr
):
    row, live = own_rows(tokens, ROWS)
    chunks = load_row(x + row * x_stride + tl.arange(0, TILE)[None, :], live, WIDTH, TILE, CHUNKS)
    tl.store(out + row, inverse_rms_row(chunks, eps, WIDTH, CHUNKS), mask=live)


def residual_norm(
    x: Tensor, updates: Sequence[Update], norm: Norm, out: Tensor, *, eps: float, x_out: Tensor | None = None,
    scale_out: Tensor | None = None,
) -> Tensor:
    """Gated residuals, LayerNorm, modulation and, with scale_out [T], FP8 quantisation of [T, D] rows in one pass."""
    tokens, width = x.shape
    name, groups = "residual_norm", norm.scale.shape[0] if norm.scale.dim() == 2 else 1
    modulation: tuple[int, ...] = (groups, width) if norm.scale.dim() == 2 else (width,)
    tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {"x": (x, (tokens, width)), "out": (out, (tokens, width))}
    tensors |= {"scale": (norm.scale, modulation), "shift": (norm.shift, modulation)}
    for i, (y, gate) in enumerate(updates):
        tensors |= {f"y{i}": (y, (tokens, width))} | ({} if gate is None else {f"gate{i}": (gate, (width,))})
    if x_out is not None:
        tensors["x_out"] = (x_out, (tokens, width))
    check(name, tensors)
    if scale_out is not None:
        check_quantized(name, out, scale_out, (tokens, width))
    if len(updates) > MAX_UPDATES or tokens % groups:
        refuse(name, f"{len(updates)} updates (at most {MAX_UPDATES}), {tokens} tokens in {groups} groups")
    ys = [y for y, _ in updates] + [x] * (MAX_UPDATES - len(updates))
    gates = [gate for _, gate in updates] + [None] * (MAX_UPDATES - len(updates))
    target = x if x_out is None else x_out
    tiles = tiling(width)
    run(
        residual_norm_kernel, triton.cdiv(tokens, tiles["ROWS"]), x, *ys,
        *(norm.scale if gate is None else gate for gate in gates),
        norm.scale, norm.shift, out, target, x if scale_out is None else scale_out,
        x.stride(0), *(y.stride(0) for y in ys), out.stride(0), target.stride(0),
        tokens // groups, norm.scale.stride(0), tokens, eps,
        UPDATES=len(updates), GATED0=gates[0] is not None, GATED1=gates[1] is not None, GATED2=gates[2] is not None,
        GROUPED=groups > 1, PLUS_ONE=norm.plus_one, ROUND_INPUT=norm.round_input, ROUND_NORM=norm.round_norm,
        HAS_X_OUT=x_out is not None, QUANTIZE=scale_out is not None, **tiles,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """out = R(R(x * rsqrt(mean(x^2) + eps)) * weight) over the full width of [T, D] rows."""
    tokens, width = x.shape
    check("rms_norm", {"x": (x, (tokens, width)), "weight": (weight, (width,)), "out": (out, (tokens, width))})
    tiles = tiling(width)
    programs = triton.cdiv(tokens, tiles["ROWS"])
    run(rms_norm_kernel, programs, x, weight, out, x.stride(0), out.stride(0), tokens, eps, **tiles)
    return out


def inverse_rms(x: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """out = rsqrt(mean(x^2) + eps), one float32 for each row of [T, D]: where a norm's weight went elsewhere."""
    tokens, width = x.shape
    check("inverse_rms", {"x": (x, (tokens, width)), "out": (out, (tokens,))})
    if out.dtype != torch.float32:
        refuse("inverse_rms", f"out is {out.dtype}, expected float32")
    tiles = tiling(width)
    run(inverse_rms_kernel, triton.cdiv(tokens, tiles["ROWS"]), x, out, x.stride(0), tokens, eps, **tiles)
    return out


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_residual_norm(
    x: Tensor, updates: Sequence[Update], norm: Norm, out: Tensor, *, eps: float, x_out: Tensor | None = None,
    scale_out: Tensor | None = None,
) -> dict[str, Tensor]:
    """Float64, no rounding."""
    total = x.double()
    for y, gate in updates:
        total = total + (y.double() if gate is None else y.double() * gate.double())
    scale, shift = norm.scale.double(), norm.shift.double()
    if scale.dim() == 2:
        scale, shift = (part.repeat_interleave(x.shape[0] // scale.shape[0], dim=0) for part in (scale, shift))
    normed = torch.nn.functional.layer_norm(total, total.shape[-1:], eps=eps)
    result = normed * (1 + scale if norm.plus_one else scale) + shift
    exact = {"out": result} if scale_out is None else reference_rows(result)
    return exact | ({} if x_out is None else {"x_out": total})


def reference_rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> dict[str, Tensor]:
    """Float64, no rounding."""
    wide = x.double()
    return {"out": wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()}


def reference_inverse_rms(x: Tensor, out: Tensor, *, eps: float) -> dict[str, Tensor]:
    """Float64, no rounding."""
    return {"out": torch.rsqrt(x.double().square().mean(-1) + eps)}


def make_residual_norm(updates: int, kind: str, quantize: bool) -> MakeCase:
    """Input maker of a variant; kind: modulate, affine or audio, as in the layers of the model."""

    def make(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
        tokens, width = dims["tokens"], dims["width"]
        shape = (tokens, width)
        x, out, x_out = random(shape, dtype, rng, device), *(poisoned(shape, dtype, device) for _ in range(2))
        ys: list[Update] = []
        for i in range(updates):
            gate = None if i == 1 else random((width,), torch.float32, rng, device)
            ys.append((random(shape, dtype, rng, device), gate))
        groups, of = ((dims["frames"], width), dtype) if kind == "audio" else ((width,), torch.float32)
        scale, shift = (random(groups, of if kind != "affine" else dtype, rng, device) for _ in range(2))
        writes_x = updates in (1, 3) and kind != "affine"
        norm = Norm(
            scale, shift, plus_one=kind != "affine", round_input=kind == "affine" or writes_x,
            round_norm=kind == "modulate" and updates != 2,
        )
        kwargs: dict[str, Any] = {"eps": 1e-5 if kind == "audio" else 1e-6} | ({"x_out": x_out} if writes_x else {})
        outputs = {"out": out} | ({"x_out": x_out} if writes_x else {})
        if quantize:
            outputs |= quantized_outputs(shape, device)
            kwargs["scale_out"] = outputs["scale"]
        return Case((x, ys, norm, outputs["out"]), kwargs, outputs)

    return make


def cost_residual_norm(updates: int, writes: int, quantize: bool) -> CostOf:
    """Bytes and operations of a variant."""

    def cost(dims: Dims, dtype: torch.dtype) -> Cost:
        elements = dims["tokens"] * dims["width"]
        saved = (dtype.itemsize - 1) if quantize else 0
        return Cost(elements * ((1 + updates + writes) * dtype.itemsize - saved), elements * (8 + 2 * updates))

    return cost


def make_rms_norm(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    shape = (dims["tokens"], dims["width"])
    x, weight = random(shape, dtype, rng, device), random(shape[1:], dtype, rng, device)
    out = poisoned(shape, dtype, device)
    return Case((x, weight, out), {"eps": 1e-6}, {"out": out})


def cost_rms_norm(dims: Dims, dtype: torch.dtype) -> Cost:
    elements = dims["tokens"] * dims["width"]
    return Cost(2 * elements * dtype.itemsize, 5 * elements)


def make_inverse_rms(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    out = poisoned((dims["tokens"],), torch.float32, device)
    return Case((random((dims["tokens"], dims["width"]), dtype, rng, device), out), {"eps": 1e-6}, {"out": out})


def cost_inverse_rms(dims: Dims, dtype: torch.dtype) -> Cost:
    elements = dims["tokens"] * dims["width"]
    return Cost(elements * dtype.itemsize + 4 * dims["tokens"], 2 * elements)


SMALL = {
    "odd": {"tokens": 21, "width": 97, "frames": 3},
    "one-row": {"tokens": 1, "width": 64, "frames": 1},
    "tiny-model": {"tokens": 48, "width": 128, "frames": 3},
    "wide": {"tokens": 3, "width": 5120, "frames": 3},
    "ragged": {"tokens": 6, "width": 1500, "frames": 3},
}
PRODUCTION = {"14B 704x384": {"tokens": 3168, "width": 5120, "frames": 3}}


def _row(name: str, updates: int, kind: str, writes: int, quantize: bool = False) -> KernelSpec:
    return KernelSpec(
        name + ("_quant" if quantize else ""), residual_norm, reference_residual_norm, torch_ops.residual_norm,
        make_residual_norm(updates, kind, quantize), cost_residual_norm(updates, writes, quantize), SMALL, PRODUCTION,
        min_arch=89 if quantize else 80,
    )  # fmt: skip


SPECS = [
    _row("norm_modulate", 0, "modulate", 1),
    _row("gate_norm_affine", 1, "affine", 1),
    _row("residual2_norm_modulate", 2, "modulate", 1),
    _row("residual3_norm_modulate", 3, "modulate", 2),
    _row("residual3_norm_audio", 3, "audio", 2),
    _row("residual_norm_modulate", 1, "modulate", 2),
    _row("gate_norm_affine", 1, "affine", 1, quantize=True),
    _row("residual2_norm_modulate", 2, "modulate", 1, quantize=True),
    _row("residual3_norm_modulate", 3, "modulate", 2, quantize=True),
    _row("residual3_norm_audio", 3, "audio", 2, quantize=True),
    KernelSpec(
        "rms_norm", rms_norm, reference_rms_norm, torch_ops.rms_norm, make_rms_norm, cost_rms_norm, SMALL, PRODUCTION,
    ),
    KernelSpec(
        "inverse_rms", inverse_rms, reference_inverse_rms, torch_ops.inverse_rms, make_inverse_rms, cost_inverse_rms,
        SMALL, PRODUCTION,
    ),
]  # fmt: skip
