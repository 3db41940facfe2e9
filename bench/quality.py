"""`python -m bench.quality --checkpoint DIR`: what a small talking cartoon model does, on people and speech held out.

Each part prints a table with the goals beside the values. Controls say what a measure could reach: the renderer's own
frames, the same blurred, and for lip sync the same through the model's VAE.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liverelay.engine.config import set_process_defaults

set_process_defaults()  # before torch is imported

import torch  # noqa: E402

from bench import quality_clips, quality_long, quality_pictures, quality_tables  # noqa: E402
from bench.quality_options import Options  # noqa: E402
from distill import espeak  # noqa: E402
from liverelay.engine import LiveRelayError, media  # noqa: E402
from liverelay.engine.arguments import number, positive  # noqa: E402
from liverelay.engine.devices import check_device, default_device  # noqa: E402
from liverelay.engine.loading import Loader  # noqa: E402

Part = tuple[Callable[[Options], dict[str, Any]], Callable[[dict[str, Any]], list[str]]]
PARTS: dict[str, Part] = {
    "lipsync": (quality_clips.lip_sync, quality_tables.lipsync),
    "identity": (quality_long.identity, quality_tables.identity),
    "prompts": (quality_clips.prompts, quality_tables.prompts),
    "ablations": (quality_long.ablations, quality_tables.streams),
    "teacher": (quality_clips.teacher, quality_tables.teacher),
    "precision": (quality_clips.precision, quality_tables.precision),
    "speed": (quality_clips.speed, quality_tables.speed),
}
CONTROLLED = ["lipsync", "identity", "prompts"]  # say something without a model, too
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Report:
    """Results by part, in a file that is renewed as a whole; `part` is the one that is being measured."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path, self.results, self.part = path and media.real_path(path), dict[str, Any](facts), ""
        self.kept, self.failed = False, False

    def save(self, result: object) -> None:
        self.results[self.part] = result
        if self.path is not None:
            part = media.part_path(self.path)
            try:
                part.write_text(json.dumps(plain(self.results), indent=1) + "\n")
                os.replace(part, self.path)
                self.kept, self.failed = True, False
            except OSError as error:  # a stream of hours goes on
                part.unlink(missing_ok=True)
                self.failed = True
                print(f"cannot write {self.path}: {error.strerror}", file=sys.stderr)


def plain(value: Any) -> Any:
    """As JSON knows it: numbers that are none become null."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checkpoints(given: list[str]) -> dict[str, Path]:
    """LABEL=DIR or DIR, whose label is the folder's name."""
    found: dict[str, Path] = {}
    for text in given:
        label, _, folder = ("", "", text) if Path(text).is_dir() else text.rpartition("=")
        label = label or Path(folder).name
        if label in found:
            raise LiveRelayError(f"two checkpoints are called '{label}'; name them with LABEL=DIR")
        found[label] = Path(folder)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", action="append", default=[], metavar="[LABEL=]DIR",
        help="a model in the published layout; several may be given, such as one trained without history corruption")
    add("--only", metavar="PART,PART", help=f"some of {', '.join(PARTS)}; teacher is left out without --run")
    add("--clips", type=positive(int, "clips"), help="default: 8 (lipsync), 12 (prompts), 4 (teacher), 2 (precision)")
    add("--frames", type=positive(int, "frames"), default=100,
        help="of a clip (100); prompts take at most 48, precision at most 60, speed at least 125")
    add("--seconds", type=positive(float, "seconds"), help="of a stream; default: 120 (identity), 60 (each ablation)")
    add("--skim", action="store_true", help="identity: decode some windows of a long stream only")
    add("--people", type=positive(int, "people"), default=1, help="that are streamed side by side")
    add("--seed", type=number(int, "seeds"), default=0, help="of the first clip and of the noise")
    add("--whole-file", action="store_true", help="lip sync with the whole sound known, instead of heard live")
    add("--run", type=Path, metavar="DIR", help="a teacher's training run")
    add("--teacher-blocks", type=positive(int, "blocks"), default=5, help="that it makes at once")
    add("--teacher-steps", type=positive(int, "steps"), default=20)
    add("--device", default=default_device())
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--json", type=Path, metavar="FILE", help="all numbers; renewed while a long part runs")
    add("--pictures", type=Path, metavar="DIR", help="curves and contact sheets")
    return parser.parse_args()


def chosen(given: argparse.Namespace) -> list[str]:
    """The parts to do."""
    possible = [name for name in PARTS if given.run or name != "teacher"] if given.checkpoint else CONTROLLED
    parts = given.only.split(",") if given.only else possible
    for name in parts:
        if name not in PARTS:
            raise LiveRelayError(f"there is no part '{name}'; there are {', '.join(PARTS)}")
        if not given.checkpoint and name not in CONTROLLED:
            raise LiveRelayError(f"{name} needs a model; give --checkpoint DIR")
    if "teacher" in parts and not (given.run and (given.run / "state.pt").exists()):
        raise LiveRelayError(f"teacher needs a training run with its state.pt: --run DIR (given: {given.run})")
    return parts


def main() -> int:
    given = arguments()
    try:
        parts = chosen(given)
        if given.json:
            media.check_writable(given.json)
        if given.pictures:
            quality_pictures.prepare(given.pictures)
        voices = "own synthesiser" if espeak.files() is None else "espeak-ng and own synthesiser"
        facts = {"checkpoints": given.checkpoint, "seed": given.seed, "frames": given.frames, "voices": voices}
        report = Report(given.json, facts)
        options = Options(
            checkpoints(given.checkpoint), device=check_device(given.device), dtype=DTYPES.get(given.dtype),
            clips=given.clips, frames=given.frames, seconds=given.seconds, people=given.people, seed=given.seed,
            skim=given.skim, whole_file=given.whole_file, run=given.run, teacher_blocks=given.teacher_blocks,
            teacher_steps=given.teacher_steps, pictures=given.pictures, save=report.save,
        )  # fmt: skip
        for folder in options.checkpoints.values():
            Loader.make(folder, (options.device,), dtype=options.dtype)  # says what is missing
        for name in parts:
            report.part = name
            measure, lines = PARTS[name]
            result = measure(options)
            report.save(result)
            print("\n" + "\n".join(lines(result)), flush=True)
    except LiveRelayError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        so_far = report.results.get(report.part)
        if so_far and report.part in ("identity", "ablations"):
            print("\n".join(PARTS[report.part][1](so_far)), flush=True)
        kept = f"; what was done is in {given.json}" if report.kept else ""
        print(f"interrupted in {report.part}{kept}", file=sys.stderr)
        return 130
    return int(report.failed or bool(quality_pictures.missing))


if __name__ == "__main__":
    raise SystemExit(main())
