"""liverelay: a lean real-time inference engine for Live Avatar (arXiv 2512.04677).

    from liverelay.engine import Engine
    engine = Engine.load("ckpt/Wan2.2-S2V-14B")
    with engine.open("portrait.png", "A person talks.", audio="speech.wav") as session:
        for chunk in session.frames():
            show(chunk.frames, chunk.audio)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from liverelay.engine.config import DiTConfig, StreamConfig
from liverelay.engine.errors import (
    BusyError,
    CheckpointError,
    InputError,
    LiveRelayError,
    MissingExtraError,
    OutputError,
    RingClosedError,
    RingError,
    RingPeerError,
)
from liverelay.engine.version import __version__

if TYPE_CHECKING:
    from liverelay.engine.engine import Engine
    from liverelay.engine.frame_ring import FrameRing, RingFrame
    from liverelay.engine.session import Session
    from liverelay.engine.snapshot import Snapshot
    from liverelay.engine.steps import SteppedSession
    from liverelay.engine.stream import Chunk

__all__ = [
    "BusyError",
    "CheckpointError",
    "Chunk",
    "DiTConfig",
    "Engine",
    "FrameRing",
    "InputError",
    "LiveRelayError",
    "MissingExtraError",
    "OutputError",
    "RingClosedError",
    "RingError",
    "RingFrame",
    "RingPeerError",
    "Session",
    "Snapshot",
    "SteppedSession",
    "StreamConfig",
    "__version__",
]

_LAZY = {
    "Engine": "engine", "Session": "session", "Chunk": "stream", "Snapshot": "snapshot", "SteppedSession": "steps",
    "FrameRing": "frame_ring", "RingFrame": "frame_ring",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Engine and Session import the models, and the frame ring numpy; `import liverelay.engine` alone stays quick.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"liverelay.engine.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
