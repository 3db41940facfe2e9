"""The cache folder keeps what is put, is bounded and private, and never touches, follows or trusts what is not ours."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from liverelay.engine import cache_folder
from liverelay.engine.cache_folder import MARK, MARK_TEXT, Cache
from liverelay.engine.config import cache_root


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is in this test; nothing is there yet."""
    monkeypatch.setenv("LIVERELAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_folder, "_told", threading.Event())
    return tmp_path / "cache"


def cache(kind: str = "things", entries: int = 8, nbytes: int = 1 << 20) -> Cache:
    return Cache(kind, entries=entries, nbytes=nbytes)


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder with its content and mode."""
    return {str(path): (path.read_bytes(), path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def entries(root: Path, kind: str = "things") -> list[Path]:
    return sorted(path for path in (root / kind).iterdir() if cache_folder.ENTRY.fullmatch(path.name))


def test_the_folder_is_the_one_that_the_user_named(monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path) -> None:
    assert cache_root() == cache_of_its_own  # of the suite, so that it never writes into a real home
    monkeypatch.delenv("LIVERELAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_root() == Path("/var/caches/liverelay")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_root() == Path("/home/somebody/.cache/liverelay")


def test_what_is_put_is_found_by_the_next_start(root: Path, numbers: np.random.Generator) -> None:
    given = {f"key {i}\n\u00fc\udc80": numbers.bytes(int(numbers.integers(0, 5000))) for i in range(6)}
    for key, payload in given.items():
        cache().put(key, payload)
    assert {key: cache().get(key) for key in given} == given
    cache().put("key 7", b"old")
    cache().put("key 7", b"new")
    assert cache().get("key 7") == b"new" and cache().get("another key") is None and cache("other").get("key 7") is None


def test_nothing_is_made_by_looking(root: Path) -> None:
    assert cache().get("key") is None and not root.exists()


def test_folders_are_private_and_bear_our_mark(root: Path) -> None:
    root.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        cache().put("key", b"payload")
    finally:
        os.umask(before)
    for folder in (root, root / "things"):
        assert folder.stat().st_mode & 0o777 == 0o700 and (folder / MARK).read_bytes() == MARK_TEXT
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in entries(root))
    assert MARK_TEXT.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n") and b"liverelay" in MARK_TEXT


@pytest.mark.parametrize("limit", ["entries", "bytes"])
def test_what_was_unused_longest_goes_first(root: Path, limit: str) -> None:
    kept = cache(entries=3) if limit == "entries" else cache(nbytes=3 * 1200)
    for name in "abc":
        kept.put(name, bytes(1000))
    assert kept.get("a") == bytes(1000)  # now b is the one that was not used
    kept.put("d", bytes(1000))
    assert [name for name in "abcd" if kept.get(name) is not None] == ["a", "c", "d"]
    kept.put("large", bytes(1 << 20 if limit == "entries" else 5000))
    assert kept.get("large") is None and len(entries(root)) == 3
    assert sum(path.stat().st_size for path in entries(root)) <= kept.nbytes


def damages() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda data: b"",
        "cut": lambda data: data[:-1],
        "longer": lambda data: data + b"\0",
        "head only": lambda data: data[:40],
        "a bit": lambda data: data[:-3] + bytes([data[-3] ^ 4]) + data[-2:],
        "its checksum": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
        "another version": lambda data: b"X" + data[1:],
        "another key's": lambda data: cache_folder._pack("other key", b"payload"),
    }


@pytest.mark.parametrize("damage", list(damages()))
def test_a_damaged_entry_is_absent_until_it_is_put_again(root: Path, damage: str) -> None:
    cache().put("key", b"payload" * 20)
    (path,) = entries(root)
    path.write_bytes(damages()[damage](path.read_bytes()))
    assert cache().get("key") is None
    cache().put("key", b"payload")
    assert cache().get("key") == b"payload"


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_an_entry_that_is_no_file_is_absent_and_left_alone(root: Path, tmp_path: Path, what: str) -> None:
    cache().put("key", b"payload")
    (path,) = entries(root)
    other = path.rename(tmp_path / "other")
    before = other.read_bytes()
    {"link": lambda: path.symlink_to(other), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[what]()
    assert cache().get("key") is None
    cache(entries=1).put("key 2", b"payload")  # evicts what is too much
    assert os.path.lexists(path)
    cache().put("key", b"new")
    assert other.read_bytes() == before and cache().get("key") == (None if what == "folder" else b"new")


@pytest.mark.parametrize("part", ["root", "kind"])
@pytest.mark.parametrize("target", ["ours", "empty", "dangling", "a file"])
def test_links_are_refused(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, target: str
) -> None:
    cache("made").put("key", b"payload")
    other = tmp_path / "other"
    if target == "ours":
        (root if part == "root" else root / "made").rename(other)
    elif target != "dangling":
        other.mkdir() if target == "empty" else other.write_bytes(b"text")
    if part == "root" and root.exists():
        root.rename(tmp_path / "away")
    (root if part == "root" else root / "things").symlink_to(other)
    before = tree(tmp_path)
    with caplog.at_level(logging.WARNING):
        cache().put("key", b"payload")
        assert cache().get("key") is None
    assert tree(tmp_path) == before and len(caplog.records) == 1 and "link" in caplog.text


@pytest.mark.parametrize("part", ["root", "kind"])
@pytest.mark.parametrize("mark", [None, b"Signature: 8a477f597d28d172789f06886806bc55\n# Made by another program.\n"])
def test_a_folder_of_somebody_elses_files_is_not_touched(
    root: Path, caplog: pytest.LogCaptureFixture, part: str, mark: bytes | None
) -> None:
    if part == "kind":
        cache("made").put("key", b"payload")
    folder = root if part == "root" else root / "things"
    folder.mkdir(mode=0o755)
    (folder / ("ab" * 32 + ".entry")).write_bytes(b"of another program")
    if mark is not None:
        (folder / MARK).write_bytes(mark)
    before = tree(root)
    for i in range(20):
        cache(entries=1).put(str(i), b"payload")
        assert cache().get(str(i)) is None
    assert tree(root) == before and folder.stat().st_mode & 0o777 == 0o755
    assert len(caplog.records) == 1 and str(root) in caplog.text


def test_foreign_files_beside_ours_are_never_counted_or_removed(root: Path) -> None:
    cache().put("key", b"payload")
    foreign = [root / "things" / name for name in ("a.txt", "ab" * 32, "ab" * 32 + ".entry.bak", "AB" * 32 + ".entry")]
    for path in foreign:
        path.write_bytes(bytes(5000))
        os.utime(path, (0, 0))
    for i in range(5):
        cache(entries=2, nbytes=2000).put(str(i), b"payload")
    assert all(path.stat().st_size == 5000 for path in foreign) and len(entries(root)) == 2


@pytest.mark.parametrize("fault", ["home is a file", "other owner", "full disk", "read-only", "no home"])
def test_where_nothing_can_be_kept_all_goes_on_and_one_line_says_why(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    words = "?"
    if fault == "home is a file":
        root.parent.joinpath("file").write_text("")
        monkeypatch.setenv("LIVERELAY_CACHE", str(root.parent / "file" / "cache"))
        words = "Not a directory"
    elif fault == "other owner":
        root.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
        words = "another user"
    elif fault == "no home":
        monkeypatch.setattr(cache_folder, "cache_root", lambda: None)
        words = "no home"
    else:
        number = {"full disk": 28, "read-only": 30}[fault]
        opened, words = os.open, os.strerror(number)

        def refuse(path: str, flags: int, *mode: int, dir_fd: int | None = None) -> int:
            if flags & os.O_CREAT:
                raise OSError(number, os.strerror(number), path)
            return opened(path, flags, *mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", refuse)
    for i in range(3):
        for kind in ("things", "others"):
            cache(kind).put(str(i), b"payload")
            assert cache(kind).get(str(i)) is None
    assert len(caplog.records) == 1 and words in caplog.text and len(caplog.text.splitlines()) == 1


def test_a_write_that_fails_half_way_leaves_the_old_entry(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache().put("key", b"old")
    with monkeypatch.context() as patch:

        def refuse(*names: object, **folders: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "replace", refuse)
        cache().put("key", b"new")
    assert cache().get("key") == b"old" and not list(root.rglob("*.tmp"))


def test_temporary_files_of_dead_writers_go_after_some_age(root: Path) -> None:
    cache().put("key", b"payload")
    old, fresh = (root / "things" / f"{letter * 32}.tmp" for letter in "ab")
    for path in (old, fresh):
        path.write_bytes(b"half an en")
    os.utime(old, (time.time() - 2 * cache_folder.TEMPORARY_AGE_S,) * 2)
    cache().put("key 2", b"payload")
    assert not old.exists() and fresh.exists() and cache().get("key") == b"payload"


HAMMER = """
import random, sys, threading
from liverelay.engine.cache_folder import Cache

cache, errors = Cache("things", entries=6, nbytes=200_000), []

def hammer(seed):
    rng = random.Random(seed)
    for _ in range(400):
        key = f"key {rng.randrange(12)}"
        if rng.random() < 0.5:
            cache.put(key, (key.encode() + bytes([rng.randrange(256)])) * rng.randrange(1, 3000))
        elif (found := cache.get(key)) is not None:
            part = found[: len(key) + 1]
            if not part.startswith(key.encode()) or found != part * (len(found) // len(part)):
                errors.append(f"half an entry of {key} was read")

threading.excepthook = lambda given: errors.append(repr(given.exc_value))
threads = [threading.Thread(target=hammer, args=(int(sys.argv[1]) + i,)) for i in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(repr(errors) if errors else 0)
"""


def test_two_processes_and_two_threads_of_each_share_a_folder(root: Path, seed: int) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", HAMMER, str(seed + 2 * i)], stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0] and said == ["", ""], said
    cache("things", entries=6, nbytes=200_000).put("last", b"payload")
    assert 0 < len(entries(root)) <= 6 and not list(root.rglob("*.tmp"))
