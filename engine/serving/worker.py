"""One session of a server, in a thread of its own: sound from its ring into the engine, frames into theirs.

All use of the engine's session is here, between two blocks: requests wait in a queue for it. A client that is slow
stops its own thread only.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any

import numpy as np

from liverelay.engine.errors import InputError, LiveRelayError, RingClosedError, RingError, RingPeerError
from liverelay.engine.frame_ring import FrameRing, PixelFormat, Policy
from liverelay.engine.media import to_nv12
from liverelay.engine.models.audio import SAMPLE_RATE
from liverelay.engine.serving.protocol import Code
from liverelay.engine.serving.states import States
from liverelay.engine.session import Session
from liverelay.engine.stream import Chunk

SOUND_SLOTS, SOUND_SAMPLES = 256, 4096  # of the ring, samples at the client's rate
AHEAD_S = 10.0  # sound that is taken out of the ring before it is needed
WAIT_S = 0.02  # between two looks at what has come
ATTACH_S = 20.0  # a client has this long to open its rings
QUIET_S = 0.3  # an idle session fills in silence when no sound has come for so long
RUNS, ENDED, FAILED = 1, 2, 3
SECOND_NS = 1_000_000_000


class StateError(LiveRelayError):
    """What was asked for is not possible now."""


@dataclass(frozen=True)
class Output:
    """How a client wants its frames. idle: the stream goes on in silence when there is no sound."""

    pixels: PixelFormat = "rgb24"
    policy: Policy = "block"
    slots: int = 8
    idle: bool = False


class _Stop(Exception):
    """The session is to end."""


class Worker:
    """states: where snapshots go. `fault` says why a session failed."""

    def __init__(self, session: Session, output: Output, states: States) -> None:
        self._session, self._output, self._states = session, output, states
        self.size, self.fps = session.size, session.engine.stream.fps
        width, height = self.size
        pixels = width * height * 3 // (1 if output.pixels == "rgb24" else 2)
        self.frames = FrameRing.create(
            frame_bytes=pixels, audio_samples=SAMPLE_RATE // self.fps, slots=output.slots, policy=output.policy
        )
        try:
            self.sound = FrameRing.create(
                frame_bytes=0, audio_samples=SOUND_SAMPLES, slots=SOUND_SLOTS, role="reader"
            )
        except RingError:
            self.frames.close()
            raise
        self.state, self.fault, self.made, self.busy_since = RUNS, (Code.ENGINE, ""), 0, 0.0
        self.next_frame, self.heard = session.next_frame, session.heard_samples
        self._sound_ended = session.total_frames is not None
        self._last_sound = self._shown_until = 0.0
        self._requests: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)

    # -- for the thread of the connection --------------------------------------------------------------------------

    def begin(self) -> None:
        """Start, if it has not: once the client knows the rings."""
        if self._thread.ident is None:
            self._thread.start()

    def interrupt(self) -> int:
        """Forget the sound that no block was asked for, in the ring too; number of the frame that is free again."""
        return int(self._ask(self._interrupt))

    def snapshot(self) -> tuple[str, int]:
        """Keep the session's state: its token, and the frame with which a resumed session begins."""
        found: tuple[str, int] = self._ask(self._snapshot)
        return found

    def stop(self) -> None:
        """Ask for the end."""
        self._stopping.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end."""
        if self._thread.ident is None:
            self._finish()
        else:
            self._thread.join(timeout)

    def _ask(self, action: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        self._requests.put((action, future))
        while True:
            try:
                return future.result(timeout=0.1)
            except NotYet:
                if self.state != RUNS and not future.done():
                    raise StateError("the stream of this session has ended") from None

    # -- the session's own thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        state = ENDED
        try:
            self._await_client()
            while True:
                self._attend()
                chunk = self._next_chunk()
                if chunk is not None:
                    self._deliver(chunk)
                elif self._sound_ended:
                    break
                else:
                    self._hear(WAIT_S)
        except (_Stop, RingPeerError):
            state, self.fault = FAILED, (Code.LOST, "the session was ended before its stream")
        except (InputError, RingError) as error:  # what the client has put into the ring
            state, self.fault = FAILED, (Code.INPUT, str(error))
        except Exception as error:
            state, self.fault = FAILED, (Code.ENGINE, str(error) or type(error).__name__)
        self.state = state
        self._finish()

    def _finish(self) -> None:
        self._session.close()
        self.frames.close()
        self.sound.close()

    def _await_client(self) -> None:
        deadline = time.monotonic() + ATTACH_S
        while self.frames.peer != "alive":
            if self._stopping.wait(0.002) or time.monotonic() > deadline:
                raise _Stop

    def _next_chunk(self) -> Chunk | None:
        session = self._session
        self.next_frame = session.next_frame
        self.busy_since = time.monotonic()
        try:
            return next(session.frames(idle=self._silence_is_due()), None)
        finally:
            self.busy_since = 0.0

    def _silence_is_due(self) -> bool:
        """Whether an idle session has nothing else to go on with, and its video would otherwise stand still."""
        if not self._output.idle or self._sound_ended or self._session.has_sound(self._session.next_block):
            return False
        now = time.monotonic()
        speaks = self.heard > self._session.next_frame * SAMPLE_RATE // self.fps  # do not cut what is being said
        quiet = now - self._last_sound > QUIET_S
        return now >= self._shown_until - self._session.engine.stream.block_seconds and (quiet or not speaks)

    def _deliver(self, chunk: Chunk) -> None:
        samples = SAMPLE_RATE // self.fps
        for i, frame in enumerate(chunk.frames):
            index = chunk.first_frame + i
            picture = to_nv12(frame) if self._output.pixels == "nv12" else frame
            sound = chunk.audio[i * samples : (i + 1) * samples]
            self._push(picture, np.ascontiguousarray(sound, np.float32), index)
            self.made += 1
        self._shown_until = max(self._shown_until, time.monotonic()) + len(chunk.frames) / self.fps

    def _push(self, picture: Any, sound: Any, index: int) -> None:
        pts_ns, pixels = index * SECOND_NS // self.fps, self._output.pixels
        while not self.frames.push(
            picture, sound, index=index, pts_ns=pts_ns, pixel_format=pixels, sample_rate=SAMPLE_RATE, timeout=WAIT_S
        ):
            self._attend()
            if self._output.policy == "drop_oldest":  # the client holds every slot: this frame is the dropped one
                return

    def _attend(self) -> None:
        """What must not wait for the next block: the end, requests, sound."""
        if self._stopping.is_set():
            raise _Stop
        while not self._requests.empty():
            action, future = self._requests.get()
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)
        limit = AHEAD_S * SAMPLE_RATE + self._session.next_frame * SAMPLE_RATE // self.fps
        while self.heard < limit and self._hear(0.0):
            pass

    def _hear(self, timeout: float) -> bool:
        """One piece of sound from the ring; False when there is none."""
        piece = self._pop(timeout)
        if piece is None:
            return False
        self._session.push_audio(piece[0], piece[1])
        self._last_sound, self.heard = time.monotonic(), self._session.heard_samples
        return True

    def _pop(self, timeout: float) -> tuple[Any, int] | None:
        """Samples and their rate. The slot is free again when the array is gone."""
        if self._sound_ended:
            self._stopping.wait(timeout)
            return None
        try:
            item = self.sound.pop(timeout)
        except RingClosedError:
            self._session.end_audio()
            self._sound_ended, self.heard = True, self._session.heard_samples  # with what the resampler held back
            return None
        return None if item is None else (item.audio, item.sample_rate)

    def _interrupt(self) -> int:
        while self._pop(0.0) is not None:
            pass
        self._session.interrupt()
        self.heard = self._session.heard_samples
        return self.heard * self.fps // SAMPLE_RATE

    def _snapshot(self) -> tuple[str, int]:
        for _ in range(SOUND_SLOTS):  # what was pushed before is in it
            if not self._hear(0.0):
                break
        return self._states.put(self._session.snapshot()), self._session.next_frame
