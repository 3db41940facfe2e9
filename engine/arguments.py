"""What the commands' arguments are read with: each error is one line that says what is expected."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def size(text: str) -> tuple[int, int]:
    """704x384 -> (width, height)."""
    match = re.fullmatch(r"(\d+)[xX*](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT, as in 704x384")
    return int(match[1]), int(match[2])


def positive(kind: type[Any], what: str) -> Callable[[str], Any]:
    """A number above 0."""
    return number(kind, what, zero=False)


def number(kind: type[Any], what: str, *, zero: bool = True) -> Callable[[str], Any]:
    """A number that is not negative; zero: it may be 0."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number of {what}") from None
        if not (0 < value < 1e9 or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text} is not a sensible number of {what}")
        return value

    return convert


def add_fp8(parser: argparse.ArgumentParser) -> None:
    """--fp8 [products|attention|all]."""
    parser.add_argument(
        "--fp8", nargs="?", const="products", default=False, choices=("products", "attention", "all"),
        help="FP8 (e4m3) in the transformer's large products (the default of --fp8), in self-attention with half the "
        "arena's memory, or in both",
    )


def add_model(p: argparse.ArgumentParser) -> None:
    """Which checkpoint, and how it computes: what `launch.load_options` reads."""
    p.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder with the published files")
    p.add_argument("--lora", metavar="FILE", help="LoRA file, or 'none' (default: looked for beside the checkpoint)")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="bfloat16 on a GPU, float32 on a CPU")
    add_fp8(p)
    p.add_argument(
        "--text-encoder", choices=("device", "host", "disk"),
        help="where the text encoder (11 GB) is kept between new prompts (the host's memory where there is room, else "
        "the disk); the 64 prompts used last are kept anyway",
    )
    p.add_argument("--backend", metavar="NAME", help="kernel backend or attention, as liverelay kernels lists")


def add_stages(p: argparse.ArgumentParser, device: str, threads: int | None = None) -> None:
    """--device, --plan and --threads; device, threads: what is told, and taken, without them."""
    p.add_argument(
        "--device", "--devices", dest="device", metavar="NAMES",
        help=f"cpu, cuda or cuda:N; several with commas between them are a line of stages ({device})",
    )
    p.add_argument(
        "--plan", metavar="STAGES", help="what each device does, as in 0+1,2+3,vae or 0,1,2,3,vae1,vae2 (balanced)"
    )
    p.add_argument(
        "--threads", type=positive(int, "threads"), metavar="N", default=threads,
        help="CPU threads of each process; results are equal to the bit where this number is ("
        + ("all cores, 1 under torchrun)" if threads is None else f"{threads})"),
    )


def add_reports(p: argparse.ArgumentParser) -> None:
    """--telemetry, --trace and --view: what `telemetry.watched` takes."""
    p.add_argument("--telemetry", type=Path, metavar="FILE.jsonl", help="a line of JSON for each block and stage")
    p.add_argument("--trace", type=Path, metavar="FILE.json", help="the stages' timeline, in Chrome's trace format")
    p.add_argument("--view", action="store_true", help="show the stages' figures while they work")
