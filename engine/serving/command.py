"""`liverelay serve`: a running engine for other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from liverelay.engine.errors import InputError, LiveRelayError
from liverelay.engine.progress import uninterrupted


def add_serve(commands: Any) -> None:
    """The command."""
    p = commands.add_parser("serve", help="a running engine for programs in other languages (docs/embedding.md)")
    p.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder with the published files")
    p.add_argument("--socket", type=Path, required=True, metavar="PATH", help="Unix socket, in a folder of your own")
    p.add_argument("--state", type=Path, metavar="DIR", help="keep clients' snapshots here (default: in memory)")
    p.add_argument(
        "--snapshots", type=int, metavar="N",
        help="keep so many, the latest (16, in memory 2: each has some 50 GB with the 14B model)",
    )
    p.add_argument("--sessions", type=int, default=16, metavar="N", help="most sessions at a time (16)")
    p.add_argument("--max-area", type=int, metavar="PIXELS", help="most pixels of a video (720x400 of them)")
    p.add_argument("--real-time", action="store_true", help="refuse a session that there is no time for")
    p.add_argument("--device", "--devices", dest="device", metavar="NAMES", help="as for generate")
    p.add_argument("--plan", metavar="STAGES", help="as for generate")
    p.add_argument("--lora", metavar="FILE", help="as for generate")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="as for generate")
    p.add_argument(
        "--fp8", nargs="?", const="products", default=False, choices=("products", "attention", "all"),
        help="as for generate",
    )
    p.add_argument("--backend", metavar="NAME", help="as for generate")
    p.set_defaults(command=_serve)


def _serve(a: argparse.Namespace) -> int:
    with uninterrupted():  # a library that is half imported fails with anything
        from liverelay.engine import native
        from liverelay.engine.config import RankEnvironment
        from liverelay.engine.engine import DEFAULT_MAX_AREA
        from liverelay.engine.frame_ring import sweep
        from liverelay.engine.serving import sockets
        from liverelay.engine.serving.server import Server
        from liverelay.engine.serving.states import States

    if not hasattr(native.module(), "ring_create"):
        raise LiveRelayError("serve needs the compiled module, which was not built: it needs a C++ compiler and cmake")
    if RankEnvironment.read() is not None:
        raise InputError("serve runs in one process; give it all devices with --devices instead of torchrun")
    kept = a.snapshots if a.snapshots is not None else 16 if a.state else 2
    area = a.max_area or DEFAULT_MAX_AREA
    for name, value, most in (("sessions", a.sessions, 1000), ("snapshots", kept, 1000000)):
        if not 1 <= value <= most:
            raise InputError(f"--{name} is {value}; give a number from 1 to {most}")
    if not 64 * 64 <= area <= 1 << 26:
        raise InputError(f"--max-area is {area}; give a number of pixels from {64 * 64} to {1 << 26}")
    sockets.clear(a.socket)  # before a model is loaded
    states = States(a.state, kept)
    sweep()
    server = Server(_engine(a), a.socket, states, max_area=area, say=_say)
    try:
        print(f"serving {a.checkpoint} on {a.socket}", flush=True)
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    return 0


def _engine(a: argparse.Namespace) -> Any:
    from liverelay.engine.config import StreamConfig
    from liverelay.engine.engine import Engine
    from liverelay.engine.golden import DTYPES
    from liverelay.engine.launch import LineOptions, make_plan

    plan = make_plan(LineOptions(a.device, a.plan), None, StreamConfig().steps)
    engine = Engine.load(
        a.checkpoint, lora=a.lora, device=plan, dtype=DTYPES[a.dtype] if a.dtype else None, backend=a.backend,
        fp8=a.fp8, say=_say,
    )  # fmt: skip
    engine.sessions, engine.admit_by_rate = a.sessions, a.real_time
    return engine


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
