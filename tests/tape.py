"""CUDA graphs without a GPU: PyTorch's operations on the CPU, recorded once and repeated as they were.

What a graph freezes is frozen here too: every number and shape that Python chose, and which memory is read and written.
Whatever changes from one replay to the next has to come through that memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from liverelay.engine.relay.graph import Graphs


class Tape(TorchDispatchMode):
    """Operations in order, with what each was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Everything again on what the same memory holds now; what was made on the way is made anew."""
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, before in self.steps:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(_tensors(before), _tensors(again), strict=True):
                made[id(old)] = new


class TapeGraphs(Graphs):
    """As `Graphs` on a GPU."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.enabled, self.tapes, self.replays = True, dict[Hashable, Tape](), 0
        self.programmed = 0  # of the replays, those that were in programs

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key in self.tapes:
            self.replays += 1
            return self.tapes[key].replay()
        with Tape() as tape:
            work()
        self.tapes[key] = tape

    def has(self, key: Hashable) -> bool:
        return key in self.tapes

    def add(self, program: Any, key: Hashable) -> None:
        self.replays, self.programmed = self.replays + 1, self.programmed + 1
        program.call(self.tapes[key].replay)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for item in value for part in _tensors(item)] if isinstance(value, list | tuple) else []
