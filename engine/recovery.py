"""A run that was cut off goes on: its video so far and the session's last snapshot, in a folder beside the output.

`talk.mp4.resume/` holds the video in pieces, each whole, and state.json, which names the pieces and the snapshot that
belong together. state.json is replaced last, so whatever is killed when, the folder tells of one moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from liverelay.engine.errors import InputError, OutputError
from liverelay.engine.media import Frames, Sound, VideoWriter, holds_frames, join_videos, part_path, pictures_of
from liverelay.engine.session import Session
from liverelay.engine.snapshot import Snapshot

STATE = "state.json"


def digest(array: Any) -> str:
    """Tells pictures and sounds apart."""
    values = np.ascontiguousarray(array)
    return hashlib.sha256(f"{values.shape} {values.dtype}".encode() + values.tobytes()).hexdigest()[:16]


class RecoverableVideo:
    """A VideoWriter whose work survives its process. `folder` is locked until `release` or `abort`.

    run: what decides the result, by the name that a user knows; a folder of another run is refused. sound
    [m, channels] of `rate`: all of it, as it goes into the video.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], *, sound: Sound, rate: int, fps: int) -> None:
        self.out, self.folder = out, out.with_name(f"{out.name}.resume")
        self._run, self._sound, self._rate, self._fps = dict(run), sound, rate, fps
        self.pieces: list[tuple[str, int]] = []  # file and frames
        self._writer: VideoWriter | None = None
        self._size = (0, 0)
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another process is making {out}; wait for it or give another --out") from None
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror}") from None

    def resume(self) -> Snapshot | None:
        """The snapshot that an earlier run left; None where there is none. InputError where it is of another run."""
        found = self.folder / STATE
        if not found.exists():
            return None
        try:
            state = json.loads(found.read_text())
            run, pieces, snapshot = dict(state["run"]), state["pieces"], str(state["snapshot"])
            self.pieces = [(str(name), int(frames)) for name, frames in pieces]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{found} cannot be read ({error}); delete {self.folder} to begin anew") from None
        other = [name for name in self._run if run.get(name) != self._run[name]]
        if other:
            raise InputError(
                f"{self.folder} is of a run with another {', '.join(other)}; delete it to begin anew, or give another "
                "--out"
            )
        for name, frames in self.pieces:
            if not holds_frames(self.folder / name, frames):
                raise InputError(f"{self.folder / name} is damaged or gone; delete {self.folder} to begin anew")
        self._tidy({STATE, snapshot, *(name for name, _ in self.pieces)})
        return Snapshot.load(self.folder / snapshot)

    def _tidy(self, keep: set[str]) -> None:
        """Delete what was half-written when the earlier run ended."""
        for path in self.folder.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def begin(self, size: tuple[int, int]) -> None:
        """Say how large the frames are: (width, height)."""
        self._size = size

    @property
    def frames(self) -> int:
        """Of the video so far."""
        return sum(frames for _, frames in self.pieces) + (0 if self._writer is None else self._writer.frames)

    def show(self, see: Callable[[Frames], None]) -> None:
        """Show the frames of an earlier run, [1, H, W, 3] each."""
        for name, _ in self.pieces:
            for frame in pictures_of(self.folder / name):
                see(frame)

    def write(self, frames: Frames, audio: Sound) -> None:
        """Append frames [n, H, W, 3]; the sound is put to them in the end."""
        if self._writer is None:
            self._writer = VideoWriter(self.folder / f"video-{len(self.pieces)}.mp4", fps=self._fps, size=self._size)
        self._writer.write(frames, audio)

    def save(self, session: Session) -> None:
        """Make what was written and the session's state last."""
        snapshot = f"session-{session.next_block}.safetensors"
        session.snapshot().save(self.folder / snapshot)
        self._end_piece()
        state = {"run": self._run, "pieces": self.pieces, "snapshot": snapshot}
        part = part_path(self.folder / STATE)
        try:
            part.write_text(json.dumps(state, indent=1))
            os.replace(part, self.folder / STATE)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder / STATE}: {error.strerror}") from None
        self._tidy({STATE, snapshot, *(name for name, _ in self.pieces)})

    def _end_piece(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self.pieces.append((writer.close().name, writer.frames))

    def close(self, path: Path | None = None) -> Path:
        """Write the whole video; the folder stays until `remove`."""
        self._end_piece()
        files = [(self.folder / name, frames) for name, frames in self.pieces]
        return join_videos(files, path or self.out, self._sound, self._rate, self._fps)

    def abort(self) -> None:
        """Leave what was saved, and nothing else."""
        if self._writer is not None:
            self._writer.abort()
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # where nothing was saved
        self.release()

    def release(self) -> None:
        """Let another process go on in the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """The video is done: nothing is left to go on with."""
        shutil.rmtree(self.folder, ignore_errors=True)
