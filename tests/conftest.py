"""Shared by all tests: threads, poisoned memory, fresh seeds, the golden folder, a tiny checkpoint, a compiler."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from liverelay.engine.config import set_process_defaults

set_process_defaults()  # before torch is imported

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("LIVERELAY_GOLDEN", ROOT.parent / "shared" / "golden"))

# Triton decides at import between compiler and interpreter, so without a GPU its tests are a process of their own.
collect_ignore_glob = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/*"]
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tests and the processes that they start neither fill nor read the user's own cache folder.

    LIVERELAY_TEST_CACHE names one that several processes with tests share, so that each finds what another has tried.
    """
    given = os.environ.get("LIVERELAY_TEST_CACHE")
    folder = Path(given) if given else tmp_path_factory.mktemp("cache") / "liverelay"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIVERELAY_CACHE", str(folder))
        yield folder


@pytest.fixture
def compiler() -> None:
    """Skips where Triton or its assembler is missing."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton is not installed")
    if not (Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this triton has no ptxas")


@pytest.fixture
def golden() -> Path:
    """The folder of tensors from the published model; the test is skipped where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip("no golden tensors here (set LIVERELAY_GOLDEN to their folder)")
    return GOLDEN


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for every run; it is printed when the test fails. LIVERELAY_TEST_SEED sets it."""
    value = int(os.environ.get("LIVERELAY_TEST_SEED", random.SystemRandom().randrange(1 << 31)))
    print(f"LIVERELAY_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A torch generator with the test's fresh seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def numbers(seed: int) -> np.random.Generator:
    """A numpy generator with the test's fresh seed."""
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that a kernel that leaves a part of its output unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint in the published layout."""
    from liverelay.engine.make_checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", seed=7)


@pytest.fixture(params=["native", "python"])
def ring_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of its two implementations the frame ring uses in the test."""
    from liverelay.engine import native

    if request.param == "native" and not hasattr(native.module(), "ring_create"):
        pytest.skip("the compiled module was not built")
    if request.param == "python":
        monkeypatch.setitem(sys.modules, "liverelay.engine._C", None)
    return str(request.param)
