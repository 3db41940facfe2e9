"""What the leader sends down the line, and when. Pure Python: the pipeline and the simulator drive the same rules.

Two blocks at most are dispatched that the first stage has not finished, so that a newcomer is not kept waiting. The
first block of a session's second clip, which takes the sink of the model's own first latent frame, is held until that
frame is known; its sink is made in the stages' shadow as soon as that is free, or else right before the block.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from liverelay.engine.relay.scheduler import Request, Scheduler

DISPATCHED = 2  # blocks: one that the first stage works on, one that waits for it
BUFFERS = 2  # of a link: a stage gets its next block while it works on one


class Dispatcher:
    """The scheduler with the order of blocks and sinks on the line. blocks_per_clip: before a session's sink changes.

    Whoever drives it asks `next` after every `request`, `clean` and `done`, and sends what it says in that order.
    """

    def __init__(self, scheduler: Scheduler, blocks_per_clip: int) -> None:
        self.scheduler, self.blocks_per_clip = scheduler, blocks_per_clip
        self._under_way = 0  # dispatched, not finished by the first stage
        self._shadow_of: Hashable = None  # the session whose sink the stages' shadows hold
        self._held: dict[Hashable, list[tuple[int, float]]] = {}  # blocks of sessions whose reference is not known yet

    def open(self, session: Hashable, rate: float = 0.0, *, known: bool = False) -> None:
        """Let a session in; ValueError as `Scheduler.admit`. known: its new reference is there (a saved state)."""
        self.scheduler.admit(session, rate)
        if not known:
            self._held[session] = []

    def close(self, session: Hashable) -> None:
        """The session has ended; what it wants is forgotten."""
        self.scheduler.remove(session)
        self._held.pop(session, None)
        if self._shadow_of == session:
            self._shadow_of = None

    def request(self, session: Hashable, block: int, deadline: float = math.inf) -> None:
        """Want a session's next block."""
        if block >= self.blocks_per_clip and session in self._held:
            self._held[session].append((block, deadline))
        else:
            self.scheduler.request(session, block, deadline)

    def clean(self, session: Hashable) -> bool:
        """A session's new reference is known. Whether its sink is to be made now: the shadow is free."""
        for block, deadline in self._held.pop(session, []):
            self.scheduler.request(session, block, deadline)
        if self._shadow_of is not None:
            return False
        self._shadow_of = session
        return True

    def done(self) -> None:
        """The first stage has finished a block."""
        self._under_way -= 1

    def next(self) -> tuple[Request, bool] | None:
        """The block to send now, and whether its session's sink has to be made before; None while there is no room."""
        if self._under_way >= DISPATCHED or (request := self.scheduler.next()) is None:
            return None
        self._under_way += 1
        changes = request.block == self.blocks_per_clip
        sink = changes and self._shadow_of != request.session  # another session's is in the shadow, or none
        if changes:
            self._shadow_of = None
        return request, sink
