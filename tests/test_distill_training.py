"""The training programs: they go on where they stopped, change what they should and nothing else, and learn."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import data, dmd, pretrain, sample, train_vae
from distill.data import LATENTS, Examples, write
from distill.dmd import matching_loss, whole
from distill.flow import flow_loss, many_steps, mixed
from distill.identity import Identity
from distill.motion import neutral
from distill.muon import Optimisers, orthogonal
from distill.portrait import render
from distill.pretrain import noise_levels, random_span, sequences
from distill.run import Average, Recipe, Run, cosine, load_average, load_into
from distill.toon import BANDS, DIT, VAE
from distill.video_dit import Condition, Span, VideoDiT
from distill.video_vae import VideoVAE
from liverelay.engine.errors import CheckpointError, InputError

RECIPE = Recipe(steps=4, minutes=5, batch=2, rate=1e-3, seed=3)


@pytest.fixture
def examples(numbers: np.random.Generator) -> Examples:
    """Random arrays in the form of a data folder, of pictures of 64x64."""

    def random(*shape: int) -> np.ndarray:
        return numbers.standard_normal(shape).astype(np.float16)

    text = torch.from_numpy(random(4, DIT.text_len, DIT.text_dim)).float()
    return Examples(random(4, 16, LATENTS, 8, 8), random(4, 16, 7, 8, 8), random(4, BANDS, 4 * LATENTS), text)


@pytest.fixture
def clips(numbers: np.random.Generator) -> np.ndarray:
    """Flat squares that slide over flat backgrounds, uint8 [N, T, H, W, 3]."""
    video = np.empty((4, 17, 128, 128, 3), np.uint8)
    video[:] = numbers.integers(0, 256, (4, 1, 1, 1, 3))
    for n in range(4):
        left, top, colour = numbers.integers(0, 60), numbers.integers(0, 90), numbers.integers(0, 256, 3)
        for t in range(17):
            video[n, t, top : top + 30, left + 2 * t : left + 2 * t + 30] = colour
    return video


def weights_of(folder: Path) -> Tensor:
    return torch.cat([weight.flatten() for weight in load_average(folder).values()])


def teach(examples: Examples, out: Path, begin: Path | None = None) -> Path:
    pretrain.train(examples, out, RECIPE, begin)
    return out


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(
    examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = teach(examples, tmp_path / "straight")
    whole_run = Run.steps

    def two(self: Run, until: int, *finish: Any) -> object:
        return whole_run(self, min(until, self.step + 2), *finish)

    monkeypatch.setattr(Run, "steps", two)
    for _ in range(2):
        teach(examples, tmp_path / "cut")
    assert torch.equal(weights_of(straight), weights_of(tmp_path / "cut"))


def test_a_folder_goes_on_with_what_it_holds_only(examples: Examples, tmp_path: Path) -> None:
    teacher = teach(examples, tmp_path / "teacher")
    before = (teacher / "state.pt").read_bytes()
    for begin in (teacher, tmp_path / "absent"):
        with pytest.raises(InputError, match="a run of a bidirectional teacher, not of a causal student"):
            teach(examples, teacher, begin)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "state.pt").write_bytes(before[: len(before) // 2])
    with pytest.raises(CheckpointError, match="cut"):
        load_average(tmp_path / "cut")
    assert (teacher / "state.pt").read_bytes() == before


def test_a_run_of_another_version_is_one_line(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    run = Run(tmp_path, "a test", minutes=5, seed=0)
    run.keep(model=model, average=Average(model, 0.9), optimiser=torch.optim.AdamW(model.parameters()))
    run.save()
    for part in ({"model": torch.nn.Linear(2, 3)}, {"optimiser": Optimisers(model, 1e-3, ("weight",))}):
        with pytest.raises(CheckpointError, match="another version"):
            Run(tmp_path, "a test", minutes=5, seed=0).keep(**part)


def test_weights_of_another_model_are_one_line(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors has no weights for this model"):
        load_into(VideoVAE(VAE), tmp_path / "other.safetensors")


def test_an_interrupt_ends_training_after_a_step_and_saves_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    run, model = Run(tmp_path, "a test", minutes=5, seed=0), torch.nn.Linear(1, 1)
    run.keep(model=model, average=Average(model, 0.9))
    with pytest.raises(KeyboardInterrupt):
        for step in run.steps(100):
            if step == 2:
                signal.raise_signal(signal.SIGINT)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_data_that_was_interrupted_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VideoVAE(VAE).requires_grad_(False)
    write(vae, tmp_path / "data", range(1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    monkeypatch.setattr(data, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(vae, tmp_path / "data", range(2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (tmp_path / "data" / "prompts.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not whole"):
        Examples.open(tmp_path / "data")


def test_a_causal_student_begins_with_its_teachers_weights(examples: Examples, tmp_path: Path) -> None:
    teacher = teach(examples, tmp_path / "teacher")
    pretrain.train(examples, tmp_path / "s", replace(RECIPE, steps=0), teacher)
    assert torch.equal(weights_of(teacher), weights_of(tmp_path / "s"))
    pretrain.train(examples, tmp_path / "t", replace(RECIPE, steps=0), None, teacher / "average.safetensors")
    assert torch.equal(weights_of(teacher).bfloat16().float(), weights_of(tmp_path / "t"))


def test_distillation_changes_student_and_fake_score_and_leaves_the_teacher(examples: Examples, tmp_path: Path) -> None:
    teacher = teach(examples, tmp_path / "teacher")
    student = teach(examples, tmp_path / "student", teacher)
    before = (teacher / "state.pt").read_bytes()
    dmd.train(examples, tmp_path / "dmd", replace(RECIPE, steps=1), teacher, student)
    state = torch.load(tmp_path / "dmd" / "state.pt", weights_only=True)
    for part in ("model", "fake"):
        begun = load_average(teacher if part == "fake" else student)
        changed = [not torch.equal(state[part][name], weight) for name, weight in begun.items()]
        assert sum(changed) > 200, part
    assert (teacher / "state.pt").read_bytes() == before
    for swapped in ((student, student), (teacher, teacher)):
        with pytest.raises(InputError, match=r"holds a run of a .*, not of"):
            dmd.train(examples, tmp_path / "other", RECIPE, *swapped)


def test_the_student_follows_the_difference_of_the_scores(examples: Examples, numbers: np.random.Generator) -> None:
    """Scores that are sure of one video each: the gradient points from the teacher's to the fake one's."""
    span = random_span(numbers, 2, True)
    given = sequences(examples, numbers, 2, span)
    real, ours = torch.randn_like(given.latents), torch.randn_like(given.latents)
    sigma = torch.from_numpy(numbers.uniform(0.1, 0.9, 2).astype(np.float32))

    def sure(video: Tensor) -> object:
        return lambda noisy, *_: (noisy - video) / sigma.view(-1, 1, 1, 1, 1)

    clean = torch.randn_like(real).requires_grad_()
    matching_loss(clean, sure(real), sure(ours), given, whole(span), sigma).backward()  # type: ignore[arg-type]
    direction = (ours - real) / (clean.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(clean.grad, direction / clean.numel(), rtol=1e-3, atol=1e-7)


def test_many_steps_along_a_straight_flow_reach_the_clean_latents(rng: torch.Generator) -> None:
    clean, noise = (torch.randn(2, 16, 3, 8, 8, generator=rng) for _ in range(2))
    nothing, span = Condition(*(torch.empty(0),) * 4), Span(torch.zeros(2), torch.zeros(2, 1))
    out = many_steps(lambda *_: noise - clean, noise, nothing, span, 7)  # type: ignore[arg-type]
    torch.testing.assert_close(out, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed(clean, noise, torch.tensor([0.0, 1.0]))[1], noise[1])


@pytest.mark.parametrize("number", range(2))
def test_the_vae_learns_a_clip(number: int) -> None:
    """Fixed clips, since how fast depends on the colours: of five that were tried the loss fell to 0.26..0.78."""
    colours = np.random.default_rng(number).integers(60, 200, (2, 3))
    clip = np.empty((1, 9, 64, 64, 3), np.uint8)
    clip[:] = colours[0]
    for t in range(9):
        clip[0, t, 10:40, 2 * t : 2 * t + 30] = colours[1]
    torch.manual_seed(number)
    model = VideoVAE(VAE)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    video = train_vae.crops(clip, np.random.default_rng(number), batch=1, frames=9, size=64)
    losses = []
    for _ in range(40):
        loss, _, _ = train_vae.loss_of(model, video, torch.zeros(1, 16, 3, 8, 8))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), losses


def test_half_of_the_small_pieces_hold_the_whole_mouth(numbers: np.random.Generator) -> None:
    still, opening = neutral(9), np.linspace(0, 1, 9)
    people = [render(Identity.random(numbers), still.with_mouth(opening, 0 * opening)) for _ in range(20)]
    whole = train_vae.near_mouth(data.video(np.stack(people)))
    assert whole.amax(dim=(1, 3, 4))[:, 0].eq(0).all()  # shut
    assert whole.amax(dim=(1, 3, 4))[:, 2:].eq(1).all()
    assert whole.mean() < 0.02
    kept = []
    for video, mask in zip(people, whole, strict=True):
        piece = train_vae.crops(video[None], numbers, batch=10, frames=9, size=64)
        kept += (train_vae.near_mouth(piece).sum(dim=(1, 2, 3, 4)) == mask.sum()).tolist()
    assert 0.3 < np.mean(kept) < 0.9  # 200 pieces: half of them, and some of the others


def test_pictures_come_first_and_both_kinds_are_trained_on(clips: np.ndarray, tmp_path: Path) -> None:
    train_vae.train(clips, tmp_path, train_vae.Plan(images=1, steps=2, minutes=5, seed=1))
    assert [train_vae.piece(step, 1)["frames"] for step in range(2)] == [1, 17]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2


def test_training_begins_with_finished_weights(clips: np.ndarray, tmp_path: Path) -> None:
    train_vae.train(clips, tmp_path / "first", train_vae.Plan(images=1, steps=1, minutes=5, seed=1))
    finished = train_vae.finish(tmp_path / "first", clips)
    train_vae.train(clips, tmp_path / "next", train_vae.Plan(images=0, steps=0, minutes=5, seed=2, start=finished))
    want = torch.cat([weight.float().flatten() for weight in load_file(finished).values()])
    got = torch.load(tmp_path / "next" / "state.pt", weights_only=True)["model"]
    assert torch.equal(torch.cat([got[name].flatten() for name in load_file(finished)]), want)


def test_a_decoder_is_trained_alone_and_its_latents_stay(clips: np.ndarray, tmp_path: Path) -> None:
    train_vae.train(clips, tmp_path / "first", train_vae.Plan(images=1, steps=1, minutes=5, seed=1))
    start = load_file(train_vae.finish(tmp_path / "first", clips))
    train_vae.train(clips, tmp_path / "next", train_vae.Plan(images=0, steps=1, minutes=5, seed=2,
                    rate=0.5, start=tmp_path / "first" / "vae.safetensors", decoder_only=True))  # fmt: skip
    done = load_file(train_vae.finish(tmp_path / "next", clips, whitened=False))
    changed = {name.split(".")[0] for name in done if not torch.equal(done[name], start[name])}
    assert changed == {"decoder", "conv2"}


@torch.no_grad()
def test_whitened_latents_give_the_same_video(clips: np.ndarray) -> None:
    model = VideoVAE(VAE).requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    video = train_vae.crops(clips, np.random.default_rng(0), batch=1, frames=17, size=128)
    before = model.decode(model.encode(video))
    train_vae.whiten(model, clips)
    torch.testing.assert_close(model.decode(model.encode(video)), before, rtol=1e-3, atol=1e-3)
    codes = torch.cat([
        model.encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1)[0, :, 1:].flatten(1)
        for clip in clips
    ], dim=1)  # fmt: skip
    assert float(codes.mean(1).abs().max()) < 0.05 and float((codes.std(1) - 1).abs().max()) < 0.05


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_an_orthogonal_update_has_equal_singular_values(shape: tuple[int, int], rng: torch.Generator) -> None:
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=rng), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.2, 1, len(s))) @ v  # by chance one value may be nearly 0, and stays so
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3, values
    assert float((orthogonal(matrix) * matrix).sum()) > 0


def test_places_that_move_more_weigh_more(examples: Examples, numbers: np.random.Generator) -> None:
    still = examples.latents[:, :, :1].repeat(LATENTS, axis=2)
    still[..., 2, 3] = examples.latents[..., 2, 3]
    places = replace(examples, latents=still).liveliness()
    assert int(places.argmax()) == 2 * 8 + 3 and float(places.min()) == pytest.approx(0.5)
    clean, sigma = torch.randn(1, 1, 1, 8, 8), torch.tensor([0.5])
    losses = []
    for at in ((2, 3), (0, 0)):

        def model(noisy: Tensor, *_: object, at: tuple[int, int] = at) -> Tensor:
            flow = 2 * (noisy - clean)  # the right one for sigma 0.5, wrong at one place
            flow[..., at[0], at[1]] += 1
            return flow

        losses.append(float(flow_loss(model, clean, sigma, None, None, places)))  # type: ignore[arg-type]
    assert losses[0] > 5 * losses[1]


def test_training_computes_where_it_is_told(
    examples: Examples, numbers: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which refuses tensors of the CPU: everything that a step makes lies on one device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know that device
    torch.set_default_device("meta")
    try:
        student = VideoDiT(DIT)
        for causal in (False, True):
            span = random_span(numbers, 2, causal)
            given = sequences(examples, numbers, 2, span)
            flow_loss(student, given.latents, noise_levels(numbers, 2, causal), given.condition, span).backward()
        clean = dmd.sample(student, numbers, given, span)
        sigma = noise_levels(numbers, 2, False)
        matching_loss(clean, student, student, given, whole(span), sigma).backward()
    finally:
        torch.set_default_device(None)
    assert student.head.head.weight.grad is not None


def test_training_draws_grids_of_what_it_has_learned(
    examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(sample.Grids.__init__, "__defaults__", (1, 0))  # of one clip
    weights = {name: weight.contiguous() for name, weight in VideoVAE(VAE).state_dict().items()}
    save_file(weights, tmp_path / "vae.safetensors")
    recipe = replace(RECIPE, steps=2, vae=tmp_path / "vae.safetensors", grid_every=2)
    pretrain.train(examples, tmp_path / "run", recipe, teach(examples, tmp_path / "teacher"))
    picture = np.array(image.open(tmp_path / "run" / "grid-2.png"))
    assert picture.shape == (2 * 128, 10 * 128, 3) and not (tmp_path / "run" / "grid-1.png").exists()
    assert not np.array_equal(picture[:128, 128:], picture[128:, 128:])  # the truth, and below it the model's


def test_an_average_follows_its_model() -> None:
    model = torch.nn.Linear(2, 2)
    average = Average(model, 0.9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0)
    for step in range(200):
        average.update(model, step)
    torch.testing.assert_close(next(average.buffers()), torch.ones(2, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("program", ["pretrain", "dmd", "data", "sample", "export"])
def test_a_missing_file_is_one_line(program: str, tmp_path: Path) -> None:
    arguments = {
        "pretrain": ["--data", "absent"], "dmd": ["--data", "absent", "--teacher", "absent", "--student", "absent"],
        "data": ["--vae", "absent"], "sample": ["--run", "absent", "--vae", "absent"],
        "export": ["--dit", "absent", "--vae", "absent"],
    }[program]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", f"distill.{program}", *arguments, "--out", str(tmp_path / "out.png")],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 1 and "absent" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not any(tmp_path.iterdir())


def test_the_rate_rises_and_falls() -> None:
    factors = [cosine(step, 1000) for step in range(1000)]
    assert max(factors) == pytest.approx(1, abs=1e-3) and factors[0] < 0.02 and factors[-1] < 0.06
    assert factors.index(max(factors)) in range(95, 110)
