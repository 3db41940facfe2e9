"""The frame ring between processes that are killed at any moment, and over memory that somebody damaged."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from liverelay.engine import frame_ring_layout as layout
from liverelay.engine.errors import RingError, RingPeerError
from liverelay.engine.frame_ring import FrameRing, Policy, sweep
from tests.ring_peer import picture

SHM = Path("/dev/shm")
PEER = Path(__file__).with_name("ring_peer.py")
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(ring_kind: str) -> Iterator[Start]:
    """Starts ring_peer.py; what still runs in the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(name: str, verb: str, *rest: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(PEER), ring_kind, name, verb, *map(str, rest)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    while word not in (line := process.stdout.readline()):
        assert line, f"the process ended without '{word}'"


def make(policy: Policy = "block", role: str = "writer", slots: int = 4) -> FrameRing:
    return FrameRing.create(frame_bytes=144, audio_samples=3, slots=slots, policy=policy, role=role)  # type: ignore[arg-type]


def check(ring: FrameRing, timeout: float) -> int:
    """Pop a frame, compare every byte, and give back its number; -1 when there was none in time."""
    item = ring.pop(timeout)
    if item is None:
        return -1
    np.testing.assert_array_equal(item.frame, picture(item.index))
    np.testing.assert_array_equal(item.audio, np.full(3, item.index, np.float32))
    assert item.sequence == item.index
    return item.index


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen within 30 s"
        time.sleep(0.01)


@pytest.mark.parametrize("policy", ["block", "drop_oldest"])
def test_two_processes_with_random_stalls(start: Start, policy: Policy, numbers: np.random.Generator) -> None:
    with make(policy, "reader") as ring:
        start(ring.name, "write", 3000, 100)
        seen = []
        while not seen or seen[-1] < 2999:
            seen.append(check(ring, 30))
            if numbers.random() < 0.02:
                time.sleep(numbers.random() * 0.005)
        assert seen == sorted(set(seen)) and seen[0] >= 0
        assert len(seen) + ring.dropped == 3000 and (policy == "drop_oldest" or ring.dropped == 0)


def test_a_killed_writer_is_seen_and_replaced(start: Start) -> None:
    with make(role="reader") as ring:
        first = start(ring.name, "write", 0, 0)
        until(lambda: ring.unread == 4)
        first.kill()  # not waited for: a zombie is dead too
        until(lambda: ring.peer == "dead")
        assert [check(ring, 0) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(RingPeerError, match=r"the writer of ring .* died"):
            check(ring, 30)
        start(ring.name, "write", 9, 0)
        until(lambda: ring.peer != "dead")
        assert [check(ring, 30) for _ in range(5)] == [4, 5, 6, 7, 8]


def test_a_killed_reader_frees_what_it_held(start: Start) -> None:
    with make() as ring:
        reader = start(ring.name, "read", 3)
        for number in range(4):
            assert ring.push(picture(number), np.full(3, number, np.float32), index=number, timeout=30)
        says(reader, "holding")
        reader.kill()
        until(lambda: ring.peer == "dead")
        with pytest.raises(RingPeerError, match=r"the reader of ring .* died"):
            ring.push(picture(4), np.full(3, 4, np.float32), index=4, timeout=30)
        with FrameRing.attach(ring.name) as second:
            assert check(second, 0) == 3
            for number in range(4, 8):  # all slots are of use again
                assert ring.push(picture(number), np.full(3, number, np.float32), index=number, timeout=0)


@pytest.mark.parametrize("policy", ["block", "drop_oldest"])
def test_processes_killed_at_random_moments(start: Start, policy: Policy, numbers: np.random.Generator) -> None:
    with make(policy, "reader", slots=3) as ring:
        last = -1
        for _ in range(4):
            writer = start(ring.name, "write", 0, 0)
            until(lambda: ring.peer == "alive")
            number = check(ring, 30)
            end = time.monotonic() + numbers.random() * 0.05
            while time.monotonic() < end:
                assert number > last
                last, number = number, check(ring, 30)
            writer.kill()
            with pytest.raises(RingPeerError):
                while True:
                    assert number > last
                    last, number = number, check(ring, 30)
    with make(policy, "writer", slots=3) as ring:
        number = 0
        for _ in range(4):
            reader = start(ring.name, "read", 0)
            says(reader, "reading")
            end = time.monotonic() + numbers.random() * 0.05
            while time.monotonic() < end:
                number += ring.push(picture(number), np.full(3, number, np.float32), index=number, timeout=1)
            reader.kill()
            until(lambda: ring.peer == "dead")
        with FrameRing.attach(ring.name) as second:
            unread = [check(second, 0) for _ in range(second.unread)]
            assert unread == sorted(unread) and check(second, 0) == -1


def test_a_forked_child_leaves_the_ring_alone(start: Start) -> None:
    with make(role="reader") as ring:
        writer = start(ring.name, "fork")
        says(writer, "opened before a fork")
        assert (item := ring.pop(30)) is not None and item.index == 1 and item.sequence == 0


def test_a_pid_that_was_used_again_is_no_owner(ring_kind: str) -> None:
    with make() as ring:
        with (SHM / ring.name).open("r+b") as file:
            file.seek(layout.READER_CLAIM)
            file.write(struct.pack("<Q", layout.identity() - 1))  # this pid, started at another time
        assert ring.peer == "dead"
        FrameRing.attach(ring.name).close()


def test_a_stopped_process_is_alive_but_silent(start: Start) -> None:
    with make(role="reader") as ring:
        writer = start(ring.name, "write", 3, 0)
        assert check(ring, 30) == 0
        writer.send_signal(signal.SIGSTOP)
        # It may have ended before the signal came; if not, only its silence tells.
        until(lambda: ring.peer_silent_s > 0.2)
        assert ring.peer == ("none" if writer.poll() is not None or ring.pushed == 3 else "alive")


def test_sweep_removes_the_segments_of_dead_owners_only(start: Start) -> None:
    with make() as living:
        other = start("-", "make")
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        assert name not in sweep() and (SHM / name).exists()
        young, old = (SHM / f"liverelay-ring-{os.urandom(8).hex()}" for _ in range(2))
        foreign = SHM / f"liverelay-ring-{os.urandom(8).hex()}"
        header = layout.Layout(2, 64, 0, False, False, 0, 0, layout.pid_namespace() + 1)
        try:
            for path in (young, old, foreign):
                path.touch(0o600)
            foreign.write_bytes(header.pack().ljust(header.total_bytes, b"\0"))
            os.utime(old, (0, 0))
            other.kill()
            other.wait()
            removed = sweep()
            assert {name, old.name} <= set(removed) and not (SHM / name).exists() and not old.exists()
            assert not {living.name, young.name, foreign.name} & set(removed)
        finally:
            for path in (young, old, foreign):
                path.unlink(missing_ok=True)


def test_a_damaged_header_is_refused(ring_kind: str, numbers: np.random.Generator) -> None:
    odd = (0, 1, 2, 4095, 4096, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1)
    refused = 0
    for _ in range(400):
        with make(slots=2) as ring:
            ring._end.close()  # the role is free, and the name is gone: the file is made anew
            good = layout.Layout(2, 144, 12, False, ring_kind == "python", 1, 2, layout.pid_namespace()).pack()
        text, fixed = bytearray(good.ljust(4096 + 2 * 4096, b"\0")), numbers.random() < 0.5
        for _ in range(int(numbers.integers(1, 4))):
            if numbers.random() < 0.5:
                text[int(numbers.integers(128))] ^= 1 << int(numbers.integers(8))
            else:
                struct.pack_into("<Q", text, 8 * int(numbers.integers(16)), odd[int(numbers.integers(len(odd)))])
        if fixed:
            struct.pack_into("<Q", text, 120, layout.checksum(bytes(text[:120])))
        size = len(text) if numbers.random() < 0.8 else int(numbers.integers(0, 2 * len(text)))
        path = SHM / ring.name
        path.touch(0o600)
        path.write_bytes(bytes(text).ljust(size, b"\0")[:size])
        try:
            with FrameRing.attach(ring.name) as end:
                assert size == len(text) and (fixed or text[:128] == good)
                assert end.slots == 2 and end.frame_bytes + end.audio_samples * 4 <= 4096 - 128
        except RingError:
            refused += 1
        finally:
            path.unlink()
    assert refused > 200


def test_damage_in_use_is_an_error_and_no_crash(ring_kind: str, numbers: np.random.Generator) -> None:
    for _ in range(60):
        with make("drop_oldest" if numbers.random() < 0.5 else "block", slots=3) as writer:
            reader = FrameRing.attach(writer.name)
            with (SHM / writer.name).open("r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
            places = (128, 4096, 8192, 12288)
            for number in range(30):
                at = int(numbers.choice(places)) + 8 * int(numbers.integers(16))
                memory[at : at + 8] = numbers.bytes(8) if numbers.random() < 0.5 else struct.pack("<Q", number)
                with suppress(RingError):
                    writer.push(picture(number), np.zeros(3, np.float32), timeout=0)
                try:
                    item = reader.pop(timeout=0)
                except RingError:
                    continue
                if item is not None:
                    assert item.audio.nbytes <= 12 and (item.frame is None or item.frame.nbytes <= 144)
                    bytes(item.audio), None if item.frame is None else bytes(item.frame)  # every byte is there
                item = None
            reader.close()


def test_only_the_damaged_frame_is_lost(ring_kind: str) -> None:
    with make() as writer, FrameRing.attach(writer.name) as reader:
        for number in range(3):
            writer.push(picture(number), np.full(3, number, np.float32), index=number)
        with (SHM / writer.name).open("r+b") as file:
            file.seek(4096 + 4096 + layout.META_OFFSET + 32)
            file.write(struct.pack("<I", 16000))  # the width of the second
        assert check(reader, 0) == 0
        with pytest.raises(RingError, match="holds a damaged frame"):
            reader.pop(0)
        assert check(reader, 0) == 2
        for number in range(3, 7):
            assert writer.push(picture(number), np.full(3, number, np.float32), index=number, timeout=0)
