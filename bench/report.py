"""`python -m bench.report FILE.json`: the page docs/FILE.md and its roofline picture, from a run of bench.gpu_suite.

Tables are those that the parts printed on the machine; nothing is measured here. `--times` instead writes what the
planner knows of each card, engine/relay/card_times.py, from the newest results of each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import line_14b, micro, opening, products, stage_14b, timing, vae_split
from bench.card_times import DOCUMENT, document
from bench.ceilings import Ceilings

DOCS = Path(__file__).resolve().parents[1] / "docs"
PRECISIONS = {
    "": "bfloat16", "products": "products in FP8, attention in bfloat16", "attention": "attention in FP8",
    "all": "products and attention in FP8",
}  # fmt: skip


def limits(result: Mapping[str, Any]) -> Ceilings:
    return Ceilings.read(result["ceilings"])


def fenced(text: str) -> list[str]:
    return ["```", text.rstrip(), "```"]


def section(part: Mapping[str, Any]) -> Iterator[str]:
    """Of one part, by what its result holds; nothing of kernels, which have one table for all parts."""
    result = part["result"]
    words = PRECISIONS.get(result.get("fp8", ""), "")
    if "parts" in result:
        what = "Three stages joined by memory and by NCCL" if list(result["parts"]) == ["loop"] else "Stages and line"
        yield from ["", f"## {part.get('title') or f'{what}, {words}'}", ""]
        yield from fenced(line_14b.report(result))
    elif "backends" in result:
        yield from ["", f"## Block-step, full ring, {words}", "", limits(result).text + ".", ""]
        yield from fenced(stage_14b.report(result, limits(result)))
    elif "vae" in result:
        yield from ["", "## Decoding a block, by convolution", "", limits(result).text + ".", ""]
        yield from fenced(vae_split.report(result["vae"], result["ceilings"]["matmul"]))
    elif "products" in result:
        yield from ["", "## Matrix products of the transformer", "", limits(result).text + ".", ""]
        yield from fenced(products.report(result["products"]))
    elif "opening" in result and "error" not in result["opening"]:
        yield from ["", "## Opening a session", ""]
        yield from fenced(opening.report(result["opening"]))


def kernels(found: list[Mapping[str, Any]], picture: Path) -> Iterator[str]:
    """The table of all kernels that were timed, and the roofline, which is drawn."""
    if not (results := [part["result"] for part in found if "rows" in part["result"]]):
        return
    rows, ceilings = micro.merged(results), limits(results[0])
    drawn = timing.roofline(micro.points(rows), ceilings, picture)
    yield from ["", "## Kernels", "", ceilings.text + ".", "", *fenced(micro.report(rows, ceilings)), ""]
    yield f"![roofline]({picture.name})" if picture.exists() else drawn


def page(suite: Mapping[str, Any], name: str, docs: Path) -> str:
    """The page; draws the picture beside it where the suite has microbenchmarks."""
    found, machine = [part for part in suite["parts"] if isinstance(part.get("result"), dict)], suite["machine"]
    lines = [
        f"# {machine.get('gpu') or machine['cpu']}", "",
        f"Made by `python -m bench.report bench/results/{name}.json` from results of `python -m bench.gpu_suite`:",
        f"torch {machine['torch']}, triton {machine['triton']}, the 14B model with random weights at 704x384. Columns:",
        "[bench/README.md](../bench/README.md).", "",
    ]  # fmt: skip
    tested = [part for part in suite["parts"] if part["name"] in ("kernels", "tests")]
    lines += [f"- {part['name']}: {part['headline']}" for part in tested]
    notes = [note for part in found for note in part["result"].get("ceilings", {}).get("notes", ())]
    lines += [f"- {note}" for note in dict.fromkeys([*suite.get("notes", ()), *notes])]
    for part in found:
        lines += section(part)
    lines += kernels(found, docs / f"{name}.png")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.json", nargs="?")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    parser.add_argument("--times", action="store_true", help="write the planner's times of all cards instead of a page")
    given = parser.parse_args()
    if given.times:
        DOCUMENT.write_text(document())
        print(DOCUMENT)
        return 0
    if given.file is None:
        parser.error("give a FILE.json, or --times")
    try:
        suite = json.loads(given.file.read_text())
        text = page(suite, given.file.stem, given.docs)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        parser.error(f"{given.file} is not a readable result of bench.gpu_suite: {fault!r}")
    (given.docs / f"{given.file.stem}.md").write_text(text)
    print(given.docs / f"{given.file.stem}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
