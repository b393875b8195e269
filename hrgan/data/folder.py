"""OUT, the folder that a build writes: what may be in it, who may write there, and what is removed."""

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from hrgan.data import manifest as manifests
from hrgan.errors import UserError

SKIPPED = "skipped.csv"
INDEX = "build.sqlite"
SPOOL = "build.spool"
RELIST = "build.relist"
"""Of a source that is listed again, to see whether it has changed."""
LOCK = "build.lock"
PARTS = manifests.PARTS
REPORT = "report.html"
OURS = {manifests.FILE, manifests.FILE + ".tmp", SKIPPED, INDEX, RELIST, SPOOL, LOCK, PARTS, REPORT}
OURS |= {f"{name}-journal" for name in (INDEX, RELIST)} | {f"{REPORT}.tmp"}


@contextlib.contextmanager
def disk_errors_named(out: Path) -> Iterator[None]:
    """A full or read-only disk as a UserError with the folder, what failed and the free space."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        full = isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_FULL
        refused = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST
        )  # fmt: skip
        if not (full or refused):
            raise
        what = getattr(error, "filename", None) or (INDEX if full else "a file")
        free = f"{shutil.disk_usage(out).free / 2**20:.1f} MB free" if out.is_dir() else "no such folder"
        raise UserError(f"{out}: cannot write {what} ({error}), {free}; make room or choose another OUT") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One build at a time. The kernel drops the lock with this process, however that ends."""
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held by forked workers
            # The file may have been removed by a build that ended between our opening and locking it.
            current = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, PermissionError):
            current = False
        if not current:
            raise UserError(f"{path.parent}: another build is writing here; wait for it or choose another OUT")
        try:
            yield
        finally:
            path.unlink()


def _is_tier(path: Path) -> bool:
    """Whether a folder is what a build writes: named by a power of two, with tar files only."""
    side = int(path.name) if path.name.isdecimal() else 0
    return side >= 16 and not side & (side - 1) and path.is_dir() and all(p.suffix == ".tar" for p in path.iterdir())


def _is_cache(path: Path) -> bool:
    """Whether a folder is what evaluations leave beside a set: statistics of its pictures."""
    return (
        path.name == "stats"
        and path.is_dir()
        and all(p.suffix == ".safetensors" or p.name.startswith(".") for p in path.iterdir())
    )


def check_folder(out: Path, overwrite: bool, merging: bool = False) -> None:
    """UserError for an OUT that holds a finished set (unless that may be replaced) or anything that no build wrote."""
    if (out / PARTS).is_dir() and not merging:
        raise UserError(
            f"{out} holds parts of a set; join them with `hrgan data merge {out}`, or remove {out / PARTS} first"
        )
    if (out / manifests.FILE).exists() and not overwrite:
        raise UserError(f"{out} already holds a set; add --overwrite to replace it or choose another OUT")
    for entry in sorted(out.iterdir()):
        if entry.name not in OURS and not _is_tier(entry) and not _is_cache(entry):
            raise UserError(f"{out} holds {entry.name}, which no build wrote; choose an empty or new OUT")


def clean(out: Path, keep: str = "") -> None:
    """Remove a set, whole or partial; its manifest first, so that no moment shows a manifest without its shards."""
    for name in (manifests.FILE, *sorted(OURS - {manifests.FILE, LOCK, PARTS, keep})):
        (out / name).unlink(missing_ok=True)
    for entry in out.iterdir():
        if entry.is_dir() and (_is_tier(entry) or _is_cache(entry)):
            shutil.rmtree(entry)
