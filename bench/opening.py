"""`python -m bench.opening`: from `Engine.open` to the first frames at full size, and what it costs who runs meanwhile.

Transformer and VAE have random weights of the published shapes; prompts and sound go through real encoders that are
tiny. One session is opened on a cold line and one on a warm line; then a running one's blocks are watched while another
is opened. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from liverelay.engine.config import set_process_defaults

set_process_defaults()  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench import timing  # noqa: E402
from bench.random_model import VAE_DIM, tidy  # noqa: E402
from bench.stage_14b import PRESETS, RandomWeights, ms  # noqa: E402
from bench.timing import one_line  # noqa: E402
from liverelay.engine import Engine, make_checkpoint  # noqa: E402
from liverelay.engine.config import StreamConfig  # noqa: E402
from liverelay.engine.devices import fp8_parts  # noqa: E402
from liverelay.engine.errors import BusyError  # noqa: E402
from liverelay.engine.loading import Loader  # noqa: E402
from liverelay.engine.models import text  # noqa: E402
from liverelay.engine.models.dit import DiT  # noqa: E402
from liverelay.engine.models.geometry import Geometry  # noqa: E402
from liverelay.engine.models.vae import VAE  # noqa: E402
from liverelay.engine.relay.messages import Block  # noqa: E402
from liverelay.engine.relay.plan import parse_plan  # noqa: E402
from liverelay.engine.relay.room import check_room  # noqa: E402
from liverelay.engine.relay.stage import NOBODY, Stage, set_device  # noqa: E402
from liverelay.engine.session import Session  # noqa: E402

SOUND_S, RATE, WARM = 8.0, 16_000, 8  # seconds of sound in a session, its rate; blocks before a session is watched


@dataclasses.dataclass(frozen=True)
class RandomLoader(Loader):
    """Encoders from a tiny checkpoint; transformer and VAE of a preset's size, drawn on the device."""

    preset: str = "tiny"

    def dit(self, device: str) -> DiT:
        products, attention = fp8_parts(self.fp8)
        tiny = make_checkpoint.PRESETS["tiny"]
        config = dataclasses.replace(PRESETS[self.preset][0], text_dim=tiny.text_dim, audio_dim=tiny.audio_dim)
        weights = RandomWeights(config, torch.device(device))
        return DiT.load(
            weights, config, device=device, dtype=self.dtype, fp8=products, fp8_attention=attention
        )

    def vae(self, device: str) -> VAE:
        sizes = dataclasses.replace(make_checkpoint.PRESETS["tiny"], vae_dim=VAE_DIM[self.preset])
        with torch.device(device):
            weights = make_checkpoint._vae_weights(sizes, torch.Generator(device).manual_seed(0))
        return VAE.load(weights, device=device, dtype=self.dtype)


class KeepingEngine(Engine):
    """Knows the stages of the line that it made last."""

    made: list[Stage]

    def _make_stages(self, geometry: Geometry) -> list[Stage]:
        self.made = super()._make_stages(geometry)
        return self.made


class Opening:
    """An engine of a preset's size on one device, and how its sessions are opened."""

    def __init__(self, preset: str, device: torch.device, fp8: str, folder: Path) -> None:
        self.device, latent = device, PRESETS[preset][1]
        self.size = 8 * latent[1], 8 * latent[0]
        plan, stream = parse_plan("0+1+2+3+vae", [str(device)]), StreamConfig()
        checkpoint = make_checkpoint.make_checkpoint(folder / "tiny")
        loader = Loader.make(checkpoint, plan.devices, fp8=fp8 or False)
        fields = {field.name: getattr(loader, field.name) for field in dataclasses.fields(loader)}
        engine = KeepingEngine.assemble(RandomLoader(**fields, preset=preset), plan, stream)
        assert isinstance(engine, KeepingEngine)
        self.engine = engine
        rng = np.random.default_rng(0)
        self.picture = rng.integers(0, 256, (self.size[1], self.size[0], 3), dtype=np.uint8)
        self.sound = 0.1 * rng.standard_normal(int(SOUND_S * RATE)).astype(np.float32)
        self.prompts = 0

    def open(self) -> Session:
        """A live session that has been given all of its sound; a prompt of its own, so that it is encoded."""
        self.prompts += 1
        session = self.engine.open(self.picture, f"person {self.prompts} speaks", size=self.size)
        session.push_audio(self.sound, sample_rate=RATE)
        session.end_audio()
        return session

    def lacks_place(self) -> str:
        """Why there is no memory for a second session; empty where there is."""
        try:
            check_room([stage.room for stage in self.engine.made], {0}, 1)
        except BusyError as refusal:
            return str(refusal)
        return ""

    def measure(self) -> dict[str, float]:
        """Seconds until `open` has returned, which encodes, until the first frames are there, and between the two."""
        began = time.perf_counter()
        with self.open() as session:
            opened = time.perf_counter() - began
            next(iter(session.frames()))
            whole = time.perf_counter() - began
            return {"open_s": opened, "first_frames_s": whole, "after_encoding_s": whole - opened}

    @torch.inference_mode()
    def parts(self) -> dict[str, float]:
        """Seconds of what opening consists of, each by itself on a line that has no session; a prompt that was encoded
        before is known. Then those of a first block, which attends to a third of the ring, and its video."""
        engine, device, stage = self.engine, self.device, self.engine.made[0]
        set_device(device)
        encode, (given, _, _) = _timed(lambda: engine._prepare(self.picture, "someone else", size=self.size), device)
        place, vae, dit = stage.places[0], stage.vae, stage.dit
        assert vae is not None and dit is not None and place.decoder is not None and place.motion is not None
        decoder, motion, arena = place.decoder, place.motion[:, : stage.spec.stream.prime_latents], place.arenas[0]
        prefill, _ = _timed(lambda: stage._prefill(place, arena, given["reference"]), device)
        prime, _ = _timed(lambda: stage._prime(vae, decoder, motion), device)
        whole, _ = _timed(lambda: stage.open(0, given), device)
        first = Block(0, NOBODY, 0, (0,) * len(place.arenas))
        block, _ = _timed(lambda: (stage.denoise(0, first), stage.decode(0, 1)), device)
        return {
            "encode_s": encode, "prefill_s": prefill, "prime_s": prime, "stage_open_s": whole, "block_0_s": block
        }  # fmt: skip


def allow_plain_prompts() -> None:
    """A bare GPU machine lacks ftfy, without which no prompt is cleaned; ours needs none of it."""
    if importlib.util.find_spec("ftfy") is None or importlib.util.find_spec("regex") is None:
        print("prompts are taken as they are: ftfy or regex is not installed")
        text.clean_text = str.strip


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Median seconds of three calls after a first one."""
    taken = []
    for _ in range(4):
        timing.wait(device)
        began = time.perf_counter()
        result = work()
        timing.wait(device)
        taken.append(time.perf_counter() - began)
    return median(taken[1:]), result


def measure_gaps(opening: Opening) -> dict[str, Any]:
    """Seconds between two blocks of a running session: by itself, and while another one is opened on the same line and
    until that has its first frames."""
    if lack := opening.lacks_place():
        return {"skipped": lack}
    with opening.open() as session:
        blocks, alone, times = session.frames(), list[float](), list[float]()
        for _ in range(WARM):
            next(blocks)
            alone.append(time.perf_counter())
        with ThreadPoolExecutor(1) as pool:
            times.append(time.perf_counter())
            other = pool.submit(opening.measure)
            for _ in _while(other, blocks):
                times.append(time.perf_counter())
        other.result()  # raises what went wrong
    beside, before = _gaps(times), _gaps(alone[WARM // 2 :])
    return {
        "alone_median_s": median(before), "beside_median_s": median(beside), "beside_max_s": max(beside),
        "blocks_beside": float(len(beside)),
    }  # fmt: skip


def _while(other: Future[Any], blocks: Iterator[Any]) -> Iterator[Any]:
    """At least one block, and those that come as long as the other work runs."""
    for block in blocks:
        yield block
        if other.done():
            return


def _gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def headline(result: dict[str, Any]) -> str:
    """The run in one line."""
    if "error" in result:
        return f"FAULT: {result['error']}"
    parts, warm, gaps = result["parts_s"], result["warm"], result["gaps"]
    texts = [f"{name.removesuffix('_s').replace('_', ' ')} {ms(took)}" for name, took in parts.items()]
    beside = f"a second session {gaps['skipped']}" if "skipped" in gaps else (
        f"gap between blocks {ms(gaps['alone_median_s'])} ms, while another opens {ms(gaps['beside_median_s'])} "
        f"(median) and {ms(gaps['beside_max_s'])} ms at most"
    )
    return (
        f"{', '.join(texts)} ms; first frames {warm['first_frames_s']:.2f} s after open on a warm line "
        f"({warm['after_encoding_s']:.2f} once encoded), {result['cold']['first_frames_s']:.1f} s cold; {beside}"
    )


def report(result: dict[str, Any]) -> str:
    """The table of a run."""
    rows = [[name.removesuffix("_s").replace("_", " "), ms(took)] for name, took in result.get("parts_s", {}).items()]
    for state in ("cold", "warm"):
        rows += [[f"{state} line: {name.removesuffix('_s').replace('_', ' ')}", ms(took)]
                 for name, took in result.get(state, {}).items()]  # fmt: skip
    gaps = result.get("gaps", {})
    rows += [[f"gap between blocks, {name.removesuffix('_s').replace('_', ', ')}", ms(gaps[name])]
             for name in ("alone_median_s", "beside_median_s", "beside_max_s") if name in gaps]  # fmt: skip
    return timing.table(["opening a session", "ms"], rows)


def run(opening: Opening, result: dict[str, Any], path: Path | None) -> None:
    """All measurements into `result`; the file is written anew after each."""
    measures: dict[str, Callable[[], Any]] = {
        "cold": opening.measure, "warm": lambda: _best(opening.measure), "gaps": lambda: measure_gaps(opening),
        "parts_s": opening.parts,
    }  # fmt: skip
    for name, measure in measures.items():
        with timing.watched(opening.device) as clocks:
            result[name] = measure()
        result["clocks"][name] = clocks
        timing.save(path, {"opening": result, "headline": f"measured so far: {', '.join(result['clocks'])}"})


def _best(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Medians of three."""
    found = [measure() for _ in range(3)]
    return {name: median(one[name] for one in found) for name in found[0]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.opening", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: 14b on a GPU, else tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--fp8", choices=("products", "attention", "all"), default="", help="what is in FP8")
    parser.add_argument("--json", type=Path, help="write the results here, after every measurement")
    options = parser.parse_args(argv)
    device = timing.pick_device(options.device)
    preset = options.preset or ("14b" if device.type == "cuda" else "tiny")
    result: dict[str, Any] = {"preset": preset, "fp8": options.fp8, "clocks": {}}
    allow_plain_prompts()
    try:
        with tempfile.TemporaryDirectory() as folder:
            opening = Opening(preset, device, options.fp8, Path(folder))
            run(opening, result, options.json)
            opening.engine.close()
        print(report(result))
    except Exception as error:
        result["error"] = one_line(error, 400)
    tidy()
    kept = {"opening": result, "machine": timing.machine(device), "headline": headline(result)}
    timing.save(options.json, kept)
    print(kept["headline"])
    print(json.dumps(kept))
    return 1 if "error" in result else 0


if __name__ == "__main__":
    raise SystemExit(main())
