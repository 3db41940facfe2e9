"""`liverelay generate`: one image and one sound in, a video file out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverelay.engine import media
from liverelay.engine.engine import DEFAULT_MAX_AREA, Engine, pick_size
from liverelay.engine.errors import StageLost
from liverelay.engine.media import ContactSheet, VideoWriter, container_of, picture_format
from liverelay.engine.models.audio import SAMPLE_RATE, read_audio, resample
from liverelay.engine.models.image import as_image, prepare_image
from liverelay.engine.progress import Progress, uninterrupted
from liverelay.engine.recovery import RecoverableVideo, digest
from liverelay.engine.session import Session
from liverelay.engine.stream import Chunk, Samples

LIVE_PIECE_S = 0.1


@dataclass(frozen=True)
class GenerateOptions:
    """What to make. size (width, height) in pixels or None for the published rule under max_area; seconds: at most.

    snapshot_every: blocks, 0 for never: a run that is cut off can go on from its last snapshot (engine/recovery.py).
    reports: files that the caller writes beside it, with what each is; reads: those that it reads.
    """

    image: Path
    audio: Path
    prompt: str
    out: Path
    size: tuple[int, int] | None = None
    max_area: int = DEFAULT_MAX_AREA
    seed: int = 0
    seconds: float | None = None
    live: bool = False
    contact_sheet: Path | None = None
    snapshot_every: int = 0
    reports: tuple[tuple[str, Path], ...] = ()
    reads: tuple[Path, ...] = ()


@dataclass(frozen=True)
class GenerateResult:
    """What was made: the file, its frames, seconds of work, and whether it was cut short by an interrupt."""

    path: Path
    frames: int
    interrupted: bool


@dataclass(frozen=True)
class Inputs:
    """What a user's files hold: sound [n, channels] with its rate, and the picture."""

    sound: Samples
    rate: int
    picture: Any


def check_outputs(options: GenerateOptions) -> None:
    """An error before any long work starts when a result could not be written in the end, or over an input."""
    container_of(options.out)
    outputs = [("video", options.out)]
    if options.contact_sheet is not None:
        picture_format(options.contact_sheet)
        outputs.append(("contact sheet", options.contact_sheet))
    media.check_outputs([*outputs, *options.reports], [options.image, options.audio, *options.reads])


def read_inputs(options: GenerateOptions) -> Inputs:
    """The user's files; InputError for what cannot be used, the size included, before a model is loaded."""
    sound, rate = read_audio(options.audio)
    if options.seconds is not None:
        sound = sound[: max(1, round(options.seconds * rate))]
    picture = as_image(options.image)
    prepare_image(picture, pick_size(picture.size, options.size, options.max_area))
    return Inputs(sound, rate, picture)


def generate(engine: Engine, options: GenerateOptions, inputs: Inputs | None = None) -> GenerateResult:
    """Write the video with its sound; on KeyboardInterrupt, or StageLost, what is done becomes a playable file.

    The sound file's own samples go into the video; the model hears them at 16 kHz. `seconds` cuts the sound first.
    A video that has the name already is replaced by a finished one only: one that was cut short gets another name.
    With snapshots the same call goes on where an earlier one was cut off.
    """
    check_outputs(options)
    older = [path for path in (options.out, options.contact_sheet) if path is not None and path.exists()]
    fps, inputs = engine.stream.fps, inputs or read_inputs(options)
    sound, rate = inputs.sound, inputs.rate
    waveform = resample(sound, rate)
    session, video = _begin(engine, options, inputs, waveform)
    progress = Progress(-(-len(sound) * fps // rate), fps, done=video.frames)
    sheet = ContactSheet(fps)
    interrupted, lost = False, None
    try:
        if isinstance(video, RecoverableVideo) and options.contact_sheet is not None:
            video.show(sheet.add)
        for chunk in _chunks(session, waveform, live=options.live):
            start, end = (frame * rate // fps for frame in (chunk.first_frame, chunk.first_frame + len(chunk.frames)))
            with uninterrupted():  # packets lost half-way would spoil the file
                video.write(chunk.frames, sound[start:end])
                if isinstance(video, RecoverableVideo) and session.next_block % options.snapshot_every == 0:
                    video.save(session)
            sheet.add(chunk.frames)
            progress.update(chunk.block + 1, video.frames)
    except KeyboardInterrupt:
        interrupted = True
        try:
            engine.after_interrupt()
        except StageLost as error:
            lost = error
    except StageLost as error:
        lost = error
    except BaseException:
        video.abort()
        raise
    progress.finish()
    if not video.frames:
        video.abort()
        raise lost or KeyboardInterrupt
    return _finish(video, sheet, options, (interrupted, lost), older)


def _begin(
    engine: Engine, options: GenerateOptions, inputs: Inputs, waveform: Samples
) -> tuple[Session, VideoWriter | RecoverableVideo]:
    """The session and its video: new ones, or those of an earlier run that was cut off."""

    def begin() -> Session:
        return engine.open(
            inputs.picture, options.prompt, audio=None if options.live else waveform, size=options.size,
            max_area=options.max_area, seed=options.seed,
        )  # fmt: skip

    sound, rate, fps = inputs.sound, inputs.rate, engine.stream.fps
    if not options.snapshot_every:
        session = begin()
        writer = VideoWriter(options.out, fps=fps, size=session.size, audio_rate=rate, audio_channels=sound.shape[1])
        return session, writer
    run = {
        "image": digest(inputs.picture), "audio": f"{digest(sound)} {rate}", "prompt": options.prompt,
        "seed": options.seed, "size": [*(options.size or (0, options.max_area))], "live": options.live,
        "relative distance": engine.stream.relative_distance, "checkpoint or precision": engine.model_id,
        "colour standard": media.COLOURS,
    }  # fmt: skip
    video = RecoverableVideo(options.out, run, sound=sound, rate=rate, fps=fps)
    try:
        snapshot = video.resume()
        session = begin() if snapshot is None else engine.resume(snapshot)
    except BaseException:
        video.abort()
        raise
    if snapshot is not None:
        engine.loader.say(f"going on from frame {video.frames}, saved in {video.folder}")
    video.begin(session.size)
    return session, video


def _finish(
    video: VideoWriter | RecoverableVideo, sheet: ContactSheet, options: GenerateOptions,
    cut: tuple[bool, StageLost | None], older: list[Path],
) -> GenerateResult:
    """Give the results their names. cut: whether the run was interrupted, and the stage that was lost."""
    interrupted, lost = cut
    short = interrupted or lost is not None

    def named(path: Path) -> Path:
        return path.with_name(f"{path.stem}.interrupted{path.suffix}") if short and path in older else path

    name = named(options.out)
    with uninterrupted():
        try:
            video.close(name)
            if options.contact_sheet is not None:
                sheet.save(named(options.contact_sheet))
            if isinstance(video, RecoverableVideo) and not short:
                video.remove()
        finally:
            if isinstance(video, RecoverableVideo):
                video.release()
    if lost is not None:
        raise StageLost(f"{lost}; the {video.frames} frames that were done are in {name}")
    return GenerateResult(name, video.frames, interrupted)


def _chunks(session: Session, waveform: Samples, *, live: bool) -> Iterator[Chunk]:
    """The session's blocks; in live mode the sound is pushed piece by piece, as it would come from a microphone."""
    if live:
        piece = round(LIVE_PIECE_S * SAMPLE_RATE)
        for start in range(session.heard_samples, len(waveform), piece):
            session.push_audio(waveform[start : start + piece], SAMPLE_RATE)
            yield from session.frames()
        session.end_audio()
    yield from session.frames()
