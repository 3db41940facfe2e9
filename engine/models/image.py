"""Reference picture: size choice, resize and crop, speaker masks (spec vae_audio_text.md sections 6 and 9)."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from liverelay.engine.errors import InputError, MissingExtraError

DIVISOR = 64
_STEPS = 100
LONGEST_SIDE = 65535  # of a resized picture; nothing that shows a person comes near


def choose_size(height: int, width: int, max_area: int) -> tuple[int, int]:
    """(height, width) of the video for a picture and an area limit in pixels: multiples of 64 (spec 6.1)."""
    area = height * width
    if area <= max_area:
        largest, smallest = 1.0, 0.1
    else:
        largest = math.sqrt(max_area / area)
        b, c = (DIVISOR - 1) * (height + width), (DIVISOR - 1) ** 2 - max_area
        smallest = (-b + math.sqrt(b * b - 2 * area * c)) / (2 * area)
    for i in range(_STEPS):
        scale = largest - (largest - smallest) * i / _STEPS
        sides = [-(-int(side * scale) // DIVISOR) * DIVISOR for side in (height, width)]
        if 0 < sides[0] * sides[1] <= max_area:
            return sides[0], sides[1]
    floor = [max(DIVISOR, side // DIVISOR * DIVISOR) for side in (height, width)]
    fitted = [int(math.sqrt(max_area * ratio)) // DIVISOR * DIVISOR for ratio in (height / width, width / height)]
    return min(floor[0], max(DIVISOR, fitted[0])), min(floor[1], max(DIVISOR, fitted[1]))


def load_image(path: str | Path, *, strict: bool = False) -> Any:
    """A picture file as a Pillow RGB image. Transparency is dropped and EXIF orientation ignored, as published.

    strict: kinds that Pillow would clip are refused, where the published code takes them.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"the image {path} " + ("is not a file" if path.exists() else "does not exist"))
    return _decode(path, str(path), strict=strict)


def decode_image(data: bytes) -> Any:
    """The bytes of a picture file as a Pillow RGB image; only of kinds that no other program is started for."""
    return _decode(io.BytesIO(data), "the picture", strict=True, formats=("PNG", "JPEG", "WEBP", "BMP"))


def _decode(source: Any, name: str, *, strict: bool, formats: Sequence[str] | None = None) -> Any:
    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(source, formats=formats) as opened:
                mode, converted = opened.mode, opened.convert("RGB")
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise InputError(f"{name} has too many pixels; make it smaller than 9000x9000 first") from None
    except pillow.UnidentifiedImageError:
        raise InputError(f"{name} is not a readable image of a kind that is known here") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{name} is not a readable image: {error}") from None
    if strict:
        _check_mode(mode)
    return converted


def as_image(image: Any) -> Any:
    """A path, a Pillow image or uint8 [h, w, 3] as a Pillow RGB image; InputError for anything else."""
    pillow = _pillow()
    if isinstance(image, str | Path):
        return load_image(image, strict=True)
    if isinstance(image, pillow.Image):
        _check_mode(image.mode)
        return image.convert("RGB")
    if not isinstance(image, np.ndarray):
        raise InputError(f"a {type(image).__name__} is no picture; give a path, a Pillow image or uint8 [h, w, 3]")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"a picture of {image.dtype} {list(image.shape)} cannot be used; give uint8 [h, w, 3]")
    return pillow.fromarray(image)


def _check_mode(mode: str) -> None:
    """Pillow clips these kinds instead of scaling them: the person would be all white or all black."""
    if mode.startswith("I") or mode == "F":
        raise InputError(f"the picture's kind is '{mode}' (more than 8 bits a value); save it with 8 bits first")


def prepare_image(image: Any, size: tuple[int, int]) -> Tensor:
    """Resize the shorter side to min(H, W), crop the centre to size = (H, W), black where it is short (spec 6.2).

    image: anything that `as_image` takes. Returns float32 [3, H, W] in [-1, 1], not rounded.
    """
    pillow, image = _pillow(), as_image(image)
    height, width = size
    short, (w, h) = min(height, width), image.size
    new_w, new_h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if max(new_w, new_h) > LONGEST_SIDE:
        raise InputError(f"a picture of {w}x{h} pixels is too long and thin; cut it to the person first")
    pixels = np.asarray(image.resize((new_w, new_h), pillow.Resampling.BILINEAR))
    gap_h, gap_w = max(0, height - new_h), max(0, width - new_w)
    pixels = np.pad(pixels, ((gap_h // 2, (gap_h + 1) // 2), (gap_w // 2, (gap_w + 1) // 2), (0, 0)))
    # round() takes ties to even, as published
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    cropped = pixels[top : top + height, left : left + width]
    return torch.from_numpy(cropped.copy()).permute(2, 0, 1).float().div_(255).mul_(2).sub_(1).contiguous()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("Pillow", "to read pictures", "media") from None
    return Image


# -- speaker masks (several speakers in one picture) -----------------------------------------------------------------


def load_masks(folder: Path) -> list[npt.NDArray[np.bool_]]:
    """Masks 1/annotated_frame_00000.png, 2/..., left to right; any value that is not zero belongs to the face."""
    masks: list[npt.NDArray[np.bool_]] = []
    while (path := folder / str(len(masks) + 1) / "annotated_frame_00000.png").is_file():
        with _pillow().open(path) as opened:
            pixels = np.asarray(opened)
        masks.append((pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=2)) > 0)
    if not masks:
        raise InputError(f"{folder} holds no 1/annotated_frame_00000.png")
    return masks


def actor_masks(masks: Sequence[npt.NDArray[np.bool_]], height: int, width: int, frames: int = 12) -> Tensor:
    """Token masks of each actor, later ones over earlier ones: [A, frames, H/16, W/16, 1] float32 (spec 9, 1 and 2)."""
    grid = (frames, height // 16, width // 16)
    label = torch.zeros(grid, dtype=torch.long)
    for actor, mask in enumerate(masks, start=1):
        volume = torch.from_numpy(mask.astype(np.float32))[None, None, None]
        label[F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)[0, 0] > 0.5] = actor
    return torch.stack([(label == actor).float() for actor in range(1, len(masks) + 1)]).unsqueeze(-1)


def dilated_masks(actors: Tensor) -> Tensor:
    """Each actor's mask grown by a square whose radius follows its bounding box in that frame (spec 9, 3)."""
    grown = torch.zeros_like(actors)
    for a, frame in np.ndindex(actors.shape[0], actors.shape[1]):
        mask = actors[a, frame, :, :, 0]
        rows, cols = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if not len(rows):
            continue
        extent = max(int(axis.max() - axis.min()) + 1 for axis in (rows, cols))
        radius = max(1, int(0.1 * extent + 0.9999))
        pooled = F.max_pool2d(mask[None, None], 2 * radius + 1, stride=1, padding=radius)
        grown[a, frame, :, :, 0] = pooled[0, 0]
    return grown


def speaker_masks(masks: Sequence[npt.NDArray[np.bool_]], height: int, width: int, frames: int = 12) -> Tensor:
    """Where each speaker's sound may act: 1 where no other actor stands, [A, frames, H/16, W/16, 1] (spec 9, 4)."""
    grown = dilated_masks(actor_masks(masks, height, width, frames))
    others = grown.sum(dim=0, keepdim=True) - grown
    return (others == 0).float()
