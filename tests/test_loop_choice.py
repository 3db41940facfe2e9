"""The user's choice between the C++ loop of a stage and its Python twin reaches every line; what cannot be is said."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import stage_loop as bench
from liverelay.engine import cli
from liverelay.engine.engine import Engine
from liverelay.engine.errors import InputError
from liverelay.engine.relay.handoff import LocalLink
from liverelay.engine.relay.loop import StageLoop
from liverelay.engine.relay.messages import Stop
from liverelay.engine.relay.native_loop import NativeStageLoop, available, wanted_loop
from liverelay.engine.relay.plan import parse_plan
from liverelay.engine.relay.ranks import Leader, RankServer, StageLost

for library in ("transformers", "ftfy"):
    pytest.importorskip(library)
CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not available(CPU), reason="the compiled module was not built")
CHOICES = [("native", NativeStageLoop), ("python", StageLoop), (None, NativeStageLoop)]


@needs_native
@pytest.mark.parametrize(("loop", "kind"), CHOICES)
def test_an_engine_runs_the_loop_that_was_chosen(checkpoint: Path, loop: Any, kind: type[StageLoop]) -> None:
    engine = Engine.load(checkpoint, device="cpu,cpu", dtype=torch.float32, loop=loop)
    line: Any = engine.line(8, 8)
    assert [type(worker.loop) for worker in line.workers] == [kind, kind]
    engine.close()


class Group(SimpleNamespace):
    """Of two ranks, without another process."""

    def __init__(self, rank: int) -> None:
        self.over = threading.Event()
        channel = SimpleNamespace(put=lambda message: None, get=self.get)
        super().__init__(rank=rank, world=2, timeout_s=1.0, channels=[channel])

    def get(self, timeout_s: float) -> Any:
        self.over.wait(60)
        raise EOFError

    def links(self, *_: Any) -> tuple[Any, Any]:
        link = LocalLink(bench.SHAPES, CPU, torch.bfloat16)
        return (None, link) if self.rank == 0 else (link, None)


@needs_native
@pytest.mark.parametrize(("loop", "kind"), CHOICES)
def test_every_rank_runs_the_loop_that_was_chosen(
    monkeypatch: pytest.MonkeyPatch, loop: Any, kind: type[StageLoop]
) -> None:
    stage: Any = bench.FixedStage(0.0)
    stage.dtype = torch.bfloat16
    plan, native = parse_plan("0+1+2,3+vae", ["cpu", "cpu"]), wanted_loop(loop, ["cpu", "cpu"])
    spec: Any = SimpleNamespace(parcel_of=lambda part: bench.SHAPES, stream=SimpleNamespace(blocks_per_clip=4))
    server = RankServer(Group(1), plan, lambda spec: stage, native)  # type: ignore[arg-type]
    server._build(spec)
    monkeypatch.setattr(Leader, "_wait_ready", lambda self: None)
    group: Any = Group(0)
    leader = Leader(group, plan, native)
    line = leader.build(spec, stage, places=1)
    for worker in (server._worker, leader._own):
        assert worker is not None and type(worker.loop) is kind
        worker.put(Stop())
        worker.close(broken=True)
    line.entry.close()
    group.over.set()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_ends_before_the_leader_knows_all_of_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = Group(0)
    group.over.set()
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (start(self), self.join(10)))
    with pytest.raises(StageLost, match="rank 1"):
        Leader(group, parse_plan("0+1+2,3+vae", ["cpu", "cpu"]))


def test_a_native_loop_that_was_not_built_is_said_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "liverelay.engine._C", None)
    root = Path(__file__).resolve().parents[1] / "samples"
    flags = ["--image", str(root / "portrait.png"), "--audio", str(root / "speech.wav"), "--device", "cpu"]
    command = ["generate", "--checkpoint", str(checkpoint), *flags, "--out", str(tmp_path / "a.mp4")]
    assert cli.main([*command, "--loop", "native"]) == 1
    captured = capsys.readouterr()
    assert "the native loop needs the compiled module" in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert wanted_loop("python", ["cpu"]) is False and wanted_loop(None, ["cpu"]) is None


def test_a_loop_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="native or python"):
        wanted_loop("fast", ["cpu"])  # type: ignore[arg-type]
