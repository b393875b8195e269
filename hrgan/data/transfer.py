"""Ways to a file at a URL, none of which waits for ever: HTTP, the stores that fsspec opens, and commands. What they
say of errors quotes no credentials."""

from __future__ import annotations

import base64
import netrc
import os
import re
import select
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, Any
from urllib.parse import urlsplit

from hrgan.errors import UserError

PIECE = 2**20
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


class Refused(Exception):
    """The server wants other credentials."""


def refuse_credentials(url: str) -> None:
    """UserError for a URL that holds some, or that is none."""
    try:
        parts = urlsplit(url)
    except ValueError as error:  # whose text quotes the URL for some mistakes
        raise UserError(f"data.path: no URL: {redacted(url)} ({type(error).__name__})") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        what = "a query" if parts.query or parts.fragment else "a user or password"
        place = CREDENTIALS[parts.scheme]
        raise UserError(
            f"data.path: the URL of {parts.hostname} holds {what}, which would end up in logs; leave it out, "
            f"credentials are taken from {place}"
        )


def check_package(scheme: str) -> None:
    """UserError where the package that opens this kind of URL is missing."""
    if scheme in HTTP:
        return
    try:
        __import__(PACKAGES[scheme])
    except ImportError:
        package = PACKAGES[scheme]
        raise UserError(f"data.path: {scheme}:// needs the package {package}: pip install {package}") from None


def open_http(url: str, timeout: float) -> Response:
    """A response whose every wait for bytes is bounded. FileNotFoundError for what is not there, Refused for other
    credentials, any error of the network.

    By the standard library, not fsspec: the time-out is that of the socket, and there is no event loop in a thread that
    a fork would lose."""
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
def filesystem(scheme: str, timeout: float, process: int) -> Any:
    """fsspec's. process: its threads do not survive a fork, so each has its own."""
    import aiohttp
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        # "max_attempts" would count further attempts only.
        times = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        options = {"config_kwargs": times}
    if scheme == "gs":
        # Without it gcsfs waits for ever. Its own six attempts cannot be turned off.
        options = {"requests_timeout": aiohttp.ClientTimeout(sock_connect=timeout, sock_read=timeout)}
    system = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    if scheme == "s3":
        system.retries = 1  # We try again ourselves.
    return system


def from_command(command: str, timeout: float) -> Iterator[bytes]:
    """What a command prints. Its whole group of processes ends with it."""
    with (
        tempfile.TemporaryFile() as told,
        subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=told, start_new_session=True
        ) as process,
    ):
        assert process.stdout is not None
        output, length = process.stdout.fileno(), 0
        arriving = select.poll()  # select() takes no descriptor above 1023.
        arriving.register(output, select.POLLIN)
        try:
            while True:
                if not arriving.poll(timeout * 1000):
                    raise TimeoutError
                piece = os.read(output, PIECE)
                if not piece:
                    break
                length += len(piece)
                yield piece
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            if process.returncode is None:  # Else its number may be another's by now.
                os.killpg(process.pid, signal.SIGKILL)
        told.seek(max(0, told.seek(0, os.SEEK_END) - 1000))
        last = redacted(told.read().decode(errors="replace").strip().rpartition("\n")[2])
        if code or not length:
            end = f"the command ended with code {code}" if code else "the command printed nothing"
            raise ConnectionError(f"{end}{': ' + last if last else ''}")


def is_refusal(error: Exception) -> bool:
    """Whether a store's error is that it wants other credentials. Each library has its own way to say so."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
    return (
        isinstance(error, (Refused, PermissionError))
        or status in (401, 403)
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
        or (isinstance(error, OSError) and str(error).startswith("Forbidden:"))  # gcsfs
    )


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
    text = re.sub(r"://[^/\s]*@", "://", text)
    text = re.sub(r"\?[^\s'\"]+", "?...", text)
    text = re.sub(r"(?i)\b(basic|bearer)\s+[^\s'\"]+|\bhf_\w{8,}", "...", text)
    return re.sub(r"(?i)(token|signature|secret|password|authorization|key)(['\"]?\s*[:=]\s*)\S+", r"\1\2...", text)
