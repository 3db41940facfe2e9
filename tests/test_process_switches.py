"""Stages and engines share a process: none of them turns a switch of the whole process, or depends on one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from liverelay.engine import Engine
from liverelay.engine.models.convolution import convolve, make_exact
from tests.tape import TapeGraphs
from tests.test_relay import stages_of

# Of torch._C's setters, those that hold for the calling thread alone.
PER_THREAD = {"grad_enabled", "fwd_grad_enabled", "multithreading_enabled", "view_replay_enabled", "dispatch_mode",
              "torch_function_state", "conj", "neg", "tensor_metadata", "only_lift_cpu_tensors", "tracing_state",
              "value_trace", "thread_name", "skip_next_torch_function", "meta_in_tls_dispatch_include"}  # fmt: skip
SETTERS = [name for name in dir(torch._C) if name.startswith("_set_") and name[5:] not in PER_THREAD]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def switches() -> dict[str, Any]:
    """What the process has set, as far as it can be read."""
    cuda, found = torch.backends.cuda, {"threads": torch.get_num_threads(), "environment": dict(os.environ)}
    found["environment"].pop("PYTEST_CURRENT_TEST", None)  # type: ignore[attr-defined]
    enabled = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled)
    found |= {getter.__name__: getter() for getter in enabled}
    for name in SETTERS:
        getter = getattr(torch._C, "_get_" + name[5:], None)
        try:
            found[name] = None if getter is None else getter()
        except (TypeError, RuntimeError):  # one that wants arguments, or is not in this build
            continue
    return found


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the process's switches that were written from now on, by whatever thread."""
    written: list[str] = []

    def recorded(name: str, setter: Callable[..., Any]) -> Callable[..., Any]:
        def write(*values: Any) -> Any:
            written.append(name)
            return setter(*values)

        return write

    for name in SETTERS:
        monkeypatch.setattr(torch._C, name, recorded(name, getattr(torch._C, name)))
    for name in ("set_num_threads", "set_num_interop_threads", "set_flush_denormal", "set_default_device"):
        monkeypatch.setattr(torch, name, recorded(name, getattr(torch, name)))
    prop = torch.backends.ContextProp  # `torch.backends.cudnn.allow_tf32 = ...` has kept the setters
    monkeypatch.setattr(prop, "__set__", recorded("torch.backends", prop.__set__))
    return written


def test_a_write_would_be_seen(writes: list[str]) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        pass
    assert "_set_sdp_use_flash" in writes
    for write in (
        lambda: torch.backends.cudnn.flags(enabled=True, allow_tf32=False).__enter__(),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32),
        lambda: torch.set_num_threads(torch.get_num_threads()),
        lambda: torch.set_float32_matmul_precision(torch.get_float32_matmul_precision()),
    ):
        writes.clear()
        before = switches()
        write()
        assert writes
        torch.backends.cudnn.set_flags(True, _allow_tf32=True)
        assert switches() == before


def test_sessions_on_several_stages_turn_no_switch_of_the_process(
    checkpoint: Path, numbers: np.random.Generator, writes: list[str]
) -> None:
    pytest.importorskip("transformers")
    before = switches()
    engine = Engine.load(checkpoint, device="cpu,cpu,cpu", dtype=torch.float32)
    for stage in stages_of(engine.line(8, 8)):
        stage.graphs = TapeGraphs()
    image, errors = numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8), []

    def speak(sound: np.ndarray) -> None:
        try:
            with engine.open(image, audio=sound, size=(64, 64)) as session:
                assert len(list(session.frames())) == 3
        except BaseException as error:
            errors.append(error)

    # The second opens, encodes and captures while the first computes.
    sounds = [numbers.uniform(-0.5, 0.5, 20000).astype(np.float32) for _ in range(2)]
    threads = [threading.Thread(target=speak, args=(sound,)) for sound in sounds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert not errors and not writes and switches() == before


@pytest.mark.parametrize("dims", list(CONVOLUTIONS))
@pytest.mark.parametrize("biased", [True, False])
def test_our_convolution_is_pytorchs(
    dims: int, biased: bool, rng: torch.Generator, numbers: np.random.Generator
) -> None:
    stride, padding, groups = (int(numbers.integers(low, low + 2)) for low in (1, 0, 1))
    sides = [int(side) for side in numbers.integers(4, 12, dims)]
    x = torch.randn(2, 4 * groups, *sides, generator=rng)
    weight = torch.randn(6 * groups, 4, *[3] * dims, generator=rng)
    bias = torch.randn(6 * groups, generator=rng) if biased else None
    exact = CONVOLUTIONS[dims](x, weight, bias, stride=stride, padding=padding, groups=groups)
    for tf32 in (False, True):
        got = convolve(x, weight, bias, stride=stride, padding=padding, groups=groups, tf32=tf32)
        assert torch.equal(got, exact)
    uneven = ([2, *[1] * (dims - 1)], [0, *[1] * (dims - 1)])
    exact = CONVOLUTIONS[dims](x, weight, bias, *uneven, groups=groups)
    assert torch.equal(convolve(x, weight, bias, stride=uneven[0], padding=uneven[1], groups=groups), exact)


class Convolutions(TorchDispatchMode):
    """Notes for every convolution whether it may be TF32; None where it leaves that to the process."""

    def __init__(self) -> None:
        super().__init__()
        self.tf32: list[bool | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._convolution.default:
            self.tf32.append(args[12])
        elif "conv" in str(func):
            self.tf32.append(None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_convolution_says_itself_whether_it_may_be_tf32(
    checkpoint: Path, numbers: np.random.Generator, rng: torch.Generator, dtype: torch.dtype
) -> None:
    pytest.importorskip("transformers")
    engine = Engine.load(checkpoint, device="cpu", dtype=dtype)
    config = engine.dit.config
    audio: Tensor = torch.randn(1, config.audio_states, config.audio_dim, 12, generator=rng)
    sound = numbers.uniform(-0.5, 0.5, 8000).astype(np.float32)
    with torch.inference_mode():
        for work, tf32 in (
            (lambda: engine.dit.audio_condition(audio, 3), False),
            (lambda: engine.audio.hidden_states(sound), False),  # type: ignore[attr-defined]
            (lambda: engine.vae.encode(torch.rand(3, 5, 32, 32, generator=rng)), dtype != torch.float32),
            (lambda: engine.vae.decode(torch.randn(16, 2, 4, 4), engine.vae.new_decoder(4, 4)), dtype != torch.float32),
        ):
            with Convolutions() as seen:
                work()
            assert set(seen.tf32) == {tf32}


def test_a_convolution_that_ours_does_not_compute_is_refused() -> None:
    for options in ({"padding": "same"}, {"padding_mode": "circular", "padding": 1}, {"dilation": 2}):
        with pytest.raises(ValueError, match="none that"):
            make_exact(torch.nn.Conv1d(4, 4, 3, **options))  # type: ignore[arg-type]
