"""The few error types a caller meets. Each message is one line: what is wrong and what to do about it."""

from __future__ import annotations


class LiveRelayError(Exception):
    """Base of every error that liverelay raises on purpose; the command line prints it and exits with 1."""


class CheckpointError(LiveRelayError):
    """A file of the checkpoint is missing, truncated, or holds a key or shape that does not fit."""


class InputError(LiveRelayError, ValueError):
    """An image, sound, size or option given by the user cannot be used."""


class BusyError(InputError):
    """There is no place, or no time, for one more session now; it can be tried again, or elsewhere."""


class StageLost(LiveRelayError):
    """A stage of the line has died, hangs, failed or lost its device; the text names it. Its line is over."""


class OutputError(LiveRelayError):
    """A result cannot be written where the user wants it."""


class RingError(LiveRelayError):
    """A frame ring cannot be made, opened or used: it is not ours, damaged, gone, taken or full of held frames."""


class RingClosedError(RingError):
    """The writer has ended the stream, and every frame was read."""


class RingPeerError(RingError):
    """The process on the other side died. The ring stays usable: another one can take its place."""


class MissingExtraError(LiveRelayError, ImportError):
    """An optional library is not installed."""

    def __init__(self, library: str, purpose: str, extra: str) -> None:
        super().__init__(f"{library} is needed {purpose}; install it with: pip install 'liverelay[{extra}]'")
