"""The native loop's calls of the CUDA runtime, on a small library that stands in for it: order, streams, faults.

The runtime is opened once for a process, so each test has one of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from liverelay.engine.relay.native_loop import native_fault

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(bool(native_fault(torch.device("cpu"))), reason="the compiled module was not built")

SETUP = """
import ctypes, json, sys, threading, time
import numpy as np
from liverelay.engine import _C
assert _C.cuda_open("/no/such/library.so")
assert _C.cuda_open(sys.argv[1]) == ""
fake = ctypes.CDLL(sys.argv[1])
fake.fake_log.restype = ctypes.c_char_p
hold, total = ctypes.c_int.in_dll(fake, "fake_hold"), ctypes.c_long.in_dll(fake, "fake_sum")
STREAM, DEVICE = 77, 2
memory = {name: np.zeros(8, np.uint8) for name in ("a", "b", "own", "words", "draft", "out1", "out2")}
at = {name: array.ctypes.data for name, array in memory.items()}
link = _C.StageLink([at["a"], at["b"]], 8, DEVICE)
loop = _C.StageLoop(1)
def start():
    def work():
        loop.run(DEVICE, STREAM)
        loop.end()
    threading.Thread(target=work, daemon=True).start()
def block(graph):
    program = _C.StageProgram()
    program.receive(link, [(0, at["own"], 8)])
    program.begun()
    program.copy(at["words"], at["draft"], 8)
    program.launch(graph)
    program.computed()
    program.send(link, [(0, at["own"], 8)])
    return program
def fill(value):
    buffer = link.take_free(5)
    memory["ab"[buffer]][:] = value
    link.give_full(buffer, 5)
def result(**more):
    lines = [line.split() for line in fake.fake_log().decode().splitlines()]
    print(json.dumps(more | {"log": [[name, int(a), int(b)] for name, a, b in lines]}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    made = tmp_path_factory.mktemp("cudart") / "libcudart_fake.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, ROOT / "tests" / "fake_cudart.c"], check=True)
    return made


def run(library: Path, script: str) -> dict[str, Any]:
    command = [sys.executable, "-c", SETUP + script, str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_block_is_copies_and_launches_on_the_stage_stream_between_events(library: Path) -> None:
    found = run(library, """
memory["draft"][:] = 9
fill(42)
loop.put(0, block(11))
loop.put(1, block(20))
loop.stop()
start()
told = [loop.take(), loop.take()]
assert loop.take() is None
result(own=memory["own"].tolist(), words=memory["words"].tolist(), total=total.value, told=told)
""")
    assert found["own"] == [42] * 8 and found["words"] == [9] * 8 and found["total"] == 31
    assert [told[0] for told in found["told"]] == [0, 1] and all(told[5] == "" for told in found["told"])
    for _, asked, begun, computed, ended, _ in found["told"]:
        assert asked <= begun + 1e-4 and begun <= computed <= ended
    log = [entry for entry in found["log"] if entry[0] not in ("create", "destroy", "device", "synchronize")]
    filled = ["record", log[0][1], 5]
    assert log[0] == filled  # by whoever filled the buffer, on a stream of its own
    # Wait for that event, copy in, give the buffer back; begin, words, graph, end; the way out.
    names = ["wait", "copy", "record", "record", "copy", "launch", "record", "copy", "record"]
    first = log[1:10]
    assert [entry[0] for entry in first] == names and first[0][1] == filled[1] and first[5] == ["launch", 11, 77]
    assert all(entry[2] == 77 for entry in log[1:])
    second = log[10:]
    assert [entry[0] for entry in second] == [*names[:7], "wait", *names[7:]]  # its buffer was used before
    assert second[6][0] == "record" and second[7][1] == first[2][1]
    created = [entry[1] for entry in found["log"] if entry[0] == "create"]
    destroyed = [entry[1] for entry in found["log"] if entry[0] == "destroy"]
    assert len(set(destroyed)) == len(destroyed) == 4 and set(destroyed) < set(created)  # those of the two jobs


def test_a_launch_that_fails_fails_its_block_alone(library: Path) -> None:
    found = run(library, """
fill(1)
for number, graph in enumerate((11, 13, 20)):
    loop.put(number, block(graph))
loop.stop()
start()
result(told=[loop.take() for _ in range(3)], total=total.value)
""")
    assert [told[5] for told in found["told"]] == ["", "cudaGraphLaunch: unspecified launch failure", ""]
    assert found["total"] == 31 and [entry[0] for entry in found["log"]].count("copy") == 3 * 3


def test_the_loop_is_one_block_ahead_of_the_device_and_nobody_is_told_early(library: Path) -> None:
    found = run(library, """
fill(1)
hold.value = 1
for number in range(4):
    loop.put(number, block(1))
loop.stop()
start()
told = []
def take():
    while (one := loop.take()) is not None:
        told.append(one)
taker = threading.Thread(target=take)
taker.start()
time.sleep(0.3)
ahead, early, since = total.value, len(told), loop.working_since_s
hold.value = 0
taker.join()
result(ahead=ahead, early=early, since=since, now=time.monotonic(), told=told, total=total.value)
""")
    assert found["ahead"] == 2 and found["early"] == 0 and found["total"] == 4 and len(found["told"]) == 4
    assert 0 < found["since"] < found["now"] - 0.25  # the watchdog sees a device that hangs
