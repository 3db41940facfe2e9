"""Snapshots that a server keeps for its clients, in memory or in a folder, under tokens of its making."""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

from liverelay.engine.errors import InputError, OutputError
from liverelay.engine.serving.sockets import check_folder
from liverelay.engine.snapshot import Snapshot

TOKEN = re.compile(r"[0-9a-f]{32}")
SUFFIX = ".safetensors"


class States:
    """At most `limit` snapshots; a new one takes the place of the oldest. With a folder they outlive the server."""

    def __init__(self, folder: Path | None = None, limit: int = 16) -> None:
        self._folder, self._limit, self._lock = folder, limit, threading.Lock()
        self._kept: OrderedDict[str, Snapshot | None] = OrderedDict()  # by token, the oldest first
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from None
            check_folder(folder, secret=True)
            found = [path for path in folder.glob(f"*{SUFFIX}") if TOKEN.fullmatch(path.stem)]
            self._kept.update((path.stem, None) for path in sorted(found, key=lambda path: path.stat().st_mtime_ns))

    def put(self, snapshot: Snapshot) -> str:
        """Keep it; its token. OutputError when it cannot be written."""
        token = secrets.token_hex(16)
        if self._folder is not None:
            snapshot.save(self._path(token))
        with self._lock:
            self._kept[token] = None if self._folder is not None else snapshot
            while len(self._kept) > self._limit:
                self._drop(next(iter(self._kept)))
        return token

    def get(self, token: str) -> Snapshot:
        """InputError where there is none of that token."""
        with self._lock:
            if token not in self._kept:
                raise InputError("there is no snapshot of that token; the oldest ones make room for new ones")
            kept = self._kept[token]
        return Snapshot.load(self._path(token)) if kept is None else kept

    def forget(self, token: str) -> None:
        """Remove one that may be there."""
        with self._lock:
            if token in self._kept:
                self._drop(token)

    def _drop(self, token: str) -> None:
        del self._kept[token]
        if self._folder is not None:
            self._path(token).unlink(missing_ok=True)

    def _path(self, token: str) -> Path:
        assert self._folder is not None and TOKEN.fullmatch(token)
        return self._folder / f"{token}{SUFFIX}"
