"""Runs and folders of the training programs that are damaged, stopped or somebody else's: one line, nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill import data, pretrain
from distill.data import Examples, write
from distill.export import export
from distill.run import DISTILLED, STUDENT, Average, Run, load_average, load_run
from distill.toon import DIT, VAE
from distill.video_dit import VideoDiT
from distill.video_vae import VideoVAE
from liverelay.engine.errors import CheckpointError, InputError, LiveRelayError, OutputError
from tests.test_distill_training import RECIPE, examples, teach

__all__ = ["examples"]


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    for damage in ("", "no state", [1], {"model": 3, "average": {}, "step": 1, "seconds": 1.0}, {"step": 1}):
        if isinstance(damage, str):
            (tmp_path / "state.pt").write_text(damage)
        else:
            torch.save(damage, tmp_path / "state.pt")
        with pytest.raises(CheckpointError, match="damaged, or no state of a training run"):
            load_average(tmp_path)


def test_a_loss_that_is_no_number_ends_a_run_before_it_is_saved(examples: Examples, tmp_path: Path) -> None:
    teacher = teach(examples, tmp_path / "teacher")
    before = (teacher / "state.pt").read_bytes()
    with pytest.raises(LiveRelayError, match="lower --rate"):
        pretrain.train(examples, teacher, replace(RECIPE, steps=40, rate=1e30))
    assert (teacher / "state.pt").read_bytes() == before


def test_the_log_of_a_killed_run_has_each_step_once(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    first, again = (Run(tmp_path, "a test", minutes=5, seed=0) for _ in range(2))
    first.keep(model=model, average=Average(model, 0.9))
    for first.step in (1, 2):
        first.log(loss=1.0)
    first.save()
    first.step = 3
    first.log(loss=2.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "sec')
    again.keep(model=model, average=Average(model, 0.9))
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_a_folder_has_one_program_at_a_time(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from distill.run import Run; "
        f"run = Run(Path({str(tmp_path)!r}), 'x', minutes=1, seed=0); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another program trains in"):
            Run(tmp_path, "a test", minutes=5, seed=0)
        other.kill()
    Run(tmp_path, "a test", minutes=5, seed=0)


def test_ctrl_c_keeps_the_averaged_weights(examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Average.update

    def stopping(self: Average, model: torch.nn.Module, step: int) -> None:
        update(self, model, step)
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(Average, "update", stopping)
    try:
        with pytest.raises(KeyboardInterrupt):
            teach(examples, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    kept = load_file(tmp_path / "run" / "average.safetensors")
    for name, weight in load_average(tmp_path / "run").items():
        assert torch.equal(kept[name], weight.bfloat16()), name


def test_a_data_folder_is_not_taken_for_what_it_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("prompts.json", "thesis.txt"):
        (folder / name).write_text("mine")
    with pytest.raises(OutputError, match="holds more than such data"):
        write(VideoVAE(VAE), folder, range(1))
    assert (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("prompts", ["5", "[", "[1]", "{}", "[]"])
def test_a_damaged_data_folder_is_one_line(tmp_path: Path, prompts: str) -> None:
    for name, shape in data.SHAPES.items():
        np.save(tmp_path / f"{name}.npy", np.zeros((1, *shape), np.float16))
    (tmp_path / "prompts.json").write_text('["a red shirt"]')
    assert len(Examples.open(tmp_path)) == 1
    (tmp_path / "prompts.json").write_text(prompts)
    with pytest.raises(CheckpointError, match="is not whole"):
        Examples.open(tmp_path)


def test_a_checkpoint_is_written_beside_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    dit, vae = VideoDiT(DIT).state_dict(), VideoVAE(VAE).state_dict()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="is no checkpoint"):
        export(dit, vae, tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    for _ in range(2):  # new, and in the place of an older one
        export(dit, vae, tmp_path / "new")
        (tmp_path / "new" / "README.md").write_text("kept")
    found = load_file(tmp_path / "new" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == dit.keys() and (tmp_path / "new" / "README.md").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "new"}


def test_a_run_of_another_model_is_not_exported(tmp_path: Path) -> None:
    model = VideoVAE(VAE)
    run = Run(tmp_path, "a VAE", minutes=5, seed=0)
    run.keep(model=model, average=Average(model, 0.9))
    run.save()
    with pytest.raises(InputError, match="holds a run of a VAE, not of a distilled student or"):
        load_run(VideoDiT(DIT), tmp_path, DISTILLED, STUDENT)
