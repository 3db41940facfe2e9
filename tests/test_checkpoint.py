"""Checkpoints: the published layout, faults that are named, what inspect counts, LoRA merging, loading by copy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from liverelay.engine.cli import main
from liverelay.engine.config import DiTConfig
from liverelay.engine.engine import Engine
from liverelay.engine.errors import CheckpointError, InputError, OutputError
from liverelay.engine.inspection import inspect_checkpoint
from liverelay.engine.make_checkpoint import make_checkpoint
from liverelay.engine.models.dit import DiT, Workspace
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.lora import MergedSource
from liverelay.engine.models.text import text_shapes
from liverelay.engine.models.vae import VAE
from liverelay.engine.models.weights import dit_shapes, open_pth, open_sharded

pytest.importorskip("transformers", reason="transformers is not installed")

STEM, AUDIO = "diffusion_pytorch_model", "wav2vec2-large-xlsr-53-english"
SHARDS = [f"{STEM}-{i:05d}-of-00002.safetensors" for i in (1, 2)]
INDEX, VAE_FILE, TEXT_FILE = f"{STEM}.safetensors.index.json", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
LORA = "LiveAvatar/liveavatar.safetensors"
LAYOUT = {
    "config.json", *SHARDS, INDEX, VAE_FILE, TEXT_FILE, LORA,
    "google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json",
    f"{AUDIO}/config.json", f"{AUDIO}/preprocessor_config.json", f"{AUDIO}/model.safetensors",
}  # fmt: skip
Numbers = np.random.Generator


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def load(folder: Path, lora: Path | None = None) -> Engine:
    """Everything that is ever read of a checkpoint, the text encoder included."""
    engine = Engine.load(folder, lora=lora, device="cpu", dtype=torch.float32)
    engine.encode_text("a person")
    return engine


def test_made_checkpoint_has_the_published_layout_and_follows_the_seed(checkpoint: Path, tmp_path: Path) -> None:
    again, other = make_checkpoint(tmp_path / "again", seed=7), make_checkpoint(tmp_path / "other", seed=8)
    assert {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()} >= LAYOUT
    for name in (*SHARDS, LORA, f"{AUDIO}/model.safetensors"):
        assert (again / name).read_bytes() == (checkpoint / name).read_bytes()
        assert (again / name).read_bytes() != (other / name).read_bytes()
    for name in (VAE_FILE, TEXT_FILE):
        mine, same = (torch.load(folder / name, weights_only=True) for folder in (again, checkpoint))
        assert list(mine) == list(same) and all(torch.equal(mine[key], same[key]) for key in mine)
    index = json.loads((again / INDEX).read_text())
    for shard in SHARDS:
        with safe_open(again / shard, "pt") as file:
            assert set(file.keys()) == {key for key, name in index["weight_map"].items() if name == shard}
    assert Engine.load(again, device="cpu", dtype=torch.float32).audio.num_states == 25
    assert {path.name for path in tmp_path.iterdir()} == {"again", "other"}


def test_make_checkpoint_refuses(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="full"):
        make_checkpoint(tmp_path / "full")
    with pytest.raises(InputError, match="huge.*tiny"):
        make_checkpoint(tmp_path / "new", preset="huge")
    assert main(["make-checkpoint", "--out", str(tmp_path / "absent" / "new")]) == 1
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["full", "full/mine.txt"]


@pytest.mark.parametrize("largest_bytes", [100_000, 3_000_000], ids=["in the shards", "in the VAE"])
def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, largest_bytes: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, hard))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            make_checkpoint(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


# -- faults ----------------------------------------------------------------------------------------------------------


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a weight file with some of its tensors changed."""
    state = torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)
    tensors = {key: value.clone() for key, value in state.items()}
    edit(tensors)
    torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path)


def truncated(name: str) -> Callable[[Path, Numbers], str]:
    def harm(folder: Path, numbers: Numbers) -> str:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(numbers.integers(0, len(content)))])
        return name

    return harm


def removed(name: str, word: str | None = None) -> Callable[[Path, Numbers], str]:
    def harm(folder: Path, numbers: Numbers) -> str:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return word or name

    return harm


def text(name: str, content: str = "not what it seems") -> Callable[[Path, Numbers], str]:
    def harm(folder: Path, numbers: Numbers) -> str:
        (folder / name).write_text(content)
        return name

    return harm


def lacking(name: str, *, in_index: bool = False) -> Callable[[Path, Numbers], str]:
    """One key is gone from the file; the index of shards goes on naming it or not."""

    def harm(folder: Path, numbers: Numbers) -> str:
        lost: list[str] = []
        change(folder / name, lambda t: t.pop(lost.append(str(numbers.choice(sorted(t)))) or lost[0]))
        if name in SHARDS and not in_index:
            index = json.loads((folder / INDEX).read_text())
            del index["weight_map"][lost[0]]
            (folder / INDEX).write_text(json.dumps(index))
        return lost[0]

    return harm


def unknown(name: str, key: str) -> Callable[[Path, Numbers], str]:
    def harm(folder: Path, numbers: Numbers) -> str:
        change(folder / name, lambda t: t.update({key: torch.ones(4, 128)}))
        return key

    return harm


def misshapen(name: str) -> Callable[[Path, Numbers], str]:
    def harm(folder: Path, numbers: Numbers) -> str:
        with_prefix = [key for key in load_file(folder / name) if not key.startswith("lm_head")]
        key = str(numbers.choice(with_prefix))
        change(folder / name, lambda t: t.update({key: t[key].unsqueeze(0)}))
        return key

    return harm


def second_lora(folder: Path, numbers: Numbers) -> str:
    shutil.copy(folder / LORA, folder / "LiveAvatar" / "another.safetensors")
    return "holds 2 LoRA files"


FOREIGN = "blocks.9.ffn.0.lora_A.default.weight"
FAULTS: dict[str, tuple[str, Callable[[Path, Numbers], str]]] = {
    "shard gone": ("transformer", removed(SHARDS[1])),
    "index gone": ("transformer", removed(INDEX, f"{STEM}.safetensors")),
    "config gone": ("", removed("config.json")),
    "shard cut": ("transformer", truncated(SHARDS[0])),
    "shard is text": ("transformer", text(SHARDS[1])),
    "config is text": ("transformer", text("config.json")),
    "config is a number": ("transformer", text("config.json", "5")),
    "config has no number of heads": ("transformer", text("config.json", '{"num_heads": "x"}')),
    "index is text": ("transformer", text(INDEX)),
    "index has no table": ("transformer", text(INDEX, '{"weight_map": ["a"]}')),
    "index names a lost key": ("transformer", lacking(SHARDS[1], in_index=True)),
    "key lacks": ("transformer", lacking(SHARDS[0])),
    "key unknown": ("transformer", unknown(SHARDS[1], "blocks.1.surprise")),
    "key misshapen": ("transformer", misshapen(SHARDS[0])),
    "LoRA foreign": ("LoRA", unknown(LORA, FOREIGN)),
    "LoRA key of another kind": ("LoRA", unknown(LORA, "blocks.0.ffn.0.weight")),
    "LoRA half": ("LoRA", lacking(LORA)),
    "LoRA misshapen": ("LoRA", misshapen(LORA)),
    "LoRA cut": ("LoRA", truncated(LORA)),
    "LoRA twice": ("", second_lora),
    "VAE gone": ("VAE", removed(VAE_FILE)),
    "VAE cut": ("VAE", truncated(VAE_FILE)),
    "VAE is text": ("VAE", text(VAE_FILE)),
    "VAE key lacks": ("VAE", lacking(VAE_FILE)),
    "VAE key unknown": ("VAE", unknown(VAE_FILE, "decoder.surprise.weight")),
    "text gone": ("text encoder", removed(TEXT_FILE)),
    "text cut": ("text encoder", truncated(TEXT_FILE)),
    "text is text": ("text encoder", text(TEXT_FILE)),
    "text key lacks": ("text encoder", lacking(TEXT_FILE)),
    "tokenizer gone": ("tokenizer", removed("google/umt5-xxl")),
    "tokenizer is text": ("tokenizer", text("google/umt5-xxl/tokenizer.json")),
    "audio gone": ("audio encoder", removed(AUDIO)),
    "audio cut": ("audio encoder", truncated(f"{AUDIO}/model.safetensors")),
    "audio config is a list": ("audio encoder", text(f"{AUDIO}/config.json", "[]")),
    "audio key unknown": ("audio encoder", unknown(f"{AUDIO}/model.safetensors", "wav2vec2.surprise")),
    "audio key misshapen": ("audio encoder", misshapen(f"{AUDIO}/model.safetensors")),
}
