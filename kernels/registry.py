"""Every kernel, once: tests, the ahead-of-time gate, benchmarks and documentation are made from this list."""

from __future__ import annotations

from liverelay.kernels import attention, audio, feedforward, latent, norm, pixels, quant, rope
from liverelay.kernels.spec import KernelSpec

KERNELS: list[KernelSpec] = [
    *norm.SPECS, *rope.SPECS, *attention.SPECS, *audio.SPECS, *feedforward.SPECS, *latent.SPECS, *pixels.SPECS,
    *quant.SPECS,
]  # fmt: skip
