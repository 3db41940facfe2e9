"""What the parts of `bench.quality` are told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Made = TypeVar("Made")


@dataclass(frozen=True)
class Options:
    """checkpoints: folders by label; clips and seconds: None for each part's own default; run: of a teacher's training;
    skim: decode some windows of a long stream only; save(result): keeps what a part has so far."""

    checkpoints: Mapping[str, Path]
    device: str = "cpu"
    dtype: torch.dtype | None = None
    clips: int | None = None
    frames: int = 100
    seconds: float | None = None
    people: int = 1
    seed: int = 0
    skim: bool = False
    whole_file: bool = False
    run: Path | None = None
    teacher_blocks: int = 5
    teacher_steps: int = 20
    pictures: Path | None = None
    save: Callable[[object], None] = lambda result: None

    def told(self, what: str, number: int, count: int, made: Made) -> Made:
        """Passes through what was made, and says how far a part is."""
        end = "\n" if number + 1 == count or not sys.stderr.isatty() else ""
        if end or number % 5 == 0 or sys.stderr.isatty():
            print(f"\r{what}: {number + 1} of {count}", end=end, file=sys.stderr, flush=True)
        return made
