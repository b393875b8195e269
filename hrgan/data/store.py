"""Where a set's files are: a folder, or a URL from which whole shards are fetched into a verified cache.

Shards are content-addressed in the cache by the sha256 that the manifest gives, so sets and processes share them. One
process fetches, the others wait. The least recently used go when the cache is full.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import netrc
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import filelock

from hrgan.errors import DataError, UserError

BACKOFF_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
PIECE = 2**20
FRESH_SECONDS = 60.0
"""A file used so lately may be about to be opened by another process: others are removed before it."""
PENDING = 4
"""Most files fetched ahead by a process at a time."""
HTTP = ("http", "https")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
"""What fsspec opens a kind of URL with."""
CREDENTIALS = {
    "http": "~/.netrc",
    "https": "~/.netrc",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "hf": "HF_TOKEN, or `hf auth login`",
    "pipe": "the command's own place",
}


class Missing(DataError):
    """A file that is not there."""


class Refused(Exception):
    """The server wants other credentials."""


@dataclass(frozen=True)
class Access:
    """How files at a URL are fetched; the fields are those of config.DataConfig."""

    cache: str | None = None
    cache_gb: float = 100.0
    timeout_seconds: float = 30.0
    retries: int = 6
    allow_pipe: bool = False


class Store:
    """See the module. where: for people, without credentials; local_root: the folder of a local set, else None."""

    def __init__(self, where: str, access: Access = Access()) -> None:
        """where: a folder, or a URL of http, https, s3, gs, hf or file, or "pipe:COMMAND with {}".

        UserError for other schemes, a missing package, a URL with credentials in it, and a pipe that is not allowed.
        """
        scheme = "pipe" if where.startswith("pipe:") else urlsplit(where).scheme if "://" in where else ""
        self._scheme, self._access = scheme, access
        self.where, self.local_root = where.rstrip("/") or "/", None
        if scheme in ("", "file"):
            self.local_root = Path(where.removeprefix("file://")).absolute()
            self.where = where.removeprefix("file://")
        elif scheme == "pipe":
            if not access.allow_pipe:
                raise UserError("data.path: pipe: commands are off; --data.allow_pipe true lets them run")
            if "{}" not in where:
                raise UserError("data.path: the pipe: command has no {}, where the file's name goes")
        elif scheme not in (*HTTP, *PACKAGES):
            kinds = ", ".join(f"{kind}://" for kind in (*HTTP, *PACKAGES))
            raise UserError(f"data.path: {scheme}:// is not known, expected a folder, {kinds} or pipe:")
        else:
            _refuse_credentials(where)
            _check_package(scheme)

    def describe(self, file: str) -> str:
        """Path or URL of a file, for people."""
        if self.local_root is not None:
            return str(self.local_root / file)
        return self.where.replace("{}", file) if self._scheme == "pipe" else f"{self.where}/{file}"

    def read(self, file: str, most: int = 2**30) -> bytes:
        """A small file, not cached. Missing at once where it is not there; DataError when it cannot be had."""
        if self.local_root is not None:
            try:
                return (self.local_root / file).read_bytes()
            except FileNotFoundError:
                raise Missing(f"{self.describe(file)} is missing") from None
            except OSError as error:
                raise DataError(f"{self.describe(file)}: {error.strerror}, expected a readable file") from None

        def attempt() -> bytes:
            content = bytearray()
            for piece in self._pieces(file):
                content += piece
                if len(content) > most:
                    raise ValueError(f"more than {most} bytes")
            return bytes(content)

        content: bytes = self._tried(file, attempt)
        return content

    def local(self, file: str, size: int, sha256: str) -> Path:
        """A path that holds these bytes: of a local set the file itself, unverified; else from the cache, fetched and
        verified first if need be. DataError, with URL and reason, when it cannot be had."""
        if self.local_root is not None:
            return self.local_root / file
        path = self._cached(sha256)
        if _verified(path, size, sha256):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.with_suffix(".lock"), self.describe(file)):
            if not _verified(path, size, sha256):  # Another process may have fetched it meanwhile.
                self._make_room(size)
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
            raise UserError(
                f"data.cache_gb: {self._access.cache_gb:g} GB do not hold the {shards} shards of "
                f"{largest / 1e9:.3g} GB that are read at once; expected at least {least:.3g}, or fewer data.slots"
            )

    # Fetching

    def _tried(self, file: str, attempt: Any) -> Any:
        """The result of `attempt`, with retries after pauses that grow."""
        name, access, problem = self.describe(file), self._access, ""
        for number in range(access.retries + 1):
            if number:
                pause = min(LONGEST_PAUSE_SECONDS, BACKOFF_SECONDS * 2 ** (number - 1))
                time.sleep(pause * (0.5 + random.random() / 2))  # Not all processes at the same moment.
            try:
                return attempt()
            except FileNotFoundError:
                raise Missing(f"{name} is missing there") from None
            except (Refused, PermissionError):
                place = CREDENTIALS[self._scheme]
                raise DataError(f"{name}: access was refused; credentials are taken from {place}") from None
            except (UserError, DataError, MemoryError):
                raise
            except Exception as error:  # of sockets, TLS, HTTP and each kind of store
                problem = reason_of(error)
                if number % 3 == 0:
                    print(f"{name}: {problem}; trying again", file=sys.stderr, flush=True)
        tries = f"{access.retries + 1} attempts" if access.retries else "one attempt"
        raise DataError(f"{name} cannot be fetched: {problem} ({tries}); is the server there, and the set whole?")

    def _fetch(self, file: str, size: int, sha256: str, path: Path) -> None:
        """Into a file of this process, verified, then renamed."""
        folder = self._cache() / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{sha256[:16]}.{os.getpid()}.{threading.get_ident()}"
        digest, length = hashlib.sha256(), 0
        try:
            with _disk_named(self._cache()), partial.open("wb") as out:
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
        """The bytes of a file as they arrive."""
        if self._scheme == "pipe":
            yield from _from_command(self.where.removeprefix("pipe:").replace("{}", shlex.quote(file)))
            return
        with self._opened(file) as stream:
            while piece := stream.read(PIECE):
                yield piece

    def _opened(self, file: str) -> Any:
        if self._scheme in HTTP:
            return open_http(f"{self.where}/{quote(file)}", self._access.timeout_seconds)
        system = _filesystem(self._scheme, self._access.timeout_seconds, os.getpid())
        return system.open(f"{self.where}/{file}", "rb", block_size=8 * PIECE, cache_type="readahead")

    # The cache

    def _cache(self) -> Path:
        return Path(self._access.cache or os.environ.get("HRGAN_CACHE") or Path.home() / ".cache" / "hrgan").absolute()

    def _cached(self, sha256: str) -> Path:
        return self._cache() / "shards" / sha256[:2] / sha256

    def _make_room(self, size: int) -> None:
        """Remove what was least recently used until `size` more bytes fit."""
        cache, limit = self._cache(), self._access.cache_gb * 1e9
        with _one_at_a_time(cache / "evict.lock", "the cache"):
            for leftover in (cache / "tmp").glob("*.*.*") if (cache / "tmp").is_dir() else ():
                with contextlib.suppress(OSError):
                    if time.time() - leftover.stat().st_mtime > 3600:  # of a process that was killed
                        leftover.unlink()
            held = []
            for mark in (cache / "shards").glob("*/*.ok"):
                with contextlib.suppress(OSError):
                    path = mark.with_suffix("")
                    held.append((mark.stat().st_mtime, path.stat().st_size, path))
            total = sum(length for _, length, _ in held)
            now = time.time()
            # Those just used last of all: another process may be about to open them.
            for _, length, path in sorted(held, key=lambda item: (now - item[0] < FRESH_SECONDS, item[0])):
                if total + size <= limit:
                    break
                path.unlink(missing_ok=True)
                path.with_suffix(".ok").unlink(missing_ok=True)
                total -= length


def _verified(path: Path, size: int, sha256: str) -> bool:
    """Whether a cached file holds what it should. Its bytes are read if it changed since they last were."""
    try:
        status = path.stat()
        known = json.loads(path.with_suffix(".ok").read_text()) if path.with_suffix(".ok").exists() else None
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        known = None
    if status.st_size == size and known == [status.st_size, status.st_mtime_ns]:
        with contextlib.suppress(OSError):
            os.utime(path.with_suffix(".ok"))  # When it was last used.
        return True
    with contextlib.suppress(OSError), path.open("rb") as file:
        if status.st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            _note_verified(path)
            return True
    print(f"{path}: damaged in the cache; fetching it again", file=sys.stderr, flush=True)
    path.unlink(missing_ok=True)
    return False


def _note_verified(path: Path) -> None:
    status = path.stat()
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    partial.write_text(json.dumps([status.st_size, status.st_mtime_ns]))
    partial.replace(path.with_suffix(".ok"))


@contextlib.contextmanager
def _one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """Alone among the processes and threads of this machine. The kernel drops the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=10)
    except filelock.Timeout:
        print(f"waiting for another process that fetches {what}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_named(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (28, 122, 30):  # ENOSPC, EDQUOT, EROFS
            raise
        free = shutil.disk_usage(cache).free / 1e9
        raise UserError(
            f"data.cache: {cache} cannot be written ({error.strerror}, {free:.1f} GB free); make room, lower "
            "data.cache_gb, or name another place with data.cache or HRGAN_CACHE"
        ) from None


# Ways to a file


def _refuse_credentials(url: str) -> None:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        what = "a query" if parts.query or parts.fragment else "a user or password"
        place = CREDENTIALS[parts.scheme]
        raise UserError(
            f"data.path: the URL of {parts.hostname} holds {what}, which would end up in logs; leave it out, "
            f"credentials are taken from {place}"
        )


def _check_package(scheme: str) -> None:
    if scheme in HTTP:
        return
    try:
        __import__(PACKAGES[scheme])
    except ImportError:
        package = PACKAGES[scheme]
        raise UserError(f"data.path: {scheme}:// needs the package {package}: pip install {package}") from None


def open_http(url: str, timeout: float) -> Response:
    """A response whose every wait for bytes is bounded. FileNotFoundError for what is not there, Refused for other
    credentials, any error of the network."""
    request = urllib.request.Request(url, headers={"User-Agent": "hrgan"})
    login = _netrc(urlsplit(url).hostname or "")
    if login is not None:
        request.add_unredirected_header("Authorization", login)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(url) from None
        if error.code in (401, 403, 407):
            raise Refused from None
        raise ConnectionError(f"HTTP {error.code}") from None
    return Response(response, response.headers.get("Content-Length"))


class Response:
    """A response that says when it ends before its announced length, which urllib's `read(n)` does not."""

    def __init__(self, response: IO[bytes], length: str | None) -> None:
        self._response, self._left = response, int(length) if length and length.isdecimal() else None

    def read(self, most: int) -> bytes:
        piece = self._response.read(most)
        if self._left is not None:
            self._left -= len(piece)
            if not piece and self._left > 0:
                raise ConnectionError(f"the connection ended {self._left} bytes early")
        return piece

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()


def _netrc(host: str) -> str | None:
    """The Authorization header for a host that the user's netrc knows."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    if found is None:
        return None
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


@lru_cache(8)
def _filesystem(scheme: str, timeout: float, process: int) -> Any:
    """fsspec's. process: its threads do not survive a fork, so each has its own."""
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        times = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}
        options = {"config_kwargs": times}
    system = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    if scheme == "s3":
        system.retries = 1  # We try again ourselves.
    return system


def _from_command(command: str) -> Iterator[bytes]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(PIECE):
            yield piece
        if process.wait():
            raise ConnectionError(f"the command ended with code {process.returncode}")


def reason_of(error: Exception) -> str:
    """What went wrong, without what might be secret: texts of errors can quote URLs and headers."""
    inner = getattr(error, "reason", None)
    error = inner if isinstance(inner, Exception) else error
    if isinstance(error, TimeoutError):
        return "no answer in time (stalled)"
    text = redacted(" ".join(str(error).split()))[:200]
    own = isinstance(error, (ValueError, ConnectionError))
    return text if own and text else f"{type(error).__name__}{': ' + text if text else ''}"


def redacted(text: str) -> str:
    """A text without the users, passwords and queries of URLs, and without the values of tokens and signatures."""
    text = re.sub(r"://[^/\s@]*@", "://", text)
    text = re.sub(r"\?[^\s'\"]+", "?...", text)
    return re.sub(r"(?i)(token|signature|secret|password|authorization|key)(['\"]?\s*[:=]\s*)\S+", r"\1\2...", text)


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
