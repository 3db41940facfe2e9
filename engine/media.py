"""Video files and pictures: H.264 with AAC sound through PyAV, NV12, contact sheets, facts about a written file.

All video is BT.709 in limited range, by the conversion of `to_nv12`, and says so.

A video is written beside its target and renamed when it is whole, so no half-written file ever has the target's name.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from liverelay.engine.errors import InputError, MissingExtraError, OutputError

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
AUDIO_BIT_RATE = 192_000
REORDERED = 2  # frames that the encoder may hold back: B-frames that refer to others
CRF = 10  # the published writer's quality 8
COLOURS = "BT.709 limited"
# What the bitstream and the container say of `to_nv12`. Readers guess at a file that says nothing, each its own way.
COLOUR_TAGS = {
    "color_range": "tv", "color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709",
    "chroma_sample_location": "center",
}  # fmt: skip
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
Frames = npt.NDArray[np.uint8]
Sound = npt.NDArray[np.float32]


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtraError("av (PyAV)", "to write and read video files", "media") from None
    return av


def check_writable(path: Path) -> None:
    """OutputError when no file of this name can be made: no folder, a folder of that name, no permission, no space."""
    target = real_path(path)
    folder = path.parent if target.parent == real_path(path.parent) else target.parent
    if not os.path.isdir(folder):
        raise OutputError(f"cannot write {path}: the folder {folder} does not exist")
    if os.path.isdir(path):
        raise OutputError(f"cannot write {path}: it is a folder")
    if os.path.exists(path) and not (os.path.isfile(path) or path.is_fifo()):  # a file would take its place
        raise OutputError(f"cannot write {path}: it is a device")
    probe = part_path(target)
    try:
        with open(probe, "wb") as file:
            file.write(bytes(65536))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def check_outputs(outputs: Sequence[tuple[str, Path]], inputs: Iterable[Path | None]) -> None:
    """OutputError when one of the outputs, given with what each is, cannot be made, or is another one or an input."""
    seen: list[tuple[str, Path]] = []
    read = [path for path in inputs if path is not None]
    for what, path in outputs:
        check_writable(path)
        if any(_same(path, other) for other in read):
            raise OutputError(f"the {what} would overwrite the input {path}; give another name")
        for before, other in seen:
            if _same(path, other):
                raise OutputError(f"the {before} and the {what} are the same file, {path}; give two names")
        seen.append((what, path))


def _same(path: Path, other: Path) -> bool:
    return real_path(path) == real_path(other) or (path.exists() and other.exists() and path.samefile(other))


def container_of(path: Path) -> str:
    """ffmpeg's name of the container that the suffix stands for; InputError when it is none that we write."""
    try:
        return CONTAINERS[path.suffix.lower()]
    except KeyError:
        raise InputError(f"cannot write {path}: give a name that ends in {', '.join(CONTAINERS)}") from None


def picture_format(path: Path) -> str:
    """Pillow's name of the format that the suffix stands for; InputError when it is none that we write."""
    try:
        return PICTURES[path.suffix.lower()]
    except KeyError:
        raise InputError(f"cannot write {path}: give a name that ends in {', '.join(PICTURES)}") from None


def real_path(path: Path) -> Path:
    """Where a name leads: a symbolic link stays, and what it points to is written."""
    return Path(os.path.realpath(path))


def part_path(path: Path) -> Path:
    """A fresh name beside the target for the unfinished file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def to_nv12(frame: Frames) -> Frames:
    """A picture [H, W, 3], even sides, as NV12 [3/2 H, W], BT.709 limited range: rows of Y, then rows of Cb, Cr."""
    import torch  # the simulator checks its outputs with this module, and needs no torch

    from liverelay.kernels.vae_ops import bytes_to_nv12

    pixels = torch.from_numpy(np.require(frame, requirements=["C", "W"]))  # torch warns of what may not be written
    nv12: Frames = bytes_to_nv12(pixels[None])[0].numpy()
    return nv12


class _Sound:
    """The AAC stream of a file. Sound keeps its own rate where AAC knows it, else it becomes 48 kHz."""

    def __init__(self, file: Any, rate: int, channels: int) -> None:
        self._file, self._rate, self._samples = file, rate, 0
        self._channels, self._layout = (1, "mono") if channels == 1 else (2, "stereo")
        aac_rate = rate if rate in _AAC_RATES else 48000
        self._stream = file.add_stream("aac", rate=aac_rate, layout=self._layout)
        self._stream.bit_rate = min(AUDIO_BIT_RATE, 6 * aac_rate)
        self._resampler = _av().AudioResampler(format="fltp", layout=self._layout, rate=aac_rate, frame_size=1024)

    def write(self, audio: Sound) -> None:
        """Append samples [m] or [m, channels] in [-1, 1]."""
        if not len(audio):
            return
        planes = audio.reshape(len(audio), -1).T
        if len(planes) != self._channels:  # more than stereo, say: a fair mix rather than a guess at the layout
            planes = np.repeat(planes.mean(axis=0, keepdims=True), self._channels, axis=0)
        frame = _av().AudioFrame.from_ndarray(np.ascontiguousarray(planes, dtype=np.float32), "fltp", self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._samples, Fraction(1, self._rate)
        self._samples += len(audio)
        for piece in self._resampler.resample(frame):
            self._file.mux(self._stream.encode(piece))

    def finish(self) -> None:
        for piece in self._resampler.resample(None):
            self._file.mux(self._stream.encode(piece))
        self._file.mux(self._stream.encode(None))


def _create(part: Path, path: Path) -> Any:
    container = container_of(path)
    options = {} if container == "matroska" else {"movflags": "faststart"}
    try:
        return _av().open(str(part), "w", format=container, options=options)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}")


class VideoWriter:
    """H.264 (4:2:0, BT.709) and AAC into mp4, mov or mkv. `close` gives the file its name; `abort` leaves nothing.

    size: (width, height), even numbers; audio_rate: of the sound, None for a video without one.
    """

    def __init__(
        self, path: Path, *, fps: int, size: tuple[int, int], audio_rate: int | None = None, audio_channels: int = 1,
        crf: int = CRF, preset: str = "medium",
    ) -> None:
        self.path, self.frames = path, 0
        self._part = part_path(real_path(path))
        self._file = _create(self._part, path)
        # Without macroblock-tree rate control, whose result is not the same in every run of equal frames.
        coding = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0", **COLOUR_TAGS}
        self._video = self._file.add_stream("libx264", rate=fps, options=coding)
        self._video.width, self._video.height, self._video.pix_fmt = *size, "nv12"
        self._tick = Fraction(1, fps)
        self._sound = None if audio_rate is None else _Sound(self._file, audio_rate, audio_channels)

    def write(self, frames: Frames, audio: Sound) -> None:
        """Append frames [n, H, W, 3] and the sound that belongs to them, [m] or [m, channels] in [-1, 1]."""
        av = _av()
        try:
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(to_nv12(pixels), format="nv12")
                frame.pts, frame.time_base = self.frames, self._tick
                self._file.mux(self._video.encode(frame))
                self.frames += 1
            if self._sound is not None:
                self._sound.write(audio)
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def close(self, path: Path | None = None) -> Path:
        """Finish the file and give it its name (or another one, `path`)."""
        target = path or self.path
        try:
            if self._sound is not None:
                self._sound.finish()
            self._file.mux(self._video.encode(None))
            self._file.close()
            os.replace(self._part, real_path(target))
        except OSError as error:
            self.abort()
            raise _cannot_write(target, error) from None
        return target

    def abort(self) -> None:
        """Leave no file behind."""
        with contextlib.suppress(OSError, ValueError):  # the file is thrown away: what it lacks does not matter
            self._file.close()
        self._part.unlink(missing_ok=True)


def join_videos(parts: Sequence[tuple[Path, int]], target: Path, sound: Sound, rate: int, fps: int) -> Path:
    """One file of several videos of one size, whose pictures are not coded again, with a sound [m, channels] of `rate`.

    parts: files of VideoWriter with the number of their frames. OutputError when it cannot be written.
    """
    av, part, frames = _av(), part_path(real_path(target)), 0
    file = _create(part, target)
    try:
        video: Any = None
        for path, count in parts:
            with av.open(str(path)) as source:
                given = source.streams.video[0]
                if video is None:
                    video, track = file.add_stream_from_template(given), _Sound(file, rate, sound.shape[1])
                frame = round(1 / fps / given.time_base)
                packets = (packet for packet in source.demux(given) if packet.dts is not None)
                for number, packet in enumerate(packets, frames):
                    # Short pieces are coded with less delay: decoding times that go on evenly suit all of them.
                    packet.pts, packet.dts = packet.pts + frames * frame, (number - REORDERED) * frame
                    packet.stream = video
                    file.mux(packet)
            track.write(sound[frames * rate // fps : (frames + count) * rate // fps])
            frames += count
        track.finish()
        file.close()
        os.replace(part, real_path(target))
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            file.close()
        part.unlink(missing_ok=True)
        raise _cannot_write(target, error) from None
    return target


def holds_frames(path: Path, count: int) -> bool:
    """Whether it is a video file of ours, mp4, whose header tells of so many frames."""
    av = _av()
    try:
        with av.open(str(path)) as file:
            return bool(file.streams.video[0].frames == count)
    except (av.FFmpegError, OSError, IndexError):
        return False


def pictures_of(path: Path) -> Iterator[Frames]:
    """The frames of a video file, one by one, [1, H, W, 3]."""
    with _av().open(str(path)) as file:
        for frame in file.decode(video=0):
            # RGB is full range. Where it is not told so, PyAV before 17 takes no notice of the file's colour tags.
            yield frame.reformat(format="rgb24", dst_color_range="JPEG").to_ndarray()[None]


class ContactSheet:
    """A picture of evenly spaced frames with their times; memory stays bounded however long the stream is."""

    def __init__(self, fps: int, *, columns: int = 6, rows: int = 4, width: int = 192) -> None:
        self._fps, self._columns, self._limit, self._width = fps, columns, columns * rows, width
        self._kept: list[tuple[int, Frames]] = []
        self._stride, self._count = 1, 0

    def add(self, frames: Frames) -> None:
        """Offer frames [n, H, W, 3]; every stride-th is kept, and the stride doubles when the sheet is full."""
        for frame in frames:
            if self._count % self._stride == 0:
                self._kept.append((self._count, frame.copy()))
                if len(self._kept) > 2 * self._limit:
                    self._kept = self._kept[::2]
                    self._stride *= 2
            self._count += 1

    @property
    def kept_frames(self) -> int:
        """How many frames are held now."""
        return len(self._kept)

    def save(self, path: Path) -> None:
        """Write the sheet as a picture; the suffix chooses the format. OutputError when it cannot be written."""
        try:
            from PIL import Image, ImageDraw
        except ImportError:
            raise MissingExtraError("Pillow", "to write a contact sheet", "media") from None
        if not self._kept:
            raise OutputError("there are no frames for a contact sheet")
        count = min(self._limit, len(self._kept))
        chosen = [self._kept[round(i)] for i in np.linspace(0, len(self._kept) - 1, count)]
        height, width = chosen[0][1].shape[:2]
        cell = (self._width, max(1, round(self._width * height / width)))
        columns = min(self._columns, count)
        gap, label = 4, 14
        rows = math.ceil(count / columns)
        sheet = Image.new("RGB", (columns * (cell[0] + gap) + gap, rows * (cell[1] + gap + label) + gap), "white")
        draw = ImageDraw.Draw(sheet)
        for i, (number, frame) in enumerate(chosen):
            left, top = gap + i % columns * (cell[0] + gap), gap + i // columns * (cell[1] + gap + label)
            sheet.paste(Image.fromarray(frame).resize(cell, Image.Resampling.BILINEAR), (left, top))
            draw.text((left, top + cell[1] + 1), f"{number / self._fps:.2f} s", fill="black")
        part = part_path(real_path(path))
        try:
            sheet.save(part, format=picture_format(path))
            os.replace(part, real_path(path))
        except (OSError, ValueError) as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


@dataclass(frozen=True)
class VideoFacts:
    """What a written file says when it is read back; times in seconds. Frames are counted by decoding."""

    fps: float
    frames: int
    width: int
    height: int
    video_start_s: float
    audio_rate: int
    audio_channels: int
    audio_start_s: float
    audio_duration_s: float


def probe(path: Path) -> VideoFacts:
    """Read a video file back. InputError when it is not playable."""
    av = _av()
    try:
        with av.open(str(path)) as file:
            video, sound = file.streams.video[0], file.streams.audio[0]
            starts: dict[str, float] = {}
            frames = samples = 0
            for packet in file.demux(video, sound):
                for frame in packet.decode():
                    starts.setdefault(packet.stream.type, float(frame.pts * frame.time_base))
                    frames += packet.stream.type == "video"
                    samples += frame.samples if packet.stream.type == "audio" else 0
            return VideoFacts(
                float(video.average_rate), frames, video.width, video.height, starts["video"], sound.rate,
                sound.channels, starts["audio"], samples / sound.rate,
            )
    except (av.FFmpegError, IndexError, KeyError, OSError) as error:
        raise InputError(f"{path} is not a playable video with sound: {error}") from None
