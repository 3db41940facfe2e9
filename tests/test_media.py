"""Written videos are whole, in step, named only when finished; what cannot be written is one clear error."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from liverelay.engine.errors import InputError, MissingExtraError, OutputError
from liverelay.engine.media import ContactSheet, VideoWriter, check_writable, probe
from tests.colours import exact_rgb

av = pytest.importorskip("av", reason="PyAV is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

FPS, BLOCK = 25, 12


def decode(path: Path) -> tuple[list[float], np.ndarray, float, np.ndarray, int]:
    """Frame times, frames [n, H, W, 3] (0..255), time of the first sample, samples [m, channels], their rate."""
    times, frames, sound = [], [], []
    with av.open(str(path)) as file:
        streams = file.streams.video[0], file.streams.audio[0]
        for packet in file.demux(*streams):
            for frame in packet.decode():
                if packet.stream.type == "video":
                    times.append(float(frame.pts * frame.time_base))
                    frames.append(exact_rgb(frame.to_ndarray()))
                else:
                    sound.append((float(frame.pts * frame.time_base), frame.to_ndarray().T))
        return times, np.stack(frames), sound[0][0], np.concatenate([piece for _, piece in sound]), streams[1].rate


def write(writer: VideoWriter, frames: np.ndarray, sound: np.ndarray, rate: int) -> None:
    """Block by block, each with the sound of its time."""
    for start in range(0, len(frames), BLOCK):
        first, last = start * rate // FPS, (start + BLOCK) * rate // FPS
        writer.write(frames[start : start + BLOCK], sound[first:last])


def tiny(path: Path, **options: int) -> VideoWriter:
    return VideoWriter(path, fps=FPS, size=(64, 64), audio_rate=16000, **options)


def noise(numbers: np.random.Generator, frames: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    pixels = numbers.integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)
    return pixels, numbers.uniform(-0.5, 0.5, frames * 640).astype(np.float32)


@pytest.mark.parametrize(
    ("suffix", "rate", "channels", "written_rate"),
    [
        (".mp4", 16000, 1, 16000),
        (".mp4", 44100, 2, 44100),
        (".mkv", 48000, 1, 48000),
        (".mov", 22050, 2, 22050),
        (".mp4", 37800, 1, 48000),
        (".mp4", 192000, 6, 48000),
    ],
)
def test_a_flash_and_a_click_at_the_same_time_stay_together(
    tmp_path: Path, numbers: np.random.Generator, suffix: str, rate: int, channels: int, written_rate: int
) -> None:
    count, flash = 5 * BLOCK, int(numbers.integers(5, 55))
    frames = np.zeros((count, 64, 64, 3), dtype=np.uint8)
    frames[flash] = 255
    sound = np.zeros((count * rate // FPS, channels), dtype=np.float32)
    sound[flash * rate // FPS :][: rate // 500] = 0.8
    path = tmp_path / f"video{suffix}"
    writer = VideoWriter(path, fps=FPS, size=(64, 64), audio_rate=rate, audio_channels=channels)
    write(writer, frames, sound, rate)
    assert writer.close() == path

    times, seen, sound_start, heard, heard_rate = decode(path)
    assert np.allclose(np.diff(times), 1 / FPS, atol=2e-3)
    assert len(seen) == count and int(seen.mean(axis=(1, 2, 3)).argmax()) == flash
    click_s = sound_start + np.abs(heard).sum(axis=1).argmax() / heard_rate
    assert abs(click_s - times[flash]) < 1 / FPS
    facts = probe(path)
    assert (facts.frames, facts.fps, facts.width, facts.height) == (count, FPS, 64, 64)
    assert facts.audio_channels == min(channels, 2)
    assert facts.audio_rate == heard_rate == written_rate
    assert abs(facts.audio_duration_s - count / FPS) < 3 * 1024 / heard_rate


def test_colours_survive(tmp_path: Path) -> None:
    colours = np.array([[200, 40, 40], [40, 180, 60], [30, 60, 200], [120, 120, 120], [255, 255, 255], [0, 0, 0]])
    frames = np.broadcast_to(colours.astype(np.uint8)[:, None, None], (6, 64, 64, 3))
    with_sound = tiny(tmp_path / "colours.mp4")
    with_sound.write(frames, np.zeros(6 * 640, dtype=np.float32))
    with_sound.close()
    _, seen, *_ = decode(tmp_path / "colours.mp4")
    assert np.abs(seen - frames).max() <= 3


def test_sound_keeps_its_loudness_and_pitch(tmp_path: Path) -> None:
    time_s = np.arange(2 * 16000) / 16000
    writer = tiny(tmp_path / "tone.mp4")
    tone = (0.5 * np.sin(2 * np.pi * 440 * time_s)).astype(np.float32)
    write(writer, np.zeros((50, 64, 64, 3), np.uint8), tone, 16000)
    writer.close()
    heard = decode(tmp_path / "tone.mp4")[3][4000:28000, 0]
    spectrum = np.abs(np.fft.rfft(heard))
    assert abs(spectrum.argmax() * 16000 / len(heard) - 440) < 1
    assert np.sqrt(2 * np.mean(heard**2)) == pytest.approx(0.5, rel=0.03)


def test_the_name_appears_only_when_the_file_is_whole(tmp_path: Path, numbers: np.random.Generator) -> None:
    path = tmp_path / "äöü 漢字 'quoted'.mp4"
    path.write_bytes(b"the video of yesterday")
    writer = tiny(path)
    writer.write(*noise(numbers))
    assert path.read_bytes() == b"the video of yesterday"
    writer.close()
    assert probe(path).frames == BLOCK
    assert list(tmp_path.iterdir()) == [path]


def test_abort_leaves_nothing_new(tmp_path: Path, numbers: np.random.Generator) -> None:
    writer = tiny(tmp_path / "video.mp4")
    writer.write(*noise(numbers))
    writer.abort()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [2, 30])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, numbers: np.random.Generator, blocks: int
) -> None:
    writer = tiny(tmp_path / "video.mp4")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*video\.mp4: File too large"):
            try:
                for _ in range(blocks):
                    writer.write(*noise(numbers))
                writer.close()
            except OutputError:
                writer.abort()
                raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_file_that_can_be_written_is_left_alone_by_the_check(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"old")
    check_writable(tmp_path / "video.mp4")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere does not exist"):
        check_writable(tmp_path / "nowhere" / "video.mp4")
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match="/dev/null: it is a device"):
        check_writable(Path("/dev/null"))
    with pytest.raises(OutputError, match="name too long"):
        check_writable(tmp_path / f"{'x' * 300}.mp4")


def test_a_folder_that_goes_away_is_named(tmp_path: Path, numbers: np.random.Generator) -> None:
    writer = tiny(tmp_path / "nowhere" / "video.mp4")
    with pytest.raises(OutputError, match=r"nowhere.*No such file"):
        for _ in range(30):
            writer.write(*noise(numbers))
    writer.abort()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_folder_that_takes_no_files_is_refused() -> None:
    with pytest.raises(OutputError, match=r"cannot write /proc/video\.mp4: \w+"):
        check_writable(Path("/proc/video.mp4"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "video.mp4")


@pytest.mark.parametrize("name", ["video.avi", "video", "video.txt"])
def test_unknown_containers_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"\.mp4, .*\.mkv"):
        tiny(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"liverelay\[media\]"):
        tiny(tmp_path / "video.mp4")


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"not what it seems" * 100)
    with pytest.raises(InputError, match="not a playable video"):
        probe(tmp_path / "video.mp4")


@pytest.mark.parametrize("count", [1, 7, 24, 1000, 4321])
def test_a_contact_sheet_spreads_over_the_whole_stream_in_bounded_memory(tmp_path: Path, count: int) -> None:
    sheet = ContactSheet(FPS)
    for start in range(0, count, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, count))
        shade = (numbers * 255 // count).astype(np.uint8)
        sheet.add(np.broadcast_to(shade[:, None, None, None], (len(numbers), 32, 64, 3)))
        assert sheet.kept_frames <= 48
    sheet.save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture)
    columns, rows = min(6, count), -(-min(24, count) // 6)
    assert pixels.shape == (rows * (96 + 4 + 14) + 4, columns * (192 + 4) + 4, 3)
    shades = [int(pixels[4 + 48 + i // 6 * 114, 4 + 96 + i % 6 * 196, 0]) for i in range(min(24, count))]
    assert shades == sorted(shades) and shades[0] == 0
    if count > 100:
        assert shades[-1] > 240 and max(np.diff(shades)) <= 2 * 255 / 24


def test_an_empty_contact_sheet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no frames"):
        ContactSheet(FPS).save(tmp_path / "sheet.png")
