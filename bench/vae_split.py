"""`python -m bench.vae_split`: the time of decoding a block, by convolution: size, kernel and channels. Random weights.

Launch by launch, each convolution between two marks on the device's clock; what is left is norms, copies of history and
nearest-neighbour doubling. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from liverelay.engine.config import set_process_defaults

set_process_defaults()  # before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import timing  # noqa: E402
from bench.ceilings import ceilings  # noqa: E402
from bench.random_model import VAE_DIM  # noqa: E402
from bench.stage_14b import PRESETS, ms  # noqa: E402
from liverelay.engine import make_checkpoint  # noqa: E402
from liverelay.engine.models.vae import VAE  # noqa: E402
from liverelay.engine.models.vae_layers import Layers  # noqa: E402

FRAMES, LATENTS = 12, 3
HEAD = ("convolution", "calls", "ms", "%", "TFLOP/s", "% of ceiling")
REST = "norms, copies, doubling"


class Watch:
    """Marks around every convolution of a decoder, by class, and its operations."""

    def __init__(self, layers: Layers, device: torch.device) -> None:
        self.layers, self.stopwatch = layers, timing.Stopwatch(device)
        self.flops: dict[str, float] = {}

    def label(self, name: str, x: Tensor) -> str:
        weight = self.layers._convs[name].weight
        kernel = "x".join(map(str, weight.shape[2:]))
        return f"{weight.shape[1]}->{weight.shape[0]} {kernel} at {x.shape[3]}x{x.shape[2]}"

    def wrap(self, function: Any) -> Any:
        def convolve(name: str, x: Tensor, **more: Any) -> Tensor:
            label = self.label(name, x)
            result: Tensor = self.stopwatch.wrap(function, label)(name, x, **more)
            weight = self.layers._convs[name].weight
            self.flops[label] = self.flops.get(label, 0.0) + 2.0 * result.numel() * weight[0].numel()
            return result

        return convolve


def measure(preset: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Times of a running stream's block: by class of convolution, launch by launch, and of the whole, captured too."""
    dtype, (_, (height, width)) = torch.bfloat16 if device.type == "cuda" else torch.float32, PRESETS[preset]
    sizes = dataclasses.replace(make_checkpoint.PRESETS["tiny"], vae_dim=VAE_DIM[preset])
    with torch.device(device):
        weights = make_checkpoint._vae_weights(sizes, torch.Generator(device).manual_seed(0))
        latent = torch.randn(16, LATENTS, height, width)
    vae = VAE.load(weights, device=device, dtype=dtype)
    cache, layers = vae.new_decoder(height, width), vae._decoder

    def decode() -> Tensor:
        return vae.decode(latent, cache)

    decode()  # the first latent is another one
    options: dict[str, Any] = {"device": device, "seconds": seconds, "cold": False}
    eager, captured = (timing.measure(decode, **options, graph=graph) for graph in (False, True))
    samples, calls, flops = dict[str, list[float]](), dict[str, int](), dict[str, float]()
    for _ in range(3):
        watch = Watch(layers, device)
        with mock.patch.multiple(layers, conv=watch.wrap(layers.conv), _time_conv=watch.wrap(layers._time_conv)):
            decode()
        timing.wait(device)
        sums: dict[str, float] = {}
        for label, begin, end in watch.stopwatch.spans:
            sums[label] = sums.get(label, 0.0) + watch.stopwatch.between(begin, end)
        calls = {label: sum(span[0] == label for span in watch.stopwatch.spans) for label in sums}
        flops = watch.flops
        for label, took in sums.items():
            samples.setdefault(label, []).append(took)
    classes = {label: {"s": median(taken), "calls": calls[label], "flops": flops[label]}
               for label, taken in samples.items()}  # fmt: skip
    return {
        "eager_s": eager.seconds, "captured_s": captured.seconds, "how": captured.how, "clocks": captured.clocks,
        "classes": classes, "rest_s": max(0.0, eager.seconds - sum(one["s"] for one in classes.values())),
        "flops": sum(flops.values()),
    }  # fmt: skip


def report(result: dict[str, Any], matmul: float) -> str:
    """matmul: the ceiling, FLOP/s."""
    whole, classes = result["eager_s"], result["classes"]

    def row(name: str, calls: str, took: float, flops: float) -> list[str]:
        rate = flops / took if took else 0.0
        shares = [f"{rate / 1e12:.3g}", f"{100 * rate / matmul:.0f}"] if flops else ["-", "-"]
        return [name, calls, ms(took), f"{100 * took / whole:.0f}", *shares]

    rows = [row(name, str(one["calls"]), one["s"], one["flops"])
            for name, one in sorted(classes.items(), key=lambda pair: -pair[1]["s"])]  # fmt: skip
    rows.append(row(REST, "-", result["rest_s"], 0.0))
    rows.append(row("12 frames, launch by launch", "-", whole, result["flops"]))
    rows.append(row(f"12 frames, {result['how']}", "-", result["captured_s"], result["flops"]))
    return timing.table(HEAD, rows)


def headline(result: dict[str, Any]) -> str:
    """The run in one line."""
    rate = result["flops"] / result["captured_s"] / 1e12
    worst = max(result["classes"], key=lambda name: result["classes"][name]["s"])
    return (
        f"VAE {ms(result['captured_s'])} ms ({result['how']}), {rate:.3g} TFLOP/s; most in {worst}: "
        f"{ms(result['classes'][worst]['s'])} ms"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.vae_split", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: 14b on a GPU, else tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(argv)
    device = timing.pick_device(options.device)
    limits = ceilings(device, min(0.2, options.seconds))
    result: dict[str, Any] = {"machine": timing.machine(device), "ceilings": asdict(limits)}
    with torch.inference_mode():
        found = measure(options.preset or ("14b" if device.type == "cuda" else "tiny"), device, options.seconds)
    result |= {"vae": found, "headline": headline(found)}
    timing.save(options.json, result)
    print(report(found, limits.matmul))
    print(result["headline"])
    print(json.dumps(result))
    return 1 if device.type == "cuda" and found["how"] != "graph" else 0


if __name__ == "__main__":
    raise SystemExit(main())
