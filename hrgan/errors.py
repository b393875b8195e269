"""What a run can end with, and the exit code of each. Every message is one line for a person: what was found, what was
expected, what to do."""

import errno
import os
from typing import IO

REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)
"""Errors of the system that a user mends by making room, or by naming another place: no fault of the program."""


def one_line(text: object, most: int = 200) -> str:
    """What a file says of itself, fit for a message: names and values may hold anything."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[:most]}..."


def to_nowhere(stream: IO[str]) -> None:
    """Let what is still written to a stream that nobody reads get lost, where Python would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class HrganError(Exception):
    """An end with a known cause: printed as one line without a traceback."""

    exit_code = 1


class UserError(HrganError):
    """The command, the configuration or the machine it was given is wrong; nothing was lost."""

    exit_code = 2


def refused_by_system(error: OSError) -> UserError:
    """A UserError for one of REFUSALS, naming the file; any other error is raised again as it is."""
    if error.errno not in REFUSALS:
        raise error
    return UserError(f"{error.filename or 'a file'}: {error.strerror}; make room there or name another place")


class Stopped(HrganError):
    """Stopped on request with everything saved; the same command goes on."""

    exit_code = 3


class DataError(HrganError):
    """The images or shards cannot be used."""

    exit_code = 4


class Drifted(HrganError):
    """Processes that must hold the same numbers do not: a fault of the machine or the program."""


class Diverged(HrganError):
    """Training produced non-finite numbers too many times in a row; the last checkpoint is untouched."""

    exit_code = 5

    def __init__(self, message: str, since: int) -> None:
        """since: images seen when that began."""
        super().__init__(message)
        self.since = since
