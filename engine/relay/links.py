"""The GPUs of this machine as NVML shows them, the links between them, and the order that keeps a line on fast ones.

NVML is optional: without it (package nvidia-ml-py, or no driver) there are no devices here. Times of a handoff are
estimates from a link's usual latency and bandwidth; they matter only where a link is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Link:
    """Between two devices. latency_ms of a handoff without data, and the rate at which its data goes."""

    name: str
    latency_ms: float
    gb_per_s: float

    def handoff_ms(self, size: int) -> float:
        """Of `size` bytes."""
        return self.latency_ms + size / self.gb_per_s / 1e6


NVLINK = Link("NVLink", 0.03, 150.0)
PCIE = Link("PCIe", 0.05, 20.0)
NODE = Link("PCIe within a NUMA node", 0.06, 15.0)
SYSTEM = Link("PCIe between CPU sockets", 0.08, 8.0)
NETWORK = Link("network", 0.5, 10.0)


@dataclass(frozen=True)
class Device:
    """name: as `--devices` takes it; model: of the GPU, empty where none was looked at; memory in bytes."""

    name: str
    memory: int
    model: str = ""


@dataclass(frozen=True)
class Machine:
    """Devices and the link between any two of them, links[i][j]."""

    devices: tuple[Device, ...]
    links: tuple[tuple[Link, ...], ...]

    @classmethod
    def assumed(
        cls, count: int, memory: int, *, nodes: int = 1, inner: Link = NVLINK, outer: Link = NETWORK
    ) -> Machine:
        """Devices that are not here, spread over nodes in order; inner: links within a node, outer: between nodes."""
        devices = tuple(Device(f"cuda:{i}", memory) for i in range(count))
        node = [i * nodes // count for i in range(count)]
        return cls(devices, tuple(tuple(inner if a == b else outer for b in node) for a in node))

    @property
    def here(self) -> bool:
        """Whether the devices were looked at."""
        return any(device.model for device in self.devices)

    def order(self, sizes: Sequence[int]) -> list[int]:
        """Devices in the order of a line whose handoffs of these bytes take the least time altogether.

        Of equal ones the first in the devices' own order. Depth first; a branch that cannot become better is left.
        """
        everybody, count = range(len(self.devices)), len(sizes) + 1
        kinds = {id(link): link for i, row in enumerate(self.links) for j, link in enumerate(row) if i != j}.values()
        least = [min((link.handoff_ms(size) for link in kinds), default=0.0) for size in sizes]
        best, found = float("inf"), list(range(count))

        def extend(path: list[int], spent: float) -> None:
            nonlocal best, found
            if spent + sum(least[max(0, len(path) - 1) :]) >= best - 1e-9:
                return
            if len(path) == count:
                best, found = spent, path
                return

            def cost(i: int) -> float:
                return self.links[path[-1]][i].handoff_ms(sizes[len(path) - 1]) if path else 0.0

            for i in sorted((i for i in everybody if i not in path), key=lambda i: (cost(i), i)):
                extend([*path, i], spent + cost(i))

        extend([], 0.0)
        return found

    def pick(self, sizes: Sequence[int]) -> Machine:
        """These devices alone, in that order."""
        return self.part(self.order(sizes))

    def part(self, which: Sequence[int]) -> Machine:
        """Some of the devices, in this order."""
        return Machine(
            tuple(self.devices[i] for i in which), tuple(tuple(self.links[i][j] for j in which) for i in which)
        )

    @property
    def handoffs(self) -> tuple[Link, ...]:
        """Links from each device to the next."""
        return tuple(self.links[i][j] for i, j in pairwise(range(len(self.devices))))


def look() -> Machine | None:
    """The GPUs of this machine by NVML's numbers (CUDA_VISIBLE_DEVICES is not looked at); None where there are none."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        devices = tuple(
            Device(f"cuda:{i}", int(nvml.nvmlDeviceGetMemoryInfo(handle).total), _text(nvml.nvmlDeviceGetName(handle)))
            for i, handle in enumerate(handles)
        )
        links = tuple(tuple(NVLINK if a is b else _link(nvml, a, b) for b in handles) for a in handles)
    except Exception:  # no library, no driver, no right to look
        return None
    return Machine(devices, links) if devices else None


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _link(nvml: Any, a: Any, b: Any) -> Link:
    """NVLink (through a switch, too), else by the nearest bridge that both devices hang on."""
    try:
        if nvml.nvmlDeviceGetP2PStatus(a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
            return NVLINK
    except nvml.NVMLError:  # not supported on this GPU
        pass
    try:
        ancestor = nvml.nvmlDeviceGetTopologyCommonAncestor(a, b)
    except nvml.NVMLError:
        return SYSTEM
    if ancestor <= nvml.NVML_TOPOLOGY_HOSTBRIDGE:
        return PCIE
    return NODE if ancestor <= nvml.NVML_TOPOLOGY_NODE else SYSTEM
