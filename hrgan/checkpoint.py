"""Run state on disk: portable, atomic, verified.

A checkpoint is a folder named by nimg: one safetensors file for each of the engine's PARTS (whole float32 tensors by
parameter name), `state.json`, and `manifest.json` with the sha256 of the others, written last. The folder is written
under another name, fsync'ed and renamed, then `latest` is replaced: a kill at any moment leaves the checkpoints
before it whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from hrgan.config import Config, from_dict
from hrgan.engine import PARTS, State
from hrgan.errors import REFUSALS, UserError
from hrgan.metrics.rows import best_row
from hrgan.monitor.log import locked, read_rows
from hrgan.watch import beat

FORMAT = 1
"""Version of the checkpoint and of the run directory."""
PIECE = 2**23
"""Bytes written or read at once."""


@dataclass(frozen=True)
class Progress:
    """What a run knows besides tensors."""

    nimg: int = 0
    """Real images shown to the discriminator."""
    skipped_steps: int = 0
    """Steps skipped for non-finite numbers."""
    bad_samples: int = 0
    """Samples replaced because they could not be read."""
    seconds: float = 0.0
    """Wall-clock time of training so far."""
    eval_seconds: float = 0.0
    """Wall-clock time of evaluations so far, without that of the reals' statistics."""
    eval_took: float = 0.0
    """Of that the last evaluation's, or what one that was left out would have taken."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint because it diverged."""
    lr_scale: float = 1.0
    """What these multiplied both learning rates by."""


# Writing


def save(run: Path, state: State, progress: Progress, config: Config, real_set: str) -> Path:
    """Write the checkpoint of `progress.nimg` and point `latest` at it. UserError on a full disk: what was saved
    before stays."""
    folder = run / "checkpoints"
    final, partial = folder / str(progress.nimg), folder / f".writing-{progress.nimg}"
    description = {
        "format": FORMAT,
        "resolution": state.resolution,
        "fading": state.fading,
        "real_set": real_set,
        "progress": asdict(progress),
        "config": asdict(config),
    }
    with clear_on_full_disk(partial):
        _sweep(folder)
        partial.mkdir(parents=True)
        hashes = {}
        for name in PARTS:
            tensors = {key: tensor.to("cpu").contiguous() for key, tensor in state.parts[name].items()}
            hashes[f"{name}.safetensors"] = write_durably(
                partial / f"{name}.safetensors", safetensors.torch.save(tensors)
            )
        hashes["state.json"] = write_durably(partial / "state.json", json.dumps(description, indent=1).encode())
        write_durably(partial / "manifest.json", json.dumps(hashes, indent=1).encode())
        fsync_folder(partial)
        if final.exists():  # Only ever one that did not verify, or the same moment once more.
            final.rename(folder / f".writing-{progress.nimg}-before")
        partial.rename(final)
        fsync_folder(folder)
        point(run, "latest", progress.nimg)
        shutil.rmtree(folder / f".writing-{progress.nimg}-before", ignore_errors=True)
    return final


def point(run: Path, name: str, nimg: int) -> None:
    """Make `run/name` (latest or best) name the checkpoint of `nimg`, atomically, if it does not yet."""
    if (run / name).exists() and (run / name).read_text() == f"{nimg}\n":
        return
    partial = run / f".{name}"
    write_durably(partial, f"{nimg}\n".encode())
    os.replace(partial, run / name)
    fsync_folder(run)


def write_durably(path: Path, content: bytes) -> str:
    """Write and fsync a file; its sha256. In pieces, each to the disk before the next, so that a slow disk shows as
    progress (watch.py)."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, max(1, len(content)), PIECE):
            piece = content[start : start + PIECE]
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            digest.update(piece)
            beat()
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    beat()


@contextmanager
def clear_on_full_disk(partial: Path) -> Iterator[None]:
    """Turn a failed write into one clear UserError and remove the half-written folder."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno not in REFUSALS:
            raise
        run = partial.parent.parent
        free = shutil.disk_usage(run).free / 2**20
        raise UserError(
            f"{run}: {error.strerror} while saving {partial.name.removeprefix('.writing-')} ({free:.0f} MiB "
            "free); earlier checkpoints are "
            "untouched: free some space and run the same command again"
        ) from error


def prune(run: Path, newest: int, keep: int, keep_every_kimg: float | None) -> None:
    """Name the best, and delete checkpoints besides it, `keep` of them up to `newest`, and the first of each
    `keep_every_kimg`.

    Any after `newest` did not verify when the run went on; they must not take the place of good ones.
    """
    _sweep(run / "checkpoints")
    # No watcher may name a best that is deleted in the same moment.
    with locked(run / "metrics.jsonl"):
        _prune(run, newest, keep, keep_every_kimg)


def _prune(run: Path, newest: int, keep: int, keep_every_kimg: float | None) -> None:
    saved = sorted(int(path.name) for path in numbered(run) if int(path.name) <= newest)
    kept = {*saved[-keep:], name_best(run)}
    if keep_every_kimg is not None:
        first: dict[int, int] = {}
        for nimg in saved:
            first.setdefault(int(nimg / 1000 // keep_every_kimg), nimg)
        kept.update(first.values())
    for nimg in saved:
        if nimg not in kept:
            _delete(run, nimg)


def name_best(run: Path) -> int | None:
    """Point `best` at the checkpoint that metrics.jsonl has the best number of (rows.best_row), among those that are
    there. The training does so after each save, and `hrgan eval --watch` after each row, so both by this rule. nimg of
    the best, None where none was measured."""
    saved = {int(folder.name) for folder in numbered(run)}
    row = best_row(row for row in read_rows(run / "metrics.jsonl") if row["nimg"] in saved)
    if row is None:
        (run / "best").unlink(missing_ok=True)
        return None
    nimg = int(row["nimg"])
    point(run, "best", nimg)
    return nimg


def forget_after(run: Path, nimg: int) -> None:
    """Delete the checkpoints after `nimg`, which a run went back from."""
    for folder in numbered(run):
        if int(folder.name) > nimg:
            _delete(run, int(folder.name))
    with locked(run / "metrics.jsonl"):
        name_best(run)


def _sweep(folder: Path) -> None:
    """Remove what kills left half written or half deleted."""
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover)


def _delete(run: Path, nimg: int) -> None:
    """A kill in the middle must not leave half a folder with a good name."""
    doomed = run / "checkpoints" / f".writing-{nimg}"
    (run / "checkpoints" / str(nimg)).rename(doomed)
    shutil.rmtree(doomed)


# Reading


def numbered(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: -int(path.name))


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, in words, or None when every file is there and has its sha256."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text())
        for name, expected in hashes.items():
            found = _sha256(folder / name)
            if found != expected:
                return f"{name} is altered (sha256 {found[:12]}, expected {expected[:12]})"
        version = json.loads((folder / "state.json").read_text())["format"]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"cannot be read ({error})"
    return None if version == FORMAT else f"has format {version}, this hrgan reads {FORMAT}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            beat()
    return digest.hexdigest()


def newest(run: Path, say: Callable[[str], None], at_most: int | None = None) -> Path | None:
    """The newest checkpoint (of at most so many images) that verifies; those passed over are said. None when the run
    has none; UserError when none verifies."""
    faults = []
    for folder in numbered(run):
        if at_most is not None and int(folder.name) > at_most:
            continue
        reason = fault(folder)
        if reason is None:
            return folder
        faults.append(f"{folder.name}: {reason}")
        say(f"checkpoint {folder} passed over: {reason}")
    if faults:
        raise UserError(f"{run}: no checkpoint can be used ({'; '.join(faults)})")
    return None


@dataclass(frozen=True)
class Saved:
    """A checkpoint in memory."""

    state: State
    progress: Progress
    config: Config
    real_set: str


def load(folder: Path, parts: tuple[str, ...] = PARTS) -> Saved:
    """Read a checkpoint that verifies; `parts` may name fewer files."""
    description: dict[str, Any] = json.loads((folder / "state.json").read_text())
    tensors: dict[str, dict[str, torch.Tensor]] = {
        name: safetensors.torch.load_file(folder / f"{name}.safetensors")
        for name in parts
        if name != "feedback" or (folder / f"{name}.safetensors").exists()  # Runs of before there was any lack it.
    }
    tensors.setdefault("feedback", {})
    state = State(description["resolution"], description["fading"], tensors)
    known = {item.name for item in fields(Progress)}
    progress = Progress(**{key: value for key, value in description["progress"].items() if key in known})
    return Saved(state, progress, saved_config(description), description["real_set"])


def saved_config(description: dict[str, Any]) -> Config:
    """The configuration in a state.json. JSON turns the keys of maps by resolution into strings; this turns them
    back."""

    def integer_keys(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {int(key) if key.isdigit() else key: integer_keys(item) for key, item in value.items()}

    return from_dict(integer_keys(description["config"]))


def _outgrown(best: Path, last: Path) -> bool:
    """Whether the last checkpoint has finished growing to a resolution above the best one's: of short runs the higher
    ones may never have been measured. A last one that cannot be read has outgrown nothing."""
    try:
        before, after = (json.loads((folder / "state.json").read_text()) for folder in (best, last))
        grown: int = after["resolution"] // (2 if after["fading"] else 1)
        return bool(grown > before["resolution"])
    except (OSError, ValueError, KeyError):
        return False


def find(target: Path) -> Path:
    """The checkpoint that a run directory (its best, or its newest where that has outgrown it) or a checkpoint folder
    means; UserError naming what is wrong."""
    if (target / "state.json").exists() or target.name.isdigit():
        folder = target
    elif (target / "checkpoints").is_dir():
        best = target / "best"
        folder = target / "checkpoints" / (best.read_text().strip() if best.exists() else "none")
        numbers = numbered(target)
        outgrown = bool(numbers) and _outgrown(folder, numbers[0])
        if not outgrown and fault(folder) is None:
            return folder
        found = newest(target, lambda line: print(line, file=sys.stderr))
        if found is None:
            raise UserError(f"{target}: no checkpoint yet; train it first")
        if outgrown:
            print(f"{target}: its best checkpoint is of a smaller size than {found.name}, taken here", file=sys.stderr)
        return found
    else:
        raise UserError(
            f"{target}: neither a run directory nor a checkpoint folder; name for example runs/demo or "
            "runs/demo/checkpoints/120000"
        )
    reason = fault(folder)
    if reason is not None:
        raise UserError(f"{folder}: {reason}; name another checkpoint")
    return folder
