"""One colour standard, BT.709 in limited range: video files keep to it and say so, NV12 for other encoders too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liverelay.engine.media import VideoWriter, join_videos, pictures_of, to_nv12
from tests.colours import exact_nv12, exact_rgb

av = pytest.importorskip("av", reason="PyAV is not installed")

ROOT = Path(__file__).resolve().parents[1]
BAR = 32  # pixels
COLOURS = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 1, 0], [1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
LEVELS = np.array([191, 255])  # colour bars of 75 % and of 100 %
BARS = (LEVELS[:, None, None] * COLOURS).astype(np.uint8)  # [2, 8, 3]
PICTURE = BARS.repeat(2 * BAR, axis=0).repeat(BAR, axis=1)
TAGGED = (1, 1, 1, 1)  # BT.709 thrice in H.273, and limited range in FFmpeg
CONTAINER_TAGS = {  # matrix, range, transfer and primaries; in mov there is none for the range
    ".mp4": [b"colrnclx\0\1\0\1\0\1\0"],
    ".mov": [b"colrnclc\0\1\0\1\0\1"],
    ".mkv": [b"\x55\xb1\x81\1", b"\x55\xb9\x81\1", b"\x55\xba\x81\1", b"\x55\xbb\x81\1"],
}


def write(path: Path, frames: int = 3) -> Path:
    writer = VideoWriter(path, fps=25, size=(PICTURE.shape[1], PICTURE.shape[0]), audio_rate=16000)
    writer.write(np.broadcast_to(PICTURE, (frames, *PICTURE.shape)), np.zeros(640 * frames, np.float32))
    return writer.close()


def middles(picture: np.ndarray) -> np.ndarray:
    """The insides of the bars, [2, 8, n, 3]: without the edges, which coding blurs."""
    inner = picture.reshape(2, 2 * BAR, 8, BAR, 3)[:, 8:-8, :, 8:-8]
    return inner.transpose(0, 2, 1, 3, 4).reshape(2, 8, -1, 3)


def tags(codec: Any) -> tuple[int, ...]:
    return tuple(map(int, (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range)))


def check(path: Path) -> None:
    """Bars and tags: those of the file as it is opened, of the container's bytes, and of the bitstream alone."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert tags(stream.codec_context) == TAGGED
        alone = av.CodecContext.create("h264", "r")
        alone.extradata = stream.codec_context.extradata
        frames = [frame for packet in file.demux(stream) for frame in alone.decode(packet)]
    assert tags(alone) == TAGGED and len(frames) >= 3
    for frame in frames:
        assert frame.format.name == "yuv420p"
        assert np.abs(middles(exact_rgb(frame.to_ndarray())) - BARS[:, :, None]).max() <= 2
    assert all(tag in path.read_bytes() for tag in CONTAINER_TAGS[path.suffix])


@pytest.mark.parametrize("suffix", CONTAINER_TAGS)
def test_a_file_holds_bt709_and_says_so(tmp_path: Path, suffix: str) -> None:
    check(write(tmp_path / f"bars{suffix}"))


@pytest.mark.parametrize("suffix", CONTAINER_TAGS)
def test_a_joined_file_does_too(tmp_path: Path, suffix: str) -> None:
    parts = [(write(tmp_path / f"{count}.mp4", count), count) for count in (3, 5)]
    check(join_videos(parts, tmp_path / f"joined{suffix}", np.zeros((8 * 640, 1), np.float32), 16000, 25))


@pytest.mark.parametrize("suffix", CONTAINER_TAGS)
def test_frames_that_are_read_back_have_the_colours_that_were_written(tmp_path: Path, suffix: str) -> None:
    frames = list(pictures_of(write(tmp_path / f"bars{suffix}")))
    assert [frame.shape for frame in frames] == [(1, *PICTURE.shape)] * 3
    for frame in frames:
        assert np.abs(middles(frame[0].astype(float)) - BARS[:, :, None]).max() <= 3  # and FFmpeg rounds


def test_nv12_is_bt709_of_each_2x2_pixels(numbers: np.random.Generator) -> None:
    height, width = 2 * numbers.integers(1, 80, 2)
    noise = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise.flags.writeable = False
    for picture in (PICTURE, noise, noise[:, ::-1]):
        got = to_nv12(picture)
        assert got.dtype == np.uint8
        assert np.abs(got - exact_nv12(picture)).max() <= 0.501  # to nearest


def of_another_standard(text: str) -> list[str]:
    """Names and weights of BT.601, and pictures that PyAV is left to convert, by BT.601."""
    weights = r"(?<![\d.])0?\.(?:299|587|114)(?!\d)"
    return re.findall(rf"(?i)\b(?:bt|itu)[.-]?601|smpte170m|{weights}|from_ndarray\(.*rgb24", text)


@pytest.mark.parametrize(
    "text",
    ["NV12: BT.601, limited range", "LUMA = [0.299, 0.587, 0.114]", "0.5 * r + .587f", "colorspace=ITU601",
     "VideoFrame.from_ndarray(pixels, format='rgb24')"],
)  # fmt: skip
def test_a_second_standard_is_seen(text: str) -> None:
    assert of_another_standard(text)


def test_there_is_one_standard() -> None:
    folders = ("engine", "kernels", "csrc", "examples", "bench", "distill", "samples")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    sources = [path for path in files if path.suffix in (".py", ".c", ".cpp", ".cu", ".h", ".hpp")]
    assert len(sources) > 100
    found = {str(path.relative_to(ROOT)): of_another_standard(path.read_text()) for path in sources}
    assert not {name: hits for name, hits in found.items() if hits}
