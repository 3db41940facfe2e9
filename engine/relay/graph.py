"""CUDA graphs of a stage's steps: captured once for every ring slot and fill level, then replayed.

Positions, ring slot, latent and sound come from static device buffers, so a replay is the same launches on other
numbers. Between them nothing is allocated and Python does nothing for a layer. Elsewhere the work simply runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Captured work by key. All graphs of a stage share one memory pool, because they run in turn."""

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do the work: the first time of a key as it stands, and capture it then; later replay.

        The first run is what loads kernels and libraries; capturing computes nothing, so the result is that of one run.
        """
        if not self.enabled:
            work()
        elif key in self.captured:
            self.captured[key].replay()
        else:
            work()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
            self.captured[key] = graph

    def forget(self) -> None:
        """Free what was captured: the buffers it works on have changed."""
        self.captured.clear()
