"""Whose block is next on the line. Pure Python and no clock of its own: the pipeline and the simulator drive it.

A block that is wanted is a request with a deadline, the time at which its first frame is due. The line takes the
request with the earliest deadline; among equal ones (files, which have none) the session that was served longest ago.
Blocks of one session stay in order. Admission keeps the sum of all sessions' rates below what the line can do, so
that no session that was let in makes another one late.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

PACE_BLOCKS = 32  # of a stage, from which its time is taken
FULL_LOAD = 0.95  # of the line's throughput that is given away: what is left evens out late blocks


@dataclass(frozen=True)
class Request:
    """One block that a session wants; deadline in seconds of the caller's clock, infinite for a file."""

    session: Hashable
    block: int
    deadline: float = math.inf


@dataclass
class _Client:
    """A session as the scheduler knows it. rate: blocks that it needs in a second; 0: a file, which takes the rest."""

    rate: float
    served: int = -1  # when it was served last, counted in blocks of the line
    wanted: list[Request] = field(default_factory=list)  # in order; the first is next


class Scheduler:
    """Requests in, the next block out. places: sessions that there is memory for.

    blocks_per_s: what the line can do; 0: it is found out by `timed`, and nobody is refused before that.
    """

    def __init__(self, places: int, blocks_per_s: float = 0.0) -> None:
        self.places, self.blocks_per_s = places, blocks_per_s
        self._given = blocks_per_s > 0
        self._times: dict[int, deque[float]] = {}
        self._clients: dict[Hashable, _Client] = {}
        self._served = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(len(client.wanted) for client in self._clients.values())

    @property
    def load(self) -> float:
        """Share of the line's throughput that live sessions have been promised; 0 while that is not known."""
        rates = sum(client.rate for client in self._clients.values())
        return rates / self.blocks_per_s if self.blocks_per_s else 0.0

    def timed(self, stage: int, seconds: float) -> None:
        """A stage has computed a block in this time. The slowest stage's median is the pace of the line."""
        if self._given:
            return
        self._times.setdefault(stage, deque(maxlen=PACE_BLOCKS)).append(seconds)
        if all(len(times) >= PACE_BLOCKS // 4 for times in self._times.values()):
            self.blocks_per_s = 1 / max(1e-9, *(statistics.median(times) for times in self._times.values()))

    def refusal(self, rate: float = 0.0) -> str:
        """Why a session of this rate (blocks in a second) cannot be let in now; empty when it can."""
        count = len(self._clients)
        if count >= self.places:
            return f"all {self.places} places are taken; close a session or give the engine more (sessions=)"
        if rate and self.blocks_per_s:
            after = self.load + rate / self.blocks_per_s
            if after > FULL_LOAD + 1e-9:
                return (
                    f"the line makes {self.blocks_per_s:.2f} blocks in a second and {count} sessions have "
                    f"{100 * self.load:.0f}% of them; {rate:.2f} more would make {100 * after:.0f}%, "
                    f"over {100 * FULL_LOAD:.0f}%"
                )
        return ""

    def admit(self, session: Hashable, rate: float = 0.0) -> None:
        """Let a session in. ValueError with the reason when there is no place or no time for it."""
        if session in self._clients:
            raise ValueError(f"session {session!r} is there already")
        if reason := self.refusal(rate):
            raise ValueError(reason)
        self._clients[session] = _Client(rate)

    def request(self, session: Hashable, block: int, deadline: float = math.inf) -> None:
        """Want a session's next block. ValueError where the session is not there or its blocks are out of order."""
        client = self._clients.get(session)
        if client is None:
            raise ValueError(f"session {session!r} was not admitted")
        if client.wanted and block != client.wanted[-1].block + 1:
            raise ValueError(f"block {block} of session {session!r} was asked for after {client.wanted[-1].block}")
        client.wanted.append(Request(session, block, deadline))

    def next(self) -> Request | None:
        """Take the request that the line should work on now; None when nobody wants anything."""
        waiting = [client for client in self._clients.values() if client.wanted]
        if not waiting:
            return None
        client = min(waiting, key=lambda client: (client.wanted[0].deadline, client.served))
        self._served += 1
        client.served = self._served
        return client.wanted.pop(0)

    def cancel(self, session: Hashable) -> list[Request]:
        """Forget what a session wants; returns what was forgotten."""
        client = self._clients[session]
        forgotten, client.wanted = client.wanted, []
        return forgotten

    def remove(self, session: Hashable) -> None:
        """The session has ended; its place and its share are free."""
        self._clients.pop(session, None)
