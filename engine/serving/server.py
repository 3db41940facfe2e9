"""A running engine that other programs use: a Unix socket for control, shared memory for frames and sound."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from liverelay.engine.engine import DEFAULT_MAX_AREA, Engine
from liverelay.engine.errors import BusyError
from liverelay.engine.serving import sockets
from liverelay.engine.serving.connection import Connection
from liverelay.engine.serving.protocol import Code
from liverelay.engine.serving.states import States

CONNECTIONS = 256
ENDING_S = 5.0


class Server:
    """Serves `engine` on the socket `path` from when it is made. `run` accepts clients until `stop`; then `close`.

    max_area: most pixels of a session's video. InputError when the socket cannot be made.
    """

    def __init__(
        self, engine: Engine, path: Path, states: States | None = None, *, max_area: int = DEFAULT_MAX_AREA,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.engine, self.path, self.states = engine, path, states or States()
        self.max_area, self.say = max_area, say
        self.started, self.sessions = time.monotonic(), 0
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._stopping = False
        self._listener = sockets.listen(path)
        self._inode = path.lstat().st_ino

    def run(self) -> None:
        """Accept clients; each is served in a thread of its own."""
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                self.say(f"cannot accept a client: {error.strerror}")
                time.sleep(0.1)  # no descriptors, perhaps: others may end
                continue
            connection = Connection(self, accepted)
            if not sockets.peer_is_us(accepted):
                accepted.close()
            elif len(self._connections) >= CONNECTIONS:
                connection.refuse(Code.BUSY, f"{CONNECTIONS} connections are open; close some first")
                accepted.close()
            else:
                self._serve(connection)

    def _serve(self, connection: Connection) -> None:
        def run() -> None:
            try:
                connection.run()
            finally:
                with self._lock:
                    self._connections.pop(connection, None)

        thread = threading.Thread(target=run, name="client", daemon=True)
        with self._lock:
            if self._stopping:  # nobody would end it
                return connection.close()
            self._connections[connection] = thread
            thread.start()  # `close` joins what it finds here

    def take_place(self) -> None:
        """One more session. BusyError when all places are taken."""
        with self._lock:
            if self.sessions >= self.engine.sessions:
                raise BusyError(f"all {self.engine.sessions} sessions of this server are in use; try again later")
            self.sessions += 1

    def give_place(self) -> None:
        """One session less."""
        with self._lock:
            self.sessions -= 1

    def stop(self) -> None:
        """Let `run` return; from any thread."""
        self._stopping = True
        with contextlib.suppress(OSError):  # it is closed already
            self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End all clients and the engine; the socket and all rings are removed."""
        self.stop()
        sockets.remove(self.path, self._inode)
        self._listener.close()
        with self._lock:
            left = dict(self._connections)
        for connection in left:
            connection.stop()
        deadline = time.monotonic() + ENDING_S
        for thread in left.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self.engine.close()  # whoever still waits for a block is woken by this
        for thread in left.values():
            thread.join(ENDING_S)
