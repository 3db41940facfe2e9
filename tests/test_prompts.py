"""Prompts are encoded once, whatever is started anew; the text encoder lives where it was asked to."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liverelay.engine import prompts as module
from liverelay.engine.cache_folder import Cache
from liverelay.engine.checkpoint import find_checkpoint
from liverelay.engine.engine import Engine
from liverelay.engine.errors import InputError
from liverelay.engine.models.text import TextEncoder
from liverelay.engine.models.weights import open_tensors
from liverelay.engine.prompts import HOMES, KEPT, Prompts

for library in ("transformers", "ftfy"):
    pytest.importorskip(library)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("LIVERELAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Homes of the text encoders that prompts were encoded with."""
    seen: list[Any] = []
    load = TextEncoder.load.__func__  # type: ignore[attr-defined]

    def counted(cls: type[TextEncoder], *args: Any, **options: Any) -> TextEncoder:
        if "home" in options:
            seen.append(options["home"])
        return load(cls, *args, **options)

    monkeypatch.setattr(TextEncoder, "load", classmethod(counted))
    return seen


def make(checkpoint: Path, **options: Any) -> Prompts:
    files = find_checkpoint(checkpoint)
    _, config = files.open_dit()
    return Prompts(files, config, CPU, options.pop("dtype", torch.float32), **options)


def exact(checkpoint: Path, prompt: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    files = find_checkpoint(checkpoint)
    return TextEncoder.load(open_tensors(files.text), files.tokenizer, dtype=dtype).encode(prompt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("home", HOMES)
def test_states_are_the_encoder_s_wherever_it_lives(
    checkpoint: Path, loads: list[Any], home: str, dtype: torch.dtype
) -> None:
    states = make(checkpoint, home=home, dtype=dtype)
    for prompt in ("A woman talks.", "", "A man \u017fings — ЖЖ"):
        assert torch.equal(states.states(prompt), exact(checkpoint, prompt, dtype))
    assert loads == ([None] * 3 if home == "disk" else [CPU])


def test_another_start_takes_what_was_kept_to_the_bit(checkpoint: Path, loads: list[Any]) -> None:
    first = make(checkpoint).states("A woman talks.")
    again = make(checkpoint).states("A woman talks.")
    assert torch.equal(first, again) and again.dtype == first.dtype and len(loads) == 1


def test_another_precision_file_or_prompt_is_encoded_anew(checkpoint: Path, tmp_path: Path, loads: list[Any]) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    make(copy).states("A woman talks.")
    make(copy, dtype=torch.bfloat16).states("A woman talks.")
    make(copy).states("A woman talks!")
    assert len(loads) == 3
    text = find_checkpoint(copy).text
    os.utime(text, ns=(text.stat().st_atime_ns, text.stat().st_mtime_ns + 1))
    make(copy).states("A woman talks.")
    assert len(loads) == 4


@pytest.mark.parametrize("damage", [b"", b"not safetensors", "wrong width", "wrong name"])
def test_a_kept_state_that_cannot_be_right_is_encoded_anew(
    checkpoint: Path, loads: list[Any], damage: bytes | str
) -> None:
    from safetensors.torch import save

    prompts = make(checkpoint)
    key = prompts._key("A woman talks.")
    tensors = {"wrong width": {"states": torch.zeros(3, 5)}, "wrong name": {"other": torch.zeros(3, 64)}}
    payload = damage if isinstance(damage, bytes) else save(tensors[damage])
    Cache("prompts", entries=4, nbytes=1 << 20).put(key, payload)
    assert torch.equal(prompts.states("A woman talks."), exact(checkpoint, "A woman talks."))


def test_no_more_than_64_prompts_are_kept_in_memory(checkpoint: Path, loads: list[Any]) -> None:
    prompts = make(checkpoint, home="host")
    for number in range(KEPT + 3):
        prompts.states(f"number {number}")
    assert len(prompts._kept) == KEPT and "number 2" not in prompts._kept and "number 3" in prompts._kept
    assert len(loads) == 1


@pytest.mark.parametrize(("free", "home"), [(None, None), (1000, None), (1 << 40, CPU)])
def test_the_encoder_stays_in_the_host_s_memory_where_there_is_room(
    checkpoint: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch, free: int | None, home: torch.device | None
) -> None:
    monkeypatch.setattr(module, "available_host_bytes", lambda: free)
    said: list[str] = []
    prompts = make(checkpoint, say=said.append)
    prompts.states("One.")
    prompts.states("Two.")
    assert loads == ([home] if home is not None else [None, None])
    assert all(line.startswith("loading the text encoder, 0.0 GiB (kept: ") for line in said)


def test_no_prompt_can_be_read_from_the_cache(checkpoint: Path, cache_root: Path) -> None:
    make(checkpoint).states("my secret words")
    entries = list(cache_root.rglob("*.entry"))
    assert entries and not any(b"secret" in entry.read_bytes() or "secret" in entry.name for entry in entries)
    assert json.loads(make(checkpoint)._key("x"))[0]


def test_an_engine_is_told_where_its_encoder_lives(checkpoint: Path, loads: list[Any]) -> None:
    engine = Engine.load(checkpoint, device="cpu", dtype=torch.float32, text_encoder="host")
    engine.encode_text("One.")
    engine.encode_text("Two.")
    assert loads == [CPU]
    engine.close()
    with pytest.raises(InputError, match="cannot live in 'moon'; there is: device, host, disk"):
        Engine.load(checkpoint, device="cpu", text_encoder="moon")


def test_a_prompt_that_is_being_encoded_holds_up_no_running_session(
    checkpoint: Path, numbers: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published prompts take as long as reading 11 GB."""
    image = numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sound = numbers.uniform(-0.5, 0.5, 20000).astype(np.float32)
    engine = Engine.load(checkpoint, device="cpu", dtype=torch.float32)
    begun, over, shown, encode = threading.Event(), threading.Event(), list[int](), TextEncoder.encode

    def slow(encoder: TextEncoder, prompt: str) -> torch.Tensor:
        begun.set()
        assert over.wait(120)
        return encode(encoder, prompt)

    with engine.open(image, "One.", audio=sound, size=(64, 64)) as session:
        running = threading.Thread(target=lambda: shown.extend(len(chunk.frames) for chunk in session.frames()))
        monkeypatch.setattr(TextEncoder, "encode", slow)
        other = threading.Thread(target=lambda: engine.open(image, "Two.", audio=sound, size=(64, 64)).close())
        other.start()
        assert begun.wait(60)
        running.start()
        running.join(60)
        held_up = running.is_alive()
        over.set()
        running.join()
        other.join()
    engine.close()
    assert not held_up and sum(shown) > 12
