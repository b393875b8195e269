"""How much faster several processes train than one: `hrgan bench step` on one, on all of them together, and on as many
that know nothing of each other, which is what the machine allows, in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

import torch

from hrgan.config import Config, at, resolutions, to_yaml
from hrgan.errors import HrganError, UserError

Row = dict[str, Any]
WANTED = 1.7
"""Least ratio of two processes on two cores to one on one core."""


def bench_world(config: Config, processes: int, seconds: float) -> list[Row]:
    """A row for each resolution and precision: images/s of 1 process, of `processes` with the same batch, and of
    `processes` at once with their share of the batch each and nothing to exchange. On CPUs each has one core; batches
    come from memory."""
    places = _places(processes)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    share = {size: at(config.schedule.batch, size) // processes for size in resolutions(config)}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(to_yaml(replace(config, data=replace(config.data, path=""))))
        file.flush()
        bench = ["-m", "hrgan", "bench", "step", "--json", "--seconds", str(seconds), "--config", file.name]
        alone = [sys.executable, *bench, "--schedule.batch", json.dumps(share)]
        one = _rows(_start([sys.executable, *bench], places[:1]))
        together = _rows(_start([*launch, "--main_process_port", "0", *bench], places))
        apart = [_rows(started) for started in [_start(alone, [place]) for place in places]]
    keys = ("resolution", "precision", "batch")
    return [
        {key: row[key] for key in keys}
        | {"one": row["img_per_sec"], "many": many["img_per_sec"], "limit": sum(r["img_per_sec"] for r in unrelated)}
        | {"ratio": many["img_per_sec"] / row["img_per_sec"]}
        for row, many, *unrelated in zip(one, together, *apart, strict=True)
    ]


def _places(processes: int) -> list[int]:
    """The first GPUs, or cores, that this process may use. UserError where there are too few."""
    on_gpus = torch.cuda.is_available()
    there = list(range(torch.cuda.device_count())) if on_gpus else sorted(os.sched_getaffinity(0))
    if not 1 <= processes <= len(there):
        kind = "GPUs" if on_gpus else "cores"
        raise UserError(f"--processes: expected 1 to {len(there)}, the {kind} here, found {processes}")
    return there[:processes]


def _start(command: list[str], places: list[int]) -> subprocess.Popen[str]:
    """On these GPUs or cores."""
    environment, names = {**os.environ, "OMP_NUM_THREADS": "1"}, ",".join(map(str, places))
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = names
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
        command = ["taskset", "--cpu-list", names, *command]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _rows(started: subprocess.Popen[str]) -> list[Row]:
    output, errors = started.communicate()
    if started.returncode:
        raise HrganError(f"hrgan bench step ended with {started.returncode}: {errors.strip()[-300:]}")
    rows: list[Row] = json.loads(output[output.index("[") :])
    return rows


def print_table(rows: list[Row], processes: int) -> None:
    """For people."""
    print(
        f"images/s of 1 process, of {processes} that share its batch, of {processes} that exchange nothing (the limit)"
    )
    for row in rows:
        print(
            f"{row['resolution']:>5}² {row['precision']:>8} batch {row['batch']:>4} {row['one']:9.1f} "
            f"{row['many']:9.1f} {row['limit']:9.1f}   x {row['ratio']:.2f}, {row['many'] / row['limit']:.0%} of the "
            "limit"
        )
    if processes == 2:
        met = [f"{row['resolution']}² {row['precision']}" for row in rows if row["ratio"] >= WANTED]
        print(f"x {WANTED} or more, as asked, at {', '.join(met) or 'none'}")
