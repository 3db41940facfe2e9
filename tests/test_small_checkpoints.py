"""Small checkpoints: tables as safetensors, a log-mel front end, bundled ones by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from liverelay.engine import checkpoint as checkpoints
from liverelay.engine.checkpoint import find_checkpoint
from liverelay.engine.cli import main
from liverelay.engine.engine import Engine
from liverelay.engine.errors import CheckpointError
from liverelay.engine.models.log_mel import LogMel
from liverelay.engine.models.weights import open_pth, save_tensors

pytest.importorskip("transformers")
TABLES = ("Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose pickled tables are safetensors."""
    folder = shutil.copytree(checkpoint, tmp_path / "small")
    for stem in TABLES:
        save_tensors(folder / f"{stem}.safetensors", open_pth(folder / f"{stem}.pth"))
        (folder / f"{stem}.pth").unlink()
    return folder


def frames(folder: Path | str) -> np.ndarray:
    engine = Engine.load(folder, device="cpu")
    with engine.open(np.zeros((64, 64, 3), np.uint8), "a person", audio=np.ones(8000, np.float32) / 9) as session:
        return np.concatenate([chunk.frames for chunk in session.frames()])


def test_tables_as_safetensors_give_the_same_video(copy: Path, checkpoint: Path) -> None:
    assert np.array_equal(frames(copy), frames(checkpoint))
    assert main(["inspect", str(copy), "--size", "64x64"]) == 0


def test_a_truncated_table_is_named(copy: Path) -> None:
    path = copy / f"{TABLES[0]}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=TABLES[0]):
        Engine.load(copy, device="cpu")


def test_a_bundled_checkpoint_is_found_by_its_name_unless_a_folder_has_it(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "BUNDLED", copy.parent)
    monkeypatch.chdir(tmp_path.parent)
    assert find_checkpoint(Path("small")).folder == copy
    with pytest.raises(CheckpointError, match="other is not a folder"):
        find_checkpoint(Path("other"))
    Path("small").mkdir()
    with pytest.raises(CheckpointError, match=r"small does not hold config\.json"):
        find_checkpoint(Path("small"))


def test_a_transformer_is_held_to_its_front_end(copy: Path) -> None:
    audio = copy / "wav2vec2-large-xlsr-53-english"
    shutil.rmtree(audio)
    audio.mkdir()
    (audio / "config.json").write_text(json.dumps({"model_type": "log_mel", "bands": 40}))
    assert LogMel.load(audio, dtype=torch.float32).width == 40
    with pytest.raises(CheckpointError, match="1 states of width 40"):
        Engine.load(copy, device="cpu")
    assert main(["inspect", str(copy), "--size", "64x64"]) == 0
