"""The Wan VAE: encoder, and the streaming decoder that is a stage of the pipeline.

No modules: a table of weights, and functions over static feature caches. Each causal convolution owns a buffer
[history | chunk]; norm and SiLU write straight into it, the convolution reads it whole, and its last two frames
become the history of the next call. Zero history is the published left padding. Source: spec vae_audio_text.md 1, 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from liverelay.engine.errors import InputError
from liverelay.engine.models.vae_config import CUT, WHOLE, DecoderStep, VAEConfig, expected_shapes
from liverelay.engine.models.vae_layers import FeatureCache, Layers
from liverelay.engine.models.weights import check_shapes
from liverelay.kernels import dispatch

CHUNK = 4  # video frames of a later latent
STRIDE = 8  # pixels of a latent position


@dataclass
class Still:
    """A picture without an end while it is encoded: the chunk's number, and what the last step made whose output is the
    same in this chunk and all later ones."""

    chunk: int = 0
    kept: Tensor = field(default_factory=lambda: torch.empty(0))


def encoder_repeats(kinds: Sequence[str]) -> list[int]:
    """The chunks of a still picture from which on the first convolution, and each step after it, gives what it gave
    for the chunk before.

    Chunk 2 is the first that equals the one before. A causal convolution repeats itself as soon as what it remembers is
    the same too: two frames, from one chunk before or, where a chunk is a single frame, from two.
    """
    chunk, frames, found = 3, CHUNK, [3]
    for kind in kinds:
        if kind == "residual":
            chunk += 2 * max(1, 2 // frames)
        elif kind == "down3d":
            chunk += 1
            frames //= 2
        found.append(chunk)
    return found


class VAE:
    """Encoder and decoder on one device.

    decode: latents in, frames out, one latent at a time against a `FeatureCache` made by `new_decoder`;
    encode: keeps its own cache, so it never disturbs a stream that is being decoded.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], config: VAEConfig, *, device: torch.device, dtype: torch.dtype,
        backend: str | None = None,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._steps = config.decoder_steps()
        try:
            self.ops = ops = dispatch.get_vae(backend, device)
        except ValueError as error:
            raise InputError(str(error)) from None
        # The encoder runs once a session and its error stays in the sink and in the primed decoder for the whole
        # stream: it keeps float32 activations, which halves the error of bfloat16 (with TF32 convolutions on a GPU,
        # unless float32 was asked for).
        encoder = [key for key in weights if key.startswith(("encoder.", "conv1."))]
        wide = torch.float32
        self._encoder = Layers(weights, encoder, device, values=dtype, operand=wide, stream=wide, ops=ops)
        decoder = [key for key in weights if key.startswith(("decoder.", "conv2."))]
        stream = torch.float32 if device.type == "cpu" else dtype
        self._decoder = Layers(weights, decoder, device, values=dtype, operand=dtype, stream=stream, ops=ops)
        mean, std = (torch.tensor(part, device=device).to(dtype) for part in (config.latent_mean, config.latent_std))
        self._mean, self._inverse_std = (part.float().view(-1, 1, 1, 1) for part in (mean, 1.0 / std))

    @classmethod
    def load(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        config: VAEConfig | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        backend: str | None = None,
    ) -> VAE:
        """Build from the published state dict. CheckpointError names the first key or shape that does not fit."""
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        config = config or VAEConfig.from_shapes(shapes)
        check_shapes(shapes, expected_shapes(config), "the VAE checkpoint")
        return cls(tensors, config, device=torch.device(device), dtype=dtype, backend=backend)

    # -- public ----------------------------------------------------------------------------------------------------

    def encode(self, video: Tensor) -> Tensor:
        """video [3, T, H, W] in [-1, 1] -> normalised latents [16, 1 + (T-1)//4, H/8, W/8] float32.

        Frames are taken as 1, 4, 4, ...; left-over frames are ignored, as published. H and W: multiples of 8. A still
        picture that was expanded over time takes less than half of the work, for the same latents to the bit.
        """
        if video.dim() != 4 or video.shape[0] != 3 or video.shape[2] % 8 or video.shape[3] % 8 or not video.shape[1]:
            raise InputError(f"cannot encode {list(video.shape)}; expected [3, T, H, W] with H and W multiples of 8")
        cache, latents, still = FeatureCache(), [], Still() if video.stride(1) == 0 else None
        for end in range(1, video.shape[1] + 1, CHUNK):
            chunk = video[:, max(0, end - CHUNK) : end].transpose(0, 1).to(self.device, self.dtype).float()
            latents.append(self._encode_chunk(chunk, cache, still))
            cache.first = False
        mean = torch.cat(latents, dim=1)
        return (mean - self._mean) * self._inverse_std

    def new_decoder(self, latent_h: int, latent_w: int, piece: str = WHOLE) -> FeatureCache:
        """An empty cache for one stream of this latent size, allocated once."""
        cache = FeatureCache()
        for name, (channels, frames, scale) in self.config.decoder_slots(piece).items():
            cache.buffers[name] = self._decoder.make(channels, 2 + frames, latent_h * scale, latent_w * scale)
        return cache

    def decode(self, latents: Tensor, cache: FeatureCache) -> Tensor:
        """latents [16, N, h, w] -> frames [3, 4N, 8h, 8w] float32 in [-1, 1]; the very first latent gives 1 frame.

        Streaming: splitting the latents over several calls changes nothing.
        """
        frames = []
        for x in self._each(latents):
            frames.append(self._finish(self._begin(x, cache), cache))
            cache.first = False
        return torch.cat(frames, dim=1)

    def decode_first(self, latents: Tensor, cache: FeatureCache, features: Tensor) -> None:
        """The first piece of `decode`, into features [4N, C, h', w'], one latent's frames behind the other's.

        cache: of this piece.
        """
        row = 0
        for x in self._each(latents):
            y = self._begin(x, cache)
            features[row : row + len(y)].copy_(y)
            row += len(y)
            cache.first = False

    def decode_second(self, features: Tensor, latents: int, cache: FeatureCache) -> Tensor:
        """The second piece: features of so many latents -> frames, to the bit those of `decode`."""
        frames, row, later = [], 0, self._steps[CUT].frames
        for _ in range(latents):
            count = 1 if cache.first else later
            frames.append(self._finish(features[row : row + count], cache))
            row += count
            cache.first = False
        return torch.cat(frames, dim=1)

    def as_features(self, memory: Tensor) -> Tensor:
        """Memory of [n, C, h', w'] as features in the layout that the decoder computes in."""
        return self._decoder.arranged(memory)

    @property
    def features_dtype(self) -> torch.dtype:
        return self._decoder.stream

    def prime(self, cache: FeatureCache, motion: Tensor, piece: str = WHOLE) -> None:
        """Warm a new stream, or a piece of its decoder, up with the first motion latents [16, 7, h, w] (spec 2.5).

        The frames are of no use: the caches end as `decode` leaves them, to the bit, but what only frames would need is
        left out. cache: empty.
        """
        steps = self.config.primed_steps(piece)
        for i, x in enumerate(self._each(motion.to(self.device))):
            left = motion.shape[1] - i
            self._through([step for step, latents in steps if latents >= left], self._middle(x, cache), cache)
            cache.first = False

    def to_uint8(self, frames: Tensor, out: Tensor | None = None) -> Tensor:
        """Frames [3, T, H, W] in [-1, 1] -> bytes [T, H, W, 3], truncated as published (spec section 7)."""
        result: Tensor = self.ops.to_uint8(frames, out)
        return result

    # -- the two halves --------------------------------------------------------------------------------------------

    def _encode_chunk(self, x: Tensor, cache: FeatureCache, still: Still | None) -> Tensor:
        """[n, 3, H, W] -> the unnormalised mean [16, n', H/8, W/8]."""
        run, plan = self._encoder, self.config.encoder_plan()
        repeats = encoder_repeats([kind for _, kind in plan]) if still else []
        first = 0
        if still and (first := sum(chunk <= still.chunk for chunk in repeats)):
            x = still.kept
        for i in range(first, 1 + len(plan)):
            if i == 0:
                x = run.causal("encoder.conv1", x, cache)
            else:
                name, kind = plan[i - 1]
                x = run.residual(name, x, cache) if kind == "residual" else run.down(name, x, cache, kind == "down3d")
            if still and i + 1 == sum(chunk <= still.chunk + 1 for chunk in repeats):
                still.kept = x
        if still:
            still.chunk += 1
        x = run.middle("encoder.middle", x, cache)
        x = run.norm_conv("encoder.head.0", "encoder.head.2", x, cache)
        return run.conv("conv1", x)[:, : self.config.z_dim].transpose(0, 1)

    def _each(self, latents: Tensor) -> Iterator[Tensor]:
        """[16, N, h, w] -> N times [1, 16, h, w], unnormalised."""
        if latents.dim() != 4 or latents.shape[0] != self.config.z_dim or not latents.shape[1]:
            raise InputError(f"cannot decode {list(latents.shape)}; expected [{self.config.z_dim}, N, h, w] with N > 0")
        x = latents.float() / self._inverse_std + self._mean  # constants hold working-dtype values (spec 1.5)
        return (x[:, i].unsqueeze(0) for i in range(x.shape[1]))

    def _begin(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[1, 16, h, w] -> what the decoder's second piece takes, [n, C, h', w']."""
        return self._through(self._steps[:CUT], self._middle(x, cache), cache)

    def _finish(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """What the first piece made of a latent -> frames [3, n, 8h, 8w]."""
        x = self._through(self._steps[CUT:], x, cache)
        return x.transpose(0, 1).float().clamp_(-1, 1)

    def _middle(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """What comes before all steps."""
        run = self._decoder
        return run.middle("decoder.middle", run.causal("decoder.conv1", run.conv("conv2", x), cache), cache)

    def _through(self, steps: Sequence[DecoderStep], x: Tensor, cache: FeatureCache) -> Tensor:
        run = self._decoder
        for step in steps:
            if step.kind == "residual":
                x = run.residual(step.name, x, cache)
            elif step.kind == "head":
                x = run.norm_conv(f"{step.name}.0", f"{step.name}.2", x, cache)
            else:
                x = run.up(step.name, x, cache, step.kind == "up3d")
        return x
