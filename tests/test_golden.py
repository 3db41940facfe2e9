"""Equality with tensors of the published model, through `liverelay golden` (tolerances of the golden contract)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from liverelay.engine.cli import main
from liverelay.engine.errors import InputError
from liverelay.engine.golden import GoldenOptions, run
from liverelay.engine.models.geometry import Geometry, grid_angles, motion_angles
from liverelay.engine.models.sampler import make_schedule
from liverelay.kernels import torch_ops
from tests.compare import largest, psnr_db, relative

BF16, F32 = torch.bfloat16, torch.float32


def check_transformer(got: dict[str, Tensor], folder: Path, name: str, dtype: torch.dtype, only: str) -> None:
    exact = load_file(folder / f"{name}.fp32.safetensors")
    exact = {key: value for key, value in exact.items() if key.startswith(only)}
    rounded = load_file(folder / f"{name}.bf16.safetensors")
    assert exact
    for key, value in exact.items():
        if dtype == F32:
            assert relative(got[key], value) <= 1e-5, key
        else:
            assert relative(got[key], rounded[key]) <= 3e-2, key
            assert relative(got[key], value) <= max(1.25 * relative(rounded[key], value), 1e-6), key


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_transformer_blocks_sink_and_ring(golden: Path, dtype: torch.dtype) -> None:
    folder = golden / "dit_tiny"
    got = run("dit", folder, GoldenOptions(dtype=dtype))
    check_transformer(got, folder, "blocks", dtype, "out.")
    check_transformer(got, folder, "blocks", dtype, "final_cache_")
    check_transformer(got, folder, "sink", dtype, "cond_")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rollout_of_three_clips(golden: Path, dtype: torch.dtype) -> None:
    folder = golden / "tpp_tiny"
    got = run("tpp", folder, GoldenOptions(dtype=dtype))
    check_transformer(got, folder, "rollout", dtype, "latent.")
    check_transformer(got, folder, "rollout", dtype, "new_ref")


@pytest.mark.parametrize("prefixed", [False, True])
def test_lora_merge_is_equal_to_the_bit(golden: Path, tmp_path: Path, prefixed: bool) -> None:
    folder = golden / "lora"
    (tmp_path / "meta.json").write_bytes((folder / "meta.json").read_bytes())
    source = "lora_prefixed.safetensors" if prefixed else "lora.safetensors"
    (tmp_path / "lora.safetensors").write_bytes((folder / source).read_bytes())
    got = run("lora", tmp_path, GoldenOptions(weights=golden / "dit_tiny" / "weights.safetensors"))
    merged = load_file(folder / "merged.safetensors")
    assert set(got) == set(merged)
    for key, value in merged.items():
        assert torch.equal(got[key], value), key


def test_vae_in_float32(golden: Path) -> None:
    folder = golden / "vae_tiny"
    got = run("vae", folder, GoldenOptions())
    for name, tensor in got.items():
        assert largest(tensor, vae_expected(folder)[name]) <= 2e-4, name


def test_vae_in_bfloat16(golden: Path) -> None:
    folder = golden / "vae_tiny"
    got, expected = run("vae", folder, GoldenOptions(dtype=BF16)), vae_expected(folder)
    for name in ("latent_1", "latent_5", "latent_9", "latent_73rep", "ref_latent", "motion_latents"):
        assert relative(got[name], expected[name]) <= 3e-2, name
    for name, bound in {"frames_1": 46, "frames_4": 46, "video_kept": 46, "primed_frames": 41}.items():
        assert psnr_db(got[name], expected[name]) >= bound, name


def vae_expected(folder: Path) -> dict[str, Tensor]:
    files = (load_file(folder / f"{name}.safetensors") for name in ("encode", "decode", "stream_decode"))
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def test_audio_front_end(golden: Path) -> None:
    pytest.importorskip("soundfile")
    folder = golden / "audio_tiny"
    got = run("audio", folder, GoldenOptions())
    files = sorted(folder.glob("*.wav"))
    assert files
    for path in files:
        for name, value in load_file(path.with_suffix(".safetensors")).items():
            bound = 1e-6 if name == "waveform_16k" else 1e-4
            assert largest(got[f"{path.stem}.{name}"], value) <= bound, (path.stem, name)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_text_encoder(golden: Path, dtype: torch.dtype) -> None:
    folder = golden / "text_tiny"
    got = run("text", folder, GoldenOptions(dtype=dtype))["output"]
    expected = load_file(folder / "io.safetensors")
    valid = expected["mask"].bool()
    exact, rounded = expected["output"][valid], expected["output_bf16"][valid]
    if dtype == F32:
        assert largest(got[valid], exact) <= 1e-4
    else:
        own = relative(rounded, exact)
        assert relative(got[valid], exact) <= 1.25 * own
        assert relative(got[valid], rounded) <= 2 * own


def test_image_sizes_and_pixels(golden: Path) -> None:
    folder = golden / "image"
    got = run("image", folder, GoldenOptions())
    cases = json.loads((folder / "sizes.json").read_text())["cases"]
    sizes = [[case["out_height"], case["out_width"]] for case in cases]
    assert got["sizes"].tolist() == sizes
    images = load_file(folder / "images.safetensors")
    for name in json.loads((folder / "cases.json").read_text())["images"]:
        assert largest(got[f"{name}.pixels"], images[f"{name}.pixels"]) <= 1e-6


def test_rope_tables_are_exact_and_rotation_too(golden: Path) -> None:
    tensors = load_file(golden / "rope" / "rope.safetensors")
    for i, case in enumerate(json.loads((golden / "rope" / "meta.json").read_text())["cases"]):
        rows, cols, head = range(case["h"]), range(case["w"]), case["head_dim"]
        if case["kind"] == "noisy":
            times = range(case["start"], case["start"] + case["frames"])
            table = [torch.from_numpy(part) for part in grid_angles(times, rows, cols, head)]
        else:
            motion = motion_angles(Geometry(2 * case["h"], 2 * case["w"], head))
            reference = grid_angles([case["ref_position"]], rows, cols, head)
            parts = zip(reference, motion, strict=True)
            table = [torch.cat([torch.from_numpy(a), torch.from_numpy(b)]) for a, b in parts]
        expected = tensors[f"{i}.table_fp16"][0]
        assert torch.equal(table[0], expected[..., 0]) and torch.equal(table[1], expected[..., 1]), case
        q = tensors[f"{i}.q"][0]
        out = torch_ops.rotate(q, table[0].float(), table[1].float(), torch.empty(q.shape))
        assert torch.equal(out, tensors[f"{i}.roped_fp32"][0]), case


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sampler_is_equal_to_the_bit(golden: Path, dtype: torch.dtype) -> None:
    tensors = load_file(golden / "sampler" / "sampler.safetensors")
    schedule = make_schedule()
    assert torch.equal(torch.tensor(schedule.sigmas), tensors["sigmas"])
    assert torch.equal(torch.tensor(schedule.timesteps), tensors["timesteps"])
    mode = "fp32" if dtype == F32 else "bf16"
    for step in range(4):
        latent, velocity = tensors[f"{mode}.x.{step}"], tensors[f"{mode}.v.{step}"]
        c, f, h, w = velocity.shape
        flow = velocity.reshape(c, f, h // 2, 2, w // 2, 2).permute(1, 2, 4, 3, 5, 0).reshape(-1, 4 * c)
        assert torch.equal(torch_ops.unpatchify(flow, velocity.shape), velocity)
        out = torch_ops.euler_step(latent, flow, schedule.step_size(step), torch.empty_like(latent))
        assert torch.equal(out, tensors[f"{mode}.x.{step + 1}"])


def test_bytes_of_frames_are_truncated(golden: Path) -> None:
    from liverelay.kernels.vae_ops import to_uint8

    tensors = load_file(golden / "image" / "images.safetensors")
    assert torch.equal(to_uint8(tensors["frames.in"]), tensors["frames.uint8_thwc"])


def test_command_writes_what_the_function_returns(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["golden", "image", str(golden / "image"), "--out", str(out)]) == 0
    direct = run("image", golden / "image", GoldenOptions())
    written = load_file(out)
    assert set(written) == set(direct)
    assert all(torch.equal(written[name], direct[name]) for name in direct)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize(
    ("component", "flags", "word"),
    [
        ("nonsense", [], "nonsense"),
        ("dit", ["--backend", "nonsense"], "nonsense"),
        ("dit", ["--weights", "absent.safetensors"], "absent.safetensors"),
        ("lora", ["--weights", "foreign.safetensors"], "fits no weight"),
    ],
)
def test_command_refuses_in_one_line(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], component: str, flags: list[str], word: str
) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    flags = [str(tmp_path / flag) if flag.startswith("foreign") else flag for flag in flags]
    folder = golden / {"dit": "dit_tiny"}.get(component, component)
    out = tmp_path / "out.safetensors"
    assert main(["golden", component, str(folder if folder.is_dir() else golden), "--out", str(out), *flags]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and word in lines[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("component", "damage", "word"),
    [
        ("dit_tiny", {"num_blocks": "many"}, "dit cannot"),
        ("dit_tiny", {"frames_per_block": 0}, "dit cannot"),
        ("dit_tiny", {"num_blocks": 99}, "x.8"),
        ("tpp_tiny", {"timesteps": [1000.0]}, "tpp cannot"),
        ("tpp_tiny", {"clips": 0}, "nothing"),
    ],
)
def test_given_files_that_do_not_fit_are_refused_in_one_line(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], component: str, damage: dict[str, object],
    word: str,
) -> None:
    for path in (golden / component).iterdir():
        (tmp_path / path.name).symlink_to(path)
    meta = json.loads((tmp_path / "meta.json").read_text()) | damage
    (tmp_path / "meta.json").unlink()
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    name, out = component.removesuffix("_tiny"), tmp_path / "out.safetensors"
    flags = ["--weights", str(golden / "dit_tiny" / "weights.safetensors")]
    assert main(["golden", name, str(tmp_path), "--out", str(out), *flags]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and word in lines[0] and not out.exists()


def test_a_device_that_is_not_there_is_refused(golden: Path, tmp_path: Path) -> None:
    for device in ("foo", "cuda:99"):
        with pytest.raises(InputError, match=device.split(":")[0]):
            run("vae", golden / "vae_tiny", GoldenOptions(device=device))
