"""`golden image`: size choice and prepared pixels (given: cases.json and the pictures it names)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from liverelay.engine.golden import GoldenOptions, given, read_json
from liverelay.engine.models.image import choose_size, load_image, prepare_image


def run(folder: Path, options: GoldenOptions) -> dict[str, Tensor]:
    where = folder / "cases.json"
    cases = read_json(where)
    sizes = [choose_size(*row) for row in given(cases, "sizes", where)]
    results = {"sizes": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)}
    for name, case in given(cases, "images", where).items():
        image = load_image(folder / given(case, "file", where))
        size = choose_size(image.height, image.width, int(given(case, "target_area", where)))
        results[f"{name}.pixels"] = prepare_image(image, size)
    return results
