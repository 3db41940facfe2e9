"""The benchmarks' baseline computes what the engine computes, or its times would mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import frame_ring
from bench.block_step_cpu import SMALL, measure
from liverelay.engine.models.geometry import Geometry

ROOT = Path(__file__).resolve().parents[1]


def test_plain_version_and_engine_agree(seed: int) -> None:
    config = replace(SMALL, dim=96, ffn_dim=160, num_heads=3, num_layers=3, audio_inject_layers=(0, 2))
    config = replace(config, text_len=64)
    result = measure(config, Geometry(8, 16, config.head_dim, ring_frames=6), blocks=4, seed=seed)
    assert result["relative_error"] <= 1e-5


def test_the_ring_and_the_queue_carry_every_frame() -> None:
    result = frame_ring.measure(frames=30, pace_s=0.001)
    assert result["throughput_ratio"] > 0 and result["ring"]["hand_over_p50_us"] <= result["ring"]["p50_us"]
    assert set(result["queue"]) < set(result["ring"])


def test_the_page_of_kernels_is_that_of_the_registry() -> None:
    pytest.importorskip("triton")
    from bench.kernel_table import DOCUMENT, document

    assert DOCUMENT.read_text() == document(), "run python -m bench.kernel_table --write"


def test_kernels_run_under_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("pytest_benchmark")
    kept = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "pytest", "bench/test_kernels.py", "-k", "rms_norm", f"--benchmark-json={kept}"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True, capture_output=True)
    (row,) = json.loads(kept.read_text())["benchmarks"]
    assert row["stats"]["median"] > 0 and row["extra_info"]["bytes"] > 0
    assert row["extra_info"]["what"] == "plain PyTorch"


def test_a_page_is_made_of_a_suite_of_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    from bench.report import page

    results = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert results
    for path in results:
        text = page(json.loads(path.read_text()), path.stem, tmp_path)
        assert "## Block-step, full ring, bfloat16" in text and "GB/s" in text
        assert text == (ROOT / "docs" / f"{path.stem}.md").read_text()
