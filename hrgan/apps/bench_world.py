"""How much faster several processes train than one: `hrgan bench step` on one and on all of them, in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from hrgan.errors import HrganError

Row = dict[str, Any]
WANTED = 1.7
"""Least ratio of two processes on two cores to one on one core."""


def bench_world(words: list[str], processes: int, seconds: float) -> list[Row]:
    """A row for each resolution and precision: images/s of 1 process and of `processes`, and their ratio. On CPUs each
    process has one core. words: the configuration's, as `hrgan bench step` takes them; batches come from memory."""
    bench = ["-m", "hrgan", "bench", "step", "--json", "--seconds", str(seconds), *words, "--data.path", ""]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    one = _rows([sys.executable, *bench], cores=1)
    many = _rows([*launch, "--main_process_port", "0", *bench], cores=processes)
    keys = ("resolution", "precision", "batch")
    return [
        {key: a[key] for key in keys}
        | {"one": a["img_per_sec"], "many": b["img_per_sec"], "ratio": b["img_per_sec"] / a["img_per_sec"]}
        for a, b in zip(one, many, strict=True)
    ]


def _rows(command: list[str], cores: int) -> list[Row]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    if not torch.cuda.is_available():
        if len(allowed) < cores:
            raise HrganError(f"--processes: {cores} need as many cores, found {len(allowed)}")
        environment["ACCELERATE_USE_CPU"] = "true"
        command = ["taskset", "--cpu-list", ",".join(map(str, allowed)), *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise HrganError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    rows: list[Row] = json.loads(done.stdout[done.stdout.index("[") :])
    return rows


def print_table(rows: list[Row], processes: int) -> None:
    """For people."""
    print(f"images/s of 1 and of {processes} processes, one core each on CPUs")
    for row in rows:
        print(
            f"{row['resolution']:>5}² {row['precision']:>8} batch {row['batch']:>4} {row['one']:9.1f} "
            f"{row['many']:9.1f}  x {row['ratio']:.2f}"
        )
    if processes == 2:
        best = max(row["ratio"] for row in rows)
        last = [row["ratio"] for row in rows if row["resolution"] == rows[-1]["resolution"]]
        print(f"at the last size x {min(last):.2f} to {max(last):.2f}, best x {best:.2f}; asked {WANTED}")
