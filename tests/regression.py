"""Folders of the form that `liverelay golden` reads, filled with numbers that are the same on every machine.

`python -m tests.regression` writes tests/data/*.safetensors, what the engine computes from them. That was done once,
when the engine was equal to tensors of the published model; since then the files hold it to that on machines that
have none of those tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from liverelay.engine.config import DiTConfig
from liverelay.engine.golden import GoldenOptions, run
from liverelay.engine.models.sampler import make_schedule
from liverelay.engine.models.sizes import dit_shapes
from liverelay.engine.models.text import text_shapes
from liverelay.engine.models.vae_config import LATENT_MEAN, LATENT_STD, VAEConfig, expected_shapes

DATA = Path(__file__).parent / "data"
CONFIG = DiTConfig(
    dim=96, ffn_dim=160, num_heads=3, num_layers=3, audio_inject_layers=(0, 2), text_dim=24, text_len=32, audio_dim=12
)
PUBLISHED = {"num_heads": 3, "audio_inject_layers": [0, 2], "text_len": 32, "model_type": "s2v"}
FRAMES, RING, SIZE = 3, 6, (8, 16)
KEPT_SAMPLES = 512


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Unit-variance values that depend on the name alone: raw Philox words, whose stream never changes."""
    count = int(np.prod(shape))
    key = int.from_bytes(name.encode()[-8:].rjust(8, b"."), "little")
    words = np.random.Philox(key=np.array([key, len(name)], dtype=np.uint64)).random_raw(count)
    values = (words >> np.uint64(48)).astype(np.float64) / 32768 - 1
    return torch.from_numpy((values * 3**0.5).astype(np.float32)).reshape(shape).bfloat16()


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    tensors = {}
    for key, shape in shapes.items():
        matrix = len(shape) > 1 and "modulation" not in key and "gamma" not in key and not key.startswith("token")
        scale = int(np.prod(shape[1:])) ** -0.5 if matrix else 0.2
        offset = float(("norm" in key or "gamma" in key) and not key.endswith("bias"))
        tensors[key] = (numbers(key, shape).float() * scale + offset).bfloat16()
    return tensors


def write(folder: Path, tensors: dict[str, dict[str, Tensor]], settings: dict[str, object]) -> None:
    for name, content in tensors.items():
        save_file({key: value.contiguous() for key, value in content.items()}, folder / f"{name}.safetensors")
    for name, value in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def conditions() -> dict[str, Tensor]:
    h, w = SIZE
    shapes = {"context": (20, CONFIG.text_dim), "ref_latents": (1, 16, 1, h, w), "motion_latents": (1, 16, 19, h, w)}
    return {name: numbers(name, shape) for name, shape in shapes.items()}


def common(config: object = None) -> dict[str, object]:
    meta: dict[str, object] = {"frames_per_block": FRAMES, "latent_h": SIZE[0], "latent_w": SIZE[1]}
    return meta | {"cache_frames": RING, "text_dim": CONFIG.text_dim} | ({"config": config} if config else {})


def make_dit(folder: Path, blocks: int = 4) -> None:
    inputs = conditions()
    for b in range(blocks):
        inputs[f"x.{b}"] = numbers(f"x.{b}", (16, FRAMES, *SIZE))
        inputs[f"cond_states.{b}"] = numbers(f"pose.{b}", (1, 16, FRAMES, *SIZE))
        inputs[f"audio.{b}"] = numbers(f"audio.{b}", (1, 25, CONFIG.audio_dim, 4 * FRAMES))
    meta = common() | {"timestep": 602.1505737304688, "num_blocks": blocks}
    meta |= {"start_frame_per_block": [0, 3, 30, 45_003], "relative_distance_per_block": [4, 30, 9, 17]}
    write(folder, {"weights": weights(dit_shapes(CONFIG)), "inputs": inputs}, {"config": PUBLISHED, "meta": meta})


def make_tpp(folder: Path, clips: int = 2, blocks: int = 2) -> None:
    inputs, schedule, frames = conditions(), make_schedule(), blocks * FRAMES
    inputs |= {f"noise.{c}": numbers(f"noise.{c}", (16, frames, *SIZE)) for c in range(clips)}
    inputs["cond_states"] = numbers("poses", (clips, 16, frames, *SIZE))
    inputs["audio"] = numbers("sound", (1, 25, CONFIG.audio_dim, clips * frames * 4))
    meta = common(PUBLISHED) | {"weights": "weights.safetensors", "clips": clips, "blocks_per_clip": blocks}
    meta |= {"timesteps": list(schedule.timesteps), "sigmas": list(schedule.sigmas)}
    later = range(4, clips * blocks)
    distances = [[30, 29, 28, 27 - rank, *(4 + (7 * i + rank) % 27 for i in later)] for rank in range(4)]
    meta["relative_distance_by_rank_and_global_block"] = distances
    write(folder, {"weights": weights(dit_shapes(CONFIG)), "inputs": inputs}, {"meta": meta})


def make_lora(folder: Path) -> None:
    base = weights(dit_shapes(CONFIG))
    rank, lora = 4, {}
    for module in ("blocks.0.self_attn.q", "blocks.2.ffn.0", "audio_injector.injector.1.o"):
        out, inner = base[f"{module}.weight"].shape
        lora[f"{module}.lora_A.default.weight"] = numbers(f"{module}.A", (rank, inner))
        lora[f"{module}.lora_B.default.weight"] = numbers(f"{module}.B", (out, rank))
    write(folder, {"base": base, "lora": lora}, {"meta": {"rank": rank, "alpha": 2, "base": "base.safetensors"}})


def make_vae(folder: Path) -> None:
    shapes = {"video_9": (3, 9, 32, 40), "z": (16, 3, 4, 6), "ref_image": (3, 32, 40)}
    shapes["block_latents"] = (2, 16, 3, 4, 5)
    inputs = {name: numbers(name, shape).float() for name, shape in shapes.items()}
    inputs = {name: tensor / 2 if name[0] in "vr" else tensor for name, tensor in inputs.items()}
    settings = {"vae": {"dim": 4}, "latent_mean": list(LATENT_MEAN), "latent_std": list(LATENT_STD)}
    write(folder, {"weights": weights(expected_shapes(VAEConfig(base_dim=4))), "inputs": inputs}, {"config": settings})


def make_text(folder: Path) -> None:
    ids = (numbers("ids", (2, 40)).float().abs() * 36).long()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    shapes = text_shapes(64, 32, 80, 4, 32, 2)
    write(folder, {"weights": weights(shapes), "inputs": {"ids": ids, "mask": mask}}, {"config": {"config": {}}})


FOLDERS: dict[str, Callable[[Path], None]] = {
    "dit": make_dit, "tpp": make_tpp, "lora": make_lora, "vae": make_vae, "text": make_text,
}  # fmt: skip


def compute(component: str, folder: Path) -> dict[str, Tensor]:
    """What the engine makes of the component's folder, thinned out to a few thousand values a tensor."""
    FOLDERS[component](folder)
    results = run(component, folder, GoldenOptions())
    return {name: thin(tensor) for name, tensor in results.items()}


def thin(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // KEPT_SAMPLES)].clone()


def main() -> None:
    import tempfile

    DATA.mkdir(exist_ok=True)
    for component in FOLDERS:
        with tempfile.TemporaryDirectory() as folder:
            save_file(compute(component, Path(folder)), DATA / f"{component}.safetensors")


if __name__ == "__main__":
    main()
