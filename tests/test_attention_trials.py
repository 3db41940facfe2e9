"""A candidate that crashes or hangs costs its own trial; what came of trials is kept, and only what would recur."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liverelay.engine import Engine
from liverelay.engine.cache_folder import Cache
from liverelay.engine.models import attention_choice
from liverelay.engine.models.attention_choice import key_of, parsed, tried
from liverelay.kernels import attention_trials, torch_ops
from liverelay.kernels.attention_backends import Trial, try_out
from liverelay.kernels.attention_trials import Factory, Setting, try_apart
from tests import attention_standins as standins

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known from before, and the other process finds everything by our paths, not by the environment."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("LIVERELAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attention_choice, "_known", {})
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that were started from now on."""
    processes: list[Any] = []
    start = subprocess.Popen

    def popen(*given: Any, **options: Any) -> Any:
        processes.append(start(*given, **options))
        return processes[-1]

    monkeypatch.setattr(attention_trials.subprocess, "Popen", popen)
    return processes


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The candidates that were asked for each time; they are tried in this process, because they are harmless."""
    calls: list[list[str]] = []

    def try_here(names: list[str], given: Setting) -> Iterator[Trial]:
        calls.append(list(names))
        found = given.factory(given.device, given.triton_works)
        return iter(try_out({name: found[name] for name in names}, given.shape, torch.zeros(1)))

    monkeypatch.setattr(attention_choice, "try_apart", try_here)
    return calls


def setting(factory: Factory = standins.mixed) -> Setting:
    return Setting(factory, False, (12, 40, 2, 16), CPU, torch.float32)


def faults(trials: list[Trial]) -> dict[str, str]:
    return {trial.name: trial.fault for trial in trials}


def test_a_crash_costs_the_one_that_crashed(started: list[Any]) -> None:
    names = ["right", "aborting", "wrong", "noisy", "poisoning", "raising", "illegal", "leaving", "last"]
    trials = list(try_apart(names, setting()))
    assert [trial.name for trial in trials] == names and all(trial.lasting for trial in trials)
    found = faults(trials)
    assert found["right"] == found["noisy"] == found["last"] == ""
    assert all(trial.error < 1e-6 and trial.seconds < 60 for trial in trials if not trial.fault)
    assert "is allowed" in found["wrong"] and found["raising"] == "no kernel for this head size"
    assert found["aborting"].startswith("it crashed: Aborted") and "Illegal instruction" in found["illegal"]
    assert found["leaving"] == "it crashed: ended with status 3"
    assert found["poisoning"] == "it crashed: CUDA error: an illegal instruction was encountered"
    assert len(started) == 5 and all(process.poll() is not None for process in started)


def test_a_hang_costs_its_time_and_ends(started: list[Any]) -> None:
    first, second = try_apart(["hanging", "last"], setting(), trial_s=8)
    assert first.fault == "no answer within 8 s" and first.lasting and not second.fault
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_what_says_nothing_of_the_candidate_is_not_lasting(started: list[Any]) -> None:
    hungry, killed, last = try_apart(["hungry", "killed", "last"], setting())
    assert "out of memory" in hungry.fault and "Killed" in killed.fault and not last.fault
    assert [trial.lasting for trial in (hungry, killed, last)] == [False, False, True]
    assert len(started) == 2


@pytest.mark.parametrize(
    "why", ["no interpreter", "no room", "no device", "not in time", "another process does not find it"]
)
def test_where_no_trial_is_possible_the_reason_is_told(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried_on, options = setting(standins.absent if why == "no device" else standins.mixed), {}
    words = why
    if why == "no interpreter":
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        words = "no process could be started"
    elif why == "no room":
        monkeypatch.setattr(attention_trials.tempfile, "TemporaryFile", Path("/nonexistent/file").open)
        words = "no process could be started"
    elif why == "not in time":
        options, words = {"start_s": 0.0}, "not ready after 0 s"
    names = ["nobody", "stranger"] if "find" in why else ["right", "last"]
    trials = list(try_apart(names, tried_on, **options))
    assert [trial.name for trial in trials] == names
    assert all(words in trial.fault and not trial.lasting for trial in trials)
    assert all(len(trial.fault.splitlines()) == 1 for trial in trials)


def test_a_trial_that_is_given_up_leaves_no_process(started: list[Any]) -> None:
    trials = try_apart(["right", "hanging"], setting())
    assert next(trials).name == "right"
    trials.close()  # type: ignore[attr-defined]
    assert [process.poll() is not None for process in started] == [True]


ORPHAN = """
from tests.test_attention_trials import setting
from liverelay.kernels.attention_trials import _Process
process = _Process(["hanging"], setting())
assert process.wait_until_ready(300) is None
print(process._process.pid, flush=True)
process.trial(300)
"""


def test_the_other_process_ends_with_its_parent() -> None:
    script = f"import sys\nsys.path[:] = {sys.path!r}\n{ORPHAN}"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    status = Path("/proc", parent.stdout.readline().strip(), "stat")
    assert status.exists()
    parent.kill()
    parent.communicate()
    ended, limit = False, time.monotonic() + 60
    while not ended and time.monotonic() < limit:
        time.sleep(0.05)
        ended = not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    assert ended


def load(checkpoint: Path, said: list[str]) -> Engine:
    return Engine.load(checkpoint, device="cpu", dtype=torch.float32, say=said.append)


def test_the_second_start_takes_what_the_first_has_found(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    monkeypatch.setattr(attention_choice, "candidates", standins.usual)
    for number in range(2):
        monkeypatch.setattr(attention_choice, "_known", {})  # a new process knows what the folder knows
        said: list[str] = []
        engine = load(checkpoint, said)
        engine.line(8, 8)
        engine.close()
        assert engine.dit.attention is engine.dit.text_attention is standins.right
        for what in ("attention", "attention to the text"):
            told = [line for line in said if line.partition(":")[0].rpartition(" ")[0] == what or f"{what}:" in line]
            assert [line.split(":")[0] for line in told] == [
                f"{what} slow", f"{what} right", f"{what} aborting", f"{what} wrong", what
            ]  # fmt: skip
            assert told[4] == f"{what}: right is taken" and "it crashed: Aborted" in told[2]
            assert [line.endswith("(kept from an earlier trial)") for line in told[:4]] == [bool(number)] * 4
        assert len(started) == 4


@pytest.mark.parametrize("first", ["line", "steps"])
def test_all_stages_compute_with_the_attention_that_was_chosen_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, asked: list[list[str]], first: str
) -> None:
    monkeypatch.setattr(attention_choice, "candidates", standins.harmless)
    engine = load(checkpoint, [])
    ways: dict[str, Callable[[], object]] = {
        "line": lambda: engine.line(8, 8),
        "steps": lambda: engine.open_steps(
            np.zeros((64, 64, 3), np.uint8), audio=np.zeros(8000, np.float32), size=(64, 64)
        ).close(),
    }
    for way in sorted(ways, key=lambda name: name != first):
        ways[way]()
        assert engine.dit.attention is engine.dit.text_attention is standins.right
        assert asked == [["slow", "right"]] * 2  # for the arena and for the text
    engine.close()


@pytest.mark.parametrize("lasting", [True, False])
def test_what_is_known_to_fail_is_never_run(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, asked: list[list[str]], lasting: bool
) -> None:
    said: list[str] = []
    engine = load(checkpoint, said)
    monkeypatch.setattr(attention_choice, "candidates", standins.hopeless if lasting else standins.without_room)
    engine.dit.attention = engine.dit.text_attention = standins.wrong  # the backend's
    engine.line(8, 8)
    engine.close()
    assert engine.dit.attention is engine.dit.text_attention is (torch_ops.attention if lasting else standins.wrong)
    assert (said[-1] == "attention to the text: none is right, plain PyTorch's is taken") == lasting


def test_a_cpu_makes_no_trial(checkpoint: Path, started: list[Any]) -> None:
    said: list[str] = []
    load(checkpoint, said).line(8, 8)
    assert not started and not [line for line in said if "attention" in line]


def test_only_new_candidates_are_tried(asked: list[list[str]]) -> None:
    assert [kept for _, kept in tried(["right"], setting())] == [False]
    found = list(tried(["slow", "right"], setting()))
    assert [(trial.name, kept) for trial, kept in found] == [("right", True), ("slow", False)]
    assert asked == [["right"], ["slow"]]


def test_what_is_not_lasting_is_tried_at_every_start(asked: list[list[str]]) -> None:
    given = setting(standins.short_of_memory)
    for number in range(2):
        found = {trial.name: kept for trial, kept in tried(["hungry", "right"], given)}
        assert found == {"hungry": False, "right": bool(number)}
    assert asked == [["hungry", "right"], ["hungry"]]


@pytest.mark.parametrize("payload", [b"", b"null", b"[]", b'{"seconds": 1}', b"\xff", b'{"name": "right"}',
                                     b'{"name": "wrong", "seconds": 1, "error": 0, "fault": ""}',
                                     b'{"name": "right", "seconds": "x", "error": 0, "fault": ""}',
                                     b'{"name": "right", "seconds": 0, "error": 0, "fault": ""}',
                                     b'{"name": "right", "seconds": 1, "error": 0, "fault": null}'])  # fmt: skip
def test_a_verdict_that_cannot_be_understood_is_none(payload: bytes) -> None:
    assert parsed("right", payload) is None


def test_the_texts_candidates_are_tried_with_the_factors_of_its_queries(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ignores them may be taken for the arena, never for the text."""
    monkeypatch.setattr(attention_choice, "candidates", standins.deaf_and_slow)
    engine = load(checkpoint, [])
    engine.line(8, 8)
    engine.close()
    assert engine.dit.attention is standins.deaf and engine.dit.text_attention is standins.slow


def test_a_damaged_verdict_is_made_again(asked: list[list[str]]) -> None:
    cache = Cache("verdicts", entries=8, nbytes=1 << 20)
    cache.put(key_of("right", setting()), b"{")
    assert [kept for _, kept in tried(["right"], setting())] == [False]
    attention_choice._known.clear()
    assert [kept for _, kept in tried(["right"], setting())] == [True]
    assert asked == [["right"], []]


def test_without_a_cache_folder_a_process_tries_once(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIVERELAY_CACHE", str(tmp_path / "file" / "cache"))
    assert [[kept for _, kept in tried(["right"], setting())] for _ in range(2)] == [[False], [True]]
    assert asked == [["right"], []]


def test_a_verdict_holds_for_what_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    given = setting()
    changed = [
        dataclasses.replace(given, shape=(12, 41, 2, 16)), dataclasses.replace(given, dtype=torch.bfloat16),
        dataclasses.replace(given, fp8=True), dataclasses.replace(given, q_factor=True),
        dataclasses.replace(given, factory=standins.usual),
    ]  # fmt: skip
    keys = {key_of("right", given), key_of("wrong", given), *(key_of("right", other) for other in changed)}
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.add(key_of("right", given))
    monkeypatch.setattr(attention_choice, "kernels_version", lambda: "others")
    keys.add(key_of("right", given))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(attention_choice, "DRIVER", ROOT / "LICENSE")
    keys.add(key_of("right", dataclasses.replace(given, device=torch.device("cuda"))))
    monkeypatch.setattr(attention_choice, "DRIVER", ROOT / "absent")
    keys.add(key_of("right", dataclasses.replace(given, device=torch.device("cuda"))))
    assert len(keys) == 11
