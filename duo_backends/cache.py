"""Object code on disk, so that a program compiled once starts at once the next time.

Entries are files named by a SHA-256 key and carry a SHA-256 of their contents: a truncated or damaged file counts as
absent. Writes are atomic (a temporary file, then a rename), the folder is bounded in size (least recently used files
go first), and a folder that cannot be written, or that others may write, is silently not used: object code is
executed, so it is only read from a place that belongs to the user alone.
"""

from __future__ import annotations

import hashlib
import os
import sys
from functools import lru_cache
from pathlib import Path

MAGIC = b"duo object 1\n"
LIMIT = 512 << 20  # bytes kept on disk
SWEEP_EVERY = 64  # writes between two looks at the folder's size
# A file that was not there before, nor is a link. (`tempfile` takes two milliseconds to load.)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def default_directory() -> Path | None:
    """The folder named by DUO_CACHE_DIR ('off' or empty: none), else `duo` in the platform's folder for caches."""
    named = os.environ.get("DUO_CACHE_DIR")
    if named is not None:
        return None if named.strip().lower() in ("", "off") else Path(named).expanduser()
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "duo"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "duo" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "duo"


class DiskCache:
    """`get` and `put` bytes by key (a hex string). Safe with several threads and processes on one folder."""

    def __init__(self, directory: Path | None, limit: int = LIMIT) -> None:
        self.limit = limit
        self.directory = directory if directory is not None and _is_private(directory) else None
        self._writes = 0

    def get(self, key: str) -> bytes | None:
        """The contents stored under `key`, or None when absent or damaged (a damaged file is removed)."""
        if self.directory is None:
            return None
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        start = len(MAGIC) + 32
        payload = data[start:]
        if data[: len(MAGIC)] != MAGIC or hashlib.sha256(payload).digest() != data[len(MAGIC) : start]:
            _remove(path)
            return None
        try:
            os.utime(path)  # marks it as recently used
        except OSError:
            pass
        return payload

    def has(self, key: str) -> bool:
        """Whether there is an entry, which may turn out to be damaged."""
        return self.directory is not None and self._path(key).exists()

    def put(self, key: str, payload: bytes) -> None:
        """Stores `payload`; does nothing when the folder cannot be written."""
        if self.directory is None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_name(f"{os.urandom(12).hex()}.tmp")
            handle = os.open(temporary, _NEW, 0o600)
        except OSError:
            return
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, path)
        except OSError:
            _remove(temporary)
            return
        if self._writes % SWEEP_EVERY == 0:
            self.sweep()
        self._writes += 1

    def sweep(self) -> None:
        """Removes the least recently used files until the folder is at most three quarters of its limit."""
        if self.directory is None:
            return
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        if total <= self.limit:
            return
        for _, size, path in sorted(entries, key=lambda e: e[0]):
            if total <= self.limit * 3 // 4:
                return
            _remove(path)
            total -= size

    def usage(self) -> tuple[int, int]:
        """How many files the folder holds, and their bytes."""
        entries = self._entries()
        return len(entries), sum(size for _, size, _ in entries)

    def clear(self) -> tuple[int, int]:
        """Removes all entries, and nothing else that may lie in the folder; gives their number and bytes."""
        entries = self._entries()
        for _, _, path in entries:
            _remove(path)
        return len(entries), sum(size for _, size, _ in entries)

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every entry, temporary files of broken-off writes among them."""
        if self.directory is None:
            return []
        entries = []
        for path in self.directory.glob("??/*"):
            if path.suffix not in (".o", ".tmp"):
                continue
            try:
                status = path.stat()
            except OSError:
                continue
            entries.append((status.st_mtime, status.st_size, path))
        return entries

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / key[:2] / f"{key[2:]}.o"


@lru_cache(maxsize=8)
def _disk(directory: Path | None) -> DiskCache:
    return DiskCache(directory)


def disk_cache() -> DiskCache:
    """The cache in the folder that DUO_CACHE_DIR names now."""
    return _disk(default_directory())


def _is_private(directory: Path) -> bool:
    """Whether the folder exists, or can be made, and only this user writes to it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError:
        return False
    if os.name == "nt":
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass
