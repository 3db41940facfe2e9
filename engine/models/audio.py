"""Sound -> wav2vec2 features at the video's frame rate, the published whole-file way.

Source: spec vae_audio_text.md sections 4.1 to 4.5. The detour over 30 Hz and its float truncation are needed for
equality. The live way, which never knows the whole file, is in audio_live.py.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from liverelay.engine.errors import CheckpointError, InputError, MissingExtraError
from liverelay.engine.models.weights import TensorSource, open_pth

SAMPLE_RATE = 16000
FEATURE_RATE = 50
VIDEO_RATE = 30  # the published intermediate rate, not the video's
MIN_SAMPLES = 400
Samples = npt.NDArray[np.float32]


def read_audio(path: str | Path) -> tuple[Samples, int]:
    """A sound file as float32 [n, channels] and its sample rate; integers are scaled by full scale.

    InputError for a file that is missing, unreadable, empty, or holds values that are not finite.
    """
    try:
        import soundfile
    except (ImportError, OSError):
        raise MissingExtraError("soundfile", "to read sound files", "audio") from None
    path = Path(path)
    if not path.is_file():
        raise InputError(f"the sound file {path} does not exist")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        decoded = _read_with_av(path)
        if decoded is None:
            raise InputError(f"{path} is not a readable sound file: {error}") from None
        samples, rate = decoded
    if not len(samples):
        raise InputError(f"{path} holds no sound")
    if not np.isfinite(samples).all():
        raise InputError(f"{path} holds samples that are not finite numbers")
    return samples, int(rate)


def _read_with_av(path: Path) -> tuple[Samples, int] | None:
    """The first sound stream of any container that FFmpeg reads (m4a, mp4, webm); None where that fails too."""
    try:
        import av
    except ImportError:
        return None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp")
            frames = [out for frame in container.decode(stream) for out in resampler.resample(frame)]
            frames += resampler.resample(None)
            parts = [frame.to_ndarray() for frame in frames]
            return np.concatenate(parts, axis=1).T.astype(np.float32), int(stream.rate)
    except (av.FFmpegError, IndexError, ValueError):
        return None


def resample(samples: npt.ArrayLike, sample_rate: int) -> Samples:
    """Mono at 16 kHz: channels averaged, soxr HQ, length ceil(n * 16000 / rate) (spec 4.1). samples [n] or [n, c]."""
    mono = np.asarray(samples, dtype=np.float32)
    if mono.ndim == 2:
        mono = mono.mean(axis=1, dtype=np.float32) if mono.shape[1] > 1 else mono[:, 0]
    if sample_rate == SAMPLE_RATE:
        return mono
    try:
        import soxr
    except ImportError:
        raise MissingExtraError("soxr", f"to resample sound from {sample_rate} Hz to 16 kHz", "audio") from None
    length = -(-len(mono) * SAMPLE_RATE // sample_rate)
    resampled = soxr.resample(mono, sample_rate, SAMPLE_RATE, quality="HQ")[:length]
    return np.pad(resampled, (0, length - len(resampled))).astype(np.float32)


def load_waveform(path: str | Path) -> Samples:
    """A sound file as the model hears it: float32 [n], mono, 16 kHz."""
    return resample(*read_audio(path))


def normalise(waveform: Samples) -> Samples:
    """Zero mean and unit variance over the whole sound (spec 4.2)."""
    return ((waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)).astype(np.float32)


def feature_count_30(count_50: int) -> int:
    """T30 of T50: float64 in the published order, which is one less than floor(3 T50 / 5) for some (spec 4.4)."""
    return int(count_50 / float(FEATURE_RATE) * VIDEO_RATE)


def feature_index(frame: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The 30 Hz sample that a video frame at 25 FPS takes: floor((12 k + 5) / 10) (spec 4.5)."""
    return (12 * np.asarray(frame, dtype=np.int64) + 5) // 10


def to_30_hz(hidden: Tensor) -> Tensor:
    """Linear interpolation with aligned corners: [states, T50, C] -> [states, T30, C]. T30 is at least 1."""
    count = max(1, feature_count_30(hidden.shape[1]))
    return F.interpolate(hidden.transpose(1, 2), size=count, mode="linear", align_corners=True).transpose(1, 2)


def bucket(features: Tensor, frames_per_clip: int) -> Tensor:
    """One 30 Hz sample a video frame, zeros past the end, whole clips: [states, T30, C] -> [states, C, clips * B]."""
    count = features.shape[1]
    clips = 5 * count // (6 * frames_per_clip) + 1
    index = torch.from_numpy(feature_index(np.arange(clips * frames_per_clip))).to(features.device)
    taken = features[:, index.clamp(max=count - 1)]
    taken[:, index >= count] = 0
    return taken.transpose(1, 2)


class AudioEncoder:
    """wav2vec2: all hidden states, the last one after the encoder's final LayerNorm (spec 4.3)."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self.device, self.dtype = model, device, dtype
        self.num_states = int(model.config.num_hidden_layers) + 1
        self.width = int(model.config.hidden_size)

    @classmethod
    def load(
        cls, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> AudioEncoder:
        """Load a wav2vec2 folder (config.json; model.safetensors or pytorch_model.bin). The CTC head is left out."""
        try:
            settings = json.loads((folder / "config.json").read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{folder / 'config.json'} is missing") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / 'config.json'} is not readable as json: {error}") from None
        model = _build(settings, str(folder))
        safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
        where = safe if safe.is_file() or not pickled.is_file() else pickled
        source: Mapping[str, Tensor] = TensorSource([safe]) if where is safe else open_pth(pickled)
        _fill(model, source, where, dtype)
        return cls(model.to(device=device, dtype=dtype).eval(), torch.device(device), dtype)

    @torch.inference_mode()
    def hidden_states(self, values: Samples) -> Tensor:
        """values: normalised samples [n] -> [states, T50, width], T50 = floor((n - 80) / 320).

        Fewer than 400 samples are padded with zeros to 400, so that there is one feature.
        """
        padded = np.pad(values, (0, max(0, MIN_SAMPLES - len(values))))
        x = torch.from_numpy(padded).to(self.device, self.dtype).unsqueeze(0)
        out = self._model(x, output_hidden_states=True)
        # transformers 5 leaves the final LayerNorm out of the last entry of hidden_states.
        return torch.cat([*out.hidden_states[:-1], out.last_hidden_state])

    def encode_file(self, waveform: Samples, frames_per_clip: int = 48) -> Tensor:
        """The published whole-file features [states, width, clips * frames_per_clip] of a 16 kHz waveform [n]."""
        return bucket(to_30_hz(self.hidden_states(normalise(waveform))), frames_per_clip)


def _build(settings: dict[str, Any], where: str) -> Any:
    """The model on the meta device: no memory until its tensors are assigned."""
    try:
        from transformers import Wav2Vec2Config, Wav2Vec2Model
    except ImportError:
        raise MissingExtraError("transformers", "to encode sound", "audio") from None
    settings = settings | {"apply_spec_augment": False}
    try:
        with torch.device("meta"):
            return Wav2Vec2Model._from_config(Wav2Vec2Config(**settings), attn_implementation="sdpa")
    except (TypeError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{where} is not a wav2vec2 model: {error}") from None


def _fill(model: Any, source: Mapping[str, Tensor], where: Path, dtype: torch.dtype) -> None:
    """Assign every tensor of the model by name, strictly; keys of the CTC head are skipped."""
    renamed = {}
    for key in source:
        if key.startswith("lm_head."):
            continue
        name = key.removeprefix("wav2vec2.")
        name = name.replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
        name = name.replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1")
        renamed[name] = key
    expected = model.state_dict()
    spare = {"masked_spec_embed"}
    lost = [name for name in expected if name not in renamed and name not in spare]
    unknown = [key for name, key in renamed.items() if name not in expected and name not in spare]
    if lost or unknown:
        what = f"lacks '{lost[0]}'" if lost else f"holds '{unknown[0]}', which wav2vec2 does not have"
        raise CheckpointError(f"{where} {what}")
    try:
        state = {name: source[renamed[name]].to(dtype) for name in expected if name in renamed}
    except (SafetensorError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{where} is truncated: {error}") from None
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shape = list(expected[name].shape)
            raise CheckpointError(f"{where}: '{renamed[name]}' has shape {list(tensor.shape)}, expected {shape}")
    if "masked_spec_embed" in expected and "masked_spec_embed" not in state:
        state["masked_spec_embed"] = torch.zeros(expected["masked_spec_embed"].shape, dtype=dtype)
    model.load_state_dict(state, assign=True)
