"""`liverelay generate`: one image and one sound in, a video file out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverelay.engine.engine import DEFAULT_MAX_AREA, Engine, pick_size
from liverelay.engine.errors import OutputError
from liverelay.engine.media import ContactSheet, VideoWriter, check_writable, container_of, picture_format
from liverelay.engine.models.audio import SAMPLE_RATE, read_audio, resample
from liverelay.engine.models.image import as_image, prepare_image
from liverelay.engine.progress import Progress, uninterrupted
from liverelay.engine.relay.ranks import StageLost
from liverelay.engine.session import Chunk, Samples, Session

LIVE_PIECE_S = 0.1


@dataclass(frozen=True)
class GenerateOptions:
    """What to make. size (width, height) in pixels or None for the published rule under max_area; seconds: at most."""

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
    check_writable(options.out)
    outputs = {"video": options.out}
    if options.contact_sheet is not None:
        picture_format(options.contact_sheet)
        check_writable(options.contact_sheet)
        if options.contact_sheet.resolve() == options.out.resolve():
            raise OutputError(f"the contact sheet and the video are the same file, {options.out}")
        outputs["contact sheet"] = options.contact_sheet
    for what, path in outputs.items():
        if path.resolve() in (options.image.resolve(), options.audio.resolve()):
            raise OutputError(f"the {what} would overwrite the input {path}; give another name")


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
    """
    check_outputs(options)
    older = [path for path in (options.out, options.contact_sheet) if path is not None and path.exists()]
    fps, inputs = engine.stream.fps, inputs or read_inputs(options)
    sound, rate = inputs.sound, inputs.rate
    total = -(-len(sound) * fps // rate)
    waveform = resample(sound, rate)
    session = engine.open(
        inputs.picture, options.prompt, audio=None if options.live else waveform, size=options.size,
        max_area=options.max_area, seed=options.seed,
    )
    progress = Progress(total, fps)
    writer = VideoWriter(options.out, fps=fps, size=session.size, audio_rate=rate, audio_channels=sound.shape[1])
    sheet = ContactSheet(fps)
    interrupted, lost = False, None
    try:
        for chunk in _chunks(session, waveform, live=options.live):
            start, end = (frame * rate // fps for frame in (chunk.first_frame, chunk.first_frame + len(chunk.frames)))
            with uninterrupted():  # packets lost half-way would spoil the file
                writer.write(chunk.frames, sound[start:end])
            sheet.add(chunk.frames)
            progress.update(chunk.block + 1, writer.frames)
    except KeyboardInterrupt:
        interrupted = True
        try:
            engine.after_interrupt()
        except StageLost as error:
            lost = error
    except StageLost as error:
        lost = error
    except BaseException:
        writer.abort()
        raise
    progress.finish()
    if not writer.frames:
        writer.abort()
        raise lost or KeyboardInterrupt
    short = interrupted or lost is not None

    def named(path: Path) -> Path:
        return path.with_name(f"{path.stem}.interrupted{path.suffix}") if short and path in older else path

    name = named(options.out)
    with uninterrupted():
        writer.close(name)
        if options.contact_sheet is not None:
            sheet.save(named(options.contact_sheet))
    if lost is not None:
        raise StageLost(f"{lost}; the {writer.frames} frames that were done are in {name}")
    return GenerateResult(name, writer.frames, interrupted)


def _chunks(session: Session, waveform: Samples, *, live: bool) -> Iterator[Chunk]:
    """The session's blocks; in live mode the sound is pushed piece by piece, as it would come from a microphone."""
    if live:
        piece = round(LIVE_PIECE_S * SAMPLE_RATE)
        for start in range(0, len(waveform), piece):
            session.push_audio(waveform[start : start + piece], SAMPLE_RATE)
            yield from session.frames()
        session.end_audio()
    yield from session.frames()
