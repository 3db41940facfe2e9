"""Room for sessions: whether the memory of one more fits, known before any of it is taken.

A session's memory at a stage (a place) is allocated when the place is first used, by a stage that serves others at the
same time. What does not fit is therefore refused beforehand, with the numbers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from liverelay.engine.errors import BusyError

# Held while a place's memory is allocated, and while free memory is compared with the places that are allocated: else
# a place that is just being allocated would count twice.
allocating = threading.Lock()
GIB = 2**30
ADVICE = "close a session, or take a smaller size, --fp8 attention or more devices"
SPARE_BYTES = GIB  # on a GPU: graphs of the new place, what libraries take, and the allocator's rounding


@dataclass(frozen=True)
class Room:
    """What a stage knows of its memory. device: its name in the line; place_bytes: of one session there; free_bytes:
    what can still be allocated, None where nobody knows; places: those whose memory is allocated."""

    device: str
    place_bytes: int
    free_bytes: int | None
    places: frozenset[int] = frozenset()


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated: on a GPU with what PyTorch holds unused; None where it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free + unused - _kept_for_graphs(device) - SPARE_BYTES)
    return available_host_bytes()


def _kept_for_graphs(device: torch.device) -> int:
    """What PyTorch holds unused in the pools of CUDA graphs: nothing else is ever allocated there."""
    kept = 0
    with contextlib.suppress(RuntimeError):  # of an allocator that tells nothing
        for segment in torch.cuda.memory_snapshot():
            if segment["device"] == device.index and any(segment.get("segment_pool_id", ())):
                kept += segment["total_size"] - segment["allocated_size"]
    return kept


def available_host_bytes() -> int | None:
    """Host memory that can be taken without swapping, as Linux estimates it; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def check_room(rooms_of: Sequence[Callable[[], Room]], taken: Collection[int], place: int) -> None:
    """BusyError with the numbers where a device cannot hold a session in this place beside those in the taken ones.

    rooms_of: asks each stage; several of them may be on one device. What is already allocated is not counted again.
    """
    places = {*taken, place}
    with allocating:
        rooms = [room() for room in rooms_of]
    for device in dict.fromkeys(room.device for room in rooms):
        here = [room for room in rooms if room.device == device]
        if all(place in room.places for room in here):
            continue
        needed = sum(room.place_bytes * len(places - room.places) for room in here)
        free = min((room.free_bytes for room in here if room.free_bytes is not None), default=None)
        if free is not None and needed > free:
            one = sum(room.place_bytes for room in here)
            coming = f", {round(needed / one)} are coming" if needed > one else ""
            raise BusyError(
                f"no session can be opened: one needs {one / GIB:.2f} GiB on {device}{coming}, and "
                f"{free / GIB:.2f} GiB are free; {ADVICE}"
            )


@contextlib.contextmanager
def refused_when_full() -> Iterator[None]:
    """Within this, BusyError takes the place of a GPU's error when its memory does not suffice for something short.

    Encoding a picture is such work: the new session is refused, and those that are open go on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = str(error).strip().splitlines()[0]
        raise BusyError(f"no session can be opened: {line}; {ADVICE}") from None
