"""The engine against its own tensors, made when it was equal to the published model; no other data is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.compare import relative
from tests.regression import DATA, FOLDERS, compute


@pytest.mark.parametrize("component", FOLDERS)
def test_results_are_those_of_the_day_they_were_equal(component: str, tmp_path: Path) -> None:
    kept, got = load_file(DATA / f"{component}.safetensors"), compute(component, tmp_path)
    assert set(got) == set(kept) and kept
    for name, value in kept.items():
        assert relative(got[name], value) <= 2e-5, name
