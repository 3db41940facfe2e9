"""Reference pictures: sizes, resize and crop, kinds of files, speaker masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from liverelay.engine.errors import InputError
from liverelay.engine.models.image import (
    actor_masks,
    choose_size,
    dilated_masks,
    load_image,
    load_masks,
    prepare_image,
    speaker_masks,
)

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def picture(numbers: np.random.Generator, height: int, width: int) -> np.ndarray:
    return numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_sizes_are_multiples_of_64_within_the_area(numbers: np.random.Generator) -> None:
    for _ in range(2000):
        height, width = (int(side) for side in np.exp(numbers.uniform(0, 9, 2)) + 1)
        area = int(numbers.integers(64 * 64, 1_000_000))
        rows, cols = choose_size(height, width, area)
        assert rows % 64 == 0 and cols % 64 == 0 and min(rows, cols) >= 64, (height, width, area)
        ratio = height / width
        if 1 / 3 < ratio < 3 and area > 60_000:
            assert rows * cols <= area, (height, width, area)
            if height * width > area:  # a large picture keeps its proportions, as far as steps of 64 allow
                assert abs(np.log(rows / cols / ratio)) < 0.75, (height, width, area)


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 200), (200, 3), (1000, 700), (65, 127)])
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 192)])
def test_any_picture_fills_the_asked_size(
    numbers: np.random.Generator, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    pixels = prepare_image(picture(numbers, *shape), size)
    assert pixels.shape == (3, *size) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_a_picture_of_the_right_size_is_not_touched(numbers: np.random.Generator) -> None:
    pixels = picture(numbers, 64, 64)
    back = (prepare_image(pixels, (64, 64)) + 1) / 2 * 255
    assert torch.equal(back.round().to(torch.uint8), torch.from_numpy(pixels).permute(2, 0, 1))


def test_borders_are_black_where_the_picture_is_too_narrow(numbers: np.random.Generator) -> None:
    pixels = prepare_image(np.full((60, 100, 3), 255, dtype=np.uint8), (64, 128))  # 106 of 128 columns
    dark = (pixels == -1).all(dim=0).all(dim=0)
    assert dark[:11].all() and dark[-11:].all() and not dark[11:-11].any()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16", "F"])
def test_every_kind_of_picture_becomes_rgb(numbers: np.random.Generator, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tiff" if mode in ("F", "CMYK") else "picture.png")
    grey = Image.fromarray(picture(numbers, 80, 70))
    (grey.convert("L").convert("I").convert("I;16") if mode == "I;16" else grey.convert(mode)).save(path)
    assert load_image(path).mode == "RGB"
    if mode in ("I;16", "F"):  # Pillow clips them: the whole picture would be white or black
        with pytest.raises(InputError, match="8 bits"):
            prepare_image(path, (64, 64))
    else:
        assert prepare_image(path, (64, 64)).isfinite().all()


def test_unusable_pictures_are_named(tmp_path: Path, numbers: np.random.Generator) -> None:
    with pytest.raises(InputError, match=r"absent\.png does not exist"):
        load_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png is not a readable image"):
        load_image(tmp_path / "text.png")
    Image.new("1", (14_000, 14_000)).save(tmp_path / "huge.png")
    with pytest.raises(InputError, match="too many pixels"):
        load_image(tmp_path / "huge.png")
    with pytest.raises(InputError, match="long and thin"):
        prepare_image(picture(numbers, 3000, 1), (64, 64))
    for wrong in (np.zeros((5, 5)), np.zeros((5, 5, 4), np.uint8), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(InputError, match="cannot be used"):
            prepare_image(wrong, (64, 64))


def test_speaker_masks_are_the_published_ones(golden: Path) -> None:
    expected = load_file(golden / "image" / "masks" / "masks.safetensors")
    masks = load_masks(golden / "image" / "masks")
    actors = actor_masks(masks, 128, 256)
    assert torch.equal(actors, expected["actor_mask"])
    assert torch.equal(dilated_masks(actors), expected["dilated_mask"])
    assert torch.equal(speaker_masks(masks, 128, 256), expected["final_mask"])


def test_background_hears_everybody_and_nobody_hears_both(numbers: np.random.Generator) -> None:
    left, right = np.zeros((2, 128, 192), dtype=bool)
    left[40:90, 10:60] = right[40:90, 130:180] = True
    masks = speaker_masks([left, right], 128, 192)
    assert masks.shape == (2, 12, 8, 12, 1)
    assert masks[:, :, 0, 0].eq(1).all()
    assert masks[0, :, 4, 2].eq(1).all() and masks[1, :, 4, 2].eq(0).all()
    assert masks[0, :, 4, 9].eq(0).all() and masks[1, :, 4, 9].eq(1).all()


def test_a_folder_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="annotated_frame_00000"):
        load_masks(tmp_path)
