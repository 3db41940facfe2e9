"""`gelu`: the activation between the two products of the feed-forward, in place; `gelu_quant`: the same to FP8 rows.

    out = R(gelu(x)),  gelu(x) = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

x, out [T, n]. Bytes: 2 T n * element size; FLOPs: about 10 for each element. Source: spec dit.md 6.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from liverelay.kernels import torch_ops
from liverelay.kernels.launch import check, next_power_of_two, run, tiling
from liverelay.kernels.quant import (
    check_quantized,
    load_row,
    own_rows,
    quantized_outputs,
    reference_rows,
    store_quantized_row,
)
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random

TILE = 2048


@triton.jit
def gelu_tanh(x):
    """0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)): exact at both ends.

    Two instructions of the special function unit and five others: Triton's own exponential and division guard against
    denormal numbers with ten more, which change nothing beside a 1, and rows of FP8 then wait for instructions.
    """
    power = x * (-2.302208198144325 - 0.1029432395800235 * (x * x))  # -2 u / ln 2
    return libdevice.fast_dividef(x, 1.0 + libdevice.exp2(power))


@triton.jit
def gelu_kernel(
    x, out, x_stride, out_stride, tokens, WIDTH: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = ((program // TILES) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    offsets = (program % TILES) * TILE + tl.arange(0, TILE)[None, :]
    mask = (row < tokens) & (offsets < WIDTH)
    value = tl.load(x + row * x_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + offsets, gelu_tanh(value).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gelu_quant_kernel(
    x, out, scale_out, x_stride, out_stride, tokens, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row, live = own_rows(tokens, ROWS)
    lane = tl.arange(0, TILE)[None, :]
    given = load_row(x + row * x_stride + lane, live, WIDTH, TILE, CHUNKS)
    chunks: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        chunks += (gelu_tanh(given[i]),)
    store_quantized_row(chunks, out + row * out_stride + lane, scale_out + row, live, WIDTH, TILE, CHUNKS)


def gelu_quant(x: Tensor, out: Tensor, scale_out: Tensor) -> Tensor:
    """Tanh GELU of [T, n] to e4m3 rows with their scales, one pass: a whole row stays in registers."""
    tokens, width = x.shape
    check("gelu_quant", {"x": (x, (tokens, width))})
    check_quantized("gelu_quant", out, scale_out, (tokens, width))
    tiles = tiling(width)
    programs = triton.cdiv(tokens, tiles["ROWS"])
    run(gelu_quant_kernel, programs, x, out, scale_out, x.stride(0), out.stride(0), tokens, **tiles)
    return out


def gelu(x: Tensor, out: Tensor, scale_out: Tensor | None = None) -> Tensor:
    """Tanh GELU of [T, n]; out may be x; with scale_out [T] out is e4m3."""
    if scale_out is not None:
        return gelu_quant(x, out, scale_out)
    tokens, width = x.shape
    check("gelu", {"x": (x, (tokens, width)), "out": (out, (tokens, width))})
    tile = min(TILE, next_power_of_two(width))
    tiles, rows = triton.cdiv(width, tile), min(64, TILE // tile)
    run(
        gelu_kernel, triton.cdiv(tokens, rows) * tiles, x, out, x.stride(0), out.stride(0), tokens, WIDTH=width,
        TILES=tiles, TILE=tile, ROWS=rows, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def reference_gelu(x: Tensor, out: Tensor, scale_out: Tensor | None = None) -> dict[str, Tensor]:
    """Float64, no rounding; as a sigmoid, since 1 + tanh cancels to zero where x is far below it."""
    value = x.double()
    exact = value * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))
    return {"out": exact} if scale_out is None else reference_rows(exact)


def make_inputs(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    shape = (dims["tokens"], dims["width"])
    out = poisoned(shape, dtype, device)
    return Case((random(shape, dtype, rng, device) * 3, out), {}, {"out": out})


def make_quantized(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    shape = (dims["tokens"], dims["width"])
    outputs = quantized_outputs(shape, device)
    return Case((random(shape, dtype, rng, device) * 3, outputs["out"], outputs["scale"]), {}, outputs)


def cost(dims: Dims, dtype: torch.dtype) -> Cost:
    elements = dims["tokens"] * dims["width"]
    return Cost(2 * elements * dtype.itemsize, 10 * elements)


def cost_quantized(dims: Dims, dtype: torch.dtype) -> Cost:
    elements = dims["tokens"] * dims["width"]
    return Cost(elements * (dtype.itemsize + 1), 13 * elements)


SMALL = {"odd": dict(tokens=7, width=97), "tiles": dict(tokens=3, width=2500), "one": dict(tokens=1, width=1)}
PRODUCTION = {"14B 704x384": dict(tokens=3168, width=13824)}
SPECS = [
    KernelSpec("gelu", gelu, reference_gelu, torch_ops.gelu, make_inputs, cost, SMALL, PRODUCTION),
    KernelSpec(
        "gelu_quant", gelu_quant, reference_gelu, torch_ops.gelu, make_quantized, cost_quantized, SMALL, PRODUCTION,
        min_arch=89,
    ),
]  # fmt: skip
