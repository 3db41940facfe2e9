"""`golden audio`: the whole-file audio front end, stage by stage, for every *.wav given (and the folder model/)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from liverelay.engine.errors import InputError
from liverelay.engine.golden import GoldenOptions
from liverelay.engine.models.audio import AudioEncoder, bucket, load_waveform, normalise, to_30_hz


def run(folder: Path, options: GoldenOptions) -> dict[str, Tensor]:
    encoder = AudioEncoder.load(options.weights or folder / "model", device=options.device, dtype=torch.float32)
    files = sorted(folder.glob("*.wav"))
    if not files:
        raise InputError(f"{folder} holds no *.wav")
    results: dict[str, Tensor] = {}
    for path in files:
        waveform = load_waveform(path)
        values = normalise(waveform)
        hidden = encoder.hidden_states(values)
        features = to_30_hz(hidden)
        named = {
            "waveform_16k": torch.from_numpy(waveform),
            "input_values": torch.from_numpy(values),
            "hidden_states": hidden,
            "feat30": features,
            "audio_emb_12": bucket(features, 12).unsqueeze(0),
            "audio_emb_48": bucket(features, 48).unsqueeze(0),
        }
        results |= {f"{path.stem}.{name}": tensor for name, tensor in named.items()}
    return results
