"""The bytes of a picture, wherever they are: files, spans of files, zip members, URLs. Runs in the worker processes."""

import os
import random
import stat
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from hrgan.data.index import Place
from hrgan.data.store import Store
from hrgan.data.transfer import HTTP, PIECE, Refused, open_http, reason_of
from hrgan.errors import HrganError, one_line

MOST = 2**30
"""Bytes of one picture's file. No decoder takes more, and a damaged length must not take all memory."""
ATTEMPTS = 5
BACKOFF_SECONDS = 0.5
TIMEOUT_SECONDS = 30.0


class Unfetched(Exception):
    """The bytes cannot be had. args: (reason, detail)."""


def fetch(place: Place) -> bytes:
    """The file's bytes. Raises Unfetched."""
    try:
        if place.kind == "zip":
            return _from_zip(place)
        if place.kind == "url":
            return _from_url(place.where)
        if place.kind == "span":
            data = os.pread(_kept(place.where, _Descriptor).number, place.size, place.offset)
            if len(data) != place.size:
                raise Unfetched("unreadable", f"the archive ends after {len(data)} of {place.size} bytes")
            return data
        if not stat.S_ISREG(os.stat(place.where).st_mode):
            raise Unfetched("unreadable", "no regular file")  # A pipe would be waited for, for ever.
        with open(place.where, "rb") as file:
            data = file.read(MOST + 1)
        if len(data) > MOST:
            raise Unfetched("too_large", f"more than {MOST} bytes")
        return data
    except OSError as error:
        raise Unfetched("unreadable", error.strerror or type(error).__name__) from None
    except ValueError:  # a NUL in the name
        raise Unfetched("unreadable", "no name of a file") from None


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self.number)


_open: OrderedDict[tuple[object, ...], Any] = OrderedDict()
MOST_OPEN = 8


def _kept(path: str, opener: Callable[[str], Any]) -> Any:
    """An open archive, kept for the next picture from it: each process its own, as an open file's place is shared with
    forked ones; and a file that was replaced is another."""
    status = os.stat(path)
    key = (path, opener, os.getpid(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _open:
        while len(_open) >= MOST_OPEN:
            _open.popitem(last=False)[1].close()
        _open[key] = opener(path)
    _open.move_to_end(key)
    return _open[key]


def _from_zip(place: Place) -> bytes:
    """A member from its own place: a ZipFile would hold the whole directory in each worker's memory."""
    kind, check, length = place.packed or (0, 0, 0)
    if max(length, place.size) > MOST:
        raise Unfetched("too_large", f"{length} bytes, at most {MOST}")
    archive = _kept(place.where, _Descriptor).number
    header = os.pread(archive, 30, place.offset)  # PKWARE's appnote, 4.3.7: the name's and the extra's lengths last
    start = place.offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    packed = os.pread(archive, place.size, start)
    if header[:4] != b"PK\3\4" or len(packed) != place.size:
        raise Unfetched("unreadable", "the archive has no such member at its place")
    if kind not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unfetched("unreadable", f"compression {kind}; pack the archive again with deflate or none")
    try:
        data = zlib.decompressobj(-15).decompress(packed, MOST + 1) if kind == zipfile.ZIP_DEFLATED else packed
    except zlib.error as error:
        raise Unfetched("unreadable", one_line(error)) from None
    if len(data) != length or zlib.crc32(data) != check:
        raise Unfetched("unreadable", "its checksum or length is not that of the archive's directory")
    return data


def plain_url(url: str) -> str:
    """A URL as people may see it: without user, password and query, which can hold secrets."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rsplit("@", 1)[-1]
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    except ValueError:
        return "a malformed URL"


def _from_url(url: str) -> bytes:
    """With retries; what a server refuses for good is not asked for again. No text quotes the URL: it may hold secrets
    here, as rows of tables do."""
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) * (0.5 + random.random() / 2))
        try:
            return _download(url) if urlsplit(url).scheme in HTTP else _from_store(url)
        except FileNotFoundError:
            raise Unfetched("unreachable", "HTTP 404") from None
        except Refused:
            raise Unfetched("unreachable", "access was refused") from None
        except (Unfetched, MemoryError):
            raise
        except Exception as error:  # of sockets, TLS, HTTP and each kind of store
            problem = reason_of(error)
    raise Unfetched("unreachable", problem)


def _download(url: str) -> bytes:
    data = bytearray()
    with open_http(url, TIMEOUT_SECONDS) as response:
        while piece := response.read(PIECE):
            data += piece
            if len(data) > MOST:
                raise Unfetched("too_large", f"more than {MOST} bytes")
    return bytes(data)


@lru_cache(8)
def _store(root: str) -> Store:
    return Store(root)


def _from_store(url: str) -> bytes:
    root, _, name = url.rpartition("/")
    try:
        return _store(root).read(name, MOST)
    except HrganError as error:  # It tried again itself, and its text has no secrets.
        raise Unfetched("unreachable", str(error)) from None
