"""Every kernel, once: tests, the ahead-of-time gate, benchmarks and documentation are made from this list."""

from __future__ import annotations

from liverelay.kernels import attention, audio, feedforward, norm, rope
from liverelay.kernels.spec import KernelSpec

KERNELS: list[KernelSpec] = [*norm.SPECS, *rope.SPECS, *feedforward.SPECS, *audio.SPECS, *attention.SPECS]
