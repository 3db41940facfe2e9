"""The simulator: what is known of a line on paper, the same rules as the pipeline, and the command."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from liverelay.engine.cli import main
from liverelay.engine.relay.dispatch import BUFFERS, DISPATCHED, Dispatcher
from liverelay.engine.relay.scheduler import FULL_LOAD, Scheduler
from liverelay.engine.relay.simulator import PLAYER_S, Clock, Line, Outcome, Span, Visit, simulate
from liverelay.engine.relay.times import StageTimes
from tests.simulated import plan_of, run

PLANS = ["0+1+2+3+vae", "0+1,2+3+vae", "0+1,2+3,vae", "0,1,2,3,vae", "0,1,2,3+vae1,vae2"]


def random_times(numbers: random.Random) -> StageTimes:
    ms = [numbers.uniform(20, 200) for _ in range(7)]
    return StageTimes(tuple(ms[:4]), ms[4], ms[5], ms[6], attention_ms=min(ms[:4]) / 2)


def rate(outcome: Outcome, first: int = 20) -> float:
    """Blocks in a second, from block `first` on."""
    times = outcome.finished_s[first:]
    return (len(times) - 1) / (times[-1] - times[0])


# -- on paper ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PLANS)
def test_a_line_is_as_fast_as_its_slowest_stage_and_a_block_takes_the_sum(text: str, seed: int) -> None:
    numbers = random.Random(seed)
    times, handoff = random_times(numbers), numbers.uniform(0, 10)
    plan = plan_of(text)
    stages, hops = [times.block_ms(stage) for stage in plan.stages], handoff * (len(plan.stages) - 1)
    _, (many,), _ = run(text, times, [Visit(0, 200)], handoff_ms=handoff)
    assert rate(many) == pytest.approx(1e3 / max(stages), rel=1e-6)
    slow = 12 / (2e-3 * (sum(stages) + hops))  # sound that comes half as fast as blocks could go one by one
    _, (alone,), _ = run(text, times, [Visit(slow, 20)], handoff_ms=handoff)
    assert alone.latencies_s[8:] == pytest.approx([1e-3 * (sum(stages) + hops)] * 12)
    first = 1e-3 * (sum(times.block_ms(stage, 0) for stage in plan.stages) + hops)
    opened = max(1e-3 * times.open_ms(stage) for stage in plan.stages)
    assert first <= many.finished_s[0] <= opened + first + 1e-9
    assert alone.late == 0 or alone.waited_s > 0


@pytest.mark.parametrize("text", PLANS)
def test_stages_work_on_one_thing_at_a_time_in_the_order_of_dispatch(text: str, seed: int) -> None:
    numbers = random.Random(seed)
    visits = [Visit(numbers.choice((0, 5, 25)), numbers.randint(1, 30), numbers.uniform(0, 5)) for _ in range(6)]
    line, outcomes, figures = run(text, random_times(numbers), visits, handoff_ms=numbers.uniform(0, 30))
    blocks: list[list[tuple[int, int]]] = []
    for index in range(len(line.stages)):
        spans = [span for span in line.spans if span.stage == index]
        assert all(a.end <= b.start + 1e-12 for a, b in pairwise(spans))
        blocks.append([(span.session, span.block) for span in spans if span.block >= 0])
    assert all(order == blocks[0] for order in blocks)
    for number, outcome in enumerate(outcomes):
        done = 0 if outcome.refused else outcome.visit.blocks
        assert [block for session, block in blocks[0] if session == number] == list(range(done))
        assert outcome.finished_s == sorted(outcome.finished_s) and len(outcome.finished_s) == done
    assert figures.blocks == len(blocks[-1]) and all(stage.busy <= 1 for stage in figures.stages)
    waiting(line.spans, len(line.stages))


def waiting(spans: list[Span], stages: int) -> None:
    """No more blocks are between the beginning of the line and its end, or of one stage and the next, than may be."""
    for first, last, most in [(0, stages - 1, stages + 1), *((i, i + 1, BUFFERS + 2) for i in range(stages - 1))]:
        begun = [(span.start, 1) for span in spans if span.stage == first and span.block >= 0]
        ended = [(span.end, -1) for span in spans if span.stage == last and span.block >= 0]
        inside = 0
        for _, step in sorted(begun + ended):
            inside += step
            assert inside <= most


def test_block_four_finds_its_own_sink_in_the_shadow(seed: int) -> None:
    numbers = random.Random(seed)
    visits = [Visit(numbers.choice((0, 25)), 9, numbers.uniform(0, 2)) for _ in range(5)]
    line, outcomes, _ = run("0+1,2+3+vae", random_times(numbers), visits)
    for stage in range(2):
        spans = [span for span in line.spans if span.stage == stage]
        for session in [i for i, outcome in enumerate(outcomes) if not outcome.refused]:
            (four,) = [i for i, span in enumerate(spans) if (span.session, span.block) == (session, 4)]
            sinks = [span.session for span in spans[:four] if span.kind == "sink"]
            assert sinks and sinks[-1] == session
            mine = [span.kind for span in spans if span.session == session]
            assert mine[0] == "open" and mine.count("open") == 1 and 1 <= mine.count("sink") <= 2


def test_a_session_that_stands_still_delays_nobody(seed: int) -> None:
    times = random_times(random.Random(seed))
    for stops in (1, 3, 6):  # before, and after its new sink is in the shadow
        visits = [Visit(0, 80, 2.0)]
        _, alone, _ = run("0,1,2,3,vae", times, [Visit(0, stops), *visits])
        _, beside, _ = run("0,1,2,3,vae", times, [Visit(0, stops, stays=True), *visits])
        assert rate(beside[1]) == pytest.approx(rate(alone[1]), rel=1e-6)
        lag = beside[1].finished_s[-1] - alone[1].finished_s[-1]
        assert lag <= 1e-3 * (times.prefill_ms + times.prime_ms) + 1e-9  # its own sink is made later, at worst


def test_mixed_rates_are_all_kept(seed: int) -> None:
    numbers = random.Random(seed)
    times = StageTimes((60.0,) * 4, 50.0, 40.0, 40.0)
    rates = [25.0, 30.0, 12.0, 50.0, 8.0]
    numbers.shuffle(rates)
    visits = [Visit(fps, 150, numbers.uniform(0, 5)) for fps in rates]
    for more in ([], [Visit(0, 500)]):  # a file takes the rest and makes nobody late
        _, outcomes, _ = run("0,1,2,3,vae", times, visits + more)
        for outcome in outcomes[:5]:
            assert not outcome.refused and outcome.late <= 2
            assert rate(outcome, 100) == pytest.approx(outcome.visit.fps / 12, rel=0.05)


@pytest.mark.parametrize("text", ["0+1,2+3+vae", "0,1,2,3+vae", "0+1,2+3,vae"])
def test_a_file_does_not_make_a_live_session_late(text: str) -> None:
    times = StageTimes((146.0,) * 4, 90.0, 75.0, 210.0)
    _, (live, file), _ = run(text, times, [Visit(25, 150), Visit(0, 300, 1.1)])
    assert live.late <= 6 and live.waited_s < 1.0  # while the file is opened
    assert rate(live, 60) == pytest.approx(25 / 12, rel=0.01)
    assert rate(live, 60) + rate(file, 60) >= 0.98e3 / max(times.block_ms(s) for s in plan_of(text).stages)


def test_rates_above_the_full_load_are_refused_with_the_reason() -> None:
    times = StageTimes((100.0,) * 4, 90.0)  # 10 blocks a second, 120 FPS
    _, outcomes, _ = run("0,1,2,3,vae", times, [Visit(25, 60)] * 5 + [Visit(12, 30)] * 2)
    assert [bool(outcome.refused) for outcome in outcomes] == [False] * 4 + [True, False, True]
    assert "over 95%" in outcomes[4].refused and FULL_LOAD == 0.95
    assert sum(o.visit.fps for o in outcomes if not o.refused) <= FULL_LOAD * 120
    assert all(o.late <= 2 for o in outcomes if not o.refused)
    _, outcomes, _ = run("0,1,2,3,vae", times, [Visit(25, 60)] * 3, places=2)
    assert "memory for 2 sessions" in outcomes[2].refused


def test_a_player_waits_for_late_blocks() -> None:
    times = StageTimes((100.0,) * 4, 100.0, prime_ms=3000.0)  # somebody who comes takes the decoder for 3 s
    _, (live, _), _ = run("0,1,2,3,vae", times, [Visit(25, 40), Visit(0, 1, 6.0)])
    due = [live.finished_s[0] + PLAYER_S + max(0, block * 12 - 3) / 25 for block in range(40)]
    lags = [done - late for done, late in zip(live.finished_s, due, strict=True)]
    assert max(lags) > 0.1 and live.late >= 1 and live.waited_s == pytest.approx(max(lags))


def test_lines_side_by_side_share_the_sessions() -> None:
    times, plan, clock = StageTimes((100.0,) * 4, 90.0), plan_of("0,1,2,3,vae"), Clock()
    lines = [Line(clock, plan, times, places=20) for _ in range(3)]
    outcomes = simulate(lines, [Visit(25, 40, 0.1 * i) for i in range(13)], clock)
    assert sorted(o.line for o in outcomes if not o.refused) == sorted([0, 1, 2] * 4) and outcomes[12].refused


def test_the_dispatcher_sends_no_more_than_keeps_the_line_busy() -> None:
    turns = Dispatcher(Scheduler(2), stages=3, blocks_per_clip=4)
    turns.open("a")
    for block in range(6):
        turns.request("a", block)
    sent = [turns.next() for _ in range(3)]
    assert [due is not None for due in sent] == [True] * DISPATCHED + [False]
    turns.done(0)
    turns.done(0)
    assert turns.next() and turns.next() and turns.depth == 4
    turns.done(0)
    assert turns.next() is None  # four are on the line, and block 4 waits for the reference
    turns.done(2)
    assert turns.next() is None and turns.clean("a")
    due = turns.next()
    assert due is not None and due[0].block == 4 and not due[1]  # its sink is in the shadow already


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_reports_lines_and_sessions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    flags = ["--gpus", "16", "--nodes", "2", "--handoff-ms", "5", "--sessions", "20", "--seconds", "20", "--fp8"]
    flags += ["--card", "h100"]  # whose memory is for few
    assert main(["simulate", *flags, "--rates", "25,30,0", "--trace", str(trace), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["plan"] for line in found["lines"]] == ["0,1,2,3,vae"] * 3
    assert 5 in [max(line["handoffs_ms"]) for line in found["lines"]]  # the line that lies on both nodes
    assert len(found["sessions"]) == 20 and any(session["refused"] for session in found["sessions"])
    assert found["fps"] == pytest.approx(sum(line["made_fps"] for line in found["lines"]))
    spans = [span for span in json.loads(trace.read_text()) if span["ph"] == "X"]
    assert {span["pid"] for span in spans} == set(range(5))
    assert main(["simulate", *flags]) == 0
    said = capsys.readouterr().out
    assert "16 GPUs, 3 line(s), 1 GPUs unused" in said and "refused: there is memory for 3 sessions" in said


def test_a_picture_is_drawn_or_the_missing_library_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["simulate", "--gpus", "2", "--fp8", "all", "--seconds", "5", "--rates", "25,0", "--plot"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert main([*flags, str(tmp_path / "a.png")]) == 1
        assert "matplotlib is needed to draw" in capsys.readouterr().err and not list(tmp_path.iterdir())
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from PIL import Image

    assert main([*flags, str(tmp_path / "a.png")]) == 0
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0x7D, 0xB8, 0xE8), (0xF4, 0xA5, 0x82)):  # both sessions are seen
        assert (pixels == colour).all(axis=1).sum() > 1000
    assert main([*flags, str(tmp_path / "missing" / "a.png")]) == 1


def test_a_trace_is_drawn_and_anything_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from PIL import Image

    trace, out = tmp_path / "trace.json", tmp_path / "a.png"
    assert main(["simulate", "--gpus", "2", "--fp8", "all", "--seconds", "5", "--trace", str(trace)]) == 0
    whole = trace.read_text()
    for text in (whole, whole.rstrip().removesuffix("]")):  # of a run that was killed, too
        trace.write_text(text)
        assert main(["timeline", str(trace), "--out", str(out)]) == 0
        pixels = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3)
        assert (pixels == (0x7D, 0xB8, 0xE8)).all(axis=1).sum() > 1000
    before = out.read_bytes()
    for text in ("", "[]", "{}", "no json", '[{"ph": "X"}]', whole[:300]):
        trace.write_text(text)
        capsys.readouterr()
        assert main(["timeline", str(trace), "--out", str(out)]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1 and out.read_bytes() == before
    assert main(["timeline", str(tmp_path / "none.json"), "--out", str(out)]) == 1
    assert main(["timeline", str(trace), "--out", str(tmp_path / "a.pdf")]) == 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [("--times x.json --trace x.json", "overwrite the input"), ("--plot x.txt", "ends in .png"),
     ("--trace y.png --plot y.png", "the trace and the plot are the same file")],
)  # fmt: skip
def test_outputs_are_checked_before_the_work(
    flags: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("liverelay.engine.relay.simulator.simulate", lambda *_: pytest.fail("work was done"))
    Path("x.json").write_text(times := '{"step_ms": 200, "vae_ms": 90}')
    assert main(["simulate", "--gpus", "5", *flags.split()]) == 1
    assert text in capsys.readouterr().err
    assert Path("x.json").read_text() == times and [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("--gpus 0", 2), ("--gpus 5 --rates 25,-1", 2), ("--gpus 5 --rates x", 2), ("--gpus 5 --sessions 100000", 1),
        ("--gpus 2 --nodes 3", 1), ("--gpus 2 --lines 3", 1), ("--gpus 2 --size 100x100", 1),
        ("--gpus 1 --card h100", 1),
        ("--gpus 5 --seconds 1e8", 1), ("--gpus 5 --seconds nan", 2), ("--gpus 5 --handoff-ms -1", 2),
        ("--gpus 2 --trace missing/trace.json", 1),
    ],
)  # fmt: skip
def test_bad_input_to_simulate_ends_in_one_line(flags: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["simulate", *flags.split()]) == status == 1
    except SystemExit as end:
        assert end.code == status == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.splitlines()[-1].startswith("liverelay")
