"""The kernel that measures how fast a GPU can copy does copy, all of it and nothing else."""

from __future__ import annotations

import pytest
import torch

from bench import copies

SIZES = (4, copies.BLOCK - 4, copies.BLOCK, 3 * copies.BLOCK + 1000)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("count", SIZES)
def test_every_word_is_copied_and_no_other_is_touched(
    count: int, persistent: bool, device: torch.device, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    source = torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int32, generator=rng).to(device)
    memory = torch.full((count + copies.BLOCK,), 7, dtype=torch.int32, device=device)
    copies.launch(source, memory[:count], persistent=persistent)
    assert torch.equal(memory[:count], source) and bool((memory[count:] == 7).all())


def test_every_way_reads_the_source_and_writes_the_target(device: torch.device, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    source = torch.randint(0, 1 << 30, (copies.BLOCK,), dtype=torch.int32, generator=rng).to(device)
    for name, copy in copies.ways().items():
        target = torch.full_like(source, -1)
        copy(source, target)
        assert torch.equal(target - int(name == "torch.add"), source), name
