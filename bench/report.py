"""`python -m bench.report FILE.json`: the page docs/FILE.md and its roofline picture, from a run of bench.gpu_suite.

Tables are those that the parts printed on the machine; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import line_14b, micro, stage_14b, timing
from bench.ceilings import Ceilings

DOCS = Path(__file__).resolve().parents[1] / "docs"
STAGES = {
    "stage": "Block-step in bfloat16", "fp8": "Products in FP8, attention in bfloat16",
    "fp8-all": "Products and attention in FP8",
}  # fmt: skip
LINES = {
    "line-bf16": "Stages and line in bfloat16", "line": "Stages and line, products in FP8",
    "line-all": "Stages and line, products and attention in FP8",
}  # fmt: skip


def ceilings_of(result: dict[str, Any]) -> Ceilings:
    return Ceilings.read(result["ceilings"])


def page(suite: dict[str, Any], name: str, docs: Path) -> str:
    """The page; draws the picture beside it where the suite has microbenchmarks."""
    found, machine = {part["name"]: part for part in suite["parts"]}, suite["machine"]
    lines = [
        f"# {machine['gpu']}", "",
        f"Made by `python -m bench.report bench/results/{name}.json` from one run of `python -m bench.gpu_suite`:",
        f"torch {machine['torch']}, triton {machine['triton']}. Columns: [bench/README.md](../bench/README.md).", "",
    ]  # fmt: skip
    lines += [f"- {part}: {one['headline']}" for part, one in found.items() if part in ("kernels", "tests")]
    for part, title in LINES.items():
        if result := found.get(part, {}).get("result"):
            lines += ["", f"## {title}, 14B, 704x384", "", "```", line_14b.report(result), "```"]
    for part, title in STAGES.items():
        if result := found.get(part, {}).get("result"):
            lines += ["", f"## {title}, 14B, 704x384, full ring", "", ceilings_of(result).text + ".", ""]
            lines += ["```", stage_14b.report(result, ceilings_of(result)), "```"]
    if result := found.get("micro", {}).get("result"):
        rows = [micro.Row(**row) for row in result["rows"]]
        picture = docs / f"{name}.png"
        drawn = timing.roofline(micro.points(rows), ceilings_of(result), picture)
        lines += ["", "## Kernels", "", ceilings_of(result).text + ".", "", "```"]
        lines += [micro.report(rows, ceilings_of(result)).rstrip(), "```", ""]
        lines.append(f"![roofline]({picture.name})" if picture.exists() else drawn)
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    given = parser.parse_args()
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
