"""Small checkpoints: tables as safetensors, a log-mel front end, bundled ones by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from liverelay.engine import checkpoint as checkpoints
from liverelay.engine import make_checkpoint
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


def with_video_size(folder: Path, value: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"video_size": value}))
    return folder


def test_a_model_of_one_size_makes_that_size_unless_another_is_asked_for(copy: Path) -> None:
    engine = Engine.load(with_video_size(copy, [128, 64]), device="cpu")
    picture = np.zeros((300, 200, 3), np.uint8)
    for asked, size in (({}, (128, 64)), ({"size": (64, 64)}, (64, 64)), ({"max_area": 64 * 64}, (64, 64))):
        with engine.open(picture, **asked) as session:
            assert session.size == size


@pytest.mark.parametrize("value", [[128], "128x128", [100, 128], [True, 128], [-64, 64]])
def test_a_size_that_cannot_be_is_refused(copy: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="video_size"):
        Engine.load(with_video_size(copy, value), device="cpu")


def test_a_bundled_checkpoint_is_copied(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checkpoints, make_checkpoint):
        monkeypatch.setattr(module, "BUNDLED", copy.parent)
    assert main(["make-checkpoint", "--preset", "small", "--out", str(tmp_path / "random")]) == 0
    assert main(["make-checkpoint", "--preset", "other", "--out", str(tmp_path / "new")]) == 1
    copy.rename(copy.parent / "talker")
    assert main(["make-checkpoint", "--preset", "talker", "--out", str(tmp_path / "new")]) == 0
    for path in (tmp_path / "talker").rglob("*.safetensors"):
        assert (tmp_path / "new" / path.relative_to(tmp_path / "talker")).read_bytes() == path.read_bytes()
