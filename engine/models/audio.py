"""Sound -> wav2vec2 features at the video's frame rate, the published whole-file way.

Source: spec vae_audio_text.md sections 4.1 to 4.5. The detour over 30 Hz and its float truncation are needed for
equality. The live way, which never knows the whole file, is in audio_live.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from liverelay.engine.errors import CheckpointError, InputError, MissingExtraError
from liverelay.engine.models.convolution import make_exact
from liverelay.engine.models.weights import TensorSource, open_pth

SAMPLE_RATE = 16000
FEATURE_RATE = 50
VIDEO_RATE = 30  # the published intermediate rate, not the video's
MIN_SAMPLES = 400
LOWEST_RATE, HIGHEST_RATE = 1000, 384000
LOUDEST = 100.0  # times full scale: beyond it numbers are no sound, and AAC refuses them in the end
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
        raise InputError(f"the sound file {path} " + ("is not a file" if path.exists() else "does not exist"))
    if not os.access(path, os.R_OK):
        raise InputError(f"the sound file {path} may not be read")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        decoded = _read_with_av(path)
        if decoded is None:
            raise InputError(f"{path} is not a readable sound file: {error}") from None
        samples, rate = decoded
    if not len(samples):
        raise InputError(f"{path} holds no sound")
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise InputError(f"{path} has {rate} samples a second; {LOWEST_RATE} to {HIGHEST_RATE} can be used")
    if not np.isfinite(samples).all():
        raise InputError(f"{path} holds samples that are not finite numbers")
    if (peak := float(np.abs(samples).max())) > LOUDEST:
        raise InputError(f"{path} holds samples up to {peak:g}; full scale is 1, so divide them first")
    return samples, int(rate)


def as_samples(audio: npt.ArrayLike) -> Samples:
    """Samples given by a caller as float32 of our own; integers are scaled by full scale. InputError else."""
    try:
        given = np.asarray(audio)
        if given.dtype.kind in "iu":
            limits = np.iinfo(given.dtype)
            middle = 0.0 if limits.min < 0 else (limits.max + 1) / 2
            return ((given - middle) / ((int(limits.max) + 1) / (1 if limits.min < 0 else 2))).astype(np.float32)
        samples = np.array(given, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError("sound must be numbers [n] or [n, channels]") from None
    return samples


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
        files = open_wav2vec2(folder)
        try:
            # copy=True: never a view of the mapped file
            state = {name: files.source[key].to(dtype, copy=True) for name, key in files.keys.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{files.path} is truncated: {error}") from None
        model, spare = files.model, "masked_spec_embed"
        if spare in files.shapes and spare not in state:
            state[spare] = torch.zeros(files.shapes[spare], dtype=dtype)
        model.load_state_dict(state, assign=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d):
                make_exact(module)
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


@dataclass(frozen=True)
class Wav2Vec2Files:
    """A checked wav2vec2 folder: the model on the meta device, and where each of its tensors comes from."""

    model: Any
    path: Path
    source: Mapping[str, Tensor]
    keys: dict[str, str]  # the library's name -> key in the file; the CTC head is left out
    shapes: dict[str, tuple[int, ...]]  # by the library's name


def open_wav2vec2(folder: Path) -> Wav2Vec2Files:
    """Read a folder's config.json and headers, strictly both ways; CheckpointError names what does not fit."""
    config = folder / "config.json"
    try:
        settings = json.loads(config.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{config} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} is not readable as json: {error}") from None
    model = _build(settings, folder)
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    path = safe if safe.is_file() or not pickled.is_file() else pickled
    source: Mapping[str, Tensor] = TensorSource([safe]) if path is safe else open_pth(pickled)
    keys = {_library_name(key): key for key in source if not key.startswith("lm_head.")}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = getattr(source, "shapes", None) or {key: tuple(tensor.shape) for key, tensor in source.items()}
    spare = {"masked_spec_embed"}
    lost = [name for name in expected if name not in keys and name not in spare]
    unknown = [key for name, key in keys.items() if name not in expected and name not in spare]
    if lost or unknown:
        what = f"lacks '{lost[0]}'" if lost else f"holds '{unknown[0]}', which wav2vec2 does not have"
        raise CheckpointError(f"{path} {what}")
    keys = {name: key for name, key in keys.items() if name in expected}
    for name, key in keys.items():
        if found[key] != expected[name]:
            raise CheckpointError(f"{path}: '{key}' has shape {list(found[key])}, expected {list(expected[name])}")
    return Wav2Vec2Files(model, path, source, keys, expected)


def _library_name(key: str) -> str:
    """The name that transformers gives to a published key."""
    name = key.removeprefix("wav2vec2.")
    name = name.replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
    return name.replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1")


def _build(settings: Any, folder: Path) -> Any:
    """The model on the meta device: no memory until its tensors are assigned."""
    try:
        from transformers import Wav2Vec2Config, Wav2Vec2Model
    except ImportError:
        raise MissingExtraError("transformers", "to encode sound", "audio") from None
    try:
        config = Wav2Vec2Config(**settings | {"apply_spec_augment": False})
        with torch.device("meta"):
            return Wav2Vec2Model._from_config(config, attn_implementation="sdpa")
    except Exception as error:  # the library has many ways to say that a value does not fit
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"{folder / 'config.json'} describes no wav2vec2 model: {line}") from None
