"""The user's cache folder: what was found out once, kept for the next start; losing any of it costs time alone.

`$LIVERELAY_CACHE`, else `$XDG_CACHE_HOME/liverelay`, else `~/.cache/liverelay`, with a folder for each kind. Every
folder is private (0700), belongs to the user and bears our mark; no link is followed, and only files of our own name
form are read, counted or removed. Readers and writers of any number of threads and processes need no lock: an entry is
written under another name and renamed, and what vanishes meanwhile was evicted by somebody else.

Where the folder cannot be used (no home, read-only, full, somebody else's, a link), nothing is kept, and one line of
the log says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from liverelay.engine.config import cache_root

log = logging.getLogger(__name__)

MARK = "CACHEDIR.TAG"  # backup programs leave folders out that hold one (bford.info/cachedir)
MARK_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# Made by liverelay; it may be deleted at any time.\n"
MAGIC = b"liverelay-entry-1\n"
ENTRY = re.compile(r"[0-9a-f]{64}\.entry")
TEMPORARY = re.compile(r"[0-9a-f]{32}\.tmp")
TEMPORARY_AGE_S = 3600.0  # nobody writes one entry for so long: its writer has died
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe of that name must not block us

_told = threading.Event()


class Cache:
    """Entries of one kind, at most `entries` of them with `nbytes` bytes together; those unused longest go first.

    kind: the folder's name, of lower-case letters, digits and hyphens. No method raises for what the disk does.
    """

    def __init__(self, kind: str, *, entries: int, nbytes: int) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", kind):
            raise ValueError(f"'{kind}' is no name for a kind of cache entries")
        self.kind, self.entries, self.nbytes = kind, entries, nbytes
        self.root = cache_root()

    def get(self, key: str) -> bytes | None:
        """What was last put under the key; None where there is nothing, or nothing whole."""
        try:
            with self._folder(make=False) as folder:
                return self._read(folder, key)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None

    def put(self, key: str, payload: bytes) -> None:
        """Keep the payload under the key, in place of what was there, and evict what is too much."""
        data = _pack(key, payload)
        if len(data) > self.nbytes or self.entries < 1:
            return
        try:
            with self._folder(make=True) as folder:
                _replace(folder, _name(key), data)
                self._evict(folder)
        except OSError as error:
            self._warn(error)

    @contextlib.contextmanager
    def _folder(self, *, make: bool) -> Iterator[int]:
        """The kind's folder as a descriptor, opened anew for every call: it may be deleted and made at any time."""
        if self.root is None:
            raise PermissionError("there is no home folder")
        if make:
            _make_parents(self.root.parent)
        with _claimed(str(self.root), None, make) as root, _claimed(self.kind, root, make) as folder:
            yield folder

    def _read(self, folder: int, key: str) -> bytes | None:
        data = _read(folder, _name(key), self.nbytes)
        payload = None if data is None else _unpack(key, data)
        if payload is not None:
            now = time.time_ns()  # the file system's own clock is too coarse to order what was used
            with contextlib.suppress(OSError):  # evicted just now, or on a read-only disk, which can still be read
                os.utime(_name(key), ns=(now, now), dir_fd=folder, follow_symlinks=False)
        return payload

    def _evict(self, folder: int) -> None:
        """Remove the entries unused longest until the rest fits, and what writers that died have left."""
        found, entries, nbytes = [], 0, 0
        with os.scandir(folder) as names:
            for name in names:
                if not (ENTRY.fullmatch(name.name) or TEMPORARY.fullmatch(name.name)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = name.stat(follow_symlinks=False)
                    if _is_own_file(status):
                        found.append((status.st_mtime_ns, name.name, status.st_size))
        for used_ns, name_, size in sorted(found, reverse=True):
            if TEMPORARY.fullmatch(name_):
                too_much = time.time() - used_ns / 1e9 > TEMPORARY_AGE_S
            else:
                entries, nbytes = entries + 1, nbytes + size
                too_much = entries > self.entries or nbytes > self.nbytes
            if too_much:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name_, dir_fd=folder)

    def _warn(self, error: OSError) -> None:
        if not _told.is_set():
            _told.set()
            log.warning("nothing is kept for the next start in %s: %s", self.root, error.strerror or error)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest() + ".entry"


def _pack(key: str, payload: bytes) -> bytes:
    """Magic, checksum of the rest, length of the key, key, payload."""
    given = key.encode("utf-8", "surrogatepass")
    rest = len(given).to_bytes(8, "little") + given + payload
    return MAGIC + hashlib.sha256(rest).digest() + rest


def _unpack(key: str, data: bytes) -> bytes | None:
    """The payload; None where the entry is damaged or another key's."""
    given = key.encode("utf-8", "surrogatepass")
    head = len(MAGIC) + hashlib.sha256().digest_size
    rest = memoryview(data)[head:]
    whole = data[:head] == MAGIC + hashlib.sha256(rest).digest()
    if not whole or rest[: 8 + len(given)] != len(given).to_bytes(8, "little") + given:
        return None
    return bytes(rest[8 + len(given) :])


def _is_own_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _read(folder: int, name: str, most: int) -> bytes | None:
    """A file of at most `most` bytes; None where it is larger, no file or somebody else's."""
    descriptor = os.open(name, _OPEN_FILE, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        if not _is_own_file(status) or status.st_size > most:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _replace(folder: int, name: str, data: bytes) -> None:
    """Write a file so that others see the old one or the new one, never a part."""
    temporary = f"{secrets.token_hex(16)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.utime(temporary, ns=(time.time_ns(),) * 2, dir_fd=folder, follow_symlinks=False)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def _make_parents(path: Path) -> None:
    if not path.is_dir():
        _make_parents(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)


@contextlib.contextmanager
def _claimed(name: str, parent: int | None, make: bool) -> Iterator[int]:
    """A folder that is ours, as a descriptor; `make`: made where it is missing, and marked where it is empty.

    OSError where it is missing, a link, no folder, somebody else's, or holds something without bearing our mark.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    try:
        descriptor = os.open(name, _OPEN_FOLDER, dir_fd=parent)
    except NotADirectoryError:
        raise PermissionError(f"{name} is a link or no folder") from None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise PermissionError(f"the folder {name} belongs to another user")
        # Listed before the mark is looked for: whoever makes the folder at this moment fills it after marking it.
        held = [held for held in os.listdir(descriptor) if not TEMPORARY.fullmatch(held)]
        if not _is_marked(descriptor):
            if held:
                raise PermissionError(f"the folder {name} holds files but no {MARK} of ours, so it is left alone")
            if not make:
                raise FileNotFoundError(name)
            _replace(descriptor, MARK, MARK_TEXT)
        if status.st_mode & 0o777 != 0o700:
            os.fchmod(descriptor, 0o700)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_marked(folder: int) -> bool:
    try:
        return _read(folder, MARK, len(MARK_TEXT)) == MARK_TEXT
    except OSError:
        return False
