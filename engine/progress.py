"""Live progress of a long generation: blocks, frames, FPS, real-time factor, time to go; and interrupts in its way."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

LINE_EVERY_S = 5.0
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and a polite kill, which ends like it
PATIENCE_S = 5.0  # after an interrupt, in which another one is the same


class Progress:
    """One line on standard error, rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, total_frames: int | None, fps: int, stream: TextIO | None = None, *, done: int = 0) -> None:
        self._total, self._fps, self._done = total_frames, fps, done  # done: frames of an earlier run
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._started = time.perf_counter()
        self._shown = self._started
        self.first_frame_s: float | None = None

    def update(self, block: int, frames: int) -> None:
        """Show that `frames` video frames are done after `block` blocks."""
        now = time.perf_counter()
        if self.first_frame_s is None:
            self.first_frame_s = now - self._started
        if self._live or now - self._shown >= LINE_EVERY_S:
            self._shown = now
            self._write(self.line(block, frames, now - self._started))

    def line(self, block: int, frames: int, elapsed: float) -> str:
        """The text of the progress line."""
        rate = (frames - self._done) / max(elapsed, 1e-9)
        text = f"block {block}  frame {frames}"
        if self._total:
            to_go = (self._total - frames) / max(rate, 1e-9)
            text += f"/{self._total} ({100 * frames // self._total}%)  {_clock(to_go)} to go"
        return f"{text}  {rate:.1f} FPS  {rate / self._fps:.2f}x real time"

    def finish(self) -> None:
        """End the line."""
        if self._live:
            self._stream.write("\n")
            self._stream.flush()

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(line: str) -> None:
    """Tell the user what is being done, on standard error."""
    if sys.stderr is not None:  # closed by the caller; print would take standard output instead
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Another handler of interrupts; signals go to the main thread only."""
    with contextlib.ExitStack() as before:  # all of it is put back, also when an interrupt comes meanwhile
        if threading.current_thread() is threading.main_thread():
            for number in INTERRUPTS:
                before.callback(signal.signal, number, signal.signal(number, handler))
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and a polite kill wait until the body is done; then one comes."""
    came: list[int] = []
    with _handled(lambda number, _: came.append(number)):
        yield
    if came:
        signal.raise_signal(came[0])


def killable() -> contextlib.AbstractContextManager[None]:
    """Let Ctrl-C and a polite kill end the process at once: for waits inside a library, which lets no handler run."""
    return _handled(signal.SIG_DFL)


def catch_interrupts() -> None:
    """From now on Ctrl-C and a polite kill raise KeyboardInterrupt, but not a second time soon after: what the first
    one closes and names is not cut. One that was lost can be given again."""
    last = -math.inf

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > PATIENCE_S:
            last = now
            raise KeyboardInterrupt

    for number in INTERRUPTS:
        signal.signal(number, interrupt)


def ignore_interrupts() -> None:
    """The process is ending: threads that are left half-way would take it down."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
