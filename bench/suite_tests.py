"""Tests within the GPU suite: who runs which, in what process, and which may be left out on a GPU.

As a pytest plugin (-p bench.suite_tests) it keeps one share of the tests: a family of the kernels, so that a kernel
which breaks its process spoils no other family, or every n-th test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARE = "LIVERELAY_TEST_SHARE"  # the name of a family, or "i/n": every n-th collected test, from i on
MOST = "LIVERELAY_TEST_MOST"  # keep no more of the share than this, as a dry run does
NOTHING_COLLECTED = 5  # pytest's exit status
SKIPPED = re.compile(r"^SKIPPED \[\d+\] (\S+?): (.*)$", re.MULTILINE)
# What may be skipped on a GPU: another kind of GPU, the interpreter's own tests, libraries that the core does without.
ALLOWED = re.compile(
    r"needs (two|2|several|more) GPUs|is not for sm_|for sm_1\d\d|on a GPU a fault would|only in the interpreter"
    r"|could not import '(av|ftfy|regex|soundfile|soxr|sentencepiece|matplotlib|rich)'"
    r"|(PyAV|soundfile|soxr|ftfy) is not installed"
)


def family(item: Any) -> str:
    """A collected test's family: the module of its kernel's launcher, else the name of its own file."""
    spec = getattr(item, "callspec", None) and item.callspec.params.get("spec")
    return str(spec.family) if hasattr(spec, "family") else Path(item.path).stem


def families() -> list[str]:
    """All that tests of tests/kernels can be of."""
    from liverelay.kernels.registry import KERNELS

    files = (ROOT / "tests" / "kernels").glob("test_*.py")
    return sorted({spec.family for spec in KERNELS} | {path.stem for path in files})


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this process's share of the tests."""
    share = os.environ.get(SHARE)
    if not share:
        return
    first, _, of = share.partition("/")
    kept = items[int(first) :: int(of)] if of else [item for item in items if family(item) == share]
    kept = kept[: int(os.environ.get(MOST, len(kept)))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def wrongly_skipped(texts: Iterable[str]) -> list[str]:
    """Skips in pytest's output that a GPU has no excuse for: `file:line: reason`."""
    found = [f"{where}: {reason.strip()}" for text in texts for where, reason in SKIPPED.findall(text)]
    return sorted({skip for skip in found if not ALLOWED.search(skip)})


def counts(texts: Iterable[str]) -> dict[str, int]:
    """Of pytest's last lines: passed, failed, ..."""
    found: dict[str, int] = {}
    for text in texts:
        last = next((line for line in reversed(text.splitlines()) if re.search(r" in [\d.]+s", line)), "")
        for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last):
            found[word] = found.get(word, 0) + int(count)
    return dict(sorted(found.items()))
