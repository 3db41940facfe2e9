"""`python -m bench.line_14b`: the engine's own stages at full size with random weights, captured and as a whole line.

stage: one block-step of a stage, launch by launch against its CUDA graphs: equal bit for bit, times, launches. line:
all steps and the VAE on this device in one stage, as a session sees it; apart: the VAE in a stage of its own. loop: the
same in three stages, joined by memory and by NCCL to itself (without a GPU: by memory twice, a dry run). The last line
is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from liverelay.engine.config import set_process_defaults

set_process_defaults()  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import timing  # noqa: E402
from bench.clocks import text  # noqa: E402
from bench.random_model import Model, counters, launches, tidy  # noqa: E402
from bench.stage_14b import PRESETS, ms  # noqa: E402
from bench.timing import one_line, table  # noqa: E402
from liverelay.engine.relay.graph import Graphs  # noqa: E402
from liverelay.engine.relay.messages import Event  # noqa: E402
from liverelay.engine.relay.pipeline import MakeLink, local_pipeline  # noqa: E402
from liverelay.engine.relay.plan import StagePlan, parse_plan  # noqa: E402
from liverelay.engine.relay.remote import self_loop  # noqa: E402
from liverelay.engine.relay.stage import Stage, set_device  # noqa: E402
from liverelay.engine.telemetry import Telemetry  # noqa: E402
from liverelay.engine.telemetry import table as telemetry_table  # noqa: E402

TOGETHER, APART = "0+1+2+3+vae", "0+1+2+3,vae"
STEADY = 8  # blocks after which every ring slot has met a full ring, and the sink has been replaced
CHECKED = 13  # blocks that are compared


# -- one stage ---------------------------------------------------------------------------------------------------------


def step_through(model: Model, stage: Stage, blocks: int) -> list[Tensor]:
    """A session of its own from the start; the parcel after each block, on the host."""
    stage.open(0, model.given)
    results = []
    for block in range(blocks):
        stage.parcel.fill(model.sound[block % len(model.sound)])
        stage.denoise(0, model.command(0, block))
        results.append(stage.parcel.parts["latent"].cpu().clone())
    return results


def measure_stage(model: Model, seconds: float) -> dict[str, Any]:
    """A stage of one step, eager and captured."""
    stage, result = model.stage(StagePlan((0,), "", str(model.device))), dict[str, Any]()
    stage.graphs.enabled = False
    eager = step_through(model, stage, CHECKED)
    command = model.command(0, CHECKED)

    def step() -> None:
        stage.denoise(0, command)

    def measure(mode: str) -> None:
        took = timing.measure(step, device=model.device, seconds=seconds, graph=False, cold=False)
        result[mode] = {"s": took.seconds, "spread": took.spread, "clocks": took.clocks}
        result[mode] |= launches(step, model.device)

    measure("eager")
    stage.graphs = Graphs(model.device)
    began = time.perf_counter()
    captured = step_through(model, stage, CHECKED)
    timing.wait(model.device)
    result["first_blocks_s"] = time.perf_counter() - began  # with the captures
    result["equal"] = all(map(torch.equal, eager, captured)) and all(bool(part.isfinite().all()) for part in eager)
    measure("captured")
    result["graphs"] = len(stage.graphs.captured)
    if model.device.type == "cuda" and not stage.graphs.enabled:
        result["note"] = "the stage could not be captured: see the log"
    return result


def stage_report(result: dict[str, Any]) -> str:
    rows = [[mode, ms(one["s"]), f"{12 / one['s']:.1f}", str(one["host"] or "-"), str(one["device"] or "-")]
            for mode in ("eager", "captured") if (one := result.get(mode))]  # fmt: skip
    same = "equal bit for bit" if result["equal"] else "NOT EQUAL"
    return table(["stage of one step", "ms", "FPS", "host calls", "kernels"], rows) + (
        f"\n{same} over {CHECKED} blocks; {result['graphs']} graphs; "
        f"the first {CHECKED} blocks with all captures took {result['first_blocks_s']:.1f} s"
    )


# -- a line ------------------------------------------------------------------------------------------------------------


class Watched:
    """A line of stages in this process, and the figures of the session that runs on it. link: None for the engine's
    own choice."""

    def __init__(self, model: Model, plan: str, stages: Sequence[Stage] = (), link: MakeLink | None = None) -> None:
        self.model, self.plan = model, parse_plan(plan, [str(model.device)] * (plan.count(",") + 1))
        self.stages = list(stages) or [model.stage(part) for part in self.plan.stages]
        self.telemetry: Telemetry | None = None
        self.line = local_pipeline(self.plan, model.spec, self.stages, observe=self._observe, make_link=link)

    def _observe(self, event: Event) -> None:
        if self.telemetry is not None:
            self.telemetry.observe(event)

    def session(self, blocks: int) -> tuple[list[Any], dict[str, Any]]:
        """A session of its own: frames of its first blocks, figures of all."""
        model, stream = self.model, self.model.stream
        self.telemetry = Telemetry(self.plan, block_frames=stream.block_frames, fps=stream.fps)
        serial = self.line.open(model.given)

        def run(first: int, end: int) -> list[Any]:
            futures = [self.line.request(serial, block, model.sound[block % len(model.sound)],
                                         model.distances[block % len(model.distances)])
                       for block in range(first, end)]  # fmt: skip
            return [future.result() for future in futures]

        frames, before = run(0, STEADY), counters(model.device)
        with timing.watched(model.device) as clocks:
            begun = time.perf_counter()
            frames += run(STEADY, STEADY + blocks)
            steady, after = time.perf_counter() - begun, counters(model.device)
        self.line.close_session(serial)
        figures = self.telemetry.close()
        return frames, {
            "steady_fps": blocks * stream.block_frames / steady, "first_frame_s": figures.first_frame_s,
            "allocated": {name: after[name] - before[name] for name in after},
            "figures": dataclasses.asdict(figures), "table": telemetry_table(figures), "clocks": clocks,
        }  # fmt: skip


def measure_line(model: Model, blocks: int, seconds: float, plan: str = TOGETHER) -> dict[str, Any]:
    """All steps and the VAE on one GPU, in one stage or the VAE in its own; the second session meets a warm line."""
    if lack := model.lacks(1):
        return {"skipped": lack}
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    began = time.perf_counter()
    watched = Watched(model, plan)
    try:
        _, first = watched.session(1)
        cold = time.perf_counter() - began
        _, result = watched.session(blocks)
    finally:
        watched.line.close()
    result |= {"plan": plan, "cold_s": cold, "cold_first_frame_s": first["first_frame_s"]}
    result["vae"] = measure_vae(watched.stages[-1], seconds)
    result["captured"] = sum(len(stage.graphs.captured) for stage in watched.stages)
    if model.device.type == "cuda":
        result["memory_bytes"] = torch.cuda.max_memory_allocated(model.device)
        result["reserved_bytes"] = torch.cuda.max_memory_reserved(model.device)
    return result


def measure_vae(stage: Stage, seconds: float) -> dict[str, Any]:
    """Decoding a block to bytes: captured (on a GPU), eager, and eager by the size that its blocks work at."""
    device, decoder = stage.device, stage.places[0].decoder
    assert stage.vae is not None and decoder is not None
    vae, layers = stage.vae, stage.vae._decoder
    set_device(device)
    with torch.inference_mode():
        options: dict[str, Any] = {"device": device, "seconds": seconds, "graph": False, "cold": False}
        captured = timing.measure(lambda: stage.decode(0, 1), **options)
        eager = timing.measure(lambda: stage._decode(decoder, False), **options).seconds
        samples: dict[str, list[float]] = {}
        for _ in range(3):
            watch = timing.Stopwatch(device)
            parts = {kind: by_size(watch, getattr(layers, kind), kind) for kind in ("residual", "up", "attention")}
            with mock.patch.multiple(layers, **parts), mock.patch.object(
                vae, "to_uint8", watch.wrap(vae.to_uint8, "to_uint8")
            ):
                stage._decode(decoder, False)
            timing.wait(device)
            sums: dict[str, float] = {}
            for label, begin, end in watch.spans:
                sums[label] = sums.get(label, 0.0) + watch.between(begin, end)
            for label, took in sums.items():
                samples.setdefault(label, []).append(took)
    split = {label: median(values) for label, values in samples.items()}
    split["rest"] = max(0.0, eager - sum(split.values()))
    return {"captured_s": captured.seconds, "clocks": captured.clocks, "eager_s": eager, "parts_s": split}


def by_size(watch: timing.Stopwatch, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A part of the decoder, watched under its kind and the size of its input."""

    def watched(name: str, x: Tensor, *more: Any) -> Any:
        return watch.wrap(function, f"{kind} {x.shape[2]}x{x.shape[3]}")(name, x, *more)

    return watched


def line_report(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"line: {result['skipped']}"
    vae, memory = result["vae"], result.get("memory_bytes")
    rows = [[part, ms(took)] for part, took in vae["parts_s"].items()]
    rows += [["block, eager", ms(vae["eager_s"])], ["block, captured", ms(vae["captured_s"])]]
    lines = [
        result["table"],
        f"steady {result['steady_fps']:.1f} FPS; first frame after {result['first_frame_s']:.2f} s on a warm line, "
        f"{result['cold_first_frame_s']:.1f} s with all captures; allocations in steady blocks: "
        f"{result['allocated']['allocation.all.allocated']}",
    ]
    if clocks := text(result.get("clocks", {})):
        lines.append(f"during steady blocks: {clocks}")
    if memory:
        lines.append(f"memory: {memory / 2**30:.1f} GiB, {result['reserved_bytes'] / 2**30:.1f} with the caches")
    return "\n".join([*lines, "", table(["VAE decoder, 12 frames", "ms"], rows)])


# -- links -------------------------------------------------------------------------------------------------------------


def measure_loop(model: Model, blocks: int) -> dict[str, Any]:
    """The same stages joined by memory and by NCCL to itself."""
    if lack := model.lacks(2):
        return {"skipped": lack}
    result, frames, stages = dict[str, Any](), list[list[Any]](), list[Stage]()
    other = self_loop if model.device.type == "cuda" else None
    for name, link in (("warm-up", None), ("memory", None), ("NCCL to itself", other)):
        watched = Watched(model, "0+1,2+3,vae", stages, link)
        stages = watched.stages
        try:
            got, found = watched.session(1 if name == "warm-up" else blocks)
        finally:
            watched.line.close()
        if name != "warm-up":
            frames.append(got)
            result[name] = found
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    result["equal"] = all(map(np.array_equal, *frames))
    return result


def loop_report(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"links: {result['skipped']}"
    rows = []
    for name in (name for name in result if name != "equal"):
        handoffs = [stage["handoff_ms"][0] for stage in result[name]["figures"]["stages"][1:]]
        fps = result[name]["steady_fps"]
        rows.append([name, f"{fps:.1f}", f"{12e3 / fps:.1f}", "/".join(f"{value:.2f}" for value in handoffs)])
    head = ["stages 0+1,2+3,vae joined by", "FPS", "ms a block", "handoff ms p50"]
    return table(head, rows) + ("\nequal bit for bit" if result["equal"] else "\nNOT EQUAL")


# -- all ---------------------------------------------------------------------------------------------------------------

REPORTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "stage": stage_report, "line": line_report, "apart": line_report, "loop": loop_report
}  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """Tables of all parts that were measured."""
    return "\n\n".join(REPORTS[name](part) for name, part in result["parts"].items() if "error" not in part)


def faults(result: dict[str, Any]) -> list[str]:
    """What makes the run a failure."""
    found = []
    for name, part in result["parts"].items():
        if "error" in part:
            found.append(f"{name}: {part['error']}")
        if not part.get("equal", True):
            found.append(f"{name}: not equal")
        if any(part.get("allocated", {}).values()):
            found.append(f"{name}: steady blocks allocate: {part['allocated']}")
        if "note" in part:
            found.append(f"{name}: {part['note']}")
    return found


def headline(result: dict[str, Any]) -> str:
    """The run in one line."""
    parts, dtype = result["parts"], result["dtype"].removeprefix("torch.")
    texts = [f"{dtype}, FP8 {result['fp8']}" if result["fp8"] else dtype]
    if "captured" in (stage := parts.get("stage", {})):
        texts.append(f"stage {ms(stage['eager']['s'])} ms, captured {ms(stage['captured']['s'])}")
    for name, plan in (("line", TOGETHER), ("apart", APART)):
        if "skipped" in (line := parts.get(name, {})):
            texts.append(f"line {plan} {line['skipped']}")
        elif "steady_fps" in line:
            said = f"{line['steady_fps']:.1f} FPS, first frame {line['first_frame_s']:.2f} s"
            texts.append(f"line {plan} {said}, VAE {ms(line['vae']['captured_s'])} ms")
    if "equal" in (loop := parts.get("loop", {})):
        texts.append(f"NCCL loop {loop['NCCL to itself']['steady_fps']:.1f} FPS")
    return ", ".join([*texts, *(f"FAULT: {fault}" for fault in faults(result))])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.line_14b", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: 14b on a GPU, else tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--fp8", choices=("products", "attention", "all"), default="", help="what is in FP8")
    parser.add_argument("--parts", default="stage,line,apart,loop", help="of these (%(default)s)")
    parser.add_argument("--blocks", type=int, default=12, help="that a line is measured over")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement of a stage")
    parser.add_argument("--json", type=Path, help="write the results here, after every part")
    options = parser.parse_args(argv)
    device = timing.pick_device(options.device)
    preset = options.preset or ("14b" if device.type == "cuda" else "tiny")
    set_device(device)
    result: dict[str, Any] = {"preset": preset, "fp8": options.fp8, "machine": timing.machine(device), "parts": {}}
    with torch.inference_mode():
        started = time.perf_counter()
        model = Model(preset, device, options.fp8, STEADY + options.blocks)
        result |= {"dtype": str(model.dtype), "load_s": time.perf_counter() - started}
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "stage": lambda: measure_stage(model, options.seconds),
            "line": lambda: measure_line(model, options.blocks, options.seconds),
            "apart": lambda: measure_line(model, options.blocks, options.seconds, APART),
            "loop": lambda: measure_loop(model, min(options.blocks, 6)),
        }  # fmt: skip
        for name in options.parts.split(","):
            try:
                result["parts"][name] = measures[name]()
            except Exception as error:
                result["parts"][name] = {"error": one_line(error, 400)}
            tidy()
            timing.save(options.json, result | {"headline": headline(result)})
    print(report(result))
    print(headline(result))
    print(json.dumps(result))
    return 1 if faults(result) else 0


if __name__ == "__main__":
    raise SystemExit(main())
