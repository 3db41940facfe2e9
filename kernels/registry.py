"""Every kernel, once: tests, the ahead-of-time gate, benchmarks and documentation are made from this list."""

from __future__ import annotations

from liverelay.kernels import norm
from liverelay.kernels.spec import KernelSpec

KERNELS: list[KernelSpec] = [*norm.SPECS]
