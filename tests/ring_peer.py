"""The other process of the frame ring's tests: `python ring_peer.py KIND NAME VERB [...]`. Frames tell their number.

write COUNT PAUSE_US: numbered frames from the ring's own count on, then close (COUNT 0: for ever)
read HOLD: say "holding" once HOLD frames are held, then wait to be killed; HOLD 0: read for ever
make: a ring; print its name and wait to be killed; fork: use the ring in a forked child
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
from numpy.typing import NDArray


def picture(number: int, height: int = 6, width: int = 8) -> NDArray[np.uint8]:
    """[H, W, 3] of noise that only this number has."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def main() -> None:
    kind, name, verb, *rest = sys.argv[1:]
    if kind == "python":
        sys.modules["liverelay.engine._C"] = None  # type: ignore[assignment]
    from liverelay.engine.frame_ring import FrameRing, RingFrame

    if verb == "write":
        count, pause_us = map(int, rest)
        ring = FrameRing.attach(name, "writer")
        while not count or ring.pushed < count:
            number = ring.pushed
            ring.push(picture(number), np.full(3, number, np.float32), index=number)
            if pause_us:
                time.sleep(pause_us * 1e-6 * (number % 3))
        ring.close()
    elif verb == "read":
        ring, held = FrameRing.attach(name), list[RingFrame | None]()
        print("reading", flush=True)
        while True:
            held.append(ring.pop())
            if len(held) == int(rest[0]):
                print("holding", flush=True)
                time.sleep(600)
            elif not int(rest[0]):
                held.clear()
    elif verb == "make":
        ring = FrameRing.create(frame_bytes=144, audio_samples=3)
        print(ring.name, flush=True)
        time.sleep(600)
    elif verb == "fork":
        ring = FrameRing.attach(name, "writer")
        child = os.fork()
        if not child:
            try:
                ring.push(picture(0), timeout=0)
            except Exception as error:
                print(error, flush=True)
            ring.close()
            sys.exit(0)
        os.waitpid(child, 0)
        ring.push(picture(1), index=1)


if __name__ == "__main__":
    main()
