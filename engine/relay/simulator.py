"""A line without a model: the leader's own rules of dispatch and the stages' order of work, on a clock of its own.

The same Dispatcher and Scheduler that serve the pipeline decide here; stages take commands in order, links have the
same buffers, and the events are those of the pipeline, so that the same telemetry looks at both. What a stage does
takes the time that it is given. Pure Python, no torch.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from liverelay.engine.config import StreamConfig
from liverelay.engine.relay.dispatch import BUFFERS, Dispatcher
from liverelay.engine.relay.messages import Block, Command, Done, Event, Finished, Open, Sink
from liverelay.engine.relay.plan import Plan, StagePlan
from liverelay.engine.relay.scheduler import Scheduler
from liverelay.engine.relay.times import StageTimes

LOOK_AHEAD_S = 0.2  # of sound after a block, as LiveAudioConfig has it
PLAYER_S = 0.48  # that a viewer's player waits after the first frame before it begins
Observer = Callable[[Event], None]


class Clock:
    """Simulated time in seconds, and what happens when; what was planned first happens first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._planned, (max(when, self.now), next(self._count), what))

    def run(self) -> None:
        """Until nothing is planned any more."""
        while self._planned:
            self.now, _, what = heapq.heappop(self._planned)
            what()


@dataclass
class _Link:
    """Buffers in front of a stage. sender: the stage before, when it waits for a free one."""

    handoff_s: float = 0.0
    free: int = BUFFERS
    full: int = 0


@dataclass(frozen=True)
class Span:
    """What a stage did from when to when (seconds): a block, `open` or `sink` of a session."""

    stage: int
    session: int
    block: int
    kind: str
    start: float
    end: float


class _Stage:
    """As StageLoop: commands in order; a block is waited for, worked on, and handed on when the next one has room."""

    def __init__(self, line: Line, index: int) -> None:
        self.line, self.index, self.plan = line, index, line.plan.stages[index]
        self.source = _Link(1e-3 * line.handoffs_ms[index - 1] if index else 0.0)
        self.inbox: deque[Command] = deque()
        self._asked = -1.0  # when it was free for the block that it waits for or works on
        self._working = False
        self._holds: Callable[[], None] | None = None  # what hands its block on, when the next stage has room

    @property
    def next(self) -> _Stage | None:
        stages = self.line.stages
        return stages[self.index + 1] if self.index + 1 < len(stages) else None

    def put(self, command: Command) -> None:
        self.inbox.append(command)
        self.look()

    def look(self) -> None:
        """Begin the next command, if there is one and nothing else is done."""
        if self._working or not self.inbox:
            return
        now, command = self.line.clock.now, self.inbox[0]
        if isinstance(command, Block):
            if self._asked < 0:
                self._asked = now
            if not self.source.full:
                return
        self.inbox.popleft()
        self._working = True
        self.line.clock.at(now + self._seconds(command), lambda: self._end(command, now))
        if isinstance(command, Block) and command.block == 0 and self.line.last_step in self.plan.steps:
            steps = StagePlan(self.plan.steps, "", self.plan.device)
            self.line.clock.at(now + 1e-3 * self.line.times.block_ms(steps, 0), lambda: self.line.clean(command.serial))
        if isinstance(command, Block):
            self.source.full -= 1
            self.source.free += 1
            if self.index:
                self.line.stages[self.index - 1].room()

    def _seconds(self, command: Command) -> float:
        times = self.line.times
        if isinstance(command, Block):
            return 1e-3 * times.block_ms(self.plan, command.block)
        return 1e-3 * (times.open_ms(self.plan) if isinstance(command, Open) else times.sink_ms(self.plan))

    def _end(self, command: Command, begun: float) -> None:
        line, computed = self.line, self.line.clock.now
        block = command.block if isinstance(command, Block) else -1
        if computed > begun:
            line.spans.append(Span(self.index, command.serial, block, type(command).__name__.lower(), begun, computed))
        if not isinstance(command, Block):
            self._working = False
            return self.look()
        asked, self._asked = self._asked, -1.0

        def hand_on() -> None:
            if self.next is None:
                line.tell(Finished(self.index, command.serial, block, None))
            else:
                self.next.take()
            self._working, self._holds = False, None
            line.tell(Done(self.index, command.serial, block, asked, begun, computed, line.clock.now))
            self.look()

        self._holds = hand_on
        self.room()

    def room(self) -> None:
        """The next stage may have a free buffer."""
        if self._holds is not None and (self.next is None or self.next.source.free):
            self._holds()

    def take(self) -> None:
        """A block comes: it takes a buffer now and is there after the handoff."""
        self.source.free -= 1
        self.line.clock.at(self.line.clock.now + self.source.handoff_s, self._arrive)

    def _arrive(self) -> None:
        self.source.full += 1
        self.look()


class Line:
    """A plan's stages and their leader. handoffs_ms: from each stage to the next; places: sessions at a time.

    Sessions that were let in say `open`, `request`, `close` and are told of blocks that are done by `on_block`.
    """

    def __init__(
        self, clock: Clock, plan: Plan, times: StageTimes, handoffs_ms: Sequence[float] = (), *, places: int = 1,
        observe: Observer | None = None,
    ) -> None:
        self.clock, self.plan, self.times, self.observe = clock, plan, times, observe
        self.handoffs_ms = handoffs_ms or (0.0,) * (len(plan.stages) - 1)
        self.last_step = plan.steps - 1
        self.spans: list[Span] = []
        self.on_block: dict[int, Callable[[int], None]] = {}
        slowest = max(times.block_ms(stage) for stage in plan.stages)
        self.scheduler = Scheduler(places, 1e3 / slowest)
        self._turns = Dispatcher(self.scheduler, len(plan.stages), StreamConfig().blocks_per_clip)
        self.stages: list[_Stage] = []
        self.stages.extend(_Stage(self, i) for i in range(len(plan.stages)))

    @property
    def depth(self) -> int:
        """Blocks that one session has under way, as `Pipeline.depth`."""
        return self._turns.depth

    def open(self, session: int, rate: float, on_block: Callable[[int], None]) -> None:
        """Let a session in; ValueError with the reason when there is no place or no time for it."""
        self._turns.open(session, rate)
        self.on_block[session] = on_block
        self._send(Open(serial=session))

    def request(self, session: int, block: int, deadline: float = math.inf) -> None:
        self._turns.request(session, block, deadline)
        self._dispatch()

    def close(self, session: int) -> None:
        self._turns.close(session)
        self.on_block.pop(session, None)

    def clean(self, session: int) -> None:
        """The session's first latent frame is known."""
        if session in self.on_block:
            if self._turns.clean(session):
                self._send(Sink(serial=session))
            self._dispatch()

    def tell(self, event: Event) -> None:
        """Take a stage's answer."""
        if self.observe is not None:
            self.observe(event)
        if isinstance(event, Done):
            self._turns.done(event.stage)
            self._dispatch()
        elif isinstance(event, Finished) and event.serial in self.on_block:
            self.on_block[event.serial](event.block)

    def _send(self, command: Command) -> None:
        for stage in self.stages:
            stage.put(command)

    def _dispatch(self) -> None:
        while (due := self._turns.next()) is not None:
            request, sink = due
            session = int(request.session)  # type: ignore[call-overload]
            if sink:
                self._send(Sink(serial=session))
            self._send(Block(serial=session, block=request.block))
            self.stages[0].take()


@dataclass(frozen=True)
class Visit:
    """A session to come. fps: of its video, 0 for a file, which is made as fast as can be; blocks: that it wants.

    stays: it does not close after its last block but stands still.
    """

    fps: float = 25.0
    blocks: int = 125
    opens_s: float = 0.0
    stays: bool = False


@dataclass
class Outcome:
    """What became of a session. Seconds since the start; refused: why it was not let in, or empty.

    A block is late when a player that began PLAYER_S after the first frame lacks it; the player then waits for it.
    """

    visit: Visit
    line: int = -1
    refused: str = ""
    asked_s: list[float] = field(default_factory=list)
    finished_s: list[float] = field(default_factory=list)
    late: int = 0
    waited_s: float = 0.0

    @property
    def latencies_s(self) -> list[float]:
        """From when a block was asked for (its sound was there) until its frames are."""
        return [end - start for start, end in zip(self.asked_s, self.finished_s, strict=False)]

    @property
    def first_frame_s(self) -> float | None:
        """From the session's coming."""
        return self.finished_s[0] - self.visit.opens_s if self.finished_s else None


class _Client:
    """As Session: asks for blocks whose sound is there, as many as keep the stages busy, and plays what comes."""

    def __init__(self, number: int, line: Line, outcome: Outcome) -> None:
        self.number, self.line, self.outcome, self.visit = number, line, outcome, outcome.visit
        self.stream = StreamConfig()
        self._wakes = self._epoch = -1.0
        line.open(number, self.visit.fps / self.stream.block_frames, self._on_block)
        self._started = line.clock.now
        self._want()

    def _before(self, block: int) -> float:
        """Seconds of video before a block."""
        return max(0, block * self.stream.block_frames - self.stream.dropped_frames) / self.visit.fps

    def _want(self) -> None:
        now, asked = self.line.clock.now, self.outcome.asked_s
        while len(asked) < self.visit.blocks and len(asked) - len(self.outcome.finished_s) < self.line.depth:
            block, deadline = len(asked), math.inf
            if self.visit.fps:
                heard = self._started + self._before(block + 1) + LOOK_AHEAD_S
                if heard > now + 1e-9:
                    if self._wakes < heard:
                        self._wakes = heard
                        self.line.clock.at(heard, self._want)
                    return
                if self._epoch < 0 or self._epoch + self._before(block) < now:  # as Session._deadline
                    self._epoch = now - self._before(block)
                deadline = self._epoch + self._before(block)
            asked.append(now)
            self.line.request(self.number, block, deadline)

    def _on_block(self, block: int) -> None:
        now, outcome = self.line.clock.now, self.outcome
        outcome.finished_s.append(now)
        if self.visit.fps:
            due = outcome.finished_s[0] + PLAYER_S + self._before(block) + outcome.waited_s
            if now > due + 1e-9:
                outcome.late += 1
                outcome.waited_s += now - due
        if len(outcome.finished_s) < self.visit.blocks:
            self._want()
        elif not self.visit.stays:
            self.line.close(self.number)


def simulate(lines: Sequence[Line], visits: Sequence[Visit], clock: Clock) -> list[Outcome]:
    """Let sessions come to lines that stand side by side, each to the one with most time left, until all is done."""
    outcomes = [Outcome(visit) for visit in visits]

    def come(number: int, outcome: Outcome) -> None:
        rate = outcome.visit.fps / StreamConfig().block_frames

        def fitness(line: Line) -> tuple[bool, float, int]:
            return bool(line.scheduler.refusal(rate)), line.scheduler.load, len(line.on_block)

        best = min(lines, key=fitness)
        if len(best.on_block) >= best.scheduler.places:
            outcome.refused = f"there is memory for {best.scheduler.places} sessions on a line, and all have begun"
            return
        try:
            _Client(number, best, outcome)
            outcome.line = list(lines).index(best)
        except ValueError as error:
            outcome.refused = str(error)

    for number, outcome in enumerate(outcomes):
        delay = 1e-3 * lines[0].times.encode_ms
        clock.at(outcome.visit.opens_s + delay, lambda n=number, o=outcome: come(n, o))  # type: ignore[misc]
    clock.run()
    return outcomes
