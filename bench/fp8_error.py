"""`python -m bench.fp8_error --checkpoint DIR`: what FP8 costs, layer by layer, against the same model in bfloat16.

Runs a few blocks of one session with random inputs both ways and prints the relative L2 difference of the hidden
states after every layer and of the flow; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from liverelay.engine.config import set_process_defaults

set_process_defaults()  # before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from liverelay.engine.checkpoint import find_checkpoint  # noqa: E402
from liverelay.engine.devices import check_device, default_device  # noqa: E402
from liverelay.engine.errors import LiveRelayError  # noqa: E402
from liverelay.engine.models.dit import DiT  # noqa: E402
from liverelay.engine.models.geometry import Geometry, reference_position  # noqa: E402
from liverelay.engine.models.sampler import make_schedule  # noqa: E402

MODES = {  # FP8 products, FP8 attention
    "bfloat16": (False, False), "products": (True, False), "attention": (False, True), "both": (True, True),
}  # fmt: skip


@torch.inference_mode()
def hidden_states(dit: DiT, geometry: Geometry, blocks: int, seed: int) -> dict[str, Tensor]:
    """Hidden states after every layer, and the flow, of the last of some blocks at the second timestep."""
    rng, config = torch.Generator().manual_seed(seed), dit.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dit.device, dit.dtype)

    ws, arena, text = dit.make_workspace(geometry), dit.make_arena(geometry), dit.text_condition(
        noise(min(32, config.text_len), config.text_dim)
    )
    h, w, frames = geometry.latent_h, geometry.latent_w, geometry.frames_per_block
    tokens = dit.sink_tokens(noise(config.in_channels, 1, h, w), noise(config.in_channels, 19, h, w))
    dit.prefill(ws, arena, dit.timestep_tables(0.0), text, tokens)
    tables, kept = dit.timestep_tables(make_schedule().timesteps[1]), dict[str, Tensor]()
    for block in range(blocks):
        start = block * frames
        audio = dit.audio_condition(noise(1, config.audio_states, config.audio_dim, 4 * frames), frames)
        conditions = (text, audio, dit.pose_condition(None))
        latent = noise(config.in_channels, frames, h, w)

        def keep(name: str, value: Tensor, last: bool = block == blocks - 1) -> None:
            if last and name.startswith("hidden.after_audio."):
                kept[name.removeprefix("hidden.after_audio.")] = value.double().cpu()

        flow = dit.block_step(
            ws, arena, tables, latent, start, reference_position(start, 9), conditions, tap=keep
        )
    return kept | {"flow": flow.double().cpu()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_error", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--latent", type=int, nargs=2, default=(16, 16), metavar=("H", "W"))
    parser.add_argument("--blocks", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.blocks < 1:
        parser.error("--blocks takes 1 or more")
    try:
        return compare(arguments)
    except LiveRelayError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def compare(arguments: argparse.Namespace) -> int:
    """Print the differences."""
    device, states = check_device(arguments.device), {}
    source, config = find_checkpoint(arguments.checkpoint).open_dit(device)
    for name, (fp8, attention) in MODES.items():
        dit = DiT.load(source, config, device=device, dtype=torch.bfloat16, fp8=fp8, fp8_attention=attention)
        states[name] = hidden_states(dit, Geometry(*arguments.latent, config.head_dim), arguments.blocks, seed=0)
    exact, errors = states.pop("bfloat16"), dict[str, dict[str, float]]()
    print("relative L2 difference from bfloat16, by what is in FP8\nafter layer" + "".join(f"{n:>12s}" for n in states))
    for layer, value in exact.items():
        errors[layer] = {name: float((state[layer] - value).norm() / value.norm()) for name, state in states.items()}
        print(f"{layer:>11s}" + "".join(f"{error:12.4f}" for error in errors[layer].values()))
    print(json.dumps(errors))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
