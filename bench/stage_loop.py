"""`python -m bench.stage_loop`: a stage's loop in Python against the one in C++, jobs of fixed time, in one run.

A ring of one stage: it receives a block from its own link, has work of fixed time, sends the block back. Gap: from the
end of a job's work to the begin of the next one's while jobs are queued, so two copies of the block and telling are in
it; jitter is the gap's p99 - p50. Delay: from putting a job to an idle loop until its work begins, the putting thread's
own wait for the interpreter included. "busy" has a second Python thread that computes without a pause. The Python
loop's work is a sleep that holds no lock, as a launched graph would; the C++ loop's is the same sleep in C++. "called":
the C++ loop calls Python for the work, as it does for what is not captured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from liverelay.engine.relay.handoff import LocalLink, Parcel
from liverelay.engine.relay.loop import StageLoop
from liverelay.engine.relay.messages import Block, Done, Event, Failed, Stop
from liverelay.engine.relay.native_loop import Job, NativeLink, NativeStageLoop, native_fault

SHAPES = {"latent": (16, 3, 48, 88)}  # of 704x384
CPU = torch.device("cpu")


class FixedStage:
    """A stage whose work takes a fixed time and no computer."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.device, self.parcel = seconds, CPU, Parcel(SHAPES, CPU, torch.bfloat16)
        self.places: dict[int, Any] = {}
        self.outgoing, self.last_step = self.parcel, False
        self.plan = SimpleNamespace(name="fixed", decode="", makes_video=False)

    def denoise(self, *_: object) -> None:
        time.sleep(self.seconds)


class FixedLoop(NativeStageLoop):
    """The work is in C++."""

    def _program(self, block: Block, job: Job) -> Any:
        return self._around(lambda program: program.sleep(self.stage.seconds))  # type: ignore[attr-defined]


KINDS: dict[str, tuple[type[StageLoop], type[LocalLink]]] = {
    "python": (StageLoop, LocalLink), "native": (FixedLoop, NativeLink), "called": (NativeStageLoop, NativeLink),
}  # fmt: skip


@contextlib.contextmanager
def busy_thread(wanted: bool) -> Iterator[None]:
    """Another Python thread that computes, so that everybody waits for the interpreter's lock."""
    over = threading.Event()

    def work() -> None:
        number = 0
        while not over.is_set():
            for _ in range(1000):
                number = (number * 31 + 7) % 1000003

    thread = threading.Thread(target=work, daemon=True)
    if wanted:
        thread.start()
    yield
    over.set()
    if wanted:
        thread.join()


class Ring:
    """One stage whose link leads back to it, with a block in it."""

    def __init__(self, kind: str, seconds: float) -> None:
        make_loop, make_link = KINDS[kind]
        stage: Any = FixedStage(seconds)
        link = make_link(SHAPES, CPU, torch.bfloat16)
        link.send(stage.parcel)
        self.done: list[Done] = []
        self.arrived = threading.Semaphore(0)
        self.loop = make_loop(0, stage, link, link, self._take)
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()

    def _take(self, event: Event) -> None:
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Done)
        self.done.append(event)
        self.arrived.release()

    def gaps(self, jobs: int) -> list[float]:
        """Seconds between the work of jobs that are all queued."""
        for number in range(jobs):
            self.loop.put(Block(0, 0, number, ()))
        for _ in range(jobs):
            self.arrived.acquire()
        done = self.done[-jobs:]
        return [after.begun - before.computed for before, after in itertools.pairwise(done)]

    def delays(self, jobs: int) -> list[float]:
        """Seconds until an idle loop begins."""
        delays = []
        for number in range(jobs):
            put = time.perf_counter()
            self.loop.put(Block(0, 0, number, ()))
            self.arrived.acquire()
            delays.append(self.done[-1].begun - put)
        return delays

    def close(self) -> None:
        self.loop.put(Stop())
        self._thread.join()


def measure(jobs: int, seconds: float) -> dict[str, Any]:
    """Microseconds by kind of loop, with and without a busy thread; the ratio Python to C++ of the gaps' p99."""
    kinds = [kind for kind in KINDS if kind == "python" or not native_fault(CPU)]
    result: dict[str, Any] = {"jobs": jobs, "job_ms": 1e3 * seconds}
    for load in ("quiet", "busy"):
        for kind in kinds:
            ring = Ring(kind, seconds)
            with busy_thread(load == "busy"):
                gaps, delays = ring.gaps(jobs), ring.delays(jobs)
            ring.close()
            (p50, p99), delay = 1e6 * np.percentile(gaps, (50, 99)), 1e6 * np.median(delays)
            result[f"{kind}_{load}"] = {
                "gap_p50_us": p50, "gap_p99_us": p99, "jitter_us": p99 - p50, "delay_p50_us": delay,
            }  # fmt: skip
        if "native" in kinds:
            python, native = result[f"python_{load}"], result[f"native_{load}"]
            result[f"gap_ratio_{load}"] = python["gap_p99_us"] / native["gap_p99_us"]
            result[f"jitter_ratio_{load}"] = python["jitter_us"] / native["jitter_us"]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stage_loop", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--job-ms", type=float, default=5.0)
    arguments = parser.parse_args()
    result = measure(arguments.jobs, arguments.job_ms / 1e3)
    print("loop    other thread   gap us p50      p99   jitter   delay us p50")
    for load in ("quiet", "busy"):
        for kind in KINDS:
            if row := result.get(f"{kind}_{load}"):
                print(f"{kind:8}{load:12}{row['gap_p50_us']:13.0f}{row['gap_p99_us']:9.0f}"
                      f"{row['jitter_us']:9.0f}{row['delay_p50_us']:15.0f}")  # fmt: skip
    if "gap_ratio_busy" in result:
        print(f"beside a busy thread the C++ loop's gap (p99) is {result['gap_ratio_busy']:.0f}x smaller")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
