"""Times of the cards that were measured: what is shipped, what is measured in it, and whose times a plan takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from liverelay.engine.cli import main
from liverelay.engine.errors import InputError
from liverelay.engine.relay.card_times import CARDS, NEWEST
from liverelay.engine.relay.times import ESTIMATE, MEASURED, bundled_times, card, card_of
from tests.test_planner import fake_nvml


@pytest.mark.parametrize("name", list(CARDS))
def test_bundled_times_are_those_that_were_measured(name: str) -> None:
    """At the size that was measured; elsewhere, and where another card stands in, they are estimates."""
    known = CARDS[name]
    for fp8, step in known["steps"].items():
        times = bundled_times(fp8=fp8, name=name)
        assert times.step_ms == pytest.approx([step["whole_ms"]] * 4)
        assert (times.states["step_ms"] == MEASURED) == step["measured"]
    assert bundled_times((768, 384), name=name).states["step_ms"] == ESTIMATE
    assert bundled_times(fp8="attention", name=name).states["step_ms"] == ESTIMATE
    for part in ("vae_ms", "encode_ms", "prefill_ms", "prime_ms"):
        assert (times.states[part] == MEASURED) == (known[part] is not None)
        if (value := known[part] or CARDS[NEWEST][part]) is not None:
            assert getattr(times, part) == pytest.approx(value)
        assert bundled_times((768, 384), name=name).states[part] == ESTIMATE


def test_what_is_shipped_is_what_the_newest_results_say() -> None:
    pytest.importorskip("triton")
    from bench.card_times import DOCUMENT, document

    assert DOCUMENT.read_text() == document(), "run python -m bench.report --times"


def test_times_of_newer_results_take_the_place_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from bench.card_times import document

    parts = {"linear": 0.1, "attention": 0.06, "rows": 0.01, "rest": 0.002, "block-step": 0.172}
    for day, whole in (("2026-01-02", 0.3), ("2026-02-01", 0.17)):
        step = {"fp8": "", "backends": {"fastest": {"graph_s": whole, "parts_s": parts}}}
        opened = {"opening": {"parts_s": {"prefill_s": 0.05}}}
        suite = {"machine": {"gpu": "NVIDIA B9", "memory_bytes": 7}, "parts": [{"result": step}, {"result": opened}]}
        (tmp_path / f"b9-{day}.json").write_text(json.dumps(suite))
    made: dict[str, Any] = {}
    exec(document(tmp_path), made)
    monkeypatch.setitem(CARDS, "b9", made["CARDS"]["b9"])
    assert bundled_times(name="b9").step_ms[0] == pytest.approx(170)
    for fp8 in ("products", "attention", "all"):
        with pytest.raises(InputError, match=r"no block-step with .* in FP8 was measured on an NVIDIA B9"):
            bundled_times(fp8=fp8, name="b9")
    assert made["NEWEST"] == "b9" and made["CARDS"]["b9"]["results"] == "b9-2026-02-01"
    assert made["CARDS"]["b9"]["steps"][""] == {"whole_ms": 170, "parts_ms": (100, 60, 10, 2), "measured": True}
    assert (made["CARDS"]["b9"]["prefill_ms"], made["CARDS"]["b9"]["prime_ms"]) == (50, None)


def test_a_card_is_known_by_the_name_of_its_gpus() -> None:
    assert card_of(["NVIDIA H100 80GB HBM3"] * 2) == "h100" and card_of(["NVIDIA H200"]) == "h200"
    assert card_of([]) == card_of(["NVIDIA H100 PCIe", "NVIDIA H200"]) == card_of(["Quick GPU"]) == NEWEST
    with pytest.raises(InputError, match="h100, h200"):
        card("h300")


def test_the_card_is_that_of_this_machine_unless_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    said = {}
    for flags in ("", "--card h100"):
        assert main(["plan", "--gpus", "1", "--fp8", "all", "--json", *flags.split()]) == 0
        said[flags] = json.loads(capsys.readouterr().out)
    for found, name in zip(said.values(), ("h200", "h100"), strict=True):
        assert found["stages"][0]["capacity_bytes"] == CARDS[name]["memory"]
        assert found["times"]["step_ms"][0] == pytest.approx(CARDS[name]["steps"]["all"]["whole_ms"])
    assert main(["simulate", "--gpus", "1", "--fp8", "all", "--card", "h100", "--seconds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"][0]["times"] == said["--card h100"]["times"]
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(set(), {}, ["NVIDIA H100 80GB HBM3"]))
    assert main(["plan", "--fp8", "all", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert here["times"] == said["--card h100"]["times"] and here["stages"][0]["model"] == "NVIDIA H100 80GB HBM3"
