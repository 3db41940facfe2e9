"""`liverelay serve`: a running engine for other programs."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from liverelay.engine.arguments import add_model, add_reports, add_stages
from liverelay.engine.errors import InputError
from liverelay.engine.progress import say, uninterrupted


def add_serve(commands: Any) -> None:
    """The command."""
    p = commands.add_parser("serve", help="a running engine for programs in other languages (docs/embedding.md)")
    add_model(p)
    p.add_argument("--socket", type=Path, required=True, metavar="PATH", help="Unix socket, in a folder of your own")
    p.add_argument("--state", type=Path, metavar="DIR", help="keep clients' snapshots here (default: in memory)")
    p.add_argument(
        "--snapshots", type=int, metavar="N",
        help="keep so many, the latest (16, in memory 2: each has some 50 GB with the 14B model)",
    )
    p.add_argument("--sessions", type=int, default=16, metavar="N", help="most sessions at a time (16)")
    p.add_argument("--max-area", type=int, metavar="PIXELS", help="most pixels of a video (720x400 of them)")
    p.add_argument("--real-time", action="store_true", help="refuse a session that there is no time for")
    add_stages(p, "a GPU where there is one")
    add_reports(p)
    p.set_defaults(command=_serve)


def _serve(a: argparse.Namespace) -> int:
    with uninterrupted():  # a library that is half imported fails with anything
        from liverelay.engine import native
        from liverelay.engine.config import RankEnvironment
        from liverelay.engine.devices import set_threads
        from liverelay.engine.engine import DEFAULT_MAX_AREA
        from liverelay.engine.frame_ring import sweep
        from liverelay.engine.media import check_outputs
        from liverelay.engine.serving import sockets
        from liverelay.engine.serving.server import Server
        from liverelay.engine.serving.states import States
        from liverelay.engine.telemetry import watched

    native.check("serve", "ring_create")
    if RankEnvironment.read() is not None:
        raise InputError("serve runs in one process; give it all devices with --devices instead of torchrun")
    kept = a.snapshots if a.snapshots is not None else 16 if a.state else 2
    area = a.max_area or DEFAULT_MAX_AREA
    for name, value, most in (("sessions", a.sessions, 1000), ("snapshots", kept, 1000000)):
        if not 1 <= value <= most:
            raise InputError(f"--{name} is {value}; give a number from 1 to {most}")
    if not 64 * 64 <= area <= 1 << 26:
        raise InputError(f"--max-area is {area}; give a number of pixels from {64 * 64} to {1 << 26}")
    set_threads(a.threads)
    reports = (("telemetry", a.telemetry), ("trace", a.trace))
    check_outputs([(what, path) for what, path in reports if path is not None], [a.checkpoint / "config.json"])
    sockets.clear(a.socket)  # before a model is loaded
    states = States(a.state, kept)
    sweep()
    engine = _engine(a)
    with watched(engine, a.telemetry, a.trace, a.view):
        server = Server(engine, a.socket, states, max_area=area, say=say)
        try:
            signal.signal(signal.SIGTERM, lambda *_: server.stop())  # how services are ended
            print(f"serving {a.checkpoint} on {a.socket}", flush=True)
            server.run()
        finally:
            server.close()
    return 0


def _engine(a: argparse.Namespace) -> Any:
    from liverelay.engine.config import StreamConfig
    from liverelay.engine.engine import Engine
    from liverelay.engine.launch import LineOptions, load_options, make_plan

    plan = make_plan(LineOptions(a.device, a.plan), None, StreamConfig().steps)
    engine = Engine.load(a.checkpoint, device=plan, **load_options(a, say))
    engine.sessions, engine.admit_by_rate = a.sessions, a.real_time
    return engine
