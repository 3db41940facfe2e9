"""FP8 (e4m3): rows quantised to their own largest value; `quantize_rows` for what no other kernel could quantise.

    scale_t = max(max_i |x_ti|, tiny) / 448,   q_ti = e4m3(x_ti / scale_t)

x [T, n] of the working dtype, q [T, n] e4m3, scale [T] float32. A row of zeros gives zeros; denormal and huge rows
neither overflow nor divide by zero. Bytes: T n (element size + 1); FLOPs: 3 for each element. Kernels that produce
an FP8 product's input (`residual_norm`, `gelu_quant`) do the same in their own pass through `store_quantized_row`.

Row kernels read a row once and keep it in registers, as a tuple of chunks [ROWS, TILE] (`launch.tiling`); what they
share is here. A thread has 8 neighbours of a chunk: 128 bits of bfloat16, two accesses of 128 bits in float32. Their
codes are 64 bits, but a warp still writes 256 bytes in a row; with 16 neighbours a thread the loads would each use half
of the 32-byte sectors that they ask for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.contract import FP8
from liverelay.kernels.launch import check, refuse, run, tiling
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random


@triton.jit
def own_rows(tokens, ROWS: tl.constexpr):
    """The rows of this program [ROWS, 1], and which of them exist: a program of one row always has it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    live = row < tokens
    if ROWS == 1:
        live = tl.full([1, 1], True, tl.int1)
    return row.to(tl.int64), live


@triton.jit
def chunk_mask(live, index: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Which elements of a chunk [ROWS, TILE] are there; a chunk inside of the width leaves nothing to compare."""
    inside = tl.full([1, TILE], True, tl.int1)
    if (index + 1) * TILE > WIDTH:
        inside = (index * TILE + tl.arange(0, TILE) < WIDTH)[None, :]
    return live & inside


@triton.jit
def load_row(start, live, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows as a tuple of chunks [ROWS, TILE] in float32, zero where nothing is. start: addresses of the first chunk."""
    chunks: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        value = tl.load(start + i * TILE, mask=chunk_mask(live, i, WIDTH, TILE), other=0.0)
        chunks += (value.to(tl.float32),)
    return chunks


@triton.jit
def store_quantized_row(
    chunks, start, scale_at, live, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Quantise rows given as chunks, zero where nothing is: codes from `start` on, scales to `scale_at` [ROWS, 1]."""
    highest = tl.abs(chunks[0])
    for i in tl.static_range(1, CHUNKS):
        highest = tl.maximum(highest, tl.abs(chunks[i]))
    amax = tl.maximum(tl.max(highest, axis=1, keep_dims=True), 1e-30)
    for i in tl.static_range(CHUNKS):
        codes = (chunks[i] * (448.0 / amax)).to(start.dtype.element_ty)  # the largest is 448: nothing to saturate
        tl.store(start + i * TILE, codes, mask=chunk_mask(live, i, WIDTH, TILE))
    tl.store(scale_at, amax / 448.0, mask=live)


@triton.jit
def quantize_rows_kernel(
    x, out, scale_out, x_stride, out_stride, tokens, WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row, live = own_rows(tokens, ROWS)
    lane = tl.arange(0, TILE)[None, :]
    chunks = load_row(x + row * x_stride + lane, live, WIDTH, TILE, CHUNKS)
    store_quantized_row(chunks, out + row * out_stride + lane, scale_out + row, live, WIDTH, TILE, CHUNKS)


def check_quantized(name: str, out: Tensor, scale: Tensor, shape: tuple[int, int]) -> None:
    """out is e4m3 [T, n], scale float32 [T]."""
    check(name, {"out": (out, shape), "scale_out": (scale, shape[:1])})
    if out.dtype != FP8 or scale.dtype != torch.float32:
        refuse(name, f"out is {out.dtype} and scale_out {scale.dtype}, expected float8_e4m3fn and float32")


def quantize_rows(x: Tensor, out: Tensor, scale_out: Tensor) -> Tensor:
    """Rows of [T, n] to e4m3, each with its own scale."""
    tokens, width = x.shape
    check("quantize_rows", {"x": (x, (tokens, width)), "out": (out, (tokens, width))})
    check_quantized("quantize_rows", out, scale_out, (tokens, width))
    tiles = tiling(width)
    programs = triton.cdiv(tokens, tiles["ROWS"])
    run(quantize_rows_kernel, programs, x, out, scale_out, x.stride(0), out.stride(0), tokens, **tiles)
    return out


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_rows(value: Tensor) -> dict[str, Tensor]:
    """Codes before rounding and scales of float64 rows."""
    amax = value.abs().amax(dim=1).clamp_min(1e-30)
    return {"out": value * (448 / amax).unsqueeze(1), "scale": amax / 448}


def reference_quantize_rows(x: Tensor, out: Tensor, scale_out: Tensor) -> dict[str, Tensor]:
    return reference_rows(x.double())


def quantized_outputs(shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    return {"out": poisoned(shape, FP8, device), "scale": poisoned(shape[:1], torch.float32, device)}


def make_inputs(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    shape = (dims["tokens"], dims["width"])
    outputs = quantized_outputs(shape, device)
    return Case((random(shape, dtype, rng, device), outputs["out"], outputs["scale"]), {}, outputs)


def cost(dims: Dims, dtype: torch.dtype) -> Cost:
    elements = dims["tokens"] * dims["width"]
    return Cost(elements * (dtype.itemsize + 1), 3 * elements)


SPECS = [
    KernelSpec(
        "quantize_rows", quantize_rows, reference_quantize_rows, torch_ops.quantize_rows, make_inputs, cost,
        small={
            "odd": dict(tokens=9, width=97), "one": dict(tokens=1, width=16), "wide": dict(tokens=2, width=5120),
            "ragged": dict(tokens=5, width=1500),
        },
        production={"14B 704x384": dict(tokens=3168, width=5120)}, min_arch=89,
    )
]  # fmt: skip
