"""Every kernel, once: tests, the ahead-of-time gate, benchmarks and documentation are made from this list."""

from __future__ import annotations

from liverelay.kernels import attention, audio, feedforward, latent, norm, pixels, quant, rope, values
from liverelay.kernels.spec import KernelSpec


def gluon_specs() -> list[KernelSpec]:
    """Kernels in Gluon, which is experimental: a Triton without it, or with another one, does without them."""
    try:
        from liverelay.kernels import attention_gluon
    except (ImportError, AttributeError, TypeError):
        return []
    return attention_gluon.SPECS


KERNELS: list[KernelSpec] = [
    *norm.SPECS, *rope.SPECS, *attention.SPECS, *audio.SPECS, *feedforward.SPECS, *latent.SPECS, *pixels.SPECS,
    *quant.SPECS, *values.SPECS, *gluon_specs(),
]  # fmt: skip
