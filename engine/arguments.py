"""What the commands' arguments are read with: each error is one line that says what is expected."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
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
