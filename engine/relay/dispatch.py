"""What the leader sends down the line, and when. Pure Python: the pipeline and the simulator drive the same rules.

Blocks on the line cannot be overtaken any more, so no more are sent than keep it busy, and a newcomer is not kept
waiting: two that the first stage has not finished, one for each stage and one more on the whole line. (Without the
second rule blocks pile up before the slowest stage, and a file's make a live session late that the line has time for.)
The first block of a session's second clip, which takes the sink of the model's own first latent frame, is held until
that frame is known; its sink is made in the stages' shadow as soon as that is free, or else right before the block.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from liverelay.engine.relay.scheduler import Request, Scheduler

DISPATCHED = 2  # blocks: one that the first stage works on, one that waits for it
BUFFERS = 2  # of a link: a stage gets its next block while it works on one


class Dispatcher:
    """The scheduler with the order of blocks and sinks on a line of `stages`.

    blocks_per_clip: before a session's sink changes. Whoever drives it asks `next` after every `request`, `clean` and
    `done`, and sends what it says in that order.
    """

    def __init__(self, scheduler: Scheduler, stages: int, blocks_per_clip: int) -> None:
        self.scheduler, self.stages, self.blocks_per_clip = scheduler, stages, blocks_per_clip
        self._entering = 0  # dispatched, not finished by the first stage
        self._on_line = 0  # dispatched, not finished by the last stage
        self._shadow_of: Hashable = None  # the session whose sink the stages' shadows hold
        self._held: dict[Hashable, list[tuple[int, float]]] = {}  # blocks of sessions whose reference is not known yet

    @property
    def depth(self) -> int:
        """Blocks that keep all stages busy: so many are on the line at most, and one session has to ask for as many."""
        return self.stages + 1

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

    def done(self, stage: int) -> None:
        """A stage has finished a block."""
        self._entering -= stage == 0
        self._on_line -= stage == self.stages - 1

    def next(self) -> tuple[Request, bool] | None:
        """The block to send now, and whether its session's sink has to be made before; None while there is no room."""
        room = self._entering < DISPATCHED and self._on_line < self.depth
        if not room or (request := self.scheduler.next()) is None:
            return None
        self._entering += 1
        self._on_line += 1
        changes = request.block == self.blocks_per_clip
        sink = changes and self._shadow_of != request.session  # another session's is in the shadow, or none
        if changes:
            self._shadow_of = None
        return request, sink
