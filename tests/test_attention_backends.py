"""The attention that is taken is right and the fastest; what fails or is wrong is left out, with its reason."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import liverelay.kernels
from liverelay.engine import Engine
from liverelay.engine.cli import main
from liverelay.engine.devices import check_fp8
from liverelay.engine.errors import InputError
from liverelay.kernels import attention_backends, dispatch, torch_ops
from liverelay.kernels.attention_backends import (
    candidates,
    fastest,
    flash_attention,
    fp8_candidates,
    libraries,
    library,
    try_out,
)
from liverelay.kernels.contract import Place, Scales

LIKE = torch.zeros(1)
SHAPE = (12, 40, 2, 16)


def slow(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None) -> Tensor:
    time.sleep(0.02)
    return torch_ops.attention(q, k, v, out, place)


def wrong(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None) -> Tensor:
    return torch_ops.attention(q, k, v, out, place).mul_(1.01)


def failing(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None) -> Tensor:
    raise RuntimeError("no kernel for this head size\nand a long story")


def unwritten(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None) -> Tensor:
    return out


def test_the_fastest_right_one_is_taken() -> None:
    found = {"slow": slow, "wrong": wrong, "failing": failing, "unwritten": unwritten, "plain": torch_ops.attention}
    trials = {trial.name: trial for trial in try_out(found, SHAPE, LIKE)}
    best = fastest(list(trials.values()))
    assert best is not None and best.name == "plain" and best.error < 1e-6
    assert trials["slow"].seconds > 0.02 and not trials["slow"].fault
    assert "error" in trials["wrong"].fault and "error" in trials["unwritten"].fault
    assert trials["failing"].fault == "no kernel for this head size"


def test_without_a_right_one_there_is_none() -> None:
    assert fastest(try_out({"wrong": wrong}, SHAPE, LIKE)) is None


@pytest.mark.parametrize("fault", ["swapped scales", "scales left out", "none"])
def test_attention_in_fp8_is_tried_with_its_scales(fault: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None, scales: Scales) -> Tensor:
        if fault == "swapped scales":
            scales = Scales(scales.q.flip(0), scales.k.flip(0), scales.v)
        elif fault == "scales left out":
            scales = Scales(torch.ones_like(scales.q), torch.ones_like(scales.k), 1.0)
        return torch_ops.attention(q, k, v, out, place, scales)

    (trial,) = try_out({"ours": attention}, (70, 150, 3, 32), LIKE.bfloat16(), fp8=True)
    assert bool(trial.fault) == (fault != "none")
    assert trial.fault or 0 < trial.error < 0.06


def test_attention_to_text_is_tried_with_the_factors_of_its_queries() -> None:
    def without(*given: object, q_factor: Tensor) -> Tensor:
        return torch_ops.attention(*given)

    operator = library(lambda q, k, v: (torch.nn.functional.scaled_dot_product_attention(q, k, v),))
    found = {"ours": torch_ops.attention, "library": operator, "without": without}
    trials = {trial.name: trial for trial in try_out(found, SHAPE, LIKE, q_factor=True)}
    assert not trials["ours"].fault and not trials["library"].fault and "error" in trials["without"].fault


@pytest.mark.parametrize(("capability", "names"), [
    ((8, 9), ["pointer"]), ((9, 0), ["pointer", "descriptor", "specialised"]), ((10, 0), ["pointer", "descriptor"]),
])  # fmt: skip
def test_attention_in_fp8_has_candidates_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], names: list[str]
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = fp8_candidates(torch.device("cuda"), triton_works=True)
    assert list(found) == [f"triton-{name}" for name in names]
    assert list(fp8_candidates(torch.device("cpu"), triton_works=True)) == ["torch"]


@pytest.mark.parametrize("name", list(libraries()))
@pytest.mark.parametrize("placed", [True, False])
def test_a_library_is_called_by_an_operator_that_takes_our_arguments(name: str, placed: bool) -> None:
    q, k, v = (torch.empty(n, 3, 64, device="meta", dtype=torch.bfloat16) for n in (12, 40, 40))
    place, out = Place.make(torch.device("cpu")).fill(0, 33, False) if placed else None, torch.empty_like(q)
    assert libraries()[name](q, k, v, out, place) is out  # no values: PyTorch checks schema, shapes and dtypes


def test_a_library_computes_our_attention_whatever_other_threads_have_switched_off(rng: torch.Generator) -> None:
    q, k, v = (torch.randn(n, 3, 16, generator=rng) for n in (12, 40, 40))
    place, results = Place.make(torch.device("cpu")).fill(0, 33, False), []
    attention = library(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):  # for the whole process: here it stands for another thread's
            results.append(attention(q, k, v, torch.empty_like(q), place))
    exact = torch_ops.attention(q.double(), k.double(), v.double(), torch.empty_like(q.double()), place)
    assert all(torch.allclose(result.double(), exact, atol=1e-5) for result in results)


def test_a_cpu_has_pytorch_alone() -> None:
    assert list(candidates(torch.device("cpu"), triton_works=True)) == ["torch"]


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_the_specialised_kernel_is_a_candidate_on_sm_90_alone(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = candidates(torch.device("cuda"), triton_works=True)
    assert "triton-pointer" in found and ("triton-specialised" in found) == (capability == (9, 0))
    assert "triton-specialised" not in candidates(torch.device("cuda"), triton_works=False)


def test_on_amd_only_the_kernel_that_compiles_there_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cuda = torch.device("cuda")
    assert [name for name in candidates(cuda, triton_works=True) if "triton" in name] == ["triton-pointer"]
    for name, works in [("gfx942:sramecc+:xnack-", True), ("gfx1100", False)]:
        properties = types.SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        found = dispatch.available("triton", cuda)
        assert found.works == works and found.reason.startswith(name.split(":")[0])
    with pytest.raises(InputError, match="leave --fp8 out"):
        check_fp8("cuda", torch.bfloat16)


def test_without_gluon_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from liverelay.kernels import registry

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in [name for name in sys.modules if name.startswith("triton.experimental.gluon")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delitem(sys.modules, "liverelay.kernels.attention_gluon", raising=False)
    monkeypatch.delattr(liverelay.kernels, "attention_gluon", raising=False)
    assert registry.gluon_specs() == []
    found = candidates(torch.device("cuda"), triton_works=True)
    assert "triton-descriptor" in found and "triton-specialised" not in found
    assert list(fp8_candidates(torch.device("cuda"), triton_works=True)) == ["triton-pointer", "triton-descriptor"]


@pytest.mark.parametrize("q_factor", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_flash_attn_of_any_generation_is_used_where_it_imports(
    monkeypatch: pytest.MonkeyPatch, pair: bool, q_factor: bool
) -> None:
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    assert flash_attention() is None

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> object:
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        return (out, None) if pair else out

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    attention = flash_attention()
    assert attention is not None
    (trial,) = try_out({"flash-attn": attention}, SHAPE, LIKE, q_factor=q_factor)
    assert not trial.fault and trial.error < 1e-6


def test_kernels_command_says_what_works_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "default: torch" in printed and "no GPU" in printed and " ms" in printed
    assert main(["kernels", "--device", "tpu"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_named_attention_is_forced(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def counted(*args: object, **more: object) -> Tensor:
        calls.append(1)
        return torch_ops.attention(*args, **more)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="'sdpa-cudnn' cannot be used on cpu; there is: torch"):
        Engine.load(checkpoint, backend="sdpa-cudnn", device="cpu")
    found = {"torch": torch_ops.attention, "sdpa-cudnn": counted}
    monkeypatch.setattr(attention_backends, "candidates", lambda device, triton_works: found)
    engine = Engine.load(checkpoint, backend="sdpa-cudnn", device="cpu")
    engine.line(8, 8)  # no trial takes another one
    image = np.zeros((64, 64, 3), np.uint8)
    with engine.open(image, audio=np.zeros(8000, np.float32), size=(64, 64)) as session:
        next(iter(session.frames()))
    assert engine.dit.attention is engine.dit.text_attention is counted and calls
