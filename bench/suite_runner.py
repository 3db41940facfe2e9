"""Parts of the GPU suite as processes: side by side or in turn, each in its own time box, with results kept at once.

Neither a failure nor a hang stops the other parts. suite.json is written anew whenever a part has written its own
results, so that whoever is killed leaves all that was measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.suite_tests import NOTHING_COLLECTED, counts, wrongly_skipped

ROOT = Path(__file__).resolve().parents[1]
ECHO = 5000  # characters of each log that are printed: what reads our output may keep little of it
POLL_S, FOLD_S = 0.05, 1.0
PART_SECONDS = "LIVERELAY_PART_SECONDS"  # tells a task how long it has, less what ending takes
ENDING_S = 5.0
LOST_GRAPHS = "no CUDA graphs, launches one by one"  # as engine/relay/graph.py warns


@dataclass(frozen=True)
class Task:
    """One process of a part. environment: on top of the part's."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Tasks that pass or fail together. Parts with the same turn run at the same time.

    weight: share of the time that is left, in effect the seconds that are expected; side_by_side: tasks at a time;
    after: a part of the same turn that has to end first; result: a JSON file that the part writes, again and again;
    tests: its tasks are pytest's; no_skips: a test that is skipped without a good reason makes it fail.
    """

    name: str
    tasks: tuple[Task, ...]
    turn: int = 0
    weight: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    side_by_side: int = 8
    after: str = ""
    result: Path | None = None
    tests: bool = False
    no_skips: bool = False


@dataclass
class Outcome:
    """What became of a part. state: running, passed, failed, timed out or stopped (with the suite itself)."""

    name: str
    state: str
    seconds: float
    headline: str
    statuses: dict[str, int | None]
    result: Any = None


class Running:
    """A part under way: its processes, each in a process group of its own, and their logs in the folder `work`."""

    def __init__(self, part: Part, work: Path, deadline: float) -> None:
        self.part, self.work, self.deadline = part, work, deadline
        self.started, self.ended = time.monotonic(), 0.0
        self.waiting, self.processes = list(part.tasks), dict[str, subprocess.Popen[bytes]]()
        self.files: dict[str, IO[bytes]] = {}
        self.statuses: dict[str, int | None] = {task.name: None for task in part.tasks}
        self.error = ""
        self._seen = 0  # when the result that was read last was written, in ns
        self.result: Any = None

    def log(self, task: str) -> Path:
        return self.work / f"{self.part.name}.{task}.log"

    def poll(self, over: set[str]) -> bool:
        """Starts what can start, and tells whether all has ended; ends it when its time is over.

        over: names of the parts that have ended.
        """
        if self.ended:
            return True
        if not self.part.after or self.part.after in over:
            while self.waiting and not self.error and len(self.processes) < self.part.side_by_side:
                self._start(self.waiting.pop(0))
        for name, process in list(self.processes.items()):
            self.statuses[name] = process.poll()
            if self.statuses[name] is not None:
                del self.processes[name]
        going = self.waiting or self.processes
        if going and not self.error and time.monotonic() < self.deadline:
            return False
        self.stop()
        return True

    def _start(self, task: Task) -> None:
        self.files[task.name] = self.log(task.name).open("wb")
        left = {PART_SECONDS: f"{max(1.0, self.deadline - time.monotonic() - ENDING_S):.1f}"}
        try:
            self.processes[task.name] = subprocess.Popen(
                task.command, cwd=ROOT, env=os.environ | left | self.part.environment | task.environment,
                stdin=subprocess.DEVNULL, stdout=self.files[task.name], stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.error = f"cannot start {task.command[0]}: {error.strerror}"

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()
        self.ended = self.ended or time.monotonic()
        for file in self.files.values():
            file.close()

    def fold(self) -> bool:
        """Read what the part has written so far; whether there is anything new."""
        path = self.part.result
        if path is None or not path.is_file() or (written := path.stat().st_mtime_ns) == self._seen:
            return False
        with contextlib.suppress(ValueError):  # half a file: the next time
            self.result, self._seen = json.loads(path.read_text()), written
        return True

    def texts(self) -> dict[str, str]:
        return {name: self.log(name).read_text(errors="replace") for name in self.files}

    def outcome(self, *, stopped: bool = False) -> Outcome:
        """stopped: the suite itself is being ended."""
        self.fold()
        seconds = (self.ended or time.monotonic()) - self.started
        texts, name = self.texts(), self.part.name
        if not self.ended or stopped:
            said = headline(texts.values(), self.result)
            return Outcome(name, "stopped" if stopped else "running", seconds, said, self.statuses, self.result)
        good = [0, NOTHING_COLLECTED] if self.part.tests else [0]
        values = list(self.statuses.values())
        passed = all(status in good for status in values) and 0 in values
        state = "passed" if passed else "timed out" if None in values and not self.error else "failed"
        said = [self.error or headline(texts.values(), self.result)]
        if len(values) > 1 and state != "passed":
            said.append("in " + ", ".join(task for task, status in self.statuses.items() if status not in good))
        faults = list(self._faults(texts))
        return Outcome(
            name, "failed" if faults and passed else state, seconds, "; ".join([*said, *faults]), self.statuses,
            self.result,
        )  # fmt: skip

    def _faults(self, texts: dict[str, str]) -> list[str]:
        """What no exit status tells."""
        if not self.part.tests:
            lost = any(LOST_GRAPHS in text for text in texts.values())
            return [f"FAULT: {LOST_GRAPHS}: see the log"] if lost else []
        skips = wrongly_skipped(texts.values()) if self.part.no_skips else []
        more = f" and {len(skips) - 3} more" if len(skips) > 3 else ""
        return [f"SKIPPED without a good reason: {', '.join(skips[:3])}{more}"] if skips else []


def headline(texts: Any, result: Any) -> str:
    """A part in one line: what its result says, else pytest's counts, else the last line of its log."""
    if isinstance(result, dict) and "headline" in result:
        return str(result["headline"])
    texts = list(texts)
    if found := counts(texts):
        return ", ".join(f"{count} {word}" for word, count in found.items())
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


class Keeper:
    """The folder of the results: suite.json, always whole, and suite.log with the logs of all parts that have ended."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        self.outcomes: list[Outcome] = []
        (out / "suite.log").write_text("")
        self.save()  # whoever is killed early must not leave the results of an earlier run
        (out / "roofline.png").unlink(missing_ok=True)

    def save(self, running: Sequence[Outcome] = ()) -> None:
        content = self.about | {"parts": [asdict(outcome) for outcome in (*self.outcomes, *running)]}
        part = self.out / "suite.json.part"
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, self.out / "suite.json")

    def end(self, one: Running, outcome: Outcome) -> None:
        """Keep and show what became of a part."""
        self.outcomes.append(outcome)
        title = f"== {outcome.name}: {outcome.state}, {outcome.seconds:.0f} s: {outcome.headline}"
        texts = [f"-- {task}\n{text.rstrip()}" if len(one.part.tasks) > 1 else text.rstrip()
                 for task, text in one.texts().items()]  # fmt: skip
        with (self.out / "suite.log").open("a") as log:
            log.write("\n".join([title, *texts, "", ""]))
        self.save()
        shown = [line for text in texts for line in text.splitlines() if not line.startswith("{")]  # not the JSON
        print(f"\n{title}\n" + "\n".join(shown)[-ECHO:], flush=True)


def run_parts(
    parts: Sequence[Part], out: Path, work: Path, seconds: float, about: dict[str, Any]
) -> list[Outcome]:
    """Turn after turn; what a turn leaves of its time goes to the later ones. work: a folder for logs.

    The outcomes are in the order of the parts, those of suite.json in that of their ends.
    """
    end, keeper = time.monotonic() + seconds, Keeper(out, about)
    turns = sorted({part.turn for part in parts})
    for turn in turns:
        now = [part for part in parts if part.turn == turn]
        later = sum(max(p.weight for p in parts if p.turn == t) for t in turns if t > turn)
        weight = max(part.weight for part in now)
        box = max(1.0, (end - time.monotonic()) * weight / (weight + later))
        print(f"{', '.join(part.name for part in now)}: at most {box:.0f} s", flush=True)
        run_turn([Running(part, work, time.monotonic() + box) for part in now], keeper)
    order = [part.name for part in parts]
    return sorted(keeper.outcomes, key=lambda outcome: order.index(outcome.name))


def run_turn(running: list[Running], keeper: Keeper) -> None:
    """Parts side by side until the last one has ended."""
    names, over, folded, whole = {one.part.name for one in running}, set[str](), 0.0, False
    try:
        while len(over) < len(running):
            for one in running:
                gone = over | ({one.part.after} - names)  # nothing waits for a part that is not run
                if one.part.name not in over and one.poll(gone):
                    over.add(one.part.name)
                    keeper.end(one, one.outcome())
            if time.monotonic() - folded > FOLD_S:
                folded = time.monotonic()
                going = [one for one in running if one.part.name not in over]
                if any([one.fold() for one in going]):
                    keeper.save([one.outcome() for one in going])
            time.sleep(POLL_S)
        whole = True
    finally:
        if not whole:
            for one in running:
                one.stop()
                if one.part.name not in over:
                    keeper.end(one, one.outcome(stopped=True))
