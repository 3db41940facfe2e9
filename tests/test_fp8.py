"""FP8: row scales beat the published tensor scale, odd rows are safe, a quantised checkpoint loads the same."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from liverelay.engine.cache import Arena
from liverelay.engine.checkpoint import find_checkpoint
from liverelay.engine.cli import main
from liverelay.engine.devices import check_fp8, fp8_parts
from liverelay.engine.errors import InputError
from liverelay.engine.golden import GoldenOptions, run
from liverelay.engine.inspection import inspect_checkpoint
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.sizes import arena_bytes, workspace_bytes
from liverelay.engine.models.weights import save_tensors
from liverelay.engine.quantize import quantize_checkpoint
from liverelay.engine.relay.stage import Place, Stage
from liverelay.kernels import contract, torch_ops
from tests.compare import relative
from tests.test_checkpoint import tensors_of

FP8 = torch.float8_e4m3fn


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(x.shape, dtype=FP8), torch.empty(x.shape[0])
    return torch_ops.quantize_rows(x, codes, scale), scale


def published(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for the whole tensor, capped, the product rounded to the input's dtype before the conversion."""
    scale = torch.clamp(1 / x.float().abs().max().clamp_min(1e-12) * 448, max=448.0)
    product = (x.float() * scale).to(x.dtype).float()
    return product.clamp(-448, 448).to(FP8), 1 / scale


def test_the_published_scheme_is_reproduced(golden: Path) -> None:
    tensors = load_file(golden / "fp8" / "fp8.safetensors")
    names = {key.split(".")[1] for key in tensors if key.startswith("q.")}
    assert len(names) > 3
    for name in names:
        codes, factor = published(tensors[f"q.{name}.x"])
        assert torch.equal(codes.view(torch.uint8), tensors[f"q.{name}.bytes"]), name
        assert torch.allclose(factor, tensors[f"q.{name}.inv_scale"], rtol=1e-6), name


def test_row_scales_have_a_smaller_error_than_the_published_scheme(golden: Path) -> None:
    tensors = load_file(golden / "fp8" / "fp8.safetensors")
    layers = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    assert layers
    for layer in layers:
        weight, bias = tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias")
        bias = torch.zeros(weight.shape[0]) if bias is None else bias
        for key in [key for key in tensors if key.startswith(f"{layer}.in_") and key.endswith(".x")]:
            x = tensors[key].flatten(0, -2)
            exact = x.double() @ weight.double().T + bias.double()
            theirs = relative(tensors[key.replace(".x", ".y_f32_emulated")], exact)
            ours = torch_ops.linear_fp8(*quantized(x), *quantized(weight), bias, torch.empty(exact.shape))
            assert relative(ours, exact) < theirs, key


def test_fp8_attention_stays_near_the_published_tensors(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights, sharp softmax; docs/fp8.md has what a trained model loses, which is less."""
    monkeypatch.setattr(DiT, "load", functools.partial(DiT.load, fp8_attention=True))
    got = run("dit", golden / "dit_tiny", GoldenOptions())
    exact = load_file(golden / "dit_tiny" / "blocks.fp32.safetensors")
    errors = [relative(got[name], value) for name, value in exact.items() if name.startswith("out.")]
    assert len(errors) > 3 and 1e-3 < max(errors) < 0.12


def test_odd_rows_are_safe(rng: torch.Generator) -> None:
    rows = torch.randn(6, 33, generator=rng)
    rows[0] = 0
    rows[1] *= 1e-38
    rows[2] *= 1e37
    rows[3, 1:] = 0
    rows[4] = 7.0
    codes, scale = quantized(rows)
    back = codes.float().double() * scale.double().unsqueeze(1)
    assert back.isfinite().all() and scale.isfinite().all() and back[0].eq(0).all()
    for row in (2, 3, 4, 5):
        assert relative(back[row], rows[row]) <= 2**-4
    assert codes.float().abs().max() <= 448


def last_flow(dit: DiT, rng: torch.Generator, blocks: int) -> Tensor:
    """The flow of the last of some blocks of random inputs, and what came before it in the arena."""
    config, geometry = dit.config, Geometry(8, 8, dit.config.head_dim)
    reference, motion = (torch.randn(16, n, 8, 8, generator=rng) for n in (1, 19))
    ws, arena, text = dit.make_workspace(geometry), dit.make_arena(geometry), dit.text_condition(torch.ones(3, 64))
    dit.prefill(ws, arena, dit.timestep_tables(0.0), text, dit.sink_tokens(reference, motion))
    tables = dit.timestep_tables(857.7)
    for block in range(blocks):
        sound = torch.randn(1, config.audio_states, config.audio_dim, 12, generator=rng)
        latent = torch.randn(16, 3, 8, 8, generator=rng).to(dit.device, dit.dtype)
        conditions = (text, dit.audio_condition(sound, 3), dit.pose_condition(None))
        flow = dit.block_step(ws, arena, tables, latent, 3 * block, 3 * block + 30, conditions)
    return flow.float().cpu()


@pytest.mark.parametrize(("products", "attention"), [(True, False), (False, True), (True, True)])
def test_fp8_stays_close_to_bfloat16(checkpoint: Path, seed: int, products: bool, attention: bool) -> None:
    source, config = find_checkpoint(checkpoint).open_dit()
    flows = []
    for on in (False, True):
        fp8 = {"fp8": products and on, "fp8_attention": attention and on}
        dit = DiT.load(source, config, dtype=torch.bfloat16, **fp8)
        flows.append(last_flow(dit, torch.Generator().manual_seed(seed), blocks=6))  # the ring wraps
        workspace = dit.make_workspace(Geometry(8, 8, config.head_dim))
        assert dit.weights.fp8 == fp8["fp8"] and dit.fp8_attention == fp8["fp8_attention"]
        assert workspace.h.dtype == (FP8 if fp8["fp8"] else torch.bfloat16)
    assert 1e-4 < relative(flows[1], flows[0]) < 0.1


def test_fp8_attention_halves_the_arena(checkpoint: Path) -> None:
    source, config = find_checkpoint(checkpoint).open_dit()
    geometry, sizes = Geometry(8, 8, config.head_dim), []
    for on in (False, True):
        dit = DiT.load(source, config, dtype=torch.bfloat16, fp8_attention=on)
        arena, other = dit.make_arena(geometry), dit.make_arena(geometry)
        assert arena.nbytes == arena_bytes(config, geometry, 2, fp8=on)
        shadow = arena_bytes(config, geometry, 2, fp8=on, sink_only=True)
        assert dit.make_arena(geometry, sink_only=True).nbytes == shadow
        assert arena.k.dtype == arena.v.dtype == (FP8 if on else torch.bfloat16)
        for tensor in arena.tensors().values():
            tensor.fill_(1.0)
        other.copy_sink(arena)
        sink = geometry.sink_tokens
        for ours in (other.k[:, :sink], other.v[:, :sink], other.reference_k):
            assert ours.float().eq(1).all()
        assert other.k[:, sink:].float().eq(0).all() and other.v[:, sink:].float().eq(0).all()
        sizes.append(arena.k.nbytes + arena.v.untyped_storage().nbytes())
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors_of(dit.make_workspace(geometry))}  # fmt: skip
        assert sum(held.values()) == workspace_bytes(config, geometry, 2, fp8_attention=on)
    assert sizes[1] <= 0.55 * sizes[0]


@pytest.mark.parametrize("frame_tokens", [1, 3, 16])
def test_an_arena_with_any_number_of_rows_is_saved_and_loaded(
    checkpoint: Path, tmp_path: Path, rng: torch.Generator, frame_tokens: int
) -> None:
    """Gaps between the channels' values are no part of a state, and a loaded one has them where a device wants them."""
    _, config = find_checkpoint(checkpoint).open_dit()
    sink = frame_tokens * 5 // 2
    geometry = SimpleNamespace(frame_tokens=frame_tokens, sink_tokens=sink, arena_tokens=sink + 12 * frame_tokens)
    places = []
    for position in (31, 57):
        arena = Arena(config, geometry, "cpu", torch.bfloat16, fp8=True)
        assert arena.nbytes == arena_bytes(config, geometry, 2, fp8=True)
        assert all(layer.data_ptr() % 16 == 0 for part in (arena.k, arena.v) for layer in part)
        assert arena.v.stride(3) % 16 == 0
        for tensor in arena.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=rng))
        arena.reference_position = position
        places.append(SimpleNamespace(arenas={2: arena}, decoder=None))
        places[-1].tensors = lambda place=places[-1]: Place.tensors(place)
    first, second = (SimpleNamespace(places={5: place}) for place in places)
    saved, numbers = Stage.save(first, 5)
    save_tensors(tmp_path / "state", saved, {})
    Stage.load(second, 5, load_file(tmp_path / "state"), numbers)
    arenas = [place.arenas[2] for place in places]
    assert arenas[1].reference_position == 31 and arenas[1].v.stride(3) % 16 == 0
    for name, tensor in arenas[0].tensors().items():
        assert torch.equal(tensor.float(), arenas[1].tensors()[name].float())


def test_no_value_can_saturate_in_fp8_attention(checkpoint: Path, rng: torch.Generator) -> None:
    source, config = find_checkpoint(checkpoint).open_dit()
    dit = DiT.load(source, config, dtype=torch.float32, fp8_attention=True)
    for timestep in (0.0, 312.5, 1000.0):
        tables = dit.timestep_tables(timestep).layers
        for i, layer in enumerate(dit.weights.layers):
            x = torch.randn(64, config.dim, generator=rng)
            x[:32] *= torch.randn(config.dim, generator=rng).exp().square()  # a few channels hold nearly everything
            h = torch.nn.functional.layer_norm(x, x.shape[1:]) * (1 + tables[i, 1]) + tables[i, 0]
            largest = float((h @ layer.v.weight.t() + layer.v.bias).abs().max())
            assert largest <= 448 * dit.scales[i].v * 1.01
            assert largest >= dit.scales[i].v  # far above the smallest normal code, 1/64


def stored(dit: DiT, qk: Tensor, layer: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """q and k [2, T, H, d] of rows qk as FP8 attention has them, code * scale, and without codes, not transformed."""
    config, tokens = dit.config, len(qk)
    shape = (tokens, config.num_heads, config.head_dim)
    angle = 6 * torch.rand(tokens, config.head_dim // 2, generator=rng)
    table, scales = (angle.cos(), angle.sin()), dit.scales[layer]
    norms = (dit.weights.layers[layer].self_attn.norm_q, dit.weights.layers[layer].self_attn.norm_k)
    outs = [torch.empty(shape, dtype=of) for of in (FP8, FP8, torch.float64, torch.float64)]
    place = contract.Place.make("cpu")
    torch_ops.qk_norm_rope(qk, norms, table, tuple(outs[:2]), place, eps=config.eps, scales=scales)
    torch_ops.qk_norm_rope(qk, norms, table, tuple(outs[2:]), place, eps=config.eps)
    codes = [out.double() * scale.double()[:, None] for out, scale in zip(outs[:2], (scales.q, scales.k), strict=True)]
    return torch.stack(codes), torch.stack(outs[2:])


def outlier_model(checkpoint: Path, rng: torch.Generator) -> DiT:
    """Norm weights over two decades: a few channels of each head, the same in q and k, are far larger than the rest.

    Heads, queries and keys, and layers differ by up to two decades more.
    """
    source, config = find_checkpoint(checkpoint).open_dit()
    dit = DiT.load(source, config, dtype=torch.float32)
    for layer in dit.weights.layers:
        layer.self_attn.norm_q.copy_(10 ** (2 * torch.rand(config.dim, generator=rng) - 1))
        layer.self_attn.norm_k.copy_(layer.self_attn.norm_q)
        for norm in (layer.self_attn.norm_q, layer.self_attn.norm_k):
            norm.view(config.num_heads, -1).mul_(100 ** torch.rand(config.num_heads, 1, generator=rng))
    return DiT(dit.weights, config, dtype=torch.float32, fp8_attention=True)


def test_no_query_or_key_saturates_in_fp8_attention(checkpoint: Path, rng: torch.Generator) -> None:
    """Not even of a row that the transform turns into one element; and usual ones keep e4m3's precision."""
    dit = outlier_model(checkpoint, rng)
    width = dit.config.dim
    lone = torch_ops.hadamard(torch.eye(width).view(width, dit.config.num_heads, -1)).flatten(1)  # its own inverse
    lone = lone.repeat(1, 2) * torch.randn(width, 1, generator=rng)
    for layer in range(dit.config.num_layers):
        codes, exact = stored(dit, lone, layer, rng)
        for row, whole in zip(codes.flatten(0, 1), exact.flatten(0, 1), strict=True):
            assert relative(row, torch_ops.hadamard(whole)) <= 2**-4
        codes, exact = stored(dit, torch.randn(64, 2 * width, generator=rng), layer, rng)
        for h in range(dit.config.num_heads):
            assert relative(codes[:, :, h], torch_ops.hadamard(exact)[:, :, h]) <= 0.03  # rounding itself: 0.0265


def test_every_layer_has_scales_of_its_own(checkpoint: Path, rng: torch.Generator) -> None:
    """Codes are made and read with those of their layer, also where a head's norm has no weight."""
    dit = outlier_model(checkpoint, rng)
    head_dim, norms = dit.config.head_dim, dit.weights.layers[0].self_attn
    norms.norm_q[:head_dim], norms.norm_k[:head_dim] = 0, 0
    dit = DiT(dit.weights, dit.config, dtype=torch.float32, fp8_attention=True)
    made, read = [], []

    def recorded(qk: Tensor, *given: Any, scales: Any, **more: Any) -> None:
        made.append(scales)
        torch_ops.qk_norm_rope(qk, *given, scales=scales, **more)

    def attend(*given: Any) -> Tensor:
        read.append(given[-1])
        return torch_ops.attention(*given)

    dit.ops = SimpleNamespace(**vars(torch_ops) | {"qk_norm_rope": recorded})  # type: ignore[assignment]
    dit.attention_fp8 = attend
    assert last_flow(dit, rng, blocks=1).isfinite().all()
    layers = len(dit.scales)
    for step in (made[-layers:], read[-layers:]):
        assert [id(scales) for scales in step] == [id(scales) for scales in dit.scales]
    for scales in dit.scales:
        assert scales.q.gt(0).all() and scales.k.gt(0).all()


def test_a_hadamard_transform_of_neighbours_changes_no_product(rng: torch.Generator) -> None:
    for head_dim in (6, 32, 96, 128):
        q, k = (torch.randn(9, 3, head_dim, generator=rng).double() for _ in range(2))
        turned = [torch_ops.hadamard(x) for x in (q, k)]
        assert torch.allclose((turned[0] * turned[1]).sum(-1), (q * k).sum(-1), atol=1e-9)
        lone = torch_ops.hadamard(torch.eye(head_dim)[:1, None])
        assert (lone != 0).sum() == contract.hadamard_block(head_dim)


def test_a_few_large_channels_do_not_decide_the_error_of_fp8_attention(checkpoint: Path, rng: torch.Generator) -> None:
    """Transformed, the products of queries and keys are as near as with a scale for every row, which rounds its largest
    to itself; in codes that are not transformed they would be further off."""
    dit = outlier_model(checkpoint, rng)
    ours, exact = stored(dit, torch.randn(64, 2 * dit.config.dim, generator=rng), 0, rng)
    plain, rows = torch.empty_like(exact), torch.empty_like(exact)
    for i, scale in enumerate((dit.scales[0].q, dit.scales[0].k)):
        plain[i] = (exact[i] / scale[:, None]).to(FP8).double() * scale[:, None]
        codes, scale_of = quantized(exact[i].flatten(0, 1))
        rows[i] = (codes.double() * scale_of[:, None]).view(exact[i].shape)

    def error(both: Tensor) -> float:
        return relative(*(torch.einsum("qhd,khd->hqk", *pair) for pair in (both, exact)))

    assert error(ours) < 0.85 * error(plain) and error(ours) < 1.1 * error(rows)


def test_a_quantized_checkpoint_is_what_loading_quantizes(checkpoint: Path, tmp_path: Path) -> None:
    errors = quantize_checkpoint(checkpoint, tmp_path / "fp8")
    assert errors and all(0.015 < error.rows < error.tensor < 0.05 for error in errors)
    loaded = []
    for folder in (checkpoint, tmp_path / "fp8"):
        source, config = find_checkpoint(folder).open_dit()
        loaded.append(DiT.load(source, config, fp8=True).weights)
    for a, b in zip(loaded[0].layers, loaded[1].layers, strict=True):
        for one, other in ((a.v, b.v), (a.ffn_in, b.ffn_in), (a.self_attn.first, b.self_attn.first)):
            assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
            assert one.scale is not None and other.scale is not None and torch.equal(one.scale, other.scale)
            assert torch.equal(one.bias, other.bias)
    before, after = (
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (checkpoint, tmp_path / "fp8")
    )
    memory = inspect_checkpoint(tmp_path / "fp8", size=(64, 64)).memory
    dit = DiT.load(source, config, dtype=torch.bfloat16)
    workspace = dit.make_workspace(Geometry(8, 8, config.head_dim))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(workspace)}
    assert memory["workspace"] == sum(held.values())
    assert memory["transformer"] == sum(t.nbytes for t in tensors_of(dit.weights))
    assert after < 0.85 * before  # the tiny model is mostly audio encoder and embeddings


def test_quantize_command_tells_errors_and_refuses(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "fp8", tmp_path / "errors.json"
    command = ["quantize", "--checkpoint", str(checkpoint), "--out", str(out)]
    assert main([*command, "--json", str(table)]) == 0
    assert "blocks.*.ffn.0.weight" in capsys.readouterr().out and json.loads(table.read_text())
    assert main(["inspect", str(out)]) == 0
    assert "a LoRA is merged before a" in capsys.readouterr().out
    assert main(command) == 1 and "exists already" in capsys.readouterr().err
    again = ["quantize", "--checkpoint", str(out), "--out", str(tmp_path / "twice")]
    assert main(again) == 1 and "quantised already" in capsys.readouterr().err
    lora = str(checkpoint / "LiveAvatar" / "liveavatar.safetensors")
    assert main([*again, "--lora", lora]) == 1 and "--lora" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.json", "fp8"]


def test_parts_in_fp8_are_named() -> None:
    assert fp8_parts(False) == (False, False) and fp8_parts(True) == fp8_parts("products") == (True, False)
    assert fp8_parts("attention") == (False, True) and fp8_parts("all") == (True, True)
    with pytest.raises(InputError, match="products, attention, all"):
        fp8_parts("everything")


@pytest.mark.parametrize(
    ("capability", "dtype", "word"), [((8, 0), torch.bfloat16, "sm_89"), ((9, 0), torch.float32, "bfloat16")]
)
def test_gpus_that_cannot_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, word: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(InputError, match=word):
        check_fp8("cuda", dtype)
    check_fp8("cpu", dtype)


def test_quantize_touches_nothing_of_the_source(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    before = {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    command = ["quantize", "--checkpoint", str(source), "--lora", "none", "--out"]
    for out, table in ((source / "inside", None), (tmp_path / "fp8", source / "config.json"), (tmp_path, None)):
        flags = [] if table is None else ["--json", str(table)]
        assert main([*command, str(out), *flags]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([*command, str(tmp_path / "fp8")]) == 0
    (tmp_path / "fp8" / "config.json").write_text("changed")
    assert not (tmp_path / "fp8" / "LiveAvatar").exists()
    assert {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "source"]
