"""FP8: row scales beat the published tensor scale, odd rows are safe, a quantised checkpoint loads the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from liverelay.engine.checkpoint import find_checkpoint
from liverelay.engine.cli import main
from liverelay.engine.devices import check_fp8
from liverelay.engine.errors import InputError
from liverelay.engine.inspection import inspect_checkpoint
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.quantize import quantize_checkpoint
from liverelay.kernels import torch_ops
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


def test_fp8_layers_stay_close_to_bfloat16(checkpoint: Path, rng: torch.Generator) -> None:
    source, config = find_checkpoint(checkpoint).open_dit()
    geometry, flows = Geometry(8, 8, config.head_dim), []
    inputs = [torch.randn(16, n, 8, 8, generator=rng) for n in (1, 19, 3)]
    sound = torch.randn(1, config.audio_states, config.audio_dim, 12, generator=rng)
    for fp8 in (False, True):
        dit = DiT.load(source, config, dtype=torch.bfloat16, fp8=fp8)
        ws, arena, text = dit.make_workspace(geometry), dit.make_arena(geometry), dit.text_condition(torch.ones(3, 64))
        dit.prefill(ws, arena, dit.timestep_tables(0.0), text, dit.sink_tokens(inputs[0], inputs[1]))
        conditions = (text, dit.audio_condition(sound, 3), dit.pose_condition(None))
        latent = inputs[2].bfloat16()
        flows.append(dit.block_step(ws, arena, dit.timestep_tables(857.7), latent, 0, 30, conditions).clone())
        assert dit.weights.fp8 == fp8 and ws.h.dtype == (FP8 if fp8 else torch.bfloat16)
    assert 1e-4 < relative(flows[1], flows[0].float()) < 0.1


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
