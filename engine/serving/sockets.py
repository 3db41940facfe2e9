"""The control socket: for this user alone; a dead server's is replaced, a live one's refused; bounded reads in time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from liverelay.engine.errors import InputError, LiveRelayError
from liverelay.engine.serving.protocol import HEADER, Fields, Head, decode

LONGEST_PATH = 107  # bytes of sun_path without its end
MESSAGE_S = 20.0  # a message that has begun must be whole by then
PIECE = 1 << 16
BACKLOG = 16


class Disconnected(LiveRelayError):
    """The other side has gone, or takes and gives too slowly to be waited for."""


def listen(path: Path) -> socket.socket:
    """A listening Unix socket, mode 0600. InputError as `clear` has it."""
    with _sole_use(path.parent):
        clear(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(path))
            path.chmod(0o600)  # nobody can connect before listen
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise InputError(f"cannot make the socket {path}: {error.strerror}") from None
    return listener


def remove(path: Path, inode: int) -> None:
    """Remove our socket, not one that has taken its place."""
    with contextlib.suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


@contextlib.contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Two servers that start at a time take turns; the lock ends with its process."""
    check_folder(folder)  # before it is opened
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_folder(folder: Path, *, secret: bool = False) -> None:
    """InputError unless only this user can put files into it; secret: nor can others look into it."""
    try:
        info = folder.stat()
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(info.st_mode):
        raise InputError(f"{folder} is no folder")
    if info.st_uid != os.geteuid() or info.st_mode & (0o077 if secret else 0o022):
        raise InputError(f"the folder {folder} is not this user's own; make one with: mkdir -m 700 FOLDER")


def clear(path: Path) -> None:
    """Remove what a dead server left. InputError when a socket cannot be made there: the folder is open to others, a
    live server has the path, or it is something else."""
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise InputError(f"the path of a socket has at most {LONGEST_PATH} bytes; choose a shorter one than {path}")
    check_folder(path.parent)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InputError(f"{path} is there and no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # EAGAIN: a live server whose queue is full
        if probe.connect_ex(os.fspath(path)) != errno.ECONNREFUSED:
            raise InputError(f"a server listens on {path} already; end it or choose another path")
    path.unlink()


def peer_is_us(connection: socket.socket) -> bool:
    """Whether the other side is a process of this user."""
    pid_uid_gid = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", pid_uid_gid)[1] == os.geteuid())


def receive(connection: socket.socket, *, first_within: float | None, reply: bool = False) -> tuple[Head, Fields]:
    """The next message. first_within: seconds until it begins, None for any; once begun it must come soon.

    Disconnected when the other side ends, or is too slow; ProtocolError for what is no message.
    """
    connection.settimeout(first_within)
    try:
        begun = connection.recv(HEADER.size)
    except OSError:
        raise Disconnected("the connection ended") from None
    deadline = time.monotonic() + MESSAGE_S
    head = Head.parse(begun + _exactly(connection, HEADER.size - len(begun), deadline, begun), reply=reply)
    return head, decode(head.kind, _exactly(connection, head.length, deadline, begun))


def _exactly(connection: socket.socket, size: int, deadline: float, begun: bytes) -> bytes:
    """So many bytes; memory grows with what has come, not with what was announced."""
    found = bytearray()
    while len(found) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not begun:
            raise Disconnected("the connection ended")
        connection.settimeout(left)
        try:
            piece = connection.recv(min(PIECE, size - len(found)))
        except OSError:
            raise Disconnected("the connection ended") from None
        if not piece:
            raise Disconnected("the connection ended")
        found += piece
    return bytes(found)


def send(connection: socket.socket, message: bytes) -> None:
    """Disconnected when the other side has gone or does not take it."""
    connection.settimeout(MESSAGE_S)
    try:
        connection.sendall(message)
    except OSError:
        raise Disconnected("the connection ended") from None
