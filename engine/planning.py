"""`liverelay plan` and `liverelay simulate`: which plan for some GPUs, and how sessions would fare on it."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liverelay.engine.arguments import add_fp8, number, positive, size
from liverelay.engine.errors import InputError
from liverelay.engine.relay.card_times import CARDS, NEWEST

if TYPE_CHECKING:
    from liverelay.engine.relay.links import Machine
    from liverelay.engine.relay.planner import Forecast, TimesOf
    from liverelay.engine.relay.simulator import Outcome, Visit
    from liverelay.engine.telemetry import LineFigures

MOST_GPUS, MOST_SESSIONS, MOST_BLOCKS = 1024, 1000, 1_000_000


def add_planning(commands: Any) -> None:
    """The commands `plan`, `simulate` and `timeline`."""
    plan = commands.add_parser("plan", help="which stages on which GPUs, with speed, memory and the command to run")
    _add_common(plan)
    plan.add_argument(
        "--sessions", type=positive(int, "sessions"), default=1, metavar="N", help="to keep memory for (1)"
    )
    plan.set_defaults(command=_plan)
    simulate = commands.add_parser("simulate", help="how sessions would fare on a line, without a model or a GPU")
    _add_common(simulate)
    simulate.add_argument("--sessions", type=positive(int, "sessions"), metavar="N", help="that come (one a rate)")
    simulate.add_argument(
        "--rates", type=_rates, default=(25.0,), metavar="FPS,...",
        help="frames a second of the sessions, repeated as needed; 0 is a file, made as fast as can be (25)",
    )
    simulate.add_argument("--seconds", type=positive(float, "seconds"), default=60.0, metavar="S", help="of sound (60)")
    simulate.add_argument(
        "--every", type=number(float, "seconds"), default=1.1, metavar="S", help="between two sessions' coming (1.1)"
    )
    simulate.add_argument("--lines", type=positive(int, "lines"), metavar="N", help="side by side (one for 5 GPUs)")
    simulate.add_argument("--nodes", type=positive(int, "nodes"), default=1, metavar="N", help="of these GPUs (1)")
    simulate.add_argument(
        "--handoff-ms", type=number(float, "milliseconds"), metavar="MS",
        help="of a link between nodes; on one node of every link",
    )
    simulate.add_argument("--trace", type=Path, metavar="FILE.json", help="line 0's timeline, in Chrome's trace format")
    simulate.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of line 0's first blocks")
    simulate.set_defaults(command=_simulate)
    timeline = commands.add_parser("timeline", help="a picture of what the stages of a run did")
    timeline.add_argument("trace", type=Path, metavar="TRACE.json", help="of generate --trace")
    timeline.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="picture to write")
    timeline.set_defaults(command=_timeline)


def _add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument("--gpus", type=positive(int, "GPUs"), metavar="N", help="how many (those of this machine)")
    p.add_argument("--size", type=size, default=(704, 384), metavar="WxH", help="video size in pixels (704x384)")
    add_fp8(p)
    p.add_argument("--plan", metavar="STAGES", help="this one, as in 0,1,2,3,vae or 0,1,2,3,vae1,vae2 (the best)")
    p.add_argument(
        "--card", choices=sorted(CARDS),
        help=f"whose measured times to take (that of this machine's GPUs by the name that NVML gives, else {NEWEST})",
    )
    p.add_argument(
        "--memory", type=positive(float, "GiB"), metavar="GIB", help="of each GPU (this machine's, else the card's)"
    )
    p.add_argument(
        "--times", type=Path, metavar="FILE.json",
        help="measured times in ms, as in {\"step_ms\": 200, \"vae_ms\": 90} (the card's, scaled to the size)",
    )
    p.add_argument("--json", action="store_true", help="print everything as json")


def _rates(text: str) -> tuple[float, ...]:
    return tuple(number(float, "frames a second")(part) for part in text.split(","))


# -- what both need ----------------------------------------------------------------------------------------------------


def _machine(a: argparse.Namespace, handoff_bytes: int, *, nodes: int = 1, handoff_ms: float | None = None) -> Machine:
    """The GPUs here, as many as were asked for, in the best order; or such as were asked for and are not here.

    Settles which card's times are taken, where that was not asked for (`a.card`).
    """
    from liverelay.engine.relay.links import GIB, NETWORK, NVLINK, Link, Machine, look
    from liverelay.engine.relay.times import card, card_of

    found = look() if nodes == 1 and handoff_ms is None else None
    a.card = a.card or card_of(device.model for device in (found.devices if found else ()))
    if a.gpus is None and found is None:
        raise InputError("no GPU was found here; say how many to plan for, as in --gpus 5")
    count = a.gpus or len(found.devices if found else ())
    if count > MOST_GPUS or nodes > count:
        raise InputError(f"{count} GPUs on {nodes} nodes cannot be planned; at most {MOST_GPUS}, one or more on a node")
    if found is not None and count <= len(found.devices):
        machine = found.pick([handoff_bytes] * (count - 1))
    else:
        given = None if handoff_ms is None else Link("given", handoff_ms, float("inf"))
        inner = given if given is not None and nodes == 1 else NVLINK
        memory = max(device.memory for device in found.devices) if found else card(a.card).memory
        machine = Machine.assumed(count, memory, nodes=nodes, inner=inner, outer=given or NETWORK)
    if a.memory is not None:
        machine = replace(machine, devices=tuple(replace(d, memory=int(a.memory * GIB)) for d in machine.devices))
    return machine


def _times_of(a: argparse.Namespace) -> TimesOf:
    from liverelay.engine.models.geometry import check_size
    from liverelay.engine.relay.times import bundled_times, read_times

    check_size(a.size)
    if a.times is None:
        return lambda task: bundled_times(task.size, task.fp8, name=a.card)
    return functools.cache(lambda task: read_times(a.times, task.size))


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# -- plan --------------------------------------------------------------------------------------------------------------


def _plan(a: argparse.Namespace) -> int:
    from liverelay.engine.relay.planner import Task, best_plan

    times_of, task = _times_of(a), Task(a.size, a.fp8 or "", a.sessions)
    if a.sessions > MOST_SESSIONS:
        raise InputError(f"{a.sessions} sessions are too many to plan for; at most {MOST_SESSIONS}")
    machine = _machine(a, task.handoff_bytes)
    forecast = best_plan(machine, task, times_of, a.plan)
    notes = _notes(a, forecast, machine)
    if a.json:
        print(json.dumps(_facts(forecast) | {"notes": notes, "commands": _commands(forecast)}, indent=1))
        return 0
    from liverelay.engine.relay.links import GIB
    from liverelay.engine.relay.planner import STREAM, total

    kinds = [kind for kind in forecast.memory[0] if any(memory[kind] for memory in forecast.memory)]
    rows = [("stage", "device", "ms", "", "GiB", "of", *kinds)]
    for stage, ms, memory, device in zip(
        forecast.plan.stages, forecast.stage_ms, forecast.memory, forecast.machine.devices, strict=True
    ):
        parts = (f"{memory[kind] / GIB:.1f}" if memory[kind] else "-" for kind in kinds)
        state = f"({forecast.times.state(stage)})"
        fill = (f"{total(memory) / GIB:.1f}", f"{device.memory / GIB:.1f}")
        rows.append((stage.name, stage.device, f"{ms:.1f}", state, *fill, *parts))
    width, height = a.size
    what = f"FP8 {a.fp8}" if a.fp8 else "bfloat16"
    print(f"plan {forecast.plan} for the 14B model at {width}x{height}, {what}, memory for {a.sessions} session(s)")
    print(_columns(rows))
    stages, times = forecast.plan.stages, forecast.times
    slowest = stages[forecast.stage_ms.index(max(forecast.stage_ms))]
    speed = f"{forecast.fps:.1f} FPS, {forecast.fps / STREAM.fps:.2f}x real time"
    print(f"speed        {speed} (by the slowest stage, {slowest.name}: {times.state(slowest)})")
    first, opening = (forecast.first_frame_s(opened=opened) for opened in (True, False))
    print(
        f"first frame  {first:.2f} s after its sound, {opening:.2f} s after a session is opened; later blocks "
        f"{forecast.latency_s:.2f} s ({times.state(*stages)})"
    )
    print(f"sessions     {forecast.live_sessions()} live of 25 FPS by time, {forecast.places()} by memory")
    for title, line in [("note", note) for note in notes] + [("run", line) for line in _commands(forecast)]:
        print(f"{title:12} {line}")
    return 0


def _notes(a: argparse.Namespace, forecast: Forecast, machine: Machine) -> list[str]:
    """What the figures rest on, and what stays unused."""
    from liverelay.engine.relay.times import MEASURED_SIZE, card

    times, notes, model = forecast.times, [], card(a.card).model
    figures = [
        f"{name.removesuffix('_ms')} {value:.1f} ms ({times.states[name]})"
        for name, value in (
            ("step_ms", times.step_ms[0]), ("vae_ms", times.vae_ms), ("prefill_ms", times.prefill_ms),
            ("prime_ms", times.prime_ms), ("encode_ms", times.encode_ms),
        )
    ]  # fmt: skip
    source = str(a.times) if a.times else f"of one {model}, measured at {MEASURED_SIZE[0]}x{MEASURED_SIZE[1]}"
    notes.append(f"times {source}: {', '.join(figures)}")
    if not times.encode_ms:
        notes.append("encoding the picture is not counted in the first frame: it has not been measured")
    models = {device.model for device in machine.devices if device.model}
    if not machine.here:
        notes.append("no such GPUs were looked at: memory and links are assumed")
    elif a.times is None and models != {model}:
        notes.append(f"this machine has {', '.join(sorted(models))}: measure its times and give them with --times")
    links = dict.fromkeys(link.name for link in forecast.machine.handoffs)
    if links:
        notes.append(f"handoffs over {', '.join(links)}, at most {max(forecast.handoffs_ms):.2f} ms (estimate)")
    return notes + _unused(forecast, len(machine.devices), given=a.plan is not None)


def _unused(forecast: Forecast, devices: int, *, given: bool) -> list[str]:
    """Why some devices have nothing to do."""
    used, times = len(forecast.plan.stages), forecast.times
    if devices == used:
        return []
    free = f"{devices - used} of {devices} devices stay free"
    if given:
        return [f"{free}: the plan was given"]
    if used <= len(times.step_ms):
        return [f"{free}: one more would not make the slowest stage faster"]
    step = max(times.step_ms)
    if forecast.plan.split:
        why = f"{used} stages are all there are"
    elif times.vae_ms <= step:
        why = f"a split of the VAE would not help, because a step takes longer ({step:.0f} > {times.vae_ms:.0f} ms)"
    else:
        why = "a split of the VAE does not fit"
    return [f"{free}: {why}; another line is a process of its own"]


def _commands(forecast: Forecast) -> list[str]:
    """What runs this plan: in one process, and in one for each stage."""
    task, devices = forecast.task, ",".join(forecast.plan.devices)
    fp8 = {"": "", "products": " --fp8"}.get(task.fp8, f" --fp8 {task.fp8}")
    rest = (
        "generate --checkpoint DIR --image FILE --audio FILE --out FILE.mp4 "
        f"--size {task.size[0]}x{task.size[1]}{fp8} --devices {devices} --plan {forecast.plan}"
    )
    count = len(forecast.plan.stages)
    several = f"torchrun --standalone --nproc-per-node {count} -m liverelay.engine {rest}"
    return [f"liverelay {rest}", *([several] if count > 1 else [])]


def _facts(forecast: Forecast) -> dict[str, Any]:
    times = forecast.times
    return {
        "plan": str(forecast.plan), "size": forecast.task.size, "fp8": forecast.task.fp8,
        "sessions": forecast.task.sessions,
        "stages": [
            {"stage": stage.name, "device": stage.device, "model": device.model, "ms": ms, "state": times.state(stage),
             "memory_bytes": memory, "capacity_bytes": device.memory}
            for stage, ms, memory, device in zip(
                forecast.plan.stages, forecast.stage_ms, forecast.memory, forecast.machine.devices, strict=True)
        ],
        "handoffs_ms": forecast.handoffs_ms, "fps": forecast.fps, "latency_s": forecast.latency_s,
        "first_frame_s": forecast.first_frame_s(opened=True),
        "first_frame_after_opening_s": forecast.first_frame_s(opened=False),
        "live_sessions": forecast.live_sessions(), "places": forecast.places(),
        "times": {"step_ms": times.step_ms, "attention_ms": times.attention_ms, "vae_ms": times.vae_ms,
                  "prefill_ms": times.prefill_ms, "prime_ms": times.prime_ms, "encode_ms": times.encode_ms,
                  "states": dict(times.states)},
    }  # fmt: skip


# -- simulate ----------------------------------------------------------------------------------------------------------


def _simulate(a: argparse.Namespace) -> int:
    from liverelay.engine.media import check_outputs, picture_format
    from liverelay.engine.relay.planner import Task, best_plan
    from liverelay.engine.relay.simulator import Clock, Line, simulate
    from liverelay.engine.telemetry import Telemetry

    draw = None
    if a.plot is not None:
        from liverelay.engine.timeline import drawer, of_line

        picture_format(a.plot)
        draw = drawer(a.plot)
    check_outputs([(what, path) for what, path in (("trace", a.trace), ("plot", a.plot)) if path], [a.times])
    times_of, task, visits = _times_of(a), Task(a.size, a.fp8 or ""), _visits(a)
    machine = _machine(a, task.handoff_bytes, nodes=a.nodes, handoff_ms=a.handoff_ms)
    devices = len(machine.devices)
    count = a.lines or max(1, devices // (len(times_of(task).step_ms) + 1))
    if count > devices:
        raise InputError(f"{count} lines need as many GPUs at least, not {devices}")
    each = devices // count
    forecasts = [
        best_plan(machine.part(range(i * each, (i + 1) * each)), task, times_of, a.plan) for i in range(count)
    ]
    clock = Clock()
    watches = [
        Telemetry(f.plan, clock=lambda: clock.now, trace=a.trace if not i else None) for i, f in enumerate(forecasts)
    ]
    lines = [
        Line(clock, f.plan, f.times, f.handoffs_ms, places=f.places(), observe=watch.observe)
        for f, watch in zip(forecasts, watches, strict=True)
    ]
    outcomes = simulate(lines, visits, clock)
    figures = [watch.close() for watch in watches]
    watches[0].check()
    if draw is not None:
        draw(of_line(lines[0]))
    if a.json:
        print(json.dumps(_result(forecasts, figures, outcomes), indent=1))
    else:
        _report(forecasts, figures, outcomes, devices)
    return 0


def _visits(a: argparse.Namespace) -> list[Visit]:
    """The sessions that come, one after the other; a file is of 25 FPS."""
    from liverelay.engine.relay.planner import STREAM
    from liverelay.engine.relay.simulator import Visit

    count = a.sessions or len(a.rates)
    rates = [a.rates[i % len(a.rates)] for i in range(count)] if count <= MOST_SESSIONS else []
    blocks = [max(1, round(a.seconds * (fps or STREAM.fps) / STREAM.block_frames)) for fps in rates]
    if not rates or sum(blocks) > MOST_BLOCKS:
        raise InputError(
            f"{count} sessions of {a.seconds:g} s are too much; at most {MOST_SESSIONS} sessions, {MOST_BLOCKS} blocks"
        )
    return [Visit(fps, n, i * a.every) for i, (fps, n) in enumerate(zip(rates, blocks, strict=True))]


def _report(
    forecasts: Sequence[Forecast], figures: Sequence[LineFigures], outcomes: Sequence[Outcome], devices: int
) -> None:
    from liverelay.engine.telemetry import percentiles

    rows: list[Sequence[str]] = [("line", "plan", "sessions", "made", "could", "busy")]
    for i, (forecast, line) in enumerate(zip(forecasts, figures, strict=True)):
        busy = ", ".join(f"{stage.name} {100 * stage.busy:.0f}%" for stage in line.stages)
        here = sum(outcome.line == i for outcome in outcomes)
        rows.append((str(i), str(forecast.plan), str(here), f"{line.fps:.1f} FPS", f"{forecast.fps:.1f} FPS", busy))
    unused = devices - sum(len(forecast.plan.stages) for forecast in forecasts)
    print(f"{devices} GPUs, {len(forecasts)} line(s)" + (f", {unused} GPUs unused" if unused else ""))
    print(_columns(rows))
    rows = [("session", "line", "rate", "blocks", "late", "waited", "first frame", "latency ms p50/p95/p99")]
    for i, outcome in enumerate(outcomes):
        if outcome.refused:
            continue
        latency = "/".join(f"{ms:.0f}" for ms in percentiles(outcome.latencies_s))
        rate = f"{outcome.visit.fps:g} FPS" if outcome.visit.fps else "file"
        late, waited = (str(outcome.late), f"{outcome.waited_s:.2f} s") if outcome.visit.fps else ("-", "-")
        blocks = str(len(outcome.finished_s))
        rows.append((str(i), str(outcome.line), rate, blocks, late, waited, f"{outcome.first_frame_s:.2f} s", latency))
    if len(rows) > 1:
        print(_columns(rows))
    for i, outcome in enumerate(outcomes):
        if outcome.refused:
            print(f"  session {i} refused: {outcome.refused}")
    states = sorted(set(forecasts[0].times.states.values()))
    print(f"times are {', '.join(states)} (liverelay plan tells which); a first frame waits for its sound, too")


def _result(
    forecasts: Sequence[Forecast], figures: Sequence[LineFigures], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    from liverelay.engine.telemetry import percentiles

    lines = [
        _facts(forecast) | {"made_fps": line.fps, "busy": {stage.name: stage.busy for stage in line.stages}}
        for forecast, line in zip(forecasts, figures, strict=True)
    ]
    sessions = [
        {"fps": o.visit.fps, "line": o.line, "refused": o.refused, "blocks": len(o.finished_s), "late": o.late,
         "waited_s": o.waited_s, "first_frame_s": o.first_frame_s, "latency_ms": percentiles(o.latencies_s)}
        for o in outcomes
    ]  # fmt: skip
    return {"lines": lines, "sessions": sessions, "fps": sum(line.fps for line in figures)}


def _timeline(a: argparse.Namespace) -> int:
    from liverelay.engine.media import check_outputs, picture_format
    from liverelay.engine.timeline import drawer, of_trace

    picture_format(a.out)
    check_outputs([("picture", a.out)], [a.trace])
    drawer(a.out)(of_trace(a.trace))
    print(a.out)
    return 0
