"""A stream of 10,000 seconds: no memory is added, and what is made in the end is made like what came first."""

from __future__ import annotations

import gc
import resource

import pytest
import torch

from liverelay.engine.config import DiTConfig, StreamConfig
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.sizes import dit_shapes
from liverelay.engine.relay.pipeline import local_pipeline
from liverelay.engine.relay.plan import parse_plan
from liverelay.engine.relay.stage import LineSpec, Stage
from tests.regression import weights
from tests.rollout_twin import random_block

CONFIG = DiTConfig(
    dim=32, ffn_dim=32, num_heads=1, num_layers=1, audio_inject_layers=(0,), text_dim=8, text_len=4, audio_dim=4
)
BLOCKS = 20_834  # of 3 latent frames: 62,502, past the 45,000 at which the published stream ends
WARM = 100


def living_bytes() -> int:
    """Of all tensors there are."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) is torch.Tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_ten_thousand_seconds_need_the_memory_of_the_first_ones(rng: torch.Generator) -> None:
    before, stream = torch.get_num_threads(), StreamConfig(relative_distance=9)
    torch.set_num_threads(1)
    dit = DiT.load(weights(dit_shapes(CONFIG)), CONFIG, dtype=torch.float32)
    geometry, shape = Geometry(8, 8, CONFIG.head_dim), (1, CONFIG.audio_states, CONFIG.audio_dim, stream.block_frames)
    spec, plan = LineSpec.make(geometry, stream, shape), parse_plan("0+1+2,3+vae", ["cpu", "cpu"])
    line = local_pipeline(plan, spec, [Stage(part, spec, dit, None, torch.float32) for part in plan.stages])
    given = {"text": torch.randn(3, CONFIG.text_dim, generator=rng)}
    given |= {name: torch.randn(16, n, 8, 8, generator=rng) for name, n in (("reference", 1), ("motion", 19))}
    serial, block = line.open(given), random_block(spec, rng)
    parts, used = {"latent": block.noise, "audio": block.audio}, (0, 0)
    for number in range(BLOCKS):
        line.request(serial, number, parts, (9, 9, 9, 9)).result(timeout=60)
        if number == WARM:
            used = living_bytes(), resident_bytes()
    state = line.save(serial).result(timeout=60)
    assert living_bytes() - sum(t.nbytes for s in state.values() for t in s.tensors.values()) == used[0]
    assert resident_bytes() - used[1] < 4 << 20
    positions = {number for saved in state.values() for number in saved.numbers.values()}
    assert positions == {3 * (BLOCKS - 1) + 9}  # the sink has rolled along
    assert all(tensor.isfinite().all() for saved in state.values() for tensor in saved.tensors.values())
    line.close()
    torch.set_num_threads(before)
