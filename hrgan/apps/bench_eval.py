"""How fast `hrgan eval` is on a pair of folders: beside torch-fidelity's own command on the same files, the second
time, and on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hrgan.errors import UserError, one_line
from hrgan.metrics.rows import Row


def bench_eval(a: Path, b: Path, weights: Path) -> list[Row]:
    """FID of A against B with FID's Inception (`weights`, a file as torch-fidelity takes it), each in a process of its
    own, with everything from the start of the command to its end; `seconds` without imports where it says so."""
    for folder in (a, b):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name two folders of pictures of one size")
    if not weights.is_file():
        raise UserError(f"--weights: {weights} is no file; name FID's Inception weights, or random ones of its shapes")
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary)
        peer = timed(fidelity(a, b, weights), {})[0]
        words = ["eval", str(a), str(b), "--extractor", "inception", "--weights", str(weights)]
        own = [sys.executable, "-m", "hrgan", *words]
        first, row = timed(own, {"HRGAN_CACHE": str(cache / "first")})
        again, _ = timed(own, {"HRGAN_CACHE": str(cache / "first")})
        rows: list[Row] = [
            {"what": "fidelity --fid", "seconds": peer},
            {"what": "hrgan eval", "seconds": first, "ratio": first / peer, "of": "fidelity --fid"},
            {"what": "hrgan eval, again", "seconds": again, "ratio": again / first, "of": "hrgan eval"},
        ]
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            rows += _processes(own, words, cores[:2], cache)
        about = {"pictures": f"{row['num_fake']} and {row['num_real']}", "size": row["resolution"]}
        return [{**row, **about} for row in rows]


def _processes(own: list[str], words: list[str], cores: list[int], cache: Path) -> list[Row]:
    """One process on one core and two on two: what a row says of its time, which is without imports."""
    single = {"OMP_NUM_THREADS": "1"}
    _, one = timed(own, {**single, "HRGAN_CACHE": str(cache / "one")}, cores[:1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "hrgan", *words]
    environment = {**single, "ACCELERATE_USE_CPU": "true", "HRGAN_CACHE": str(cache / "two")}
    _, two = timed(launch, environment, cores)
    return [
        {"what": "1 process on 1 core, without imports", "seconds": one["seconds"]},
        {
            "what": "2 processes on 2 cores, without imports",
            "seconds": two["seconds"],
            "ratio": two["seconds"] / one["seconds"],
            "of": "1 process on 1 core, without imports",
        },
    ]


def fidelity(a: Path, b: Path, weights: Path) -> list[str]:
    """torch-fidelity's command for the same."""
    options = ["--input1", str(a), "--input2", str(b), "--fid", "--no-cache", "--silent", "--samples-find-deep"]
    options += ["--gpu", "0"] if torch.cuda.is_available() else []
    code = "import sys; from torch_fidelity.fidelity import main; sys.exit(main())"
    return [sys.executable, "-c", code, *options, "--feature-extractor-weights-path", str(weights)]


def timed(command: list[str], environment: dict[str, str], cores: list[int] | None = None) -> tuple[float, Row]:
    """Seconds, and the row that it printed ({} where it printed none)."""

    def on_cores() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)

    began = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, preexec_fn=on_cores
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        reason = one_line(done.stderr[-300:], 300)
        raise UserError(f"{' '.join(command[:6])} ... ended with {done.returncode}: {reason}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    return seconds, json.loads(lines[-1]) if lines else {}


def print_table(rows: list[Row]) -> None:
    """For people."""
    print(f"FID of {rows[0]['pictures']} pictures of {rows[0]['size']}")
    for row in rows:
        ratio = f"{row['ratio']:6.2f} x {row['of']}" if "ratio" in row else ""
        print(f"{row['what']:42} {row['seconds']:8.1f} s {ratio}")
