"""CUDA graphs of a stage's work: captured once for every ring slot and fill level of a place, then replayed.

Positions, ring slot, latent and sound come from static device buffers, so a replay is the same launches on other
numbers. Between them nothing is allocated and Python does nothing for a layer. Elsewhere the work simply runs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from liverelay.engine._C import StageProgram

# One capture at a time in the process: PyTorch's allocator and its graphs know of one only. Whoever else would wait for
# a whole device meanwhile (torch.cuda.synchronize) spoils the capture: stages wait for events alone.
_capturing = threading.Lock()


class Graphs:
    """Captured work by key, of one stage and in its thread.

    All graphs share one memory pool, because they run in turn, and one stream to be captured on: PyTorch's own would
    be on the device of whoever captured first. The memory that they work on is a place's, which is never made anew, so
    they stay valid for all sessions that the place is given to.
    """

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self._stream = torch.cuda.Stream(device) if self.enabled else None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do the work: the first time of a key as it stands, and capture it then; later replay.

        The first run is what loads kernels and libraries; capturing computes nothing, so the result is that of one run.
        Work that cannot be captured is run as it stands for ever, which is said once.
        """
        if self.has(key):
            return self.captured[key].replay()
        if not self.enabled:
            return work()
        self._begin(work)
        try:
            self.captured[key] = self._capture(work)
        except Exception as error:  # of a library that waits for the device, or of memory: eager is right, too
            self.enabled = False
            self._clear_up()
            reason = str(error.__context__ or error).strip() or repr(error)
            logging.getLogger(__name__).warning(
                "%s: no CUDA graphs, launches one by one: %s", self._device, reason.splitlines()[0]
            )

    def _begin(self, work: Callable[[], None]) -> None:
        """The first run, on the stream of the capture, for which libraries prepare themselves; in order with ours."""
        assert self._stream is not None
        ours = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(ours)
        with torch.cuda.stream(self._stream):
            work()
        ours.wait_stream(self._stream)

    def has(self, key: Hashable) -> bool:
        """Whether the work of this key is captured."""
        return key in self.captured

    def add(self, program: StageProgram, key: Hashable) -> None:
        """Its replay, to a program without Python. We draw no random numbers, which is what a replay by PyTorch sees
        to beyond the launch."""
        program.launch(self.captured[key].raw_cuda_graph_exec())

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Not through torch.cuda.graph, which waits for the device and empties its caches before each capture."""
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph

    def _clear_up(self) -> None:
        """After a failed capture PyTorch before 2.12 believes that it goes on: its allocator would fail to free memory
        for others. It has no public name for the end."""
        assert self._stream is not None and self._pool is not None
        with contextlib.suppress(RuntimeError, AttributeError):  # where it knows of the end by itself
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
