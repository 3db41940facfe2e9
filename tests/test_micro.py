"""Kernels before they are timed: each size is checked by itself, and one that is wrong hides no other."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernel_check, micro
from bench.ceilings import Ceilings
from liverelay.kernels import launch
from liverelay.kernels.registry import KERNELS
from liverelay.kernels.spec import KernelSpec

GELU = next(spec for spec in KERNELS if spec.name == "gelu")
CPU = torch.device("cpu")
LIMITS = Ceilings(copy=1e12, matmul=1e14, fp8=0.0, matmul_dtype="bfloat16")


def test_rows_show_shares_of_both_ceilings_and_ratios() -> None:
    row = micro.Row("k", "d", "bfloat16", bytes=1e9, flops=1e10)
    row.seconds = {"kernel": 2e-3, "plain": 6e-3, "sdpa-cudnn": 1e-3, "sdpa-flash": 4e-3}
    row.spread = dict.fromkeys(row.seconds, 0.01)
    shown = dict(zip(micro.HEAD, micro.cells(row, LIMITS), strict=True))
    assert (shown["us"], shown["GB/s"], shown["%copy"], shown["bound"]) == ("2000.0", "500", "50", "memory")
    assert (shown["TFLOP/s"], shown["%mm"], shown["x plain"]) == ("5.00", "5", "3.00")
    assert (shown["x compile"], shown["x library"]) == ("-", "0.50 sdpa-cudnn")
    red = micro.Row("bad", "d", "bfloat16", state="red", note="wrong", bytes=1.0)
    assert "RED: bad [d]" in micro.headline([row, red], LIMITS)
    assert "bad [d]: red: wrong" in micro.report([row, red], LIMITS)


def gelu_spec(**changes: Any) -> KernelSpec:
    changes = {"launch": GELU.plain, "production": GELU.small} | changes
    return dataclasses.replace(GELU, **changes)


def check(spec: KernelSpec) -> str:
    name, dims = next(iter((spec.small or spec.production).items()))
    return kernel_check.check(spec, name, dims, CPU)


def test_a_wrong_kernel_is_red_on_small_and_on_timed_dims() -> None:
    assert check(gelu_spec()) == ""
    wrong = gelu_spec(launch=lambda x, out, *rest: out.copy_(x))
    assert "error" in check(wrong)
    assert "unwritten" in check(gelu_spec(launch=lambda x, out, *rest: out))
    assert "differs from plain PyTorch" in check(dataclasses.replace(wrong, small={}))


def plan(**changes: Any) -> micro.Plan:
    return dataclasses.replace(micro.Plan(CPU, "production", 0.01, 0.0, time.monotonic() + 120, False), **changes)


def test_a_size_that_is_red_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro, "INTERPRETED", True)  # kernels count as runnable

    def launch(x: torch.Tensor, out: torch.Tensor, *rest: object) -> torch.Tensor:
        return out.fill_(5) if x.shape[1] == 3 else GELU.plain(x, out, *rest)

    sizes = {f"{width} wide": {"tokens": 4, "width": width} for width in (2, 3, 4)}
    for production, small in (({"timed": {"tokens": 4, "width": 8}}, sizes), (sizes, {})):
        spec = gelu_spec(launch=launch, production=production, small=small)
        faults = kernel_check.check_all([spec], plan())
        assert [name for (_, name), fault in faults.items() if fault] == ["3 wide"]
        assert next(iter(faults))[1] == next(iter(production))  # what is timed comes first
        rows, _ = micro.run([spec], plan(), None)
        timed, red = [row for row in rows if "kernel" in row.seconds], [row for row in rows if row.state == "red"]
        assert {row.dims for row in timed} == set(production) - {"3 wide"} and [row.dims for row in red] == ["3 wide"]
        assert "RED: gelu [3 wide]" in micro.headline(rows, LIMITS) and "3 wide" in micro.report(rows, LIMITS)


@pytest.mark.parametrize("in_chunks", [False, True])
def test_kernels_that_take_rows_in_chunks_are_timed_with_padded_rows_too(
    in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro, "INTERPRETED", True)
    tiles: list[int] = []

    def call(x: torch.Tensor, out: torch.Tensor, *rest: object) -> torch.Tensor:
        if in_chunks:
            tiles.append(launch.tiling(5120)["TILE"])
        return GELU.plain(x, out, *rest)

    spec = gelu_spec(launch=call, production={"one": {"tokens": 4, "width": 8}}, small={})
    (row,), _ = micro.run([spec], plan(), None)
    assert row.best_library == ("padded" if in_chunks else None)
    assert set(tiles) == ({1024, 8192} if in_chunks else set())


def test_a_check_goes_on_behind_a_size_that_ended_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, asked = gelu_spec(small={name: {} for name in "bcde"}, production={"a, b": {}}), list[list[str]]()

    def process(spec: KernelSpec, plan: object, names: list[str]) -> tuple[dict[str, str], str]:
        asked.append(names)
        told: dict[str, str] = {}
        for name in names:
            if name == "b":
                return told, "ended with -6"
            told[name] = "CUDA error: illegal instruction" if name == "d" else ""
            if told[name]:
                break
        return told, "ended with 1"

    monkeypatch.setattr(kernel_check, "_check_process", process)
    faults = kernel_check.check_isolated(spec, plan())
    assert {name: fault for name, fault in faults.items() if fault} == {
        "b": "its check ended with -6", "d": "CUDA error: illegal instruction"
    }  # fmt: skip
    assert list(faults) == ["a, b", *"bcde"]
    assert asked == [["a, b", *"bcde"], [*"cde"], ["e"]]


def test_a_check_in_a_process_of_its_own_tells_of_every_size() -> None:
    isolated = plan(dims="small", isolate=True)
    assert set(kernel_check.check_isolated(GELU, isolated)) == set(GELU.small)
    missing = dataclasses.replace(GELU, name="no such kernel", small={"one": {}})
    assert "no kernel is called 'no such kernel'" in kernel_check.check_isolated(missing, isolated)["one"]


@pytest.mark.parametrize(("arguments", "text"), [
    (["--check", "nonsense"], "no kernel is called 'nonsense'"),
    (["--check", "gelu", "--sizes", "nonsense"], "gelu has no size 'nonsense'"),
])  # fmt: skip
def test_a_check_of_nothing_is_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        micro.main([*arguments, "--device", "cpu"])
    assert text in capsys.readouterr().err + str(ended.value)


def test_sizes_that_there_is_no_time_to_check_are_not_red_one_by_one() -> None:
    late = dataclasses.replace(plan(dims="small", isolate=True), deadline=time.monotonic() - 1)
    assert kernel_check.check_isolated(GELU, late) == {}


def test_rows_of_several_runs_are_one_table() -> None:
    one, other = (micro.Row("k", "d", "bfloat16", bytes=1.0) for _ in range(2))
    one.seconds, other.seconds, other.notes = {"kernel": 1.0}, {"compile": 2.0}, {"compile": "late"}
    (row,) = micro.merged([{"rows": [dataclasses.asdict(one)]}, {"rows": [dataclasses.asdict(other)]}])
    assert row.seconds == {"kernel": 1.0, "compile": 2.0} and row.notes == {"compile": "late"}


def test_without_a_gpu_only_plain_pytorch_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if micro.INTERPRETED or torch.cuda.is_available():
        pytest.skip("the kernels can run here")
    path = tmp_path / "micro.json"
    arguments = ["--kernel", "attention", "--dims", "small", "--seconds", "0.01", "--compile-seconds", "0"]
    assert micro.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "only plain PyTorch is timed" in printed
    assert json.loads(printed.splitlines()[-1])["rows"]
    assert {row["state"] for row in json.loads(path.read_text())["rows"]} == {"plain only"}
