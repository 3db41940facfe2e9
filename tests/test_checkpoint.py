"""Checkpoints: the published layout, faults that are named, what inspect counts, LoRA merging, loading by copy."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from liverelay.engine.cli import main
from liverelay.engine.engine import Engine
from liverelay.engine.errors import CheckpointError, InputError, OutputError
from liverelay.engine.inspection import inspect_checkpoint
from liverelay.engine.make_checkpoint import make_checkpoint
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.lora import MergedSource
from liverelay.engine.models.sizes import PUBLISHED, dit_shapes
from liverelay.engine.models.text import text_shapes
from liverelay.engine.models.weights import open_pth, open_sharded

pytest.importorskip("transformers")
STEM, AUDIO, TOKENIZER = "diffusion_pytorch_model", "wav2vec2-large-xlsr-53-english", "google/umt5-xxl"
SHARDS = [f"{STEM}-{i:05d}-of-00002.safetensors" for i in (1, 2)]
INDEX, VAE_FILE, TEXT_FILE = f"{STEM}.safetensors.index.json", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
LORA, WEIGHTS = "LiveAvatar/liveavatar.safetensors", f"{AUDIO}/model.safetensors"
LAYOUT = {*SHARDS, INDEX, VAE_FILE, TEXT_FILE, LORA, WEIGHTS, "config.json", f"{AUDIO}/config.json"}
LAYOUT |= {f"{AUDIO}/preprocessor_config.json", f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/tokenizer_config.json"}
Numbers, Capture = np.random.Generator, pytest.CaptureFixture[str]


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def load(folder: Path) -> None:
    Engine.load(folder, device="cpu", dtype=torch.float32).encode_text("a person")


def test_made_checkpoint_has_the_published_layout_and_follows_the_seed(checkpoint: Path, tmp_path: Path) -> None:
    again, other = make_checkpoint(tmp_path / "again", seed=7), make_checkpoint(tmp_path / "other", seed=8)
    files = {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()}
    assert files >= LAYOUT and all(name.startswith(TOKENIZER) for name in files - LAYOUT)
    for name in (*SHARDS, LORA, WEIGHTS):
        first, second, third = ((folder / name).read_bytes() for folder in (checkpoint, again, other))
        assert first == second != third
    for name in (VAE_FILE, TEXT_FILE):
        mine, same = (torch.load(folder / name, weights_only=True) for folder in (again, checkpoint))
        assert list(mine) == list(same) and all(torch.equal(mine[key], same[key]) for key in mine)
    weight_map = json.loads((again / INDEX).read_text())["weight_map"]
    assert weight_map == {key: shard for shard in SHARDS for key in load_file(again / shard)}
    assert Engine.load(again, device="cpu").audio.num_states == 25
    assert {path.name for path in tmp_path.iterdir()} == {"again", "other"}


def test_make_checkpoint_refuses(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OutputError, match="exists already"):
        make_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"huge.*tiny"):
        make_checkpoint(tmp_path / "new", preset="huge")
    assert main(["make-checkpoint", "--out", str(tmp_path / "absent" / "new")]) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.txt"]


@pytest.mark.parametrize("largest_bytes", [100_000, 3_000_000], ids=["in the shards", "in the VAE"])
def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, largest_bytes: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            make_checkpoint(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)
    tensors = {key: value.clone() for key, value in state.items()}
    edit(tensors)
    torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path)


def harm(kind: str, path: Path, argument: str, numbers: Numbers) -> str:
    """Break one file; returns the word that the error has to say. argument: a key, the start of one, or content."""
    simple: dict[str, Callable[[], object]] = {
        "gone": lambda: shutil.rmtree(path) if path.is_dir() else path.unlink(),
        "text": lambda: path.write_text(argument or "not what it seems"),
        "cut": lambda: os.truncate(path, int(numbers.integers(path.stat().st_size))),
        "doubled": lambda: shutil.copy(path, path.with_name("another.safetensors")),
        "unknown": lambda: change(path, lambda tensors: tensors.update({argument: torch.ones(4, 128)})),
    }
    if kind in simple:
        simple[kind]()
        return argument if argument and kind != "text" else path.name
    source = open_pth(path) if path.suffix == ".pth" else load_file(path)
    key = str(numbers.choice([key for key in sorted(source) if key.startswith(argument)]))
    wide = {key: source[key].clone().unsqueeze(0)} if kind == "misshapen" else {}
    change(path, lambda tensors: tensors.pop(key) is None or tensors.update(wide))
    if kind == "lacking" and path.name in SHARDS:
        weight_map = json.loads((path.parent / INDEX).read_text())["weight_map"]
        (path.parent / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != key}}))
    return key.split(".lora_")[0].removesuffix(".weight")


DIT, TEXT, SOUND, Fault = "transformer", "text encoder", "audio encoder", tuple[str, str, str, str]
FAULTS: list[Fault] = [  # part that inspect names ("": the folder is refused as a whole), kind of fault, file, argument
    (DIT, "gone", SHARDS[1], ""), (DIT, "gone", INDEX, f"{STEM}.safetensors"), (DIT, "cut", SHARDS[0], ""),
    (DIT, "text", SHARDS[1], ""), (DIT, "text", "config.json", ""), (DIT, "text", "config.json", "5"),
    (DIT, "text", "config.json", '{"num_heads": "x", "audio_inject_layers": [0]}'), (DIT, "text", INDEX, ""),
    (DIT, "text", INDEX, '{"weight_map": ["a"]}'), (DIT, "lost though in the index", SHARDS[1], ""),
    (DIT, "lacking", SHARDS[0], ""), (DIT, "unknown", SHARDS[1], "blocks.1.more"), (DIT, "misshapen", SHARDS[0], ""),
    ("LoRA", "unknown", LORA, "blocks.9.ffn.0.lora_A.default.weight"), ("LoRA", "lacking", LORA, ""),
    ("LoRA", "unknown", LORA, "blocks.0.ffn.0.weight"), ("LoRA", "misshapen", LORA, ""), ("LoRA", "cut", LORA, ""),
    ("", "doubled", LORA, "holds 2 LoRA files"), ("", "gone", "config.json", ""), ("VAE", "gone", VAE_FILE, ""),
    ("VAE", "cut", VAE_FILE, ""), ("VAE", "text", VAE_FILE, ""), ("VAE", "lacking", VAE_FILE, "decoder."),
    ("VAE", "unknown", VAE_FILE, "decoder.more.weight"), (TEXT, "gone", TEXT_FILE, ""), (TEXT, "cut", TEXT_FILE, ""),
    (TEXT, "text", TEXT_FILE, ""), (TEXT, "lacking", TEXT_FILE, ""), ("tokenizer", "gone", TOKENIZER, ""),
    (SOUND, "gone", AUDIO, ""), (SOUND, "cut", WEIGHTS, ""), (SOUND, "text", f"{AUDIO}/config.json", "[]"),
    (SOUND, "unknown", WEIGHTS, "wav2vec2.more"), (SOUND, "misshapen", WEIGHTS, "wav2vec2.encoder.layers."),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=" ".join)
def test_a_fault_is_one_error_that_names_it(copy: Path, fault: Fault, numbers: Numbers, capsys: Capture) -> None:
    part, kind, file, argument = fault
    word = harm(kind, copy / file, argument, numbers)
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert main(["inspect", str(copy), "--size", "64x64"]) == 1
    assert word in "".join(capsys.readouterr())
    if part:
        report = inspect_checkpoint(copy, size=(64, 64))
        faulty = [each.name for each in report.parts if each.state in ("missing", "broken")]
        assert report.problems[0].startswith(f"{part}: ")
        assert faulty == [part] or part == DIT  # without it the LoRA cannot be judged


class Malicious:
    ran = False

    def __reduce__(self) -> tuple[object, ...]:
        return setattr, (Malicious, "ran", True)


@pytest.mark.parametrize("file", [VAE_FILE, TEXT_FILE])
def test_code_in_a_pickled_file_is_not_run(copy: Path, file: str) -> None:
    torch.save({"x": Malicious()}, copy / file)
    Malicious.ran = False
    with pytest.raises(CheckpointError, match=file):
        load(copy)
    assert "broken" in {part.state for part in inspect_checkpoint(copy, size=(64, 64)).parts}
    assert not Malicious.ran
    torch.load(copy / file, weights_only=False)
    assert Malicious.ran


def test_inspect_of_a_complete_checkpoint(checkpoint: Path, capsys: Capture) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    assert "complete" in capsys.readouterr().out.splitlines()[-1]
    assert main(["inspect", str(checkpoint), "--json", "--size", "128x64", "--dtype", "float32"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] and report["size"] == [128, 64] and not report["problems"]
    assert [part["state"] for part in report["parts"]] == ["ok"] * 6
    assert main(["inspect", str(checkpoint), "--size", "100x64"]) == 1 and "100x64" in capsys.readouterr().err
    assert main(["inspect", str(checkpoint), "--lora", "absent.st"]) == 1 and "absent.st" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="absent"):
        Engine.load(checkpoint, lora="absent.st", device="cpu")


def tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, ModuleType):
        parts = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for part in value if isinstance(value, list | tuple) else parts.values():
            yield from tensors_of(part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_figures_are_those_of_real_allocations(checkpoint: Path, dtype: torch.dtype) -> None:
    memory = inspect_checkpoint(checkpoint, size=(128, 64), dtype=str(dtype).removeprefix("torch.")).memory
    engine = Engine.load(checkpoint, device="cpu", dtype=dtype)
    geometry = Geometry(8, 16, engine.dit.config.head_dim)
    arena, workspace = engine.dit.make_arena(geometry), engine.dit.make_workspace(geometry)
    assert memory["arena_per_session_and_stage"] == arena.nbytes == sum(t.nbytes for t in tensors_of(arena))
    buffers = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_of(workspace)}
    assert len(buffers) == 19 and memory["workspace"] == sum(storage.nbytes() for storage in buffers.values())
    assert memory["text_per_session"] == sum(t.nbytes for t in tensors_of(engine.dit.make_text()))
    assert memory["transformer"] == sum(t.nbytes for t in tensors_of(engine.dit.weights))
    if dtype == torch.float32:  # on a CPU the VAE's stream is always float32
        assert memory["vae_cache_per_session"] == engine.vae.new_decoder(8, 16).nbytes


def test_parameters_of_the_published_sizes() -> None:
    dit = dit_shapes(PUBLISHED)
    text = text_shapes(256384, 4096, 10240, 64, 4096, 24)
    counts = [sum(map(math.prod, shapes.values())) for shapes in (dit, text)]
    assert counts == [16_295_755_609, 5_680_910_336] and len(dit) == 1260


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", [".weight", ".default.weight"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_lora_is_merged_with_one_rounding(numbers: Numbers, dtype: torch.dtype, prefix: str, tail: str) -> None:
    rows, columns, rank, alpha = (int(n) for n in numbers.integers(2, 40, 4))
    shapes = ((rows, columns), (rank, columns), (rows, rank))
    w, a, b = (torch.from_numpy(numbers.standard_normal(shape)).bfloat16() for shape in shapes)
    base = {"x.q.weight": w.to(dtype), "x.norm.weight": w[0].to(dtype)}
    source = MergedSource(base, {f"{prefix}x.q.lora_A{tail}": a, f"{prefix}x.q.lora_B{tail}": b}, alpha=float(alpha))
    w, a, b, scale = w.double(), a.double(), b.double(), alpha / rank
    exact, slack = w + scale * (b @ a), 1e-5 * (w.abs() + scale * (b.abs() @ a.abs()))
    merged, bound = source["x.q.weight"], torch.finfo(dtype).eps / 2 * exact.abs() + slack
    assert merged.dtype == dtype and bool(((merged.double() - exact).abs() <= bound).all())
    assert merged.untyped_storage().data_ptr() != base["x.q.weight"].untyped_storage().data_ptr()
    assert torch.equal(base["x.q.weight"].double(), w) and torch.equal(source["x.norm.weight"].double(), w[0])


def test_the_engine_merges_the_lora_that_it_finds(checkpoint: Path) -> None:
    base, lora = open_sharded(checkpoint)["blocks.1.ffn.0.weight"].float(), load_file(checkpoint / LORA)
    merged, plain = (Engine.load(checkpoint, lora=name, device="cpu").dit.weights for name in (None, "none"))
    a, b = (lora[f"blocks.1.ffn.0.lora_{side}.default.weight"].float() for side in "AB")
    assert torch.equal(merged.layers[1].ffn_in.weight, (base + 64 / a.shape[0] * (b @ a)).bfloat16().float())
    assert torch.equal(plain.layers[1].ffn_in.weight, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_that_is_loaded_depends_on_the_files_any_more(copy: Path, dtype: torch.dtype) -> None:
    engine = Engine.load(copy, lora="none", device="cpu", dtype=dtype)
    parts = {"DiT": engine.dit.weights, "VAE": engine.vae, "audio": list(engine.audio._model.parameters())}
    held = {name: list(tensors_of(part)) for name, part in parts.items()}
    before = {name: [tensor.clone() for tensor in tensors] for name, tensors in held.items()}
    for path in (copy / name for name in (*SHARDS, VAE_FILE, WEIGHTS)):
        with open(path, "r+b") as file:  # in place: a view of the mapped file would see it
            file.write(b"\x3f" * path.stat().st_size)
    assert not [name for name in held if not all(map(torch.equal, held[name], before[name]))]
