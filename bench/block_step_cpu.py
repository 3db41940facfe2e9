"""`python -m bench.block_step_cpu`: the engine's block-step against a plain module version, alternated in one run.

Prints the machine's own matmul ceiling first, checks that both give the same numbers, then the times and their ratio;
the last line is JSON. Random weights, float32; sizes: width 512, 8 layers, 256x256 pixels, full ring.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

from liverelay.engine.config import DiTConfig, set_process_defaults

set_process_defaults()  # before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.plain_dit import PlainDiT  # noqa: E402
from liverelay.engine.make_checkpoint import random_dit  # noqa: E402
from liverelay.engine.models.dit import DiT  # noqa: E402
from liverelay.engine.models.geometry import Geometry, reference_position  # noqa: E402
from liverelay.engine.models.sizes import block_step_flops  # noqa: E402

SMALL = DiTConfig(
    dim=512, ffn_dim=1408, num_heads=4, num_layers=8, audio_inject_layers=(0, 2, 4, 7), text_dim=256, audio_dim=128
)
TIMESTEP, DISTANCE = 602.1505737304688, 9


def matmul_flops_per_s(size: int = 1024, seconds: float = 1.0) -> float:
    """The best float32 matmul rate of this machine at the current number of threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


class Pair:
    """The engine and the plain version with the same weights and inputs, stepped block by block."""

    def __init__(self, config: DiTConfig, geometry: Geometry, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        weights = random_dit(config, rng)
        self.geometry = geometry
        self.plain = PlainDiT(config, geometry.ring_frames, geometry.frames_per_block).load(weights).eval()
        self.dit = DiT.load(weights, config, dtype=torch.float32)
        self.ws, self.arena = self.dit.make_workspace(geometry), self.dit.make_arena(geometry)
        h, w, frames = geometry.latent_h, geometry.latent_w, geometry.frames_per_block
        self.text = torch.randn(64, config.text_dim, generator=rng)
        self.latent = torch.randn(16, frames, h, w, generator=rng)
        self.pose = torch.zeros(16, frames, h, w)
        self.audio = torch.randn(config.audio_states, config.audio_dim, 4 * frames, generator=rng)
        reference, motion = (torch.randn(16, n, h, w, generator=rng) for n in (1, 19))
        self.text_kv = self.dit.text_condition(self.text)
        tokens = self.dit.sink_tokens(reference, motion)
        self.dit.prefill(self.ws, self.arena, self.dit.timestep_tables(0.0), self.text_kv, tokens)
        self.tables = self.dit.timestep_tables(TIMESTEP)
        self.plain.prefill(reference, motion, self.text)

    def engine_block(self, block: int) -> Tensor:
        start, dit = block * self.geometry.frames_per_block, self.dit
        sound = dit.audio_condition(self.audio[None], self.geometry.frames_per_block)
        conditions = (self.text_kv, sound, dit.pose_condition(None))
        position = reference_position(start, DISTANCE)
        flow = dit.block_step(self.ws, self.arena, self.tables, self.latent, start, position, conditions)
        return dit.ops.unpatchify(flow, self.latent.shape)

    def plain_block(self, block: int) -> Tensor:
        start = block * self.geometry.frames_per_block
        out: Tensor = self.plain(self.latent, TIMESTEP, start, DISTANCE, (self.text, self.audio, self.pose))
        return out


@torch.inference_mode()
def measure(config: DiTConfig, geometry: Geometry, *, blocks: int, seed: int = 0) -> dict[str, float]:
    """Median seconds of both once the ring is full, their ratio, and the largest relative difference of outputs."""
    pair, error = Pair(config, geometry, seed), 0.0
    times: dict[str, list[float]] = {"engine": [], "plain": []}
    warm_up = geometry.ring_frames // geometry.frames_per_block
    for block in range(warm_up + blocks):
        outputs = {}
        for name, step in (("engine", pair.engine_block), ("plain", pair.plain_block)):
            started = time.perf_counter()
            outputs[name] = step(block)
            if block >= warm_up:
                times[name].append(time.perf_counter() - started)
        difference = (outputs["engine"] - outputs["plain"]).norm() / outputs["plain"].norm()
        error = max(error, float(difference))
    engine, plain = (statistics.median(times[name]) for name in ("engine", "plain"))
    ratio = statistics.median(p / e for p, e in zip(times["plain"], times["engine"], strict=True))
    return {"engine_s": engine, "plain_s": plain, "ratio": ratio, "relative_error": error}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.block_step_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int, default=8, help="timed blocks after the ring is full")
    parser.add_argument("--layers", type=int, default=SMALL.num_layers)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = tuple(i for i in SMALL.audio_inject_layers if i < arguments.layers)
    config = replace(SMALL, num_layers=arguments.layers, audio_inject_layers=layers)
    geometry = Geometry(32, 32, config.head_dim)
    peak, work = matmul_flops_per_s(), sum(block_step_flops(config, geometry))
    print(f"ceiling: {peak / 1e9:.0f} GFLOP/s float32 matmul on {arguments.threads} threads")
    print(f"work of one block-step: {work / 1e9:.1f} GFLOP, so at least {work / peak:.3f} s")
    result = measure(config, geometry, blocks=arguments.blocks)
    if result["relative_error"] > 1e-4:
        print(f"the two differ by {result['relative_error']:.1e}: no times from wrong numbers")
        return 1
    share = work / peak / result["engine_s"]
    print(f"engine {result['engine_s']:.3f} s ({100 * share:.0f}% of the ceiling), plain {result['plain_s']:.3f} s")
    print(f"the engine is {result['ratio']:.2f}x as fast; outputs differ by {result['relative_error']:.1e}")
    print(json.dumps(result | {"threads": arguments.threads, "ceiling_gflops": peak / 1e9, "share_of_ceiling": share}))
    return 0 if result["ratio"] >= 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
