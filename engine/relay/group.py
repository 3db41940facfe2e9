"""Where the processes of a line meet: the store, the process groups of the links, and the leader's channels.

A channel is a socket: its end shows at once that the other process has died. Words in it show that one still lives.
"""

from __future__ import annotations

import io
import pickle
import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch.distributed as dist

from liverelay.engine.config import RankEnvironment
from liverelay.engine.relay.plan import Plan
from liverelay.engine.relay.remote import GlooEnd, NcclEnd
from liverelay.engine.relay.room import Room
from liverelay.engine.relay.stage import LineSpec, Stage

TIMEOUT_S = 10.0
START_S = 1800.0  # until all ranks have loaded their weights


@dataclass(frozen=True)
class Build:
    """To a rank: make your stage of a line and its links."""

    spec: LineSpec


@dataclass(frozen=True)
class Ready:
    """From a rank: what was asked for is built, with the room for sessions there, or why it is not."""

    fault: str = ""
    room: Room | None = None


@dataclass(frozen=True)
class Beat:
    """Both ways, every so often: I am here. busy_s: time since the stage began what it is at, 0 when it waits."""

    busy_s: float = 0.0
    blocks: int = 0


@dataclass(frozen=True)
class End:
    """To a rank: nothing more will come."""


@dataclass(frozen=True)
class Abort:
    """To a rank: the line is broken; end with this error."""

    text: str


class Channel:
    """A socket to another process that sends from a thread of its own, so that no sender ever waits for the other."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="channel", daemon=True)
        self._sender.start()

    def put(self, message: Any) -> None:
        self._out.put(message)

    def get(self, timeout_s: float) -> Any:
        """The next message. EOFError when the other side has ended, TimeoutError when it is silent."""
        try:
            if not self._connection.poll(timeout_s):
                raise TimeoutError
            return pickle.loads(self._connection.recv_bytes())
        except (OSError, EOFError) as error:
            raise (error if isinstance(error, TimeoutError) else EOFError()) from None

    def close(self) -> None:
        """Send what is left, then hang up."""
        self._out.put(None)
        self._sender.join(timeout=2)
        self._connection.close()

    def _send(self) -> None:
        while (message := self._out.get()) is not None:
            buffer = io.BytesIO()
            pickle.Pickler(buffer, protocol=5).dump(message)  # not the connection's own, which shares memory by file
            try:
                self._connection.send_bytes(buffer.getbuffer())
            except (OSError, ValueError):
                return  # whoever reads sees that the other side is gone


class Group:
    """This process among the ranks: the store they meet at, the process groups of the links, the channels.

    transport: gloo or nccl; timeout_s: after which a silent or stuck rank is given up.
    """

    def __init__(self, environment: RankEnvironment, transport: str, timeout_s: float = TIMEOUT_S) -> None:
        self.rank, self.world, self.timeout_s = environment.rank, environment.world, timeout_s
        self.transport = transport
        waiting = timedelta(seconds=START_S)
        address = (environment.address, environment.port)
        base = dist.TCPStore(*address, is_master=False, timeout=waiting)  # type: ignore[attr-defined]
        # A restart meets in the same store, where the last attempt's addresses still are.
        self._store = dist.PrefixStore(f"liverelay{environment.attempt}", base)  # type: ignore[attr-defined]
        dist.init_process_group(transport, store=self._store, rank=self.rank, world_size=self.world, timeout=waiting)
        # One group for each link and each line that is built on it; all ranks make all of them.
        self._groups = [dist.new_group([left, left + 1], timeout=waiting) for left in range(self.world - 1)]
        self.channels = self._connect(environment)
        self.busy: Callable[[], Beat] = Beat  # what this process says of itself
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _beat(self) -> None:
        """Tell the other side that this process lives, from now on: loading takes minutes."""
        while not self._over.wait(self.timeout_s / 5):
            for channel in self.channels:
                channel.put(self.busy())

    def close(self) -> None:
        """No more beats."""
        self._over.set()

    def _connect(self, environment: RankEnvironment) -> list[Channel]:
        """To all other ranks in order, for the leader; to the leader, for the others."""
        if self.rank:
            host, port = self._store.get("address").decode().rsplit(":", 1)
            connection = Client((host, int(port)), authkey=self._store.get("key"))
            connection.send(self.rank)
            return [Channel(connection)]
        key = secrets.token_hex(32)
        listener = Listener((environment.address, 0), authkey=key.encode())
        self._store.set("key", key)
        self._store.set("address", f"{environment.address}:{listener.address[1]}")
        found: dict[int, Connection] = {}
        while len(found) < self.world - 1:
            connection = listener.accept()
            found[connection.recv()] = connection
        listener.close()
        return [Channel(found[rank]) for rank in sorted(found)]

    def links(self, plan: Plan, stage: Stage) -> tuple[Any, Any]:
        """This process's ends of the links from the stage before and to the stage after, warmed up; None without one.

        Every rank calls it at the same time: the first message of a pair connects it, which is slow.
        """

        def end(peer: int) -> GlooEnd | NcclEnd | None:
            if not 0 <= peer < len(plan.stages):
                return None
            receiver, sends = plan.stages[max(peer, self.rank)], peer > self.rank
            shapes, group = stage.spec.parcel_of(receiver), self._groups[min(peer, self.rank)]
            dtype = (stage.outgoing if sends else stage.parcel).flat.dtype
            if self.transport == "nccl":
                return NcclEnd(shapes, stage.device, dtype, peer, group, sends=sends)
            return GlooEnd(shapes, dtype, peer, group, sends=sends)

        source, target = end(self.rank - 1), end(self.rank + 1)
        for link in (source, target):
            if link is not None:
                link.warm_up()
        return source, target
