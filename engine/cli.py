"""The command `liverelay`: generate, inspect, quantize, kernels, golden, ... Errors are one line and exit code 1."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liverelay.engine.arguments import add_model, add_reports, add_stages, positive, size
from liverelay.engine.config import RankEnvironment, leave, set_process_defaults
from liverelay.engine.errors import InputError, LiveRelayError, OutputError
from liverelay.engine.planning import add_planning
from liverelay.engine.progress import catch_interrupts, ignore_interrupts, say, uninterrupted
from liverelay.engine.serving.command import add_serve
from liverelay.engine.version import __version__

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 well, 1 error, 2 wrong usage, 130 interrupted).

    argv: None for those of the process, which then ends with the command.
    """
    set_process_defaults()
    arguments = _parser().parse_args(argv)
    catch_interrupts()
    status = _run(arguments)
    if argv is None:
        ignore_interrupts()
    # Python would end by SIGINT where the interrupt came inside an `exec`, as when a library is imported.
    if _is_rank() or (argv is None and status == INTERRUPTED):
        leave(status)
    return status


def _is_rank() -> bool:
    try:
        return RankEnvironment.read() is not None
    except InputError:  # told by the commands that look at it
        return False


def _run(arguments: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except LiveRelayError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        line = _explain(error)
        if line is None:
            raise
        return _fail(line)


def _fail(line: str) -> int:
    print("liverelay: " + " ".join(line.split()), file=sys.stderr)
    return 1


def _explain(error: BaseException) -> str | None:
    """One line for the failures of the machine that a user can do something about; None for our own mistakes."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return "out of memory; choose a smaller --max-area or --size, or a device with more memory (see inspect)"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'input/output'}: {error.strerror}"
    return None


# -- commands ------------------------------------------------------------------------------------------------------


def _generate(a: argparse.Namespace) -> int:
    with uninterrupted():  # a library that is half imported fails with anything
        from liverelay.engine.config import StreamConfig
        from liverelay.engine.devices import set_threads
        from liverelay.engine.engine import Engine
        from liverelay.engine.generate import GenerateOptions, check_outputs, generate, read_inputs
        from liverelay.engine.launch import LineOptions, join, lead, load_options, make_plan, serve
        from liverelay.engine.loading import Loader
        from liverelay.engine.telemetry import watched

    set_threads(a.threads)
    line, ranks = LineOptions(a.device, a.plan, a.transport, a.timeout), RankEnvironment.read()
    stream = StreamConfig(relative_distance=a.relative_distance)
    plan = make_plan(line, ranks, stream.steps)
    options = GenerateOptions(
        a.image, a.audio, a.prompt, a.out, size=a.size, max_area=a.max_area[0] * a.max_area[1], seed=a.seed,
        seconds=a.seconds, live=a.live, contact_sheet=a.contact_sheet, snapshot_every=a.snapshot_every,
        reports=tuple((what, path) for what, path in (("telemetry", a.telemetry), ("trace", a.trace)) if path),
        reads=(a.checkpoint / "config.json", *([] if a.lora is None else [Path(a.lora)])),
    )
    leads = ranks is None or ranks.rank == 0
    if leads:
        check_outputs(options)
        inputs = read_inputs(options)
    loader = Loader.make(a.checkpoint, plan.devices, **load_options(a, say if leads else None))
    group = None if ranks is None else join(line, ranks, plan)
    if group is not None and not leads:
        serve(loader, group, plan)
        return 0
    engine = Engine.assemble(loader, plan, stream) if group is None else lead(loader, group, plan, stream)
    with watched(engine, a.telemetry, a.trace, a.view), contextlib.closing(engine):
        result = generate(engine, options, inputs)
    print(result.path)
    return INTERRUPTED if result.interrupted else 0


def _inspect(a: argparse.Namespace) -> int:
    from liverelay.engine.inspection import inspect_checkpoint, render

    report = inspect_checkpoint(a.folder, size=a.size, dtype=a.dtype, lora=a.lora)
    if a.json:
        import json

        print(json.dumps(report.to_dict(), indent=1))
    else:
        render(report)
    return 0 if report.complete else 1


def _make_checkpoint(a: argparse.Namespace) -> int:
    from liverelay.engine.make_checkpoint import make_checkpoint

    print(make_checkpoint(a.out, preset=a.preset, seed=a.seed))
    return 0


def _quantize(a: argparse.Namespace) -> int:
    from liverelay.engine.devices import check_device
    from liverelay.engine.media import check_outputs
    from liverelay.engine.quantize import quantize_checkpoint, write_errors

    if a.json is not None:
        check_outputs([("list of errors", a.json)], [None if a.lora is None else Path(a.lora)])
        for folder in (a.checkpoint, a.out):
            if a.json.resolve().is_relative_to(folder.resolve()):
                raise OutputError(f"{a.json} lies inside {folder}; give a file beside it")
    errors = quantize_checkpoint(a.checkpoint, a.out, lora=a.lora, device=check_device(a.device), say=say)
    print("relative error of the weights, one scale a row (ours) and one a tensor:")
    groups: dict[str, list[tuple[float, float]]] = {}
    for error in errors:
        name = ".".join("*" if part.isdigit() and i < 3 else part for i, part in enumerate(error.key.split(".")))
        groups.setdefault(name, []).append((error.rows, error.tensor))
    for name, pairs in groups.items():
        rows, tensor = (max(column) for column in zip(*pairs, strict=True))
        print(f"  {name:44s} {len(pairs):3d} weights   rows at most {rows:.4f}   tensor at most {tensor:.4f}")
    if a.json is not None:
        write_errors(a.json, errors)
    print(a.out)
    return 0


def _kernels(a: argparse.Namespace) -> int:
    import torch

    from liverelay.engine.devices import check_device, default_device, default_dtype
    from liverelay.engine.models.attention_choice import tried, verdict
    from liverelay.kernels.attention_backends import candidates
    from liverelay.kernels.attention_trials import Setting
    from liverelay.kernels.dispatch import BACKENDS, available, choose

    device = torch.device(check_device(default_device() if a.device is None else a.device))
    print(f"kernel backends on {device} (default: {choose(None, device)})")
    for name in BACKENDS:
        found = available(name, device)
        print(f"  {name:8s} {'yes' if found.works else 'no ':3s}  {found.reason}")
    print("attention:")
    shape = (3168, 15312, 40, 128) if device.type == "cuda" else (96, 464, 4, 32)
    works = available("triton", device).works
    setting = Setting(candidates, works, shape, device, default_dtype(device))
    for trial, kept in tried(list(candidates(device, works)), setting):
        print(f"  {trial.name:18s} {'no ' if trial.fault else 'yes'}  {verdict(trial, kept)}", flush=True)
    return 0


def _golden(a: argparse.Namespace) -> int:
    from liverelay.engine.devices import set_threads
    from liverelay.engine.golden import GIVEN, run
    from liverelay.engine.media import check_outputs
    from liverelay.engine.models.weights import save_tensors

    set_threads(a.threads)
    check_outputs([("result", a.out)], [a.weights, *(a.folder / name for name in GIVEN)])
    results = run(a.component, a.folder, _golden_options(a))
    if results is None:  # a rank that does not lead
        return 0
    save_tensors(a.out, results)
    print(f"{len(results)} tensors -> {a.out}")
    return 0


def _golden_options(a: argparse.Namespace) -> Any:
    from liverelay.engine.golden import DTYPES, GoldenOptions
    from liverelay.engine.launch import LineOptions

    a.device = a.device or "cpu"
    line = LineOptions(a.device, a.plan, a.transport, a.timeout)
    return GoldenOptions(DTYPES[a.dtype], a.weights, a.backend, a.device.split(",")[0], line)


# -- arguments -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="liverelay", description="Real-time inference engine for Live Avatar: a talking person from one image.",
    )
    parser.add_argument("--version", action="version", version=f"liverelay {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="one image and a sound in, a video with sound out"))
    inspect = commands.add_parser("inspect", help="what a checkpoint holds, what is missing, memory it needs")
    inspect.add_argument("folder", type=Path, metavar="DIR", help="the checkpoint's folder")
    inspect.add_argument("--size", type=size, default=(704, 384), metavar="WxH", help="video size (704x384)")
    inspect.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    inspect.add_argument("--lora", metavar="FILE", help="LoRA file, or 'none' (default: looked for)")
    inspect.add_argument("--json", action="store_true", help="print the report as json")
    inspect.set_defaults(command=_inspect)

    make = commands.add_parser("make-checkpoint", help="write a small checkpoint in the published layout")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    make.add_argument("--preset", default="tiny", help="random weights: tiny, small; trained: toon (tiny)")
    make.add_argument("--seed", type=int, default=0)
    make.set_defaults(command=_make_checkpoint)

    quantize = commands.add_parser("quantize", help="write a checkpoint with its large products in FP8")
    quantize.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder of published files")
    quantize.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    quantize.add_argument("--lora", metavar="FILE", help="LoRA file to merge, or 'none' (default: looked for)")
    quantize.add_argument("--device", default="cpu", help="where to merge and quantise: cpu, cuda or cuda:N (cpu)")
    quantize.add_argument("--json", type=Path, metavar="FILE", help="also write the error of every weight")
    quantize.set_defaults(command=_quantize)

    kernels = commands.add_parser("kernels", help="which kernel backends work here, and why not")
    kernels.add_argument("--device", help="cpu, cuda or cuda:N (a GPU where there is one)")
    kernels.set_defaults(command=_kernels)

    golden = commands.add_parser("golden", help="run a component on given tensors, to compare with the published one")
    golden.add_argument("component", help="dit, tpp, lora, vae, audio, text or image")
    golden.add_argument("folder", type=Path, metavar="DIR", help="folder with the given files")
    golden.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    golden.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    golden.add_argument("--weights", type=Path, metavar="FILE", help="weights instead of those of DIR")
    golden.add_argument("--backend", metavar="NAME", help="kernel backend (torch)")
    add_stages(golden, "cpu", threads=1)
    _add_transport(golden)
    golden.set_defaults(command=_golden)
    add_planning(commands)
    add_serve(commands)
    return parser


def _add_transport(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--transport", choices=("auto", "local", "gloo", "nccl"), default="auto",
        help="between the processes of torchrun: nccl on GPUs, gloo on CPUs (auto)",
    )
    p.add_argument(
        "--timeout", type=positive(float, "seconds"), default=10.0, metavar="S",
        help="give a silent or stuck process up after this time (10)",
    )


def _add_generate(p: argparse.ArgumentParser) -> None:
    from liverelay.engine.config import DEFAULT_MAX_SIZE

    add_model(p)
    p.add_argument("--image", type=Path, required=True, metavar="FILE", help="reference picture of the person")
    p.add_argument("--audio", type=Path, required=True, metavar="FILE", help="speech, any common format")
    p.add_argument("--prompt", default="", help="what is to be seen")
    p.add_argument("--out", type=Path, required=True, metavar="FILE.mp4", help="video to write (.mp4, .mov, .mkv)")
    choice = p.add_mutually_exclusive_group()
    choice.add_argument("--size", type=size, metavar="WxH", help="video size in pixels, multiples of 64")
    choice.add_argument(
        "--max-area", type=size, default=DEFAULT_MAX_SIZE, metavar="WxH",
        help="choose the size from the picture, by the published rule, within this area (720x400)",
    )
    p.add_argument("--seconds", type=positive(float, "seconds"), metavar="N", help="at most this long")
    p.add_argument("--seed", type=int, default=0, help="of all randomness (0)")
    p.add_argument("--live", action="store_true", help="hear the sound piece by piece, as a live stream would")
    p.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="also write a picture of frames in time")
    add_stages(p, "a GPU where there is one")
    _add_transport(p)
    p.add_argument(
        "--relative-distance", type=int, metavar="N",
        help="constant distance of the rolling sink, in latent frames (drawn from 4..30 as published)",
    )
    p.add_argument(
        "--snapshot-every", type=positive(int, "blocks"), default=0, metavar="BLOCKS",
        help="save the state in OUT.resume now and then; started again, by hand or by torchrun --max-restarts, a run "
        "that was cut off goes on from there",
    )
    add_reports(p)
    p.set_defaults(command=_generate)
