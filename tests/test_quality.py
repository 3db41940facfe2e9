"""The measures of talking models are right where the answer is known: perfect videos, spoilt ones, random weights."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import quality, quality_clips, quality_pictures, quality_rollout, quality_stream, quality_tables
from bench import quality_measures as measures
from bench.quality_measures import Array
from bench.quality_rollout import VARIANTS, Rollout
from bench.quality_stream import Live, Truth, Watch, Who, summary, table_of, voice
from distill.clips import Clip, clip
from distill.data import BEFORE, FRAMES, LATENTS, features
from distill.measure import identity_features, mouth_opening
from distill.motion import RATE
from liverelay.engine import Engine

Numbers = np.random.Generator


@pytest.fixture
def clips(numbers: Numbers) -> list[Clip]:
    first = int(numbers.integers(1 << 20))
    return [clip(first + i, 100, held_out=True) for i in range(6)]


@pytest.fixture
def openings(seed: int) -> list[Array]:
    """Of speech."""
    return [opening for _, opening in itertools.islice(voice(seed), 6)]


@pytest.fixture(scope="session")
def toon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's checkpoint with random weights, and beside it a teacher's run."""
    pytest.importorskip("transformers")
    from distill.export import export
    from distill.run import TEACHER, Average
    from distill.toon import DIT, VAE
    from distill.video_dit import VideoDiT
    from distill.video_vae import VideoVAE

    torch.manual_seed(5)
    folder, dit, vae = tmp_path_factory.mktemp("toon"), VideoDiT(DIT), VideoVAE(VAE)
    for model in (dit, vae):
        for weight in model.parameters():
            if not weight.detach().any():  # what training begins with shows nothing
                weight.data.normal_(std=0.05)
    state = {"model": dit.state_dict(), "average": Average(dit, 0.9).state_dict(), "step": 1, "seconds": 1.0}
    torch.save(state | {"kind": TEACHER}, folder / "state.pt")
    export(dit.state_dict(), vae.state_dict(), folder / "checkpoint")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos of 64x64, to be quick."""
    for module in (quality_stream, quality_clips, quality_rollout):
        monkeypatch.setattr(module, "SIZE", (64, 64))


# -- controls ----------------------------------------------------------------------------------------------------------


def test_perfect_videos_are_in_sync_and_other_sound_is_not(clips: list[Clip]) -> None:
    for control in quality_clips.CONTROLS.values():
        seen = [mouth_opening(control(one)) for one in clips]
        found = measures.lip_sync(seen, [one.motion.opening for one in clips])
        assert found["correlation"]["low"] > 0.95 and found["lag"] == 0 and found["offset"]["value"] == 0
        assert abs(found["shuffled"]["value"]) < 0.35
        assert (found["silent_opening"]["value"] or 0) < 0.03 < 0.1 < found["spoken_opening"]["value"]


def test_a_late_video_is_told_by_how_many_frames(numbers: Numbers, openings: list[Array]) -> None:
    late = int(numbers.integers(2, 8)) * int(numbers.choice([-1, 1]))
    found = measures.lip_sync([np.roll(opening, late) for opening in openings], openings)
    assert found["offset"]["value"] == late == found["offset"]["low"] == found["offset"]["high"]
    assert found["correlation"]["value"] < 0.9


def test_a_mouth_that_never_moves_misses_the_goal(openings: list[Array]) -> None:
    found = measures.lip_sync([np.zeros(200, np.float32)] * len(openings), openings)
    assert found["correlation"]["value"] == 0
    assert any("MISSED" in line and "0.000" in line for line in quality_tables.lipsync({"model": found}))


def test_colours_are_those_that_the_prompt_names(clips: list[Clip]) -> None:
    hits = []
    for one in clips:
        seen = measures.colours(identity_features(measures.blurred(one.frames_uint8)).mean(0))
        hits += [seen["background"] == one.identity.background, seen["clothes"] == one.identity.clothes]
    assert np.mean(hits) > 0.8  # one in twelve by chance


# -- intervals ---------------------------------------------------------------------------------------------------------


def drifting(numbers: Numbers, count: int, trend: float) -> tuple[Array, Array]:
    """Values that are like their neighbours, with or without a trend over 0..1."""
    noise = numbers.normal(size=count + 50)
    for i in range(1, len(noise)):
        noise[i] += 0.7 * noise[i - 1]
    x = np.linspace(0, 1, count)
    return x, noise[50:] + trend * x


def test_a_slopes_interval_holds_the_true_slope_though_neighbours_are_alike(numbers: Numbers) -> None:
    inside = 0
    for _ in range(60):
        found = measures.slope(*drifting(numbers, 150, 2.0))
        inside += found["low"] <= 2.0 <= found["high"]
    assert inside >= 50  # 95% would be 57


def test_a_trend_is_seen(numbers: Numbers) -> None:
    x, y = drifting(numbers, 150, 20.0)
    found = measures.slope(x, y)
    assert 0 < found["low"] < found["high"]
    assert measures.slope(x[:5], y[:5])["value"] is None


def test_an_interval_of_blocks_is_wider_where_neighbours_are_alike(numbers: Numbers) -> None:
    _, y = drifting(numbers, 300, 0.0)
    alone, blocks = (measures.interval(y, block) for block in (1, measures.block_length(y)))
    assert blocks["high"] - blocks["low"] > 1.2 * (alone["high"] - alone["low"])


# -- long streams ------------------------------------------------------------------------------------------------------


def streamed(seed: int, drift: float) -> tuple[Watch, dict[str, object]]:
    """60 s of a perfect video whose red goes by so many levels a second to where there is room for it."""
    told, who = [0.0], Who.of_seed(seed, 100)
    towards = 1 if np.asarray(who.of.still)[..., 0].mean() < 128 else -1

    def change(frames: Array) -> Array:
        red = towards * (told[0] + drift * np.arange(len(frames)) / 25)
        told[0] += drift * len(frames) / 25
        return np.clip(frames + red[:, None, None, None] * np.array([1, 0, 0]), 0, 255).astype(np.uint8)

    watch = Watch(who)
    quality_stream.run([Truth(who.of, seed, change)], [watch], 60, seed=seed)
    return watch, summary(table_of([watch]))


@pytest.mark.usefixtures("small")
def test_a_stream_that_stays_is_told_from_one_that_drifts(seed: int) -> None:
    (watch, stays), (_, drifts) = streamed(seed, 0.0), streamed(seed, 1.0)
    assert stays["sync_late"]["value"] > 0.9 and stays["lag"] == 0
    assert abs(stays["sharpness_late"]["value"] - 1) < 0.15
    assert stays["marks"]["10"]["value"] < 0.2 * watch.who.others
    early, late = (drifts[f"identity_{when}"]["value"] for when in ("early", "late"))
    assert drifts["slope_per_1000_s"]["low"] > 0 and late > 1.2 * early
    assert set(watch.kept) == {0, 1, 3, 10, 30}
    lines = quality_tables.identity({"model": drifts | {"others": 0.2}})
    assert any("MISSED" in line and "1000 s" in line for line in lines) and "not measured" in lines[-1]


def test_a_voice_goes_on_and_is_never_the_same(seed: int) -> None:
    pieces = voice(seed)
    (first, opening), (second, _) = next(pieces), next(pieces)
    assert len(first) == 640 * len(opening) and np.abs(first - second).max() > 0.01
    assert np.array_equal(next(voice(seed))[0], first)


# -- through the engine, with random weights ---------------------------------------------------------------------------


def frames_of(talker: Live | Rollout, sound: Array) -> Array:
    try:
        return np.concatenate(list(talker.say(sound)))
    finally:
        talker.close()


@pytest.mark.usefixtures("small")
def test_the_rollout_as_published_is_the_engines_and_variants_are_others(toon: Path, seed: int) -> None:
    one, sound = clip(seed, 24, held_out=True, size=64), next(voice(seed))[0][: 122 * 640]  # ten blocks
    engine = Engine.load(toon / "checkpoint", device="cpu")
    expected = frames_of(Live(engine, one, seed), sound)
    since = {"without rolling RoPE": 9, "without sink replacement": 4}  # differ from this block on
    made = {name: frames_of(Rollout(engine, one, seed, VARIANTS[name]), sound) for name in ("as published", *since)}
    assert np.array_equal(made["as published"], expected)
    for name, block in since.items():
        assert not np.array_equal(made[name][12 * block :], expected[12 * block :])
    assert np.array_equal(made["without sink replacement"][:45], expected[:45])  # the first clip
    engine.close()


def test_windows_to_look_at_are_all_at_first_and_then_ever_further_apart() -> None:
    found = sorted(quality_stream.looked_at(10_000))
    gaps = np.diff(found)
    assert found[:12] == list(range(12)) and found[-1] in (1998, 1999) and len(found) < 120
    assert gaps.max() < 0.08 * 2000 and len([w for w in found if w >= 1000]) >= 10
    assert quality_stream.looked_at(20) == {0, 1, 2}  # of the last one some frames are never made


@pytest.mark.usefixtures("small")
@torch.inference_mode()
def test_a_stream_that_is_skimmed_shows_what_the_whole_one_shows(
    toon: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (quality_stream, quality_rollout):
        monkeypatch.setattr(module, "WINDOW", 25)
    engine, one = Engine.load(toon / "checkpoint", device="cpu"), clip(seed, 24, held_out=True, size=64)
    who, seen = Who.of_seed(seed, 24), []
    for windows in (None, {0, 3, 4}):
        watch = Watch(who)
        quality_stream.run([Rollout(engine, one, seed, VARIANTS["as published"], windows)], [watch], 8, seed=seed)
        seen.append(watch)
    whole, skimmed = seen
    assert whole.frames == skimmed.frames and len(whole.rows) > 5
    assert skimmed.rows[0]["seconds"] == 0.5
    for row in skimmed.rows[1:]:
        other = min(whole.rows, key=lambda other: abs(other["seconds"] - row["seconds"]))
        assert abs(other["seconds"] - row["seconds"]) < 0.5 and 2.5 < row["seconds"] < 5.1
        assert row["identity"] == pytest.approx(other["identity"], rel=0.2)
        assert row["sharpness"] == pytest.approx(other["sharpness"], rel=0.3)
    assert 3 <= len(skimmed.rows) <= 4
    engine.close()


@torch.inference_mode()
def test_training_hears_what_a_live_session_hears(toon: Path, seed: int) -> None:
    of = clip(seed, FRAMES, held_out=True)
    engine = Engine.load(toon / "checkpoint", device="cpu")
    stream = Rollout(engine, of, seed, VARIANTS["as published"]).stream
    stream.push_audio(of.sound, RATE)
    blocks = [stream.block_input(block).parts["audio"][0, 0] for block in range(1 + LATENTS // 3)]
    heard = features(of.sound, FRAMES, live=True)
    difference = (torch.cat(blocks, dim=1)[:, -heard.shape[1] :] - heard).abs()
    assert float(difference[:, :-1].max()) < 1e-3 and float(difference.max()) < 0.1  # the last frame hears the end
    assert sum(block.shape[1] for block in blocks[1:]) == 4 * LATENTS == heard.shape[1] - BEFORE
    whole = features(of.sound, FRAMES)
    assert 0 < float((whole - heard).abs().mean()) < 0.5  # the same sound at another loudness


@pytest.mark.usefixtures("small")
@torch.inference_mode()
def test_clean_history_is_that_of_the_finished_block_at_timestep_0(toon: Path, seed: int) -> None:
    engine, one = Engine.load(toon / "checkpoint", device="cpu"), clip(seed, 24, held_out=True, size=64)
    run = Rollout(engine, one, seed, VARIANTS["clean history"])
    run.stream.push_audio(one.sound, 16000)
    made = run.stream.block_input(0)
    latent, dit = run._denoise(made), run.dit
    arena = dit.make_arena(run.geometry)
    dit.prefill(run.workspace, arena, run.still, run.text, dit.sink_tokens(run.reference, run.motion))
    heard = dit.audio_condition(made.parts["audio"], 3)
    place = max(30, made.distances[-1])
    dit.block_step(run.workspace, arena, run.still, latent, 0, place, (run.text, heard, dit.pose_condition(None)))
    assert torch.equal(run.arenas[0].k, arena.k) and torch.equal(run.arenas[0].v, arena.v)
    assert all(step is run.arenas[0] for step in run.arenas)
    engine.close()


# -- the command -------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, words)])
    return quality.main()


@pytest.mark.usefixtures("small")
def test_every_part_runs_on_random_weights(
    toon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quality_stream, "PIECE_S", 1)
    monkeypatch.setattr(quality_clips, "PRECISIONS", dict(list(quality_clips.PRECISIONS.items())[:2]))
    kept = tmp_path / "quality.json"
    words = ["--checkpoint", f"small={toon / 'checkpoint'}", "--run", toon, "--json", kept, "--clips", 1,
             "--frames", 12, "--seconds", 1, "--teacher-blocks", 1, "--teacher-steps", 1,
             "--pictures", tmp_path]  # fmt: skip
    assert command(monkeypatch, *words) == 0
    found = json.loads(kept.read_text())
    assert set(found) >= set(quality.PARTS)
    assert set(found["lipsync"]) == {"truth", "truth, blurred", "small: truth through the VAE", "small"}
    assert set(found["prompts"]) == {"truth", "truth, blurred", "small"}
    assert set(found["ablations"]) == {f"small: {name}" for name in VARIANTS}
    assert found["precision"]["small: bfloat16"]["equal"] == 1
    assert found["precision"]["small: FP8 products"]["psnr"]["value"] > 10
    assert found["teacher"]["student small"]["seconds_per_frame"] > 0 and found["speed"]["small"]["fps"] > 0
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"lipsync.png", "lipsync_lags.png", "lipsync_sheet.png", "prompts_sheet.png", "identity.png",
                        "identity_sheet.png", "ablations.png", "ablations_sheet.png", "teacher_sheet.png"}  # fmt: skip
    assert re.search("(MISSED|not measured): small: correlation", capsys.readouterr().out)


def test_a_picture_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality_pictures, "missing", [])
    quality_pictures.sheet(tmp_path / "nowhere" / "x.png", [("a", [np.zeros((8, 8, 3), np.uint8)])])
    assert quality_pictures.missing == [tmp_path / "nowhere" / "x.png"]
    assert "nowhere/x.png: No such file" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_stream_that_is_cut_off_leaves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = quality_stream.Truth.say
    said: list[int] = []

    def say(self: Truth, sound: Array) -> Iterator[Array]:
        said.append(len(sound))
        if len(said) > 4:
            raise KeyboardInterrupt
        yield from whole(self, sound)

    monkeypatch.setattr(quality_stream.Truth, "say", say)
    assert command(monkeypatch, "--only", "identity", "--json", tmp_path / "a.json") == 130
    assert json.loads((tmp_path / "a.json").read_text())["identity"]["truth"]["windows"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and "truth" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "fault"), [
    (["--only", "beauty"], "no part 'beauty'"), (["--only", "speed"], "speed needs a model"),
    (["--only", "speed", "--checkpoint", "nowhere/at/all"], "nowhere/at/all"),
    (["--checkpoint", "a/x", "--checkpoint", "b/x", "--only", "speed"], "two checkpoints are called 'x'"),
    (["--only", "teacher", "--checkpoint", "x", "--run", "y"], "--run DIR .given: y"),
    (["--json", "no/such/folder/a.json"], "such/folder"),
    (["--pictures", __file__], "cannot be a folder"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, words: list[str], fault: str) -> None:
    with pytest.raises(SystemExit, match=fault) as stopped:
        command(monkeypatch, *words)
    assert "\n" not in str(stopped.value.code)
