"""A whole model of random weights on a device, input for it, and what the device was asked to do for a call."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable
from typing import Any

import torch

from bench import timing
from bench.stage_14b import PRESETS, RandomWeights
from liverelay.engine import make_checkpoint
from liverelay.engine.config import StreamConfig
from liverelay.engine.devices import fp8_parts
from liverelay.engine.models.attention_choice import choose_attention
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.sizes import arena_bytes
from liverelay.engine.models.vae import VAE
from liverelay.engine.relay.messages import Block
from liverelay.engine.relay.plan import StagePlan
from liverelay.engine.relay.stage import LineSpec, Stage

VAE_DIM = {"14b": 96, "tiny": 8}
SHADOW = 0.25  # of an arena: the sink alone
ROOM = 6 << 30  # beside weights and arenas: workspace, VAE, graphs
HOST_CALLS = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")


class Model:
    """Random weights of everything that a line needs, and random input for it."""

    def __init__(self, preset: str, device: torch.device, fp8: str, blocks: int) -> None:
        config, size = PRESETS[preset]
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.geometry, self.stream = Geometry(*size, config.head_dim), StreamConfig()
        products, attention = fp8_parts(fp8 or False)
        weights = RandomWeights(config, device)
        self.dit = DiT.load(
            weights, config, device=device, dtype=self.dtype, fp8=products, fp8_attention=attention
        )
        choose_attention(self.dit, self.geometry, print)
        sizes = dataclasses.replace(make_checkpoint.PRESETS["tiny"], vae_dim=VAE_DIM[preset])
        with torch.device(device):
            decoder = make_checkpoint._vae_weights(sizes, torch.Generator(device).manual_seed(0))
        self.vae = VAE.load(decoder, device=device, dtype=self.dtype)
        audio = (1, config.audio_states, config.audio_dim, self.stream.block_frames)
        self.spec = LineSpec.make(
            self.geometry, self.stream, audio, channels=config.in_channels, vae=self.vae.config
        )
        rng = torch.Generator().manual_seed(0)
        self.given = {"text": torch.randn(config.text_len, config.text_dim, generator=rng)}
        self.given |= {name: torch.randn(16, n, *size, generator=rng) for name, n in (("reference", 1), ("motion", 19))}
        self.sound = [{name: torch.randn(shape, generator=rng) for name, shape in self.spec.parcel.items()}
                      for _ in range(blocks)]  # fmt: skip
        self.distances = torch.randint(4, 31, (blocks, self.stream.steps), generator=rng).tolist()

    def stage(self, plan: StagePlan) -> Stage:
        return Stage(plan, self.spec, self.dit, self.vae, self.dtype)

    def command(self, number: int, block: int) -> Block:
        return Block(number, 0, block, tuple(self.distances[block % len(self.distances)]))

    def lacks(self, stages: int) -> str:
        """Why a line of so many stages with steps does not fit beside the weights; empty where it does."""
        if self.device.type != "cuda":
            return ""
        arena = arena_bytes(self.dit.config, self.geometry, fp8=self.dit.fp8_attention)
        arenas = self.stream.steps + SHADOW * stages
        needed = int(torch.cuda.memory_allocated(self.device) + arenas * arena + ROOM)
        there = torch.cuda.get_device_properties(self.device).total_memory
        return "" if needed < there else f"needs {needed / 2**30:.0f} GiB, the GPU has {there / 2**30:.0f}"


def tidy() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def counters(device: torch.device) -> dict[str, int]:
    """How often the allocator was asked so far, and had to look again; zeros on a CPU."""
    found = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return {name: found.get(name, 0) for name in ("allocation.all.allocated", "num_alloc_retries")}


def launches(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Calls of the driver that a call makes, and kernels and copies that the device runs for it; zeros if unknown."""
    if device.type != "cuda":
        return {"host": 0, "device": 0}
    kinds = torch.profiler.ProfilerActivity
    try:
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as seen:
            call()
            timing.wait(device)
        rows = seen.key_averages()
    except RuntimeError as error:  # no right to use the profiler here
        print(f"launches are not counted: {timing.one_line(error)}")
        return {"host": 0, "device": 0}
    return {
        "host": sum(row.count for row in rows if HOST_CALLS.match(row.key)),
        "device": sum(row.count for row in rows if row.device_type == torch.autograd.DeviceType.CUDA),
    }
