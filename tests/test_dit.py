"""The transformer at fresh random sizes against the float64 twin; memory, bad input, several speakers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liverelay.engine.config import DiTConfig
from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models.dit import DiT, _audio_norm, _stream_norm
from liverelay.engine.models.geometry import Geometry, reference_position
from liverelay.engine.models.sizes import dit_shapes
from liverelay.kernels.contract import Update
from tests.compare import relative
from tests.dit_twin import Twin

SIZES = {
    # head dim, heads, latent size, ring, frames a block, inject layers, text length
    "d32": (32, 2, (8, 8), 6, 3, (1,), 16),
    "d64-one-block-ring": (64, 2, (8, 16), 3, 3, (0, 2), 9),
    "d96": (96, 1, (16, 8), 9, 3, (0,), 32),
    "d128-one-frame-blocks": (128, 1, (8, 8), 4, 1, (2,), 20),
    "d16": (16, 4, (8, 24), 12, 3, (0, 1, 2), 512),
}


def random_weights(config: DiTConfig, rng: torch.Generator) -> dict[str, Tensor]:
    weights = {}
    for key, shape in dit_shapes(config).items():
        scale = torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 and "modulation" not in key else 0.3
        weights[key] = torch.randn(shape, generator=rng) * scale + ("norm" in key and key.endswith("weight"))
        weights[key] = weights[key].bfloat16().float()
    return weights


@pytest.mark.parametrize("name", SIZES)
def test_blocks_equal_the_twin(name: str, rng: torch.Generator, seed: int) -> None:
    head, heads, (h, w), ring, frames, inject, text_len = SIZES[name]
    config = DiTConfig(
        dim=head * heads, ffn_dim=96, num_heads=heads, num_layers=3, audio_inject_layers=inject, text_dim=24,
        text_len=text_len, freq_dim=32, audio_dim=16, audio_states=5,
    )
    weights = random_weights(config, rng)
    dit = DiT.load(weights, config, dtype=torch.float32)
    geometry = Geometry(h, w, head, frames, ring)
    twin = Twin(weights, heads, inject, (h, w), ring, frames)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    states, reference, motion = normal(text_len - 3, 24), normal(16, 1, h, w), normal(16, 17, h, w)
    ws, arena = dit.make_workspace(geometry), dit.make_arena(geometry)
    text, tables = dit.text_condition(states), dit.timestep_tables(602.1505737304688)
    dit.prefill(ws, arena, dit.timestep_tables(0.0), text, dit.sink_tokens(reference, motion))
    twin_text = twin.text(states.double(), text_len)
    twin.prefill(reference.double(), motion.double(), twin_text)
    for block in range(2 * ring // frames + 3):
        latent, features, pose = normal(16, frames, h, w), normal(5, 16, 4 * frames), normal(16, frames, h, w)
        start, distance = block * frames, 4 + (block * 7) % 27
        conditions = (text, dit.audio_condition(features[None], frames), dit.pose_condition(pose))
        flow = dit.block_step(ws, arena, tables, latent, start, reference_position(start, distance), conditions)
        out = dit.ops.unpatchify(flow, latent.shape)
        given = (latent.double(), 602.1505737304688, start, distance)
        exact = twin.block(*given, twin_text, features.double(), pose.double())
        assert relative(out, exact) <= 1e-5, f"block {block}, seed {seed}"


@pytest.fixture(scope="module")
def small() -> tuple[DiT, Geometry]:
    config = DiTConfig(64, 96, 2, 2, (0,), text_dim=24, text_len=16, freq_dim=32, audio_dim=16, audio_states=5)
    weights = random_weights(config, torch.Generator().manual_seed(3))
    return DiT.load(weights, config, dtype=torch.float32), Geometry(8, 8, 32, 3, 60)


class LargestAllocation(TorchDispatchMode):
    """Sees every operator's results and remembers the largest storage that did not exist before."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes, self.seen = 0, set[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.largest_bytes = max(self.largest_bytes, tensor.untyped_storage().nbytes())
        return out


def test_a_block_step_allocates_nothing_of_the_arenas_size(small: tuple[DiT, Geometry], rng: torch.Generator) -> None:
    dit, geometry = small
    ws, arena, tables = dit.make_workspace(geometry), dit.make_arena(geometry), dit.timestep_tables(500.0)
    text = dit.text_condition(torch.randn(4, 24, generator=rng))
    conditions = (text, dit.audio_condition(torch.randn(1, 5, 16, 12, generator=rng), 3), dit.pose_condition(None))
    latent = torch.randn(16, 3, 8, 8, generator=rng)
    one_layer = arena.k[0].nbytes
    for block in range(22):
        dit.block_step(ws, arena, tables, latent, 3 * block, 30 + block, conditions)
    with LargestAllocation() as steady:
        dit.block_step(ws, arena, tables, latent, 66, 99, conditions)
    assert 0 < steady.largest_bytes < one_layer
    with LargestAllocation() as wasteful:  # the counter does see what the published way would allocate
        torch.cat([arena.k[0], arena.v[0]])
    assert wasteful.largest_bytes >= one_layer


class Readers(TorchDispatchMode):
    """Sees every operator that reads or writes some tensors' memory; a view of it is neither."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.names: list[str] = []

    def holds(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self.storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        is_view = self.holds(out) and not func._schema.is_mutable
        if any(map(self.holds, (*args, *(kwargs or {}).values()))) and not is_view:
            self.names.append(str(func))
        return out


@pytest.mark.parametrize("fp8_attention", [False, True])
def test_nothing_but_attention_touches_the_texts_keys_and_values(
    small: tuple[DiT, Geometry], rng: torch.Generator, fp8_attention: bool
) -> None:
    """They are the prompt's alone, so what can be done to them is done once."""
    dit = DiT(small[0].weights, small[0].config, dtype=torch.float32, fp8_attention=fp8_attention)
    geometry, states = small[1], torch.randn(4, 24, generator=rng)
    text, attended = dit.make_text(), []
    with Readers(text.k, text.v) as once:
        dit.text_condition(states, text)
    assert len(once.names) >= 2 * len(dit.weights.layers)  # the counter does see what writes them
    ws, arena, tables = dit.make_workspace(geometry), dit.make_arena(geometry), dit.timestep_tables(500.0)
    conditions = (text, dit.audio_condition(torch.randn(1, 5, 16, 12, generator=rng), 3), dit.pose_condition(None))
    attend = dit.text_attention

    def attention(q: Tensor, k: Tensor, *given: object, **more: object) -> Tensor:
        before = len(loop.names)
        out = attend(q, k, *given, **more)
        if loop.holds(k):
            attended.append(k)
            del loop.names[before:]
        return out

    dit.text_attention = attention
    with Readers(text.k, text.v) as loop:
        dit.block_step(ws, arena, tables, torch.randn(16, 3, 8, 8, generator=rng), 0, 30, conditions)
    assert loop.names == [] and len(attended) == len(dit.weights.layers)


def test_far_positions_are_as_exact_as_near_ones() -> None:
    mpmath = pytest.importorskip("mpmath")
    from liverelay.engine.models.geometry import angles

    for position in (44_999, 45_000, 1_000_003, 12_345_678):
        cos, sin = angles([position], 22)
        with mpmath.workdps(40):
            for i in range(22):
                angle = position * mpmath.mpf(10000) ** (-mpmath.mpf(i) / 22)
                assert abs(float(mpmath.cos(angle)) - float(cos[0, i])) < 6e-4
                assert abs(float(mpmath.sin(angle)) - float(sin[0, i])) < 6e-4


def test_small_magnitudes_show_the_eps_values_and_two_speakers_add_up(golden: Path) -> None:
    folder = golden / "dit_tiny"
    unit, inputs = load_file(folder / "unit.fp32.safetensors"), load_file(folder / "inputs.safetensors")
    weights = load_file(folder / "weights.safetensors")
    config = DiTConfig.from_published(
        json.loads((folder / "config.json").read_text()), {key: tuple(t.shape) for key, t in weights.items()}
    )
    meta = json.loads((folder / "meta.json").read_text())
    dit = DiT.load(weights, config, dtype=torch.float32)
    geometry = Geometry(8, 24, config.head_dim)
    ws, arena, text = dit.make_workspace(geometry), dit.make_arena(geometry), dit.text_condition(inputs["context"])
    tokens = dit.sink_tokens(inputs["ref_latents"][0], inputs["motion_latents"][0])
    dit.prefill(ws, arena, dit.timestep_tables(0.0), text, tokens)
    tables, count = dit.timestep_tables(meta["timestep"]), geometry.block_tokens
    x = unit["x"][0]

    stream, norm = ws.x[:count], ws.h[:count]
    ws.place.fill(geometry.slot_row(0), geometry.valid_tokens(0), False)

    def stream_after(updates: list[Update]) -> Tensor:
        head = _stream_norm(tables.head)
        dit.ops.residual_norm(stream.copy_(x), updates, head, ws.head[:count], eps=config.eps, x_out=stream)
        return stream

    layer, modulation = dit.weights.layers[0], tables.layers[0]
    dit.ops.residual_norm(stream.copy_(x), [], _stream_norm(modulation), norm, eps=config.eps)
    dit._project(ws, layer, arena, 0, count, ws.block_rope.both)
    updates = dit._attend(ws, layer, modulation, arena, text, 0, count)
    assert relative(stream_after(updates), unit["block0_out"][0]) <= 1e-5
    audio = dit.audio_condition(inputs["audio.0"], 3)
    for j, i in enumerate(config.audio_inject_layers):
        dit.ops.residual_norm(stream.copy_(x), [], _audio_norm(audio, j, 0), norm, eps=1e-5)
        updates = dit._inject(ws, dit.weights.injectors[i], audio, j, count)
        assert relative(stream_after(updates), unit[f"after_audio.{i}"][0]) <= 1e-5
    stream_after([])
    head = F.linear(ws.head[:count], dit.weights.head.weight, dit.weights.head.bias)
    assert relative(head, unit["head_out"][0]) <= 1e-5

    arena.k[:, geometry.sink_tokens :] = 0
    arena.v[:, geometry.sink_tokens :] = 0
    both = dit.audio_condition(unit["multi_audio"], 3, unit["multi_mask"])
    conditions = (text, both, dit.pose_condition(inputs["cond_states.0"][0]))
    position = reference_position(0, meta["relative_distance_per_block"][0])
    latent = inputs["x.0"].float()
    flow = dit.block_step(ws, arena, tables, latent, 0, position, conditions)
    assert relative(dit.ops.unpatchify(flow, latent.shape), unit["multi_out"]) <= 1e-5


def test_bad_shapes_are_refused(small: tuple[DiT, Geometry]) -> None:
    dit, _ = small
    with pytest.raises(InputError, match="text states"):
        dit.text_condition(torch.zeros(17, 24))
    with pytest.raises(InputError, match="audio features"):
        dit.audio_condition(torch.zeros(1, 5, 16, 11), 3)
    with pytest.raises(InputError, match="speaker"):
        dit.audio_condition(torch.zeros(2, 5, 16, 12), 3)
    with pytest.raises(InputError, match="64 pixels"):
        Geometry(12, 8, 32)
    with pytest.raises(InputError, match="whole blocks"):
        Geometry(8, 8, 32, 3, 7)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"enable_framepack": False}, "enable_framepack"),
        ({"adain_mode": "norm"}, "adain_mode"),
        ({"num_heads": 7}, "heads"),
        ({"dim": 65}, "dim"),
        ({"audio_inject_layers": [0, 9]}, "audio_inject_layers"),
        ({"num_heads": None}, "num_heads"),
    ],
)
def test_configurations_that_are_not_computed_are_refused(
    small: tuple[DiT, Geometry], change: dict[str, object], word: str
) -> None:
    published: dict[str, object] = {"num_heads": 2, "audio_inject_layers": [0], "enable_framepack": True} | change
    published = {key: value for key, value in published.items() if value is not None}
    with pytest.raises(CheckpointError, match=word):
        DiTConfig.from_published(published, dit_shapes(small[0].config))


@pytest.mark.parametrize("fault", ["missing", "misshapen", "unknown"])
def test_a_key_that_does_not_fit_is_named(small: tuple[DiT, Geometry], fault: str) -> None:
    config = small[0].config
    weights = {key: torch.zeros(shape) for key, shape in dit_shapes(config).items()}
    key = "blocks.1.ffn.2.weight"
    if fault == "missing":
        del weights[key]
    elif fault == "misshapen":
        weights[key] = weights[key][:-1]
    else:
        key = "blocks.1.extra"
        weights[key] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=key):
        DiT.load(weights, config)
