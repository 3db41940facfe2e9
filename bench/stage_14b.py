"""`python -m bench.stage_14b`: the block-step at full size with random weights, on both backends, against its budget.

With the ring full: eager and as a replayed CUDA graph, split by part, beside the ceilings measured in the same run, and
beside a plain PyTorch layer. The outputs of the backends on the same inputs are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

from liverelay.engine.config import DiTConfig, set_process_defaults

set_process_defaults()  # before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import timing  # noqa: E402
from bench.block_step_cpu import DISTANCE, TIMESTEP  # noqa: E402
from bench.block_step_cpu import measure as measure_whole_plain  # noqa: E402
from bench.ceilings import Ceilings, ceilings  # noqa: E402
from bench.plain_dit import Layer, rope_table, rotate  # noqa: E402
from bench.step_bytes import element_wise_bytes  # noqa: E402
from bench.timing import Timing, one_line  # noqa: E402
from liverelay.engine.make_checkpoint import _dit_tensor  # noqa: E402
from liverelay.engine.models.attention_choice import choose_attention  # noqa: E402
from liverelay.engine.models.dit import DiT  # noqa: E402
from liverelay.engine.models.geometry import Geometry, reference_position  # noqa: E402
from liverelay.engine.models.layers import load_weights  # noqa: E402
from liverelay.engine.models.sizes import PUBLISHED, arena_bytes, block_step_flops, dit_shapes  # noqa: E402
from liverelay.kernels import dispatch  # noqa: E402

FRAMES = 12  # video frames of one block
# Of two outputs, relative. The roundings of 40 layers add up in bfloat16; a fault is larger.
LARGEST_DIFFERENCE = {"torch.bfloat16": 0.1, "torch.float32": 1e-4}
PARTS = ("linear, text, audio", "self-attention", "element-wise", "rest")
PART_OF = {
    "linear": 0, "linear_fp8": 0, "text attention": 0, "audio_attention": 0, "self-attention": 1, "residual_norm": 2,
    "rms_norm": 2, "inverse_rms": 2, "qk_norm_rope": 2, "gelu": 2, "quantize_rows": 2,
    "store_values": 2,
}  # fmt: skip
# Of PARTS, for 14B at 704x384 on one H100, by what is in FP8.
BUDGET_MS = {"": (117.0, 64.0, 10.0, 2.0), "products": (66.0, 64.0, 10.0, 2.0), "all": (66.0, 44.0, 10.0, 2.0)}


PRESETS = {  # and latent height and width
    "14b": (PUBLISHED, (88, 48)),
    "tiny": (DiTConfig(128, 256, 4, 4, (0, 2), text_dim=64, text_len=64, audio_dim=32), (8, 16)),
}


class RandomWeights(Mapping[str, Tensor]):
    """Every weight of the transformer, drawn on the device when it is asked for: no second copy, none on the host."""

    def __init__(self, config: DiTConfig, device: torch.device) -> None:
        self.shapes, self._device = dit_shapes(config), device

    def __getitem__(self, key: str) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(key.encode()))
        with torch.device(self._device):
            return _dit_tensor(key, self.shapes[key], generator).bfloat16()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Bench:
    """One model with a full ring, and its block-step on any backend: same weights, arena and inputs."""

    def __init__(
        self, config: DiTConfig, geometry: Geometry, device: torch.device, dtype: torch.dtype, *, fp8: str = ""
    ) -> None:
        self.config, self.geometry, self.device, self.dtype = config, geometry, device, dtype
        self.fp8_attention = fp8 == "all"
        self.weights = load_weights(RandomWeights(config, device), config, device, dtype, fp8=bool(fp8))
        dit = self.make("torch")
        self.ws, self.arena = dit.make_workspace(geometry), dit.make_arena(geometry)
        self.tables = dit.timestep_tables(TIMESTEP)
        rng = torch.Generator().manual_seed(0)
        h, w, frames = geometry.latent_h, geometry.latent_w, geometry.frames_per_block
        reference, motion, latent = (torch.randn(16, n, h, w, generator=rng) for n in (1, 19, frames))
        self.latent = latent.to(device, dtype)
        text = dit.text_condition(torch.randn(config.text_len, config.text_dim, generator=rng))
        sound = torch.randn(1, config.audio_states, config.audio_dim, 4 * frames, generator=rng)
        self.conditions = (text, dit.audio_condition(sound, frames), dit.pose_condition(None))
        dit.prefill(self.ws, self.arena, dit.timestep_tables(0.0), text, dit.sink_tokens(reference, motion))
        self.start = 0
        while self.start < geometry.ring_frames:
            self.step(dit)
        timing.wait(device)

    def make(self, name: str) -> DiT:
        """torch, triton, or fastest: triton with the attention that the engine would take here."""
        backend = "triton" if name == "fastest" else name
        dit = DiT(
            self.weights, self.config, dtype=self.dtype, backend=backend, fp8_attention=self.fp8_attention
        )
        if name == "fastest":
            choose_attention(dit, self.geometry, print)
        return dit

    def step(self, dit: DiT, start: int | None = None) -> Tensor:
        """The next block, or the one at `start` again; the sink's reference moves every time, as published."""
        if start is None:
            start, self.start = self.start, self.start + self.geometry.frames_per_block
        self.arena.reference_position = -1
        position = reference_position(start, DISTANCE)
        return dit.block_step(self.ws, self.arena, self.tables, self.latent, start, position, self.conditions)

    def compute(self, dit: DiT) -> Tensor:
        """The device's part of the last step, again: what a CUDA graph holds."""
        return dit.compute_block(self.ws, self.arena, self.tables, self.latent, self.conditions)


# -- measurements ------------------------------------------------------------------------------------------------------


def split(bench: Bench, dit: DiT, steps: int) -> dict[str, float]:
    """Median seconds by operator, and `total`, of eager block-steps."""
    samples: dict[str, list[float]] = {}
    for _ in range(steps):
        watch = timing.Stopwatch(bench.device)
        operators = SimpleNamespace(**{n: watch.wrap(f, n) for n, f in vars(dit.ops).items() if callable(f)})
        labels = dict.fromkeys(("attention", "attention_fp8"), "self-attention") | {"text_attention": "text attention"}
        attentions = {name: watch.wrap(getattr(dit, name), label) for name, label in labels.items()}
        with mock.patch.object(dit, "ops", operators), mock.patch.multiple(dit, **attentions):
            timing.wait(bench.device)
            begin = watch.mark()
            bench.step(dit)
            watch.spans.append(("total", begin, watch.mark()))
        timing.wait(bench.device)
        one: dict[str, float] = {}
        for label, first, last in watch.spans:
            one[label] = one.get(label, 0.0) + watch.between(first, last)
        for label, seconds in one.items():
            samples.setdefault(label, []).append(seconds)
    return {label: median(values) for label, values in samples.items()}


def parts(operators: Mapping[str, float]) -> dict[str, float]:
    """Seconds of PARTS and of the whole block-step."""
    sums = [sum(took for name, took in operators.items() if PART_OF.get(name) == part) for part in range(3)]
    total = operators["total"]
    return dict(zip((*PARTS, "block-step"), (*sums, total - sum(sums), total), strict=True))


def captured(bench: Bench, dit: DiT, seconds: float) -> tuple[Timing, float]:
    """A replayed graph of one block-step; and how far its output is from the eager one's."""
    eager = bench.step(dit, bench.start).clone()
    took = timing.measure(lambda: bench.compute(dit), device=bench.device, seconds=seconds, cold=False)
    return took, relative(bench.ws.flow[: len(eager)], eager)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-12))


def measure_backend(bench: Bench, dit: DiT, seconds: float) -> dict[str, Any]:
    """All times of a backend."""
    eager = timing.measure(lambda: bench.step(dit), device=bench.device, seconds=seconds, graph=False, cold=False)
    operators = split(bench, dit, 3)
    result = {
        "eager_s": eager.seconds, "eager_spread": eager.spread, "clocks": eager.clocks, "graph_s": None,
        "operators_s": operators,
        "parts_s": parts(operators), "note": "no CUDA graphs on a CPU",
    }  # fmt: skip
    if bench.device.type != "cuda":
        return result
    took, difference = captured(bench, dit, seconds)
    result |= {"note": took.note, "graph_difference": difference}
    if took.how == "graph":
        result |= {"graph_s": took.seconds, "graph_spread": took.spread, "clocks": took.clocks}
    return result


def plain_layer(bench: Bench) -> Callable[[], Any]:
    """One layer as one would write it first (bench/plain_dit.py), with the keys of a full ring concatenated."""
    config, geometry, device, dtype = bench.config, bench.geometry, bench.device, bench.dtype
    heads = (config.num_heads, config.head_dim)
    with torch.device(device):
        layer = Layer(config).to(dtype).eval()
        t, n = geometry.block_tokens, geometry.sink_tokens
        grid = list(range(geometry.rows)), list(range(geometry.cols))
        table = rope_table(list(range(geometry.frames_per_block)), *grid, config.head_dim)
        sink_table = rope_table([0, 1, 2], *grid, config.head_dim)[:n]
        x, e = torch.randn(t, config.dim, dtype=dtype), torch.randn(6, config.dim, dtype=dtype)
        text = torch.randn(config.text_len, config.dim, dtype=dtype)
        blocks = geometry.ring_frames // geometry.frames_per_block - 1
        cached = [tuple(torch.randn(t, *heads, dtype=dtype) for _ in range(2)) for _ in range(blocks)]
        sink = [torch.randn(n, *heads, dtype=dtype) for _ in range(2)]

    def run() -> Any:
        return layer(x, e, text, table, [*cached, (rotate(sink[0], sink_table), sink[1])])

    return run


def measure_plain(bench: Bench, seconds: float, compile_seconds: float) -> dict[str, Any]:
    """Seconds of all plain layers (one, times their number), eager and through torch.compile in its time box."""
    layers, run = bench.config.num_layers, plain_layer(bench)
    found: dict[str, Any] = {"layers_s": layers * timing.measure(run, device=bench.device, seconds=seconds).seconds}
    if compile_seconds < 1:
        return found
    try:
        compiled = torch.compile(run, dynamic=False)
        with timing.time_box(compile_seconds):
            compiled()
            timing.wait(bench.device)
        found["compiled_layers_s"] = layers * timing.measure(compiled, device=bench.device, seconds=seconds).seconds
    except Exception as error:
        found["note"] = one_line(error)
    return found


# -- the report --------------------------------------------------------------------------------------------------------


def ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}" if seconds >= 0.01 else f"{1e3 * seconds:.3f}"


def report(result: dict[str, Any], ceilings: Ceilings) -> str:
    """Tables of whole block-steps and of their parts."""
    total = result["flops"]["total"]
    head = ["backend", "mode", "ms", "FPS", "TFLOP/s", "%matmul"]
    rows, split_rows = [], [[name] for name in (*PARTS, "block-step")]
    for name, backend in result["backends"].items():
        for mode in ("eager", "graph"):
            if took := backend.get(f"{mode}_s"):
                rate = total / took
                share = f"{100 * rate / ceilings.matmul:.0f}"
                rows.append([name, mode, ms(took), f"{FRAMES / took:.1f}", f"{rate / 1e12:.3g}", share])
        for row in split_rows:
            row.append(ms(backend.get("parts_s", {}).get(row[0])))
    for mode, key in (("eager", "layers_s"), ("compile", "compiled_layers_s")):
        if took := result.get("plain", {}).get(key):
            rows.append(["plain layers", mode, ms(took), f"{FRAMES / took:.1f}", "-", "-"])
    planned = BUDGET_MS[result["fp8"]]
    budget = [*map(str, planned), str(sum(planned))] if result["preset"] == "14b" else ["-"] * 5
    for row, least, most in zip(split_rows, [*result["floor_s"], sum(result["floor_s"])], budget, strict=True):
        row += [ms(least), most]
    parts_head = ["part, eager, ms", *result["backends"], "floor here", "budget H100"]
    return f"{timing.table(head, rows)}\n\n{timing.table(parts_head, split_rows)}"


def faults(result: dict[str, Any]) -> list[str]:
    """What makes the run a failure."""
    found = [f"{name}: {backend['error']}" for name, backend in result["backends"].items() if "error" in backend]
    limit = 0.1 if result["fp8"] else LARGEST_DIFFERENCE[result["dtype"]]
    for name, backend in result["backends"].items():
        for key, other in (("difference", "the first backend"), ("graph_difference", "its eager output")):
            if not backend.get(key, 0.0) <= limit:  # NaN is not either
                found.append(f"{name} differs from {other} by {backend[key]:.2g}")
    return found


def headline(result: dict[str, Any]) -> str:
    """The run in one line."""
    texts = []
    for name, backend in result["backends"].items():
        took = backend.get("graph_s") or backend.get("eager_s")
        mode = "graph" if backend.get("graph_s") else "eager"
        texts.append(f"{name} {mode} {ms(took)} ms = {FRAMES / took:.1f} FPS" if took else f"{name} failed")
    differences = [backend["difference"] for backend in result["backends"].values() if "difference" in backend]
    texts += [f"outputs differ by {max(differences):.1e}"] if len(differences) > 1 else []
    return ", ".join([*texts, *(f"FAULT: {fault}" for fault in faults(result))])


def run(config: DiTConfig, geometry: Geometry, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements; the file is written anew after each."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limits = ceilings(device, min(0.2, options.seconds))
    attention, others = block_step_flops(config, geometry)
    element = element_wise_bytes(config, geometry, dtype, options.fp8)
    product = (options.fp8 and limits.fp8) or limits.matmul
    attending = product if options.fp8 == "all" else limits.matmul
    result: dict[str, Any] = {
        "preset": options.preset, "fp8": options.fp8,
        "config": asdict(config), "dtype": str(dtype), "machine": timing.machine(device),
        "ceilings": asdict(limits), "backends": {}, "element_wise_bytes": element,
        "flops": {"total": attention + others, "self-attention": attention, "linear, text, audio": others},
        "floor_s": [others / product, attention / attending, element / limits.copy, 0.0],
    }  # fmt: skip
    print(f"{result['machine'].get('gpu', result['machine']['cpu'])}; ceilings: {limits.text}", flush=True)
    started = time.perf_counter()
    bench = Bench(config, geometry, device, dtype, fp8=options.fp8)
    result["load_s"] = time.perf_counter() - started
    dits, outputs = {}, {}
    for name in options.backends.split(","):  # all outputs before any time: what follows changes the ring
        available = dispatch.available("triton" if name == "fastest" else name, device)
        if not available.works and device.type != "cuda":
            print(f"{name}: skipped: {available.reason}")
            continue
        try:
            dits[name] = bench.make(name)
            outputs[name] = bench.step(dits[name], bench.start).clone()
            result["backends"][name] = {"difference": relative(outputs[name], next(iter(outputs.values())))}
        except Exception as error:
            result["backends"][name] = {"error": one_line(error, 400)}
    for name in outputs:
        try:
            result["backends"][name] |= measure_backend(bench, dits[name], options.seconds)
        except Exception as error:
            result["backends"][name]["error"] = one_line(error, 400)
        timing.save(options.json, result | {"headline": headline(result)})
    if device.type == "cuda":
        result["memory_bytes"] = torch.cuda.max_memory_allocated(device)
    try:
        result["plain"] = measure_plain(bench, options.seconds, options.compile_seconds)
    except Exception as error:
        result["plain"] = {"note": one_line(error)}
    if device.type == "cpu" and options.preset == "tiny":
        result["plain"]["whole_model"] = measure_whole_plain(config, geometry, blocks=3)
    timing.save(options.json, result | {"headline": headline(result)})
    print(report(result, limits))
    if whole := result["plain"].get("whole_model"):
        print(f"whole plain model, float32: {whole['ratio']:.2f}x the time of the engine's block-step")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stage_14b", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: 14b on a GPU, else tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--backends", default="torch,triton,fastest", help="fastest: triton, attention as measured")
    parser.add_argument("--fp8", choices=("products", "all"), default="", help="FP8 in linear layers, or attention too")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--compile-seconds", type=float, default=60, help="time box of torch.compile, 0: none")
    parser.add_argument("--json", type=Path, help="write the results here, after every measurement")
    options = parser.parse_args(argv)
    device = timing.pick_device(options.device)
    options.preset = options.preset or ("14b" if device.type == "cuda" else "tiny")
    config, size = PRESETS[options.preset]
    geometry = Geometry(*size, config.head_dim)
    weights = sum(2 * torch.Size(shape).numel() for shape in dit_shapes(config).values())
    needed = weights + arena_bytes(config, geometry)
    print(f"{options.preset}: {needed / 2**30:.1f} GiB of weights and arena in bfloat16; the backends share both")
    with torch.inference_mode():
        result = run(config, geometry, device, options)
    if "memory_bytes" in result:
        print(f"memory: {result['memory_bytes'] / 2**30:.1f} GiB at the most")
    for part, found in (result["backends"] | {"plain layers": result["plain"]}).items():
        if note := found.get("note"):
            print(f"{part}: {note}")
    print(headline(result))
    print(json.dumps(result))
    return 1 if faults(result) or not result["backends"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
