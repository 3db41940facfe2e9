"""The parts of `bench.quality` that look at short clips: lip sync, prompts, teacher, precision, speed."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import quality_measures as measures
from bench import quality_pictures as pictures
from bench.quality_measures import Array
from bench.quality_options import Options
from bench.quality_stream import SIZE
from distill.clips import Clip, clip
from distill.measure import identity_features, mouth_opening
from distill.motion import FPS, RATE
from liverelay.engine import Engine
from liverelay.engine.stream import Stream

Result = dict[str, Any]
Video = Callable[[Clip], Array]


@contextlib.contextmanager
def loaded(folder: Path, options: Options, **changes: Any) -> Iterator[Engine]:
    engine = Engine.load(folder, device=options.device, **({"dtype": options.dtype} | changes))
    try:
        yield engine
    finally:
        engine.close()


def held_out(count: int, options: Options, frames: int) -> list[Clip]:
    return [clip(options.seed + i, frames, held_out=True, size=SIZE[0]) for i in range(count)]


def video_of(engine: Engine, of: Clip, seed: int, *, whole: bool = False) -> Array:
    """The engine's video of a clip's picture, prompt and sound, heard live or as a whole file."""
    with engine.open(of.still, of.prompt, audio=of.sound if whole else None, size=SIZE, seed=seed) as session:
        if not whole:
            session.push_audio(of.sound, RATE)
            session.end_audio()
        return np.concatenate([chunk.frames for chunk in session.frames()])


@torch.inference_mode()
def through_vae(engine: Engine, frames: Array) -> Array:
    """A video coded and decoded: the best that the transformer could do; the last frame fills up the last latent."""
    count = len(frames)
    padded = np.concatenate([frames, frames[-1:].repeat((1 - count) % 4, 0)])
    video = torch.from_numpy(padded).permute(3, 0, 1, 2).float() / 127.5 - 1
    vae = engine.vae
    latents = vae.encode(video.to(vae.device))
    return vae.to_uint8(vae.decode(latents, vae.new_decoder(*latents.shape[2:]))).numpy(force=True)[:count]


def blurred_truth(of: Clip) -> Array:
    return measures.blurred(of.frames_uint8)


CONTROLS: dict[str, Video] = {"truth": lambda of: of.frames_uint8, "truth, blurred": blurred_truth}


# -- lip sync ----------------------------------------------------------------------------------------------------------


def lip_sync(options: Options) -> Result:
    """Openings seen in the frames against those of the sound."""
    clips, rows = held_out(options.clips or 8, options, options.frames), {}
    true, drawn, sheets = [one.motion.opening for one in clips], {}, []

    def judge(label: str, video: Video) -> None:
        videos = [options.told(f"lip sync, {label}", i, len(clips), video(one)) for i, one in enumerate(clips)]
        seen = [mouth_opening(frames) for frames in videos]
        rows[label] = measures.lip_sync(seen, true)
        drawn[label] = seen
        shown = range(min(3, len(clips)))
        sheets.extend((f"{label}, clip {options.seed + i}", pictures.spread(videos[i])) for i in shown)

    for label, video in CONTROLS.items():
        judge(label, video)
    for label, folder in options.checkpoints.items():
        with loaded(folder, options) as engine:
            judge(f"{label}: truth through the VAE", lambda one, engine=engine: through_vae(engine, one.frames_uint8))
            judge(label, lambda one, engine=engine: video_of(engine, one, options.seed, whole=options.whole_file))
    if options.pictures:
        panels = []
        for i in range(min(3, len(clips))):
            curves = {"sound": true[i]} | {label: seen[i] for label, seen in drawn.items() if "blurred" not in label}
            seconds = np.arange(len(true[i])) / FPS
            panels.append((f"opening, clip {options.seed + i}",
                           {name: (seconds[: len(y)], y[: len(seconds)]) for name, y in curves.items()}))
        pictures.plot(options.pictures / "lipsync.png", panels, across="seconds")
        lags = {label: (measures.LAGS, np.array(row["curve"])) for label, row in rows.items()}
        pictures.plot(options.pictures / "lipsync_lags.png", [("correlation", lags)], across="frames the video is late")
        pictures.sheet(options.pictures / "lipsync_sheet.png", sheets)
    return rows


# -- prompts -----------------------------------------------------------------------------------------------------------


ANSWERS = ("named", "picture's instead", "kept", "kept without prompt")


def prompts(options: Options) -> Result:
    """Named colours in the last half of each video; colours that no prompt names stay those of the picture."""
    count, frames = options.clips or 12, min(options.frames, 48)
    clips: dict[bool, list[Clip]] = {True: [], False: []}
    for i in range(40 * count):
        if min(map(len, clips.values())) >= count:
            break
        made = clip(options.seed + i, frames, held_out=True, size=SIZE[0])
        clips[bool(made.prompt)].append(made)
    chosen = clips[True][:count] + clips[False][:count]
    rows, sheets = {}, []

    def judge(label: str, video: Video) -> None:
        hits: dict[str, list[float]] = {name: [] for name in ANSWERS}
        shown = []
        for i, one in enumerate(chosen):
            made = options.told(f"prompts, {label}", i, len(chosen), video(one))
            seen = measures.colours(identity_features(made[len(made) // 2 :]).mean(0))
            still = measures.colours(identity_features(one.still[None])[0])
            for what in ("background", "clothes"):
                wanted = getattr(one.identity, what)
                if wanted in one.prompt.split():
                    hits["named"].append(seen[what] == wanted)
                    hits["picture's instead"].append(seen[what] == still[what])
                else:
                    hits["kept" if one.prompt else "kept without prompt"].append(seen[what] == wanted)
            shown.append(made[-1])
        rows[label] = {name: measures.interval(np.array(values)) for name, values in hits.items()}
        sheets.append((f"{label}, with prompts: " + "; ".join(one.prompt for one in chosen[:count]), shown[:count]))
        sheets.append((f"{label}, without", shown[count:]))

    for label, control in CONTROLS.items():
        judge(label, control)
    for label, folder in options.checkpoints.items():
        with loaded(folder, options) as engine:
            judge(label, lambda one, engine=engine: video_of(engine, one, options.seed))
    if options.pictures:
        sheets.insert(0, ("pictures, with prompts", [one.still for one in chosen[:count]]))
        pictures.sheet(options.pictures / "prompts_sheet.png", sheets)
    return rows


# -- teacher -----------------------------------------------------------------------------------------------------------


class Teacher:
    """The bidirectional model of a training run: a few blocks at once, as one block, from the student's own noise."""

    def __init__(self, run: Path, blocks: int, steps: int) -> None:
        from distill.run import TEACHER, load_run
        from distill.toon import DIT
        from distill.video_dit import VideoDiT

        self.blocks, self.steps, self.model = blocks, steps, VideoDiT(DIT).eval()
        load_run(self.model, run, TEACHER)

    @torch.inference_mode()
    def video(self, engine: Engine, of: Clip, seed: int) -> Array:
        """Through the engine's encoders and decoder, in step with the sound as the engine's videos are."""
        from distill.flow import many_steps
        from distill.video_dit import Condition, Span

        given, track, latent = engine._prepare(of.still, of.prompt, size=SIZE)
        stream = Stream(engine, engine._spec(engine._geometry(*latent)), track, seed=seed)
        stream.push_audio(of.sound, RATE)
        stream.end_audio()
        made = [stream.block_input(block) for block in range(self.blocks)]
        noise, sound = (self._joined([block.parts[name] for block in made]) for name in ("latent", "audio"))
        motion = given["motion"].float().cpu()
        text = given["text"].float().cpu()
        padded = F.pad(text, (0, 0, 0, engine.dit.config.text_len - len(text)))
        condition = Condition(motion[None, :, :1], motion[None], padded[None], sound[0][None])
        span = Span(torch.zeros(1, dtype=torch.int64), torch.tensor([[made[0].distances[0]]]),
                    frames=noise.shape[1], ring=1)  # fmt: skip
        clean = many_steps(self.model, noise[None], condition, span, self.steps)[0]
        vae, decoder = engine.vae, engine.vae.new_decoder(*latent)
        vae.prime(decoder, given["motion"][:, : engine.stream.prime_latents])
        frames = vae.to_uint8(vae.decode(clean.to(vae.device), decoder)).numpy(force=True)
        return frames[engine.stream.dropped_frames :]

    @staticmethod
    def _joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.float() for part in parts], dim=-1 if parts[0].shape[0] == 1 else 1)


def teacher(options: Options) -> Result:
    """A teacher's pieces against the student's of the same length, sound and noise."""
    assert options.run is not None
    rows, sheets = {}, []
    blocks, count = options.teacher_blocks, options.clips or 4
    model = Teacher(options.run, blocks, options.teacher_steps)
    for label, folder in options.checkpoints.items():
        with loaded(folder, options) as engine:
            clips = held_out(count, options, engine.stream.block_frames * blocks - engine.stream.dropped_frames)
            ways: dict[str, Video] = {
                "truth": lambda one: one.frames_uint8,
                f"teacher, {model.steps} steps": lambda one, engine=engine: model.video(engine, one, options.seed),
                f"student {label}": lambda one, engine=engine: video_of(engine, one, options.seed),
            }
            for name, video in ways.items():
                if name in rows:
                    continue
                start = time.perf_counter()
                videos = [options.told(f"teacher, {name}", i, count, video(one)) for i, one in enumerate(clips)]
                spent = (time.perf_counter() - start) / sum(map(len, videos))
                rows[name] = _against_truth(videos, clips) | {"seconds_per_frame": spent if name != "truth" else None}
                sheets += [(f"{name}, clip {options.seed + i}", pictures.spread(made))
                           for i, made in enumerate(videos[:3])]  # fmt: skip
    if options.pictures:
        pictures.sheet(options.pictures / "teacher_sheet.png", sheets)
    return rows


def _against_truth(videos: list[Array], clips: list[Clip]) -> Result:
    """Lip sync, identity distance and sharpness of whole videos."""
    identity, sharpness = [], []
    for made, one in zip(videos, clips, strict=True):
        reference = identity_features(one.frames_uint8).mean(0)
        identity.append(float(measures.distance(identity_features(made), reference).mean()))
        sharpness.append(measures.gradient(made) / measures.gradient(one.frames_uint8))
    sync = measures.lip_sync([mouth_opening(made) for made in videos], [one.motion.opening for one in clips])
    return {"sync": sync, "identity": measures.interval(np.array(identity)),
            "sharpness": measures.interval(np.array(sharpness))}  # fmt: skip


# -- precision and speed -----------------------------------------------------------------------------------------------

PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"fp8": False}, "FP8 products": {"fp8": "products"}, "FP8 attention": {"fp8": "attention"},
    "FP8 both": {"fp8": "all"}, "float32": {"dtype": torch.float32},
}  # fmt: skip


def precision(options: Options) -> Result:
    """PSNR of each precision's videos against bfloat16's, of the same seed."""
    clips = held_out(options.clips or 2, options, min(options.frames, 60))
    rows: Result = {}
    for label, folder in options.checkpoints.items():
        exact: list[Array] = []
        for name, changes in PRECISIONS.items():
            with loaded(folder, options, **({"dtype": torch.bfloat16} | changes)) as engine:
                videos = [options.told(f"precision, {name}", i, len(clips), video_of(engine, one, options.seed))
                          for i, one in enumerate(clips)]  # fmt: skip
            exact = exact or videos
            found = _against_truth(videos, clips)
            values = [measures.psnr(a, b) for a, b in zip(videos, exact, strict=True)]
            finite = [value if math.isfinite(value) else math.nan for value in values]
            rows[f"{label}: {name}"] = {
                "psnr": measures.interval(np.array(finite)), "clips": [None if math.isnan(v) else v for v in finite],
                "equal": sum(map(math.isinf, values)), "sync": found["sync"]["correlation"],
            }
    return rows


def speed(options: Options) -> Result:
    """Of a whole file, as `generate` makes it, without writing it: seconds to load, to the first frames, then FPS."""
    rows, made = {}, clip(options.seed, max(options.frames, 125), held_out=True, size=SIZE[0])
    for label, folder in options.checkpoints.items():
        start = time.perf_counter()
        with loaded(folder, options) as engine:
            load = time.perf_counter() - start
            start = time.perf_counter()
            with engine.open(made.still, made.prompt, audio=made.sound, size=SIZE, seed=options.seed) as session:
                chunks = session.frames()
                next(chunks)
                first, count = time.perf_counter() - start, 0
                start = time.perf_counter()
                for chunk in chunks:
                    count += len(chunk.frames)
            rows[label] = {"load_s": load, "first_frame_s": first, "fps": count / (time.perf_counter() - start)}
    machine = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    return rows | {"machine": machine}
