"""`python -m bench.frame_ring`: frames from one process to another, the ring against multiprocessing.Queue, in one run.

Both carry the same frames with their sound, and the other process checks a stamp at both ends of each picture.
Throughput: as fast as the reader takes them. Latency, at a calm pace with nothing queued: from before the push (the
copy into shared memory or the pickling included) until the reader has the frame; hand-over: from the moment the frame
was published. The ceiling is a copy of the same pictures in memory, since one copy is what the ring makes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liverelay.engine.frame_ring import FrameRing, sweep

WIDTH, HEIGHT, SAMPLES, SLOTS = 704, 384, 640, 8
Frame = NDArray[np.uint8]
Source = Iterator[tuple[Frame, int, int]]  # picture, when it was pushed, when it was published (0: not known)


def ring_source(name: str) -> Source:
    with FrameRing.attach(name) as ring:
        for item in ring:
            assert item.frame is not None
            yield item.frame, item.pts_ns, item.pushed_ns


def queue_source(queue: Any) -> Source:
    while (item := queue.get()) is not None:
        yield item[0], item[2], 0


def read(make: Callable[[Any], Source], channel: Any, results: Any) -> None:
    """The other process: counts frames, checks their stamps, keeps the times."""
    results.put("ready")
    total, published = [], []
    for count, (frame, pushed_ns, published_ns) in enumerate(make(channel)):
        now = time.monotonic_ns()
        total.append(now - pushed_ns)
        if published_ns:
            published.append(now - published_ns)
        if frame[0, 0, 0] != count % 251 or frame[-1, -1, -1] != count % 251:
            raise SystemExit(f"frame {count} is damaged")
    results.put((time.monotonic_ns(), total, published))


def run(make: Callable[[Any], Source], channel: Any, push: Callable[[Frame, NDArray[np.float32], int], None],
        end: Callable[[], None], frames: int, pace_s: float) -> dict[str, float]:  # fmt: skip
    """Frames a second, GB/s, and microseconds at 50 and 99 percent."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=read, args=(make, channel, results))
    process.start()
    assert results.get(timeout=60) == "ready"
    pictures = [np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for i in range(4)]
    sound = np.zeros(SAMPLES, np.float32)
    began = time.monotonic_ns()
    for count in range(frames):
        picture = pictures[count % len(pictures)]
        picture[0, 0, 0] = picture[-1, -1, -1] = count % 251
        push(picture, sound, count)
        if pace_s:
            time.sleep(pace_s)
    end()
    ended, total, published = results.get(timeout=120)
    process.join()
    if len(total) != frames:
        raise SystemExit(f"{len(total)} of {frames} frames arrived")
    rate = frames / (ended - began) * 1e9
    result = {"frames_per_s": rate, "gb_per_s": rate * (WIDTH * HEIGHT * 3 + SAMPLES * 4) / 1e9}
    for label, times in (("", total), ("hand_over_", published)):
        if times:
            p50, p99 = np.percentile(np.array(times) / 1e3, (50, 99))
            result |= {f"{label}p50_us": float(p50), f"{label}p99_us": float(p99)}
    return result


def ring_run(frames: int, pace_s: float) -> dict[str, float]:
    with FrameRing.create(frame_bytes=WIDTH * HEIGHT * 3, audio_samples=SAMPLES, slots=SLOTS) as ring:
        def push(picture: Frame, sound: NDArray[np.float32], count: int) -> None:
            ring.push(picture, sound, index=count, pts_ns=time.monotonic_ns())

        return run(ring_source, ring.name, push, ring.close, frames, pace_s)


def queue_run(frames: int, pace_s: float) -> dict[str, float]:
    queue = multiprocessing.get_context("spawn").Queue(SLOTS)

    def push(picture: Frame, sound: NDArray[np.float32], count: int) -> None:
        queue.put((picture.copy(), sound, time.monotonic_ns()))  # it is pickled later, by a thread

    return run(queue_source, queue, push, lambda: queue.put(None), frames, pace_s)


def copy_gb_per_s(seconds: float = 0.5) -> float:
    """Of pictures into memory as large as the ring, best of some rounds."""
    source = np.random.default_rng(0).integers(0, 256, (4, HEIGHT, WIDTH, 3), np.uint8)
    target, best, until = np.zeros((SLOTS, HEIGHT, WIDTH, 3), np.uint8), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        for slot in range(SLOTS):
            np.copyto(target[slot], source[slot % 4])
        best = max(best, target.nbytes / (time.perf_counter() - began) / 1e9)
    return best


def measure(frames: int, pace_s: float) -> dict[str, Any]:
    sweep()
    with FrameRing.create(frame_bytes=1) as ring:
        result: dict[str, Any] = {"kind": ring.kind, "copy_gb_per_s": copy_gb_per_s()}
    for name, carry in (("ring", ring_run), ("queue", queue_run)):
        fast, calm = carry(frames, 0.0), carry(max(20, frames // 10), pace_s)
        result[name] = {key: (fast if key.endswith("per_s") else calm)[key] for key in fast}
    result["throughput_ratio"] = result["ring"]["frames_per_s"] / result["queue"]["frames_per_s"]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.frame_ring", description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--pace-ms", type=float, default=5.0, help="between frames, for the latency")
    arguments = parser.parse_args()
    result = measure(arguments.frames, arguments.pace_ms / 1e3)
    print(f"{WIDTH}x{HEIGHT} RGB with {SAMPLES} samples, {SLOTS} slots, {result['kind']} ring; "
          f"copy ceiling {result['copy_gb_per_s']:.1f} GB/s")  # fmt: skip
    print("          frames/s   GB/s  %copy   latency us p50    p99   hand-over us p50    p99")
    for name in ("ring", "queue"):
        r = result[name]
        share = 100 * r["gb_per_s"] / result["copy_gb_per_s"]
        hand_over = f"{r['hand_over_p50_us']:18.0f} {r['hand_over_p99_us']:6.0f}" if name == "ring" else ""
        print(f"{name:8} {r['frames_per_s']:9.0f} {r['gb_per_s']:6.2f} {share:6.0f} {r['p50_us']:16.0f} "
              f"{r['p99_us']:6.0f} {hand_over}")  # fmt: skip
    print(f"the ring carries {result['throughput_ratio']:.1f}x the frames of the queue")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
