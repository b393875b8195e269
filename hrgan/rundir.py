"""The run directory: what is in it, who may go on in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from hrgan import checkpoint
from hrgan.config import Config, Precision, differences, from_dict, read_yaml, to_yaml
from hrgan.data.dataset import Dataset
from hrgan.errors import DataError, Stopped, UserError
from hrgan.schedule import Schedule

LOCK = ".lock"
PATIENCE_SECONDS = 30
"""How long a start waits for another training to end: one whose launcher died saves first."""
_held: list[TextIO] = []
"""Open lock files: closing one would drop its lock."""


def check_shards(config: Config, dataset: Dataset, schedule: Schedule) -> None:
    """Whether the set fits the configuration and each tier that the run will read is whole. UserError or DataError,
    one line."""
    network, form, where = config.network, dataset.form, dataset.where
    words = {"channels": "--channels", "bits": "--bits", "grid": "--resolution HEIGHTxWIDTH"}
    for name, asked, held in (
        ("channels", network.channels, form.channels),
        ("bits", network.bits, form.bits),
        ("grid", list(network.grid), list(form.grid)),
    ):
        if asked != held:
            raise UserError(
                f"network.{name}: {asked}, but {where} holds images of {held}; set --network.{name} "
                f"{str(held).replace(' ', '')} or build the set with another {words[name]}"
            )
    if network.condition != "none" and not dataset.classes:
        raise UserError(
            f"network.condition: {network.condition}, but {where} has no classes; set --network.condition none, or "
            "build the set with --labels (hrgan data build --help) or name an attribute with --data.label"
        )
    if dataset.resolution < network.resolution:
        raise UserError(
            f"network.resolution: {network.resolution}, but {where} was built up to {dataset.resolution}; "
            f"set --network.resolution {dataset.resolution} or build with --resolution {network.resolution}"
        )
    if dataset.num_samples < 4:
        raise DataError(f"{where}: {dataset.num_samples} images, expected at least 4")
    for resolution in sorted({phase.resolution for phase in schedule.phases}):
        dataset.check_tier(resolution)


def with_values(config: Config, dataset: Dataset) -> Config:
    """The configuration with the range of the set's numbers and the names of its classes filled in, so that a run and
    its checkpoints keep what they were trained with."""
    if config.data.values is not None and tuple(config.data.values) != dataset.values:
        low, high = dataset.values
        raise UserError(f"data.values: {config.data.values}, but {dataset.where} has [{low}, {high}]; leave it out")
    classes = list(dataset.classes) if config.network.condition != "none" else None
    if config.network.classes is not None and config.network.classes != classes:
        found = f"{len(classes)}: {', '.join(classes[:5])}..." if classes else "none that are asked for"
        raise UserError(f"network.classes: {config.network.classes}, but {dataset.where} has {found}; leave it out")
    data = replace(config.data, values=list(dataset.values))
    return replace(config, data=data, network=replace(config.network, classes=classes))


def has_begun(folder: Path) -> bool:
    """Whether a run directory holds anything that a training made."""
    log = folder / "log.jsonl"
    rows = log.exists() and log.stat().st_size > 0
    return rows or bool(checkpoint.numbered(folder)) or (folder / "FINISHED").exists()


def begun_precision(folder: Path) -> Precision | None:
    """What the run in a folder computes in, of what `precision: auto` may be: never fp16, which not every launch takes.
    None where there is none, or none that can be read (`open_run` says so)."""
    try:
        found = read_yaml(folder / "config.yaml").get("precision")
    except UserError:
        return None
    return found if has_begun(folder) and found in ("float32", "bf16") else None


def open_run(folder: Path, config: Config, dataset: Dataset, say: Callable[[str], None]) -> Path | None:
    """Make a run directory, or check that this configuration may go on in it. The checkpoint to go on from, None at
    the start."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run: {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (folder / "STOP").exists():
        # A launcher with --max_restarts takes a stop for a failure.
        raise Stopped(f"{folder} was stopped on request and is not restarted; the same command goes on")
    _lock(folder, say)
    # A kill in the first moments leaves no more than these. SLURM's logs and a stop may be there before the run.
    untouched = {path.name for path in folder.iterdir()} <= {LOCK, ".environment.json", "slurm", "STOP"}
    start = None if untouched else _reopen(folder, config, dataset, say)
    for marker in ("STOP", "FINISHED"):
        (folder / marker).unlink(missing_ok=True)
    _replace(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    _replace(folder / "config.yaml", to_yaml(config))
    (folder / "checkpoints").mkdir(exist_ok=True)
    return start


def _lock(folder: Path, say: Callable[[str], None]) -> None:
    """One training at a time in a run directory. The kernel drops the lock with this process, however that ends."""
    file = (folder / LOCK).open("w")
    waited, give_up = False, time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > give_up:
                raise UserError(
                    f"{folder}: another training is running here; wait for it, stop it or choose another --run"
                ) from None
            if not waited:
                say(f"{folder}: another training is running here; waiting {PATIENCE_SECONDS} s for it to end")
            waited = True
            time.sleep(0.5)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            # Some cluster file systems have no locks: that must not keep anyone from training on them.
            say(f"{folder} cannot be locked ({error.strerror}): make sure that only one training runs in it")
            break
    _held.append(file)


def _reopen(folder: Path, config: Config, dataset: Dataset, say: Callable[[str], None]) -> Path | None:
    try:
        version = json.loads((folder / "environment.json").read_text())["run_format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: not a run of this hrgan (environment.json: {type(error).__name__}); choose another --run"
        ) from error
    if version != checkpoint.FORMAT:
        raise UserError(
            f"{folder}: written by run format {version}, this hrgan reads {checkpoint.FORMAT}; use the "
            "hrgan that wrote it or another --run"
        )
    # What was refused, or killed before its first tick, may be asked for otherwise.
    begun = has_begun(folder)
    changed = differences(from_dict(read_yaml(folder / "config.yaml")), config) if begun else []
    if changed:
        raise UserError(
            "\n".join(
                [
                    f"{folder}: the run was started with another configuration; change it back or choose another --run",
                    *(f"  {line}" for line in changed),
                ]
            )
        )
    try:
        start = checkpoint.newest(folder, say)
    except UserError as error:
        raise UserError(f"{error}; remove {folder / 'checkpoints'} to start anew") from error
    if start is not None:
        real_set = json.loads((start / "state.json").read_text())["real_set"]
        if real_set != dataset.real_set:
            raise UserError(
                f"data.path: {dataset.where} holds other images (set {dataset.real_set[:12]}) than "
                f"{folder} was trained on ({real_set[:12]})"
            )
    return start


def environment() -> dict[str, Any]:
    """What this process runs on."""
    packages = ("hrgan", "torch", "torchvision", "accelerate", "deepspeed", "webdataset", "torch-fidelity", "numpy",
                "pillow")  # fmt: skip
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "run_format": checkpoint.FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "packages": {name: metadata.version(name) for name in packages},
    }


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    os.replace(partial, path)
