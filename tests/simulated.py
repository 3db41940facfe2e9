"""One simulated line and what telemetry says of it, for tests."""

from __future__ import annotations

from liverelay.engine.relay.plan import Plan, parse_plan
from liverelay.engine.relay.simulator import Clock, Line, Outcome, Visit, simulate
from liverelay.engine.relay.times import StageTimes
from liverelay.engine.telemetry import LineFigures, Telemetry

Run = tuple[Line, list[Outcome], LineFigures]


def plan_of(text: str) -> Plan:
    return parse_plan(text, [f"gpu:{i}" for i in range(text.count(",") + 1)])


def run(text: str, times: StageTimes, visits: list[Visit], *, handoff_ms: float = 0.0, places: int = 20) -> Run:
    plan, clock = plan_of(text), Clock()
    watch = Telemetry(plan, clock=lambda: clock.now)
    line = Line(clock, plan, times, (handoff_ms,) * (len(plan.stages) - 1), places=places, observe=watch.observe)
    outcomes = simulate([line], visits, clock)
    return line, outcomes, watch.figures()
