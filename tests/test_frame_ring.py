"""The frame ring within one process, compiled and Python twin: order, back-pressure, drops, views, what is refused."""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from liverelay.engine import frame_ring_layout as layout
from liverelay.engine import native
from liverelay.engine.errors import InputError, RingClosedError, RingError
from liverelay.engine.frame_ring import FrameRing, Policy, RingFrame
from tests.ring_peer import picture

SHM = Path("/dev/shm")
BYTES, SAMPLES = 144, 5  # of the test's pictures: 6 x 8


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = set(SHM.glob("liverelay-ring-*"))
    yield
    assert set(SHM.glob("liverelay-ring-*")) <= before


def make(policy: Policy = "block", slots: int = 4) -> tuple[FrameRing, FrameRing]:
    writer = FrameRing.create(frame_bytes=BYTES, audio_samples=SAMPLES, slots=slots, policy=policy)
    return writer, FrameRing.attach(writer.name)


def take(ring: FrameRing) -> RingFrame:
    item = ring.pop(timeout=20)
    assert item is not None
    return item


def number_of(item: RingFrame) -> int:
    """The number of a picture, after its bytes were compared with what that number has."""
    assert item.frame is not None
    np.testing.assert_array_equal(item.frame, picture(item.index))
    return item.index


def test_what_is_pushed_comes_out(ring_kind: str, numbers: np.random.Generator) -> None:
    writer, reader = make()
    with writer, reader:
        assert writer.kind == reader.kind == ring_kind
        nv12 = numbers.integers(0, 256, (9, 8), np.uint8)
        sound = numbers.standard_normal(SAMPLES).astype(np.float32)
        assert writer.push(picture(3)[::-1], sound[:3], index=2**40, pts_ns=-7, sample_rate=48000)
        assert writer.push(nv12, pixel_format="nv12")
        assert writer.push(None, sound)
        assert reader.unread == writer.pushed == 3
        first, second, third = (take(reader) for _ in range(3))
        assert first.frame is not None and second.frame is not None and third.frame is None
        np.testing.assert_array_equal(first.frame, picture(3)[::-1])
        np.testing.assert_array_equal(first.audio, sound[:3])
        assert (first.sequence, first.index, first.pts_ns, first.sample_rate) == (0, 2**40, -7, 48000)
        assert (first.pixel_format, second.pixel_format, third.pixel_format) == ("rgb24", "nv12", None)
        np.testing.assert_array_equal(second.frame, nv12)
        assert second.audio.shape == (0,) and first.pushed_ns <= second.pushed_ns <= third.pushed_ns
        np.testing.assert_array_equal(third.audio, sound)
        assert third.sequence == 2 and reader.unread == 0


def test_frames_are_views_of_the_shared_memory(ring_kind: str) -> None:
    writer, reader = make()
    with writer, reader:
        writer.push(picture(0), np.ones(2, np.float32))
        item = take(reader)
        assert item.frame is not None
        tensor = torch.from_dlpack(item.frame)
        assert tensor.data_ptr() == item.frame.ctypes.data == np.from_dlpack(item.frame).ctypes.data
        for address in (item.frame.ctypes.data, item.audio.ctypes.data):
            (line,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if writer.name in line
                       and int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16))  # fmt: skip
            assert address % 64 == 0, line


def test_a_full_ring_holds_the_writer_back(ring_kind: str) -> None:
    writer, reader = make(slots=3)
    with writer, reader:
        assert [writer.push(picture(i), index=i, timeout=0.01) for i in range(4)] == [True, True, True, False]
        held = take(reader)
        assert not writer.push(picture(3), index=3, timeout=0.01)  # read, but not given back
        held.release()
        assert writer.push(picture(3), index=3, timeout=0.01)
        assert [number_of(take(reader)) for _ in range(3)] == [1, 2, 3]
        assert writer.dropped == 0


def test_a_waiting_writer_goes_on_when_a_frame_is_given_back(ring_kind: str) -> None:
    writer, reader = make(slots=2)
    with writer, reader:
        pushing = threading.Thread(target=lambda: [writer.push(picture(i), index=i) for i in range(40)])
        pushing.start()
        assert [number_of(take(reader)) for _ in range(40)] == list(range(40))
        pushing.join(timeout=20)
        assert not pushing.is_alive()


def test_drop_oldest_gives_up_the_oldest(ring_kind: str) -> None:
    writer, reader = make("drop_oldest", slots=4)
    with writer, reader:
        assert all(writer.push(picture(i), index=i) for i in range(11))
        assert writer.dropped == 7 and reader.unread == 4
        items = [take(reader) for _ in range(3)]
        assert [number_of(item) for item in items] == [item.sequence for item in items] == [7, 8, 9]
        del items
        assert number_of(take(reader)) == 10 and reader.pop(timeout=0) is None


@pytest.mark.parametrize("policy", ["block", "drop_oldest"])
def test_what_is_held_is_never_overwritten(ring_kind: str, policy: Policy, numbers: np.random.Generator) -> None:
    writer, reader = make(policy, slots=5)
    held: list[RingFrame] = []
    read = refused = 0

    def read_some() -> int:
        before = len(held)
        while len(held) < 4 and numbers.random() < 0.45 and (item := reader.pop(timeout=0)):
            held.append(item)
        return len(held) - before

    with writer, reader:
        for number in range(300):
            refused += not writer.push(picture(number), index=number, timeout=0)
            read += read_some()
            seen = [number_of(item) for item in held]
            assert seen == sorted(seen)
            if held and numbers.random() < 0.4:
                held.pop(int(numbers.integers(len(held))))
        assert writer.pushed + refused == 300 and bool(refused) == (policy == "block")
        assert read + reader.unread + writer.dropped == writer.pushed
        held.clear()


def test_a_slot_goes_back_with_the_last_array(ring_kind: str) -> None:
    writer, reader = make(slots=2)
    with writer, reader:
        writer.push(picture(0))
        item = take(reader)
        assert item.frame is not None
        row = torch.from_dlpack(item.frame)[2:3]
        item.release()
        with pytest.raises(RingError, match="all frames but one are held"):
            reader.pop(timeout=0)
        for number in range(1, 9):
            writer.push(picture(number), index=number, timeout=0)
        np.testing.assert_array_equal(row.numpy(), picture(0)[2:3])
        del row
        assert number_of(take(reader)) == 1


def test_views_outlive_the_ring(ring_kind: str) -> None:
    writer, reader = make()
    writer.push(picture(4), index=4)
    item = take(reader)
    writer.close()
    reader.close()
    del writer, reader
    assert number_of(item) == 4


def test_closing_ends_the_stream_after_what_is_unread(ring_kind: str) -> None:
    writer, reader = make()
    for number in range(3):
        writer.push(picture(number), index=number)
    writer.close()
    writer.close()
    assert not (SHM / writer.name).exists()
    assert [number_of(item) for item in reader] == [0, 1, 2]
    with pytest.raises(RingClosedError, match="ended the stream"):
        reader.pop()
    with pytest.raises(RingError, match="this end of the ring is closed"):
        writer.push(picture(0))
    reader.close()


def test_closing_wakes_a_reader_of_another_thread(ring_kind: str) -> None:
    writer, reader = make()
    with writer:
        errors: list[str] = []

        def read() -> None:
            try:
                reader.pop()
            except RingError as error:
                errors.append(str(error))

        waiting = threading.Thread(target=read)
        waiting.start()
        reader.close()
        waiting.join(timeout=20)
        assert errors == ["this end of the ring is closed"]


def test_each_role_is_taken_once(ring_kind: str) -> None:
    writer, reader = make()
    with writer:
        for role, ring in (("writer", writer), ("reader", reader)):
            with pytest.raises(RingError, match=f"has a live {role} already"):
                FrameRing.attach(ring.name, ring.role)
        with pytest.raises(RingError, match="a reader is needed"):
            writer.pop()
        assert writer.peer == reader.peer == "alive"
        reader.close()
        assert writer.peer == "none"
        writer.push(picture(1), index=1)
        with FrameRing.attach(writer.name) as second:
            assert number_of(take(second)) == 1
            assert 0 <= writer.peer_silent_s < 60


@pytest.mark.parametrize(("arguments", "text"), [
    ({"frame_bytes": -1}, "frame_bytes is -1"), ({"frame_bytes": 1 << 29}, "256 MiB"), ({"frame_bytes": 0}, "room"),
    ({"frame_bytes": 1, "slots": 1}, "2 to 1024 slots"), ({"frame_bytes": 1 << 28, "slots": 1024}, "8 GiB"),
    ({"frame_bytes": 1, "audio_samples": 1 << 23}, "16 MiB"), ({"frame_bytes": 1, "policy": "drop"}, "'drop'"),
    ({"frame_bytes": 1, "role": "both"}, "give writer or reader"),
])  # fmt: skip
def test_sizes_are_bounded(ring_kind: str, arguments: dict[str, int], text: str) -> None:
    with pytest.raises((InputError, RingError), match=text):
        FrameRing.create(**arguments)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_and_changes_nothing(ring_kind: str) -> None:
    writer, reader = make(slots=2)
    with writer, reader:
        for frame, options in ((picture(0, 7), {}), (np.zeros((6, 8, 3)), {}), (np.zeros((6, 8), np.uint8), {}),
                               (np.zeros((9, 7), np.uint8), {"pixel_format": "nv12"}),
                               (picture(0), {"pixel_format": "x"}), (None, {"audio": np.zeros(2)}),
                               (None, {"audio": np.zeros(6, np.float32)})):  # fmt: skip
            with pytest.raises(InputError):
                writer.push(frame, **options)  # type: ignore[arg-type]
        with pytest.raises((TypeError, struct.error, OverflowError)):
            writer.push(picture(0), index=-1)
        assert writer.pushed == 0 and all(writer.push(picture(i), index=i, timeout=0) for i in range(2))
        assert number_of(take(reader)) == 0


def test_segments_are_the_owners_alone(ring_kind: str) -> None:
    old = os.umask(0)
    try:
        writer, reader = make()
    finally:
        os.umask(old)
    path = SHM / writer.name
    with writer:
        assert path.stat().st_mode & 0o777 == 0o600
        reader.close()
        path.chmod(0o644)
        with pytest.raises(RingError, match="not this user's own"):
            FrameRing.attach(writer.name)


@pytest.mark.parametrize("name", [
    "", "/etc/passwd", "../etc/passwd", "liverelay-ring-", "liverelay-ring-0123456789abcdeg",
    "/liverelay-ring-" + "0" * 16, "liverelay-ring-" + "0" * 17, "liverelay-ring-" + "0" * 15 + "\n",
    "liverelay-ring-" + "0" * 15 + "\0",
])  # fmt: skip
def test_only_generated_names_are_opened(ring_kind: str, name: str) -> None:
    with pytest.raises(RingError, match="no name of a ring"):
        FrameRing.attach(name)


def test_links_and_missing_rings_are_refused(ring_kind: str) -> None:
    writer, reader = make()
    reader.close()
    link = SHM / f"liverelay-ring-{os.urandom(8).hex()}"
    link.symlink_to(SHM / writer.name)
    try:
        with writer, pytest.raises(RingError, match="cannot open"):
            FrameRing.attach(link.name)
    finally:
        link.unlink()
    with pytest.raises(RingError, match="there is no ring"):
        FrameRing.attach(writer.name)


def test_the_two_kinds_have_one_layout_and_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(native.module(), "ring_create"):
        pytest.skip("the compiled module was not built")
    with FrameRing.create(frame_bytes=1001, audio_samples=7, slots=3, policy="drop_oldest") as compiled:
        text = (SHM / compiled.name).read_bytes()
        header = layout.Layout.parse(text, len(text), compiled.name)
        assert (header.slots, header.frame_bytes, header.audio_bytes, header.drop_oldest) == (3, 1001, 28, True)
        assert header.pack() == text[: layout.STATIC_BYTES] and header.creator == layout.identity()
        compiled.push(picture(0), np.arange(7, dtype=np.float32), index=5, pts_ns=-9)
        text = (SHM / compiled.name).read_bytes()
        slot = text[header.slot(0) :]
        meta = layout.META.unpack_from(slot, layout.META_OFFSET)
        assert meta[:3] == (0, 5, -9) and meta[4:] == (8, 6, layout.RGB24, 144, 28, 16000)
        assert slot[layout.SLOT_HEADER_BYTES :][:144] == picture(0).tobytes()
        assert slot[header.audio_offset :][:28] == np.arange(7, dtype=np.float32).tobytes()
        word, head, pushed = (struct.unpack_from("<Q", text, at)[0]
                              for at in (header.slot(0), layout.HEAD, layout.PUSHED))  # fmt: skip
        assert (word, head, pushed) == (layout.FULL, 1, 1)
        monkeypatch.setitem(sys.modules, "liverelay.engine._C", None)
        with pytest.raises(RingError, match="belongs to the compiled module"):
            FrameRing.attach(compiled.name)
        with FrameRing.create(frame_bytes=9) as twin:
            monkeypatch.undo()
            with pytest.raises(RingError, match="belongs to the Python twin"):
                FrameRing.attach(twin.name)
