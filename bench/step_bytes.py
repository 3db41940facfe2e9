"""What the fused element-wise kernels have to move in a block-step: the registry's costs of all that it launches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from liverelay.engine.config import DiTConfig
from liverelay.engine.devices import fp8_parts
from liverelay.engine.models.geometry import Geometry
from liverelay.kernels import feedforward, norm, quant, rope, values
from liverelay.kernels.spec import CostOf, Dims

Launches = Iterator[tuple[int, CostOf, Mapping[str, int]]]  # how often, and the cost at which dims


def launches(config: DiTConfig, geometry: Geometry, fp8: str = "") -> Launches:
    """Of `DiT.compute_block`, with what is in FP8 ("", "products", "attention", "all"): norms and GELU then write rows
    in one byte, queries and keys are codes, values are stored as codes. Text's and sound's attention are no part of it.
    """
    products, attention = fp8_parts(fp8 or False)
    layers, heard = config.num_layers, len(config.audio_inject_layers)
    rows: Dims = {"tokens": geometry.block_tokens, "width": config.dim}
    wide: Dims = {"tokens": geometry.block_tokens, "width": config.ffn_dim}
    heads: Dims = {
        "tokens": geometry.block_tokens, "heads": config.num_heads, "head_dim": config.head_dim,
        "reference": geometry.frame_tokens, "moved": 1,
    }  # fmt: skip
    yield 1, norm.cost_residual_norm(0, 1, products), rows  # before the first layer
    yield layers, rope.cost_quantized if attention else rope.cost, heads
    yield layers, norm.cost_residual_norm(1, 1, products), rows  # after self-attention
    yield layers, norm.cost_inverse_rms, rows  # the factors of the text's queries
    yield layers, norm.cost_residual_norm(2, 1, products), rows  # before the feed-forward
    yield layers, feedforward.cost_quantized if products else feedforward.cost, wide
    # After the feed-forward: sound's norm and, behind its attention, the next layer's; the last one is the head's.
    yield layers - 1, norm.cost_residual_norm(3, 2, products), rows
    yield heard, norm.cost_residual_norm(1, 2, products), rows
    yield 1, norm.cost_residual_norm(3, 2, False), rows
    if products:
        yield 2 * layers + heard, quant.cost, rows  # attended rows, before the product that follows
    if attention:
        yield layers, values.cost, heads


def element_wise_bytes(config: DiTConfig, geometry: Geometry, dtype: torch.dtype, fp8: str = "") -> float:
    """Bytes of all of them together."""
    return float(sum(count * cost(dims, dtype).bytes for count, cost, dims in launches(config, geometry, fp8)))
