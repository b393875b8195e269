"""Where a set's files are: a folder, or a URL from which whole shards are fetched into a verified cache.

Shards are content-addressed in the cache by the sha256 that the manifest gives, so sets and processes share them. One
process fetches, the others wait. The least recently used go when the cache is full.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import filelock

from hrgan.data.transfer import (
    CREDENTIALS,
    HTTP,
    PACKAGES,
    PIECE,
    check_package,
    filesystem,
    from_command,
    is_refusal,
    open_http,
    reason_of,
    redacted,
    refuse_credentials,
)
from hrgan.errors import REFUSALS, DataError, UserError

T = TypeVar("T")

BACKOFF_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
WAIT_SECONDS = 10.0
"""From which waiting for another process is said."""
PENDING = 4
"""Most files fetched ahead by a process at a time."""


class Missing(DataError):
    """A file that is not there."""


@dataclass(frozen=True)
class Access:
    """How files at a URL are fetched; the fields are those of config.DataConfig."""

    cache: str | None = None
    cache_gb: float = 100.0
    timeout_seconds: float = 30.0
    retries: int = 6
    allow_pipe: bool = False


def cache_folder(named: str | None = None) -> Path:
    """Where what was fetched or computed is kept: the folder that data.cache names, else $HRGAN_CACHE, else
    ~/.cache/hrgan."""
    return Path(named or os.environ.get("HRGAN_CACHE") or Path.home() / ".cache" / "hrgan").absolute()


class Store:
    """See the module. where: for people, without credentials; local_root: the folder of a local set, else None."""

    def __init__(self, where: str, access: Access = Access()) -> None:
        """where: a folder, or a URL of http, https, s3, gs, hf or file, or "pipe:COMMAND with {}".

        UserError for other schemes, a missing package, a URL with credentials in it, and a pipe that is not allowed.
        """
        scheme = "pipe" if where.startswith("pipe:") else where.split("://")[0].lower() if "://" in where else ""
        self._scheme, self._access = scheme, access
        self._command = where.removeprefix("pipe:")
        self.where, self.local_root = where.rstrip("/") or "/", None
        if scheme in ("", "file"):
            self.local_root = Path(where.removeprefix("file://")).absolute()
            self.where = where.removeprefix("file://")
        elif scheme == "pipe":
            if not access.allow_pipe:
                raise UserError("data.path: pipe: commands are off; --data.allow_pipe true lets them run")
            if "{}" not in where:
                raise UserError("data.path: the pipe: command has no {}, where the file's name goes")
            self.where = redacted(where)
        elif scheme not in (*HTTP, *PACKAGES):
            kinds = ", ".join(f"{kind}://" for kind in (*HTTP, *PACKAGES))
            raise UserError(f"data.path: {scheme}:// is not known, expected a folder, {kinds} or pipe:")
        else:
            refuse_credentials(where)
            check_package(scheme)

    def describe(self, file: str) -> str:
        """Path or URL of a file, for people."""
        if self.local_root is not None:
            return str(self.local_root / file)
        return self.where.replace("{}", file) if self._scheme == "pipe" else f"{self.where}/{file}"

    def read(self, file: str, most: int = 2**30) -> bytes:
        """A small file, not cached. Missing at once where it is not there; DataError when it cannot be had."""
        if self.local_root is not None:
            try:
                content = (self.local_root / file).read_bytes()
            except FileNotFoundError:
                raise Missing(f"{self.describe(file)} is missing") from None
            except OSError as error:
                raise DataError(f"{self.describe(file)}: {error.strerror}, expected a readable file") from None
            if len(content) > most:
                raise DataError(f"{self.describe(file)}: found {len(content)} bytes, expected at most {most}")
            return content

        def attempt() -> bytes:
            content = bytearray()
            for piece in self._pieces(file):
                content += piece
                if len(content) > most:
                    raise ValueError(f"more than {most} bytes")
            return bytes(content)

        return self._tried(file, attempt)

    def local(self, file: str, size: int, sha256: str) -> Path:
        """A path that holds these bytes: of a local set the file itself, unverified; else from the cache, fetched and
        verified first if need be. DataError, with URL and reason, when it cannot be had."""
        if self.local_root is not None:
            return self.local_root / file
        path = self._cached(sha256)
        if _known_good(path, size):
            return path
        # Reading and removing a damaged one is under the lock, too: it may have been fetched again since it was read.
        with _disk_named(self._cache()), _one_at_a_time(path.with_suffix(".lock"), self.describe(file)):
            if not (_known_good(path, size) or _verified(path, size, sha256)):
                self._tried(file, lambda: self._fetch(file, size, sha256, path))
        return path

    def prefetch(self, file: str, size: int, sha256: str) -> None:
        """Begin to fetch in the background. What goes wrong is met again by `local`."""
        if self.local_root is not None or self._cached(sha256).exists():
            return
        state = _ahead(os.getpid())
        with state.lock:
            if sha256 in state.pending or len(state.pending) >= PENDING:
                return
            state.pending.add(sha256)

        def fetch() -> None:
            try:
                with contextlib.suppress(DataError, UserError, OSError):
                    self.local(file, size, sha256)
            finally:
                state.pending.discard(sha256)

        state.start(fetch)

    def stats_folder(self) -> Path:
        """Where statistics of the set's pictures are kept."""
        return (self.local_root if self.local_root is not None else self._cache()) / "stats"

    def size_problem(self, file: str, size: int) -> str | None:
        """What is wrong with a local file's size; None of a remote one, which is verified when it is fetched."""
        if self.local_root is None:
            return None
        path = self.local_root / file
        try:
            found = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}, expected {size} bytes"
        return None if found == size else f"{path}: found {found} bytes, expected {size} bytes"

    def check_room(self, shards: int, largest: int) -> None:
        """UserError where the cache is too small for so many shards of `largest` bytes that are read at once."""
        least = shards * largest / 1e9
        if self.local_root is None and self._access.cache_gb < least:
            # A little more, so that three digits, rounded, are still enough.
            raise UserError(
                f"data.cache_gb: {self._access.cache_gb:g} GB do not hold the {shards} shards of "
                f"{largest / 1e9:.3g} GB that are read at once; expected at least "
                f"{least * 1.006:.3g}, or fewer data.slots"
            )

    # Fetching

    def _tried(self, file: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, with retries after pauses that grow. What no retry mends is raised at once."""
        name, access, problem = self.describe(file), self._access, ""
        for number in range(access.retries + 1):
            if number:
                pause = min(LONGEST_PAUSE_SECONDS, BACKOFF_SECONDS * 2 ** (number - 1))
                time.sleep(pause * (0.5 + random.random() / 2))  # Not all processes at the same moment.
            try:
                return attempt()
            except (UserError, DataError, MemoryError):
                raise
            except Exception as error:  # of sockets, TLS, HTTP and each kind of store
                if isinstance(error, OSError) and error.errno in REFUSALS:
                    raise  # of the cache: `_pieces` tells those of the server apart
                problem = reason_of(error)
                if number % 3 == 0 and number < access.retries:
                    _say(f"{name}: {problem}; trying again")
        tries = f"{access.retries + 1} attempts" if access.retries else "one attempt"
        raise DataError(f"{name} cannot be fetched: {problem} ({tries}); is the server there, and the set whole?")

    def _fetch(self, file: str, size: int, sha256: str, path: Path) -> None:
        """Into a file of this process, verified, then renamed."""
        partial = self._make_room(size, sha256)
        digest, length = hashlib.sha256(), 0
        try:
            with partial.open("r+b") as out:
                for piece in self._pieces(file):
                    digest.update(piece)
                    length += len(piece)
                    if length > size:
                        raise ValueError(f"found more than the {size} bytes of the manifest")
                    out.write(piece)
                if length != size:
                    raise ValueError(f"found {length} bytes, expected {size}")
                if digest.hexdigest() != sha256:
                    raise ValueError(f"found sha256 {digest.hexdigest()}, expected {sha256}")
                out.flush()
                os.fsync(out.fileno())
            partial.replace(path)
            _note_verified(path)
        finally:
            partial.unlink(missing_ok=True)

    def _pieces(self, file: str) -> Iterator[bytes]:
        """The bytes of a file as they arrive. Missing, and a DataError where the server wants other credentials."""
        name = self.describe(file)
        try:
            if self._scheme == "pipe":
                yield from from_command(self._command.replace("{}", shlex.quote(file)), self._access.timeout_seconds)
                return
            with self._opened(file) as stream:
                while piece := stream.read(PIECE):
                    yield piece
        except FileNotFoundError:
            raise Missing(f"{name} is missing there") from None
        except Exception as error:  # of each kind of store
            if not is_refusal(error):
                raise
            place = CREDENTIALS[self._scheme]
            raise DataError(f"{name}: access was refused; credentials are taken from {place}") from None

    def _opened(self, file: str) -> Any:
        if self._scheme in HTTP:
            return open_http(f"{self.where}/{quote(file)}", self._access.timeout_seconds)
        system = filesystem(self._scheme, self._access.timeout_seconds, os.getpid())
        return system.open(f"{self.where}/{file}", "rb", block_size=8 * PIECE, cache_type="readahead")

    # The cache

    def _cache(self) -> Path:
        return cache_folder(self._access.cache)

    def _cached(self, sha256: str) -> Path:
        return self._cache() / "shards" / sha256[:2] / sha256

    def _make_room(self, size: int, sha256: str) -> Path:
        """A file of this process for `size` bytes, after the least recently used were removed until it fits. It has
        its whole length at once, so that others which make room count it."""
        cache, limit = self._cache(), self._access.cache_gb * 1e9
        if size > limit:
            raise UserError(
                f"data.cache_gb: {self._access.cache_gb:g} GB do not hold a shard of {size / 1e9:.3g} GB; raise it"
            )
        partial = cache / "tmp" / f"{sha256[:16]}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.partial"
        with _one_at_a_time(cache / "evict.lock", "shards into the same cache"):
            partial.parent.mkdir(exist_ok=True)
            total = _living_partials(partial.parent)
            held = []
            for path in (cache / "shards").glob("*/" + "[0-9a-f]" * 64):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    held.append((_last_use(path), status.st_size, path))
                    total += status.st_size
            # In this order those just used, which another process may be about to open, go when nothing else is left.
            for used, length, path in sorted(held):
                if total + size <= limit:
                    break
                with contextlib.suppress(FileNotFoundError):
                    if _last_use(path) != used:
                        continue  # used while this looked
                    path.with_suffix(".ok").unlink(missing_ok=True)  # First, so that `_known_good` fails from here on.
                    path.unlink()
                total -= length
            partial.touch()
            os.truncate(partial, size)
        return partial


def _living_partials(folder: Path) -> int:
    """Bytes of the files that are being fetched; those of processes that are gone are removed."""
    total = 0
    for partial in folder.glob("*.*.*.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            status, (*host, pid, _, _) = partial.stat(), partial.name.split(".")[1:]
            gone = ".".join(host) == socket.gethostname() and not _runs(int(pid))
            if gone or time.time() - status.st_mtime > 3600:
                partial.unlink()
            else:
                total += status.st_size
    return total


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _last_use(path: Path) -> float:
    """When a cached file was last handed out, as time.time() has it: the age of its mark, else its own."""
    with contextlib.suppress(FileNotFoundError):
        return path.with_suffix(".ok").stat().st_mtime
    return path.stat().st_mtime


def _known_good(path: Path, size: int) -> bool:
    """Whether a cached file is as it was when its bytes were last verified. Says that it is used."""
    mark = path.with_suffix(".ok")
    try:
        known, status = json.loads(mark.read_bytes()), path.stat()
        if status.st_size != size or known != [size, status.st_mtime_ns]:
            return False
        with contextlib.suppress(PermissionError):  # A cache that others fill can still be read.
            os.utime(mark)
    except (OSError, ValueError):
        return False
    return True


def _verified(path: Path, size: int, sha256: str) -> bool:
    """Whether a cached file holds what it should, by its bytes. A damaged one is removed."""
    try:
        with path.open("rb") as file:
            good = os.fstat(file.fileno()).st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in REFUSALS:
            raise
        good = False  # EIO: a disk that loses it
    if good:
        with contextlib.suppress(PermissionError):
            _note_verified(path)
        return True
    _say(f"{path}: damaged in the cache; fetching it again")
    path.with_suffix(".ok").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return False


def _note_verified(path: Path) -> None:
    """Under the file's lock, which makes the name its own."""
    status, partial = path.stat(), path.with_suffix(".noting")
    partial.write_text(json.dumps([status.st_size, status.st_mtime_ns]))
    partial.replace(path.with_suffix(".ok"))


@contextlib.contextmanager
def _one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """Alone among the processes and threads of this machine. The kernel drops the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=WAIT_SECONDS)
    except filelock.Timeout:
        _say(f"waiting for another process that fetches {what}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_named(cache: Path) -> Iterator[None]:
    """UserError where the cache cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        there = next(folder for folder in (cache, *cache.parents) if folder.exists())
        free = shutil.disk_usage(there).free / 1e9
        raise UserError(
            f"data.cache: {cache} cannot be written ({error.strerror}, {free:.1f} GB free); make room, lower "
            "data.cache_gb, or name another place with data.cache or HRGAN_CACHE"
        ) from None


def _say(line: str) -> None:
    """On stderr in one write: lines of several processes do not mix, and no thread holds a stream's lock at an exit or
    a fork."""
    os.write(2, f"{line}\n".encode())


class _Ahead:
    """What a process fetches in the background."""

    def __init__(self) -> None:
        self.lock, self.pending = threading.Lock(), set[str]()
        self._slots = threading.Semaphore(2)

    def start(self, fetch: Any) -> None:
        def work() -> None:
            with self._slots:
                fetch()

        threading.Thread(target=work, daemon=True).start()  # No exit waits for it.


@lru_cache(2)
def _ahead(process: int) -> _Ahead:
    """process: threads do not survive a fork."""
    return _Ahead()
