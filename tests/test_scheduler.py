"""Whose block is next: deadlines, turns among equals, order within a session, admission."""

from __future__ import annotations

import random

import pytest

from liverelay.engine.relay.scheduler import FULL_LOAD, Scheduler


def test_the_earliest_deadline_is_first_and_files_take_turns() -> None:
    line = Scheduler(4)
    for name in "abc":
        line.admit(name)
    for block in range(3):
        line.request("a", block)
        line.request("b", block)
    line.request("c", 0, 5.0)
    line.request("c", 1, 1.0)
    order = [line.next() for _ in range(8)]
    assert [request.session for request in order if request] == ["c", "c", "a", "b", "a", "b", "a", "b"]
    assert line.next() is None and not len(line)


def test_blocks_of_a_session_stay_in_order(seed: int) -> None:
    numbers, line, taken = random.Random(seed), Scheduler(5), []
    next_block = dict.fromkeys(range(5), 0)
    for name in next_block:
        line.admit(name)
    for _ in range(500):
        if numbers.random() < 0.5:
            name = numbers.randrange(5)
            line.request(name, next_block[name], numbers.random())
            next_block[name] += 1
        elif request := line.next():
            taken.append((request.session, request.block))
    for name in next_block:
        blocks = [block for session, block in taken if session == name]
        assert blocks == list(range(len(blocks)))


def test_a_session_that_wants_nothing_delays_nobody() -> None:
    line = Scheduler(2)
    line.admit("stopped", 2.0)
    line.admit("goes on", 2.0)
    for block in range(10):
        line.request("goes on", block, float(block))
    assert [request.block for request in iter(line.next, None)] == list(range(10))


def test_turns_are_fair_whoever_asks_for_more() -> None:
    line, served = Scheduler(2), []
    line.admit("greedy")
    line.admit("modest")
    for block in range(100):
        line.request("greedy", block)
    for block in range(5):
        line.request("modest", block)
    served = [request.session for request in (line.next() for _ in range(10)) if request]
    assert served.count("modest") == 5


def test_who_does_not_fit_is_refused_with_the_reason() -> None:
    line = Scheduler(3, blocks_per_s=5.0)
    line.admit("a", 2.0)
    line.admit("b", 2.0)
    assert line.load == pytest.approx(0.8) and FULL_LOAD < 1
    with pytest.raises(ValueError, match=r"2 sessions have 80% of them; 2\.00 more would make 120%"):
        line.admit("c", 2.0)
    with pytest.raises(ValueError, match="already"):
        line.admit("a")
    line.admit("c", 0.5)
    with pytest.raises(ValueError, match="all 3 places are taken"):
        line.admit("d")
    line.remove("a")
    assert not line.refusal(2.0)
    line.remove("nobody")


def test_requests_out_of_order_or_of_strangers_are_faults() -> None:
    line = Scheduler(1)
    with pytest.raises(ValueError, match="not admitted"):
        line.request("a", 0)
    line.admit("a")
    line.request("a", 3)
    with pytest.raises(ValueError, match="block 5"):
        line.request("a", 5)
    assert [request.block for request in line.cancel("a")] == [3] and line.next() is None


def test_the_pace_is_that_of_the_slowest_stage_and_refuses_what_it_cannot_do() -> None:
    line = Scheduler(places=9)
    for block in range(40):
        line.admit(block, rate=2.0) if block < 2 else None  # nothing is known yet
        line.timed(0, 0.05)
        line.timed(1, 5.0 if block == 0 else 0.2)  # the first block of all takes longer
        line.timed(2, 0.1)
    assert line.blocks_per_s == pytest.approx(5) and line.load == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"makes 5\.00 blocks in a second and 2 sessions have 80%"):
        line.admit("late", rate=1.0)
    line.admit("file")  # takes what is left
    line.admit("small", rate=0.7)


def test_a_given_pace_is_kept() -> None:
    line = Scheduler(places=9, blocks_per_s=3.0)
    for _ in range(100):
        line.timed(0, 1.0)
    assert line.blocks_per_s == 3.0
