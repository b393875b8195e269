"""Ways of dying: each is noticed, named, and costs at most what came after the last checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hrgan import checkpoint
from hrgan.watch import POST_SECONDS
from tests.conftest import TINY, Children
from tests.test_train import final_tensors, records, train

ROOT = Path(__file__).parent.parent
RARE = ("--log.tick_kimg", "100", "--checkpoint.every_kimg", "100")
"""Ticks and checkpoints at borders only, so that a stop between them is seen for itself."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path, children: Children) -> Callable[[int], Path]:
    """The run directory of ten uninterrupted steps on so many processes."""
    made: dict[int, Path] = {}

    def of(world: int) -> Path:
        if world not in made:
            folder = tmp_path_factory.mktemp("whole")
            (folder / "tiny.yaml").write_text(TINY.format(shards=shards))
            words = (str(folder / "tiny.yaml"), str(folder / "run"), *RARE)
            code, output = children.run(folder / "log", train, *words, world=world)
            assert code == 0, output
            made[world] = folder / "run"
        return made[world]

    return of


def assert_goes_on_like(expected: Path, run: Path, config: Path, world: int, children: Children, *words: str) -> None:
    """The same command finishes with the same bits and the same evaluations as if nothing had happened."""
    code, output = children.run(run.parent / "again", train, str(config), str(run), *(words or RARE), world=world)
    assert code == 0, output
    found, wanted = final_tensors(run), final_tensors(expected)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]
    for row, same in zip(records(run, "metrics.jsonl"), records(expected, "metrics.jsonl"), strict=True):
        # Statistics of reals that another number of processes made are of batches that round differently.
        assert row.keys() == same.keys()
        for key in row.keys() - {"seconds"}:
            assert row[key] == (pytest.approx(same[key], rel=1e-6) if isinstance(row[key], float) else same[key]), key
    assert (run / "FINISHED").exists()
    assert not (run / "STOP").exists()


# Stops


def at_step(number: int, act: Callable[[int], None]) -> None:
    """Plant something that happens before D's step of this number (from 0); it is given the rank."""
    import hrgan.train as loop

    original, count = loop.d_step, iter(range(10**6))

    def d_step(engine: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        if next(count) == number:
            act(engine.rank)
        return original(engine, *arguments, **keywords)

    loop.d_step = d_step


def asked_to_stop(source: str, rank: int, config: str, run: str) -> int:
    """In a child: asked to stop in the third step, on one process only."""

    def act(mine: int) -> None:
        if source == "deadline":
            Path(run, "late").touch()
        elif source == "STOP":
            Path(run, "STOP").touch()
        elif mine == rank:
            os.kill(os.getpid(), getattr(signal, source))

    at_step(2, act)
    if source == "deadline":
        from hrgan.watch import Watch

        clock = time.time

        def reason(watch: Watch, original: Any = Watch.reason) -> Any:
            time.time = lambda: clock() + 3600 * Path(run, "late").exists()  # type: ignore[method-assign]
            return original(watch)

        Watch.reason = reason  # type: ignore[method-assign]
        os.environ["HRGAN_DEADLINE"] = str(int(clock() + 3000))
    return train(config, run, *RARE, "--limits.margin_minutes", "5")


@pytest.mark.parametrize(
    ("source", "world", "said"),
    [
        ("SIGTERM", 1, "SIGTERM"),
        ("SIGINT", 1, "SIGINT"),
        ("SIGUSR1", 1, "SIGUSR1"),
        ("STOP", 1, "a STOP file"),
        ("deadline", 1, "the time limit less limits.margin_minutes"),
        pytest.param("SIGUSR1", 2, "SIGUSR1 on rank 1", marks=pytest.mark.slow),
        pytest.param("STOP", 2, "a STOP file on rank 0", marks=pytest.mark.slow),
    ],
)
def test_a_stop_is_seen_at_the_next_step_on_all_processes_and_nothing_is_lost(
    source: str, world: int, said: str, tmp_path: Path, tiny: Path, whole: Callable[[int], Path], children: Children
) -> None:
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", asked_to_stop, source, world - 1, str(tiny), str(run), world=world)
    assert code == 3, output
    assert f"stopped at 0.048 kimg with everything saved in {run} ({said})" in output
    assert (run / "latest").read_text() == "48\n"  # In the middle of a fade, with no tick or checkpoint due.
    assert (run / "STOP").exists()
    assert_goes_on_like(whole(world), run, tiny, world, children)


def stopped_while(activity: str, nimg: int, config: str, run: str, shards: str) -> int:
    """In a child: SIGTERM on the last process only, in the middle of an evaluation or a save at `nimg`."""
    from hrgan.metrics import evaluation as measuring

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def ask() -> None:
        if rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    if activity == "save":
        original = checkpoint.write_durably

        def write_durably(path: Path, content: bytes) -> str:
            if path.name == "ema.safetensors" and str(nimg) in path.parent.name:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            return original(path, content)

        checkpoint.write_durably = write_durably
    else:
        name = "extract" if activity == "fakes" else "of_reals"
        part, count = getattr(measuring, name), iter(range(10**6))
        evaluation = {32: 0, 96: 1, 160: 2}[nimg]

        def interrupted(*arguments: Any, **keywords: Any) -> Any:
            if next(count) == evaluation:
                ask()
            return part(*arguments, **keywords)

        setattr(measuring, name, interrupted)
    return train(config, run, *RARE, "--data.path", shards)


@pytest.mark.parametrize(
    ("activity", "nimg", "world"),
    [
        ("fakes", 32, 1),
        ("reals", 96, 1),
        ("fakes", 160, 1),
        ("save", 64, 1),
        pytest.param("fakes", 32, 2, marks=pytest.mark.slow),
        pytest.param("reals", 160, 2, marks=pytest.mark.slow),
        pytest.param("save", 96, 2, marks=pytest.mark.slow),
    ],
)
def test_a_stop_during_an_evaluation_or_a_save_leaves_nothing_out(
    activity: str,
    nimg: int,
    world: int,
    tmp_path: Path,
    tiny: Path,
    shards: Path,
    whole: Callable[[int], Path],
    children: Children,
) -> None:
    run, copy = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("stats"))  # No real statistics are cached there.
    words = (activity, nimg, str(tiny), str(run), str(copy))
    code, output = children.run(tmp_path / "log", stopped_while, *words, world=world)
    assert code == 3, output
    assert (run / "latest").read_text() == f"{nimg}\n"
    if activity != "save":  # The evaluation was left, its checkpoint made.
        rows = records(run, "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        assert nimg not in [row["nimg"] for row in rows]
    assert_goes_on_like(whole(world), run, tiny, world, children)
    assert (run / "best").read_text() == (whole(world) / "best").read_text()


def interrupted_twice(config: str, run: str) -> int:
    """In a child: Ctrl-C, and once more, while the training waits in one long call."""

    def act(rank: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(100)

    at_step(3, act)
    return train(config, run)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, tiny: Path, children: Children) -> None:
    began = time.monotonic()
    code, output = children.run(tmp_path / "log", interrupted_twice, str(tiny), str(tmp_path / "run"))
    assert code == 130, output
    assert time.monotonic() - began < 60
    assert "SIGINT again: ending at once" in output
    latest = tmp_path / "run" / "checkpoints" / (tmp_path / "run" / "latest").read_text().strip()
    assert checkpoint.fault(latest) is None


# Under the launcher


class Launched:
    """`accelerate launch` of a training on two processes, and what it prints."""

    def __init__(self, log: Path, config: Path, run: Path, *words: str, launcher: tuple[str, ...] = ()) -> None:
        line = f"accelerate launch --config_file {ROOT}/launch/cpu-2.yaml --main_process_port 0".split()
        line += [*launcher, "-m", "hrgan", "train", "--config", str(config), "--run", str(run), *words]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PATH": path, "OMP_NUM_THREADS": "1"}
        self.log, self.run = log, run
        with log.open("w") as output:
            self.process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def until_saved(self) -> list[psutil.Process]:
        """Wait for the first checkpoint; the two workers, in order of rank."""
        deadline = time.monotonic() + 120
        while not (self.run / "latest").exists():
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        found = [child for child in psutil.Process(self.process.pid).children() if "hrgan" in child.cmdline()]
        return sorted(found, key=lambda child: int(child.environ()["RANK"]))


@pytest.fixture
def launched() -> Iterator[Callable[..., Launched]]:
    """Starts launches; kills what is left of them at the end."""
    all_of_them: list[Launched] = []

    def start(*arguments: Any, **keywords: Any) -> Launched:
        all_of_them.append(Launched(*arguments, **keywords))
        return all_of_them[-1]

    yield start
    for launch in all_of_them:
        for process in psutil.process_iter(["cmdline"]):
            if str(launch.run) in (process.info["cmdline"] or []):
                process.kill()


LONG = ("--schedule.total_kimg", "100")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_workers_whose_launcher_is_killed_save_and_end(
    number: signal.Signals, tmp_path: Path, tiny: Path, launched: Callable[..., Launched]
) -> None:
    launch = launched(tmp_path / "log", tiny, tmp_path / "run", *LONG)
    workers = launch.until_saved()
    assert len(workers) == 2
    launch.process.send_signal(number)
    _, left = psutil.wait_procs(workers, timeout=40)
    assert not left, "orphans train on"
    assert "with everything saved" in launch.log.read_text()
    assert "the launcher is gone" in launch.log.read_text()
    assert checkpoint.fault(checkpoint.numbered(tmp_path / "run")[0]) is None


@pytest.mark.slow
def test_a_killed_worker_ends_all_and_is_named(tmp_path: Path, tiny: Path, launched: Callable[..., Launched]) -> None:
    launch = launched(tmp_path / "log", tiny, tmp_path / "run", *LONG)
    workers = launch.until_saved()
    time.sleep(2.5 * POST_SECONDS)  # It trains on, and says where it is.
    workers[1].kill()
    assert launch.process.wait(60) == 1
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left
    output = launch.log.read_text()
    assert "rank 0 ends, because it has lost rank 1 (" in output
    assert "exitcode  : -9" in output


@pytest.mark.slow
def test_a_launcher_with_restarts_finishes_by_itself_bit_for_bit(
    tmp_path: Path, tiny: Path, launched: Callable[..., Launched], children: Children
) -> None:
    words = ("--data.workers", "0", "--schedule.total_kimg", "1.6")
    launch = launched(tmp_path / "log", tiny, tmp_path / "run", *words, launcher=("--max_restarts", "2"))
    launch.until_saved()[1].kill()
    assert launch.process.wait(200) == 0, launch.log.read_text()
    assert "going on at" in launch.log.read_text()
    uninterrupted = (str(tiny), str(tmp_path / "uninterrupted"), *words, *RARE)
    code, output = children.run(tmp_path / "plain", train, *uninterrupted, world=2)
    assert code == 0, output
    found, wanted = final_tensors(tmp_path / "run"), final_tensors(tmp_path / "uninterrupted")
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


@pytest.mark.slow
def test_a_launcher_with_restarts_does_not_restart_what_was_stopped(
    tmp_path: Path, tiny: Path, launched: Callable[..., Launched]
) -> None:
    launch = launched(tmp_path / "log", tiny, tmp_path / "run", *LONG, launcher=("--max_restarts", "1"))
    launch.until_saved()
    (tmp_path / "run" / "STOP").touch()
    assert launch.process.wait(100) == 1
    assert "was stopped on request and is not restarted" in launch.log.read_text()
    assert (tmp_path / "run" / "STOP").exists()


# Hangs

SHORT = ("--limits.timeout_minutes", "0.1")


def hangs_in_data(config: str, run: str) -> int:
    """In a child: the second process never gets its fourth batch."""
    import hrgan.train as loop

    original = loop.open_reals

    def planted_hang(batches: Any, engine: Any, nimg: int) -> Any:
        for batch in batches:
            if engine.rank == 1 and nimg >= 48:
                time.sleep(1000)
            nimg += 16
            yield batch

    def open_reals(config: Any, engine: Any, manifest: Any, phase: Any, nimg: int) -> Any:
        return planted_hang(original(config, engine, manifest, phase, nimg), engine, nimg)

    loop.open_reals = open_reals
    return train(config, run, *SHORT)


@pytest.mark.slow
def test_a_hung_process_is_named_and_its_stack_printed(tmp_path: Path, tiny: Path, children: Children) -> None:
    began = time.monotonic()
    code, output = children.run(tmp_path / "log", hangs_in_data, str(tiny), str(tmp_path / "run"), world=2)
    assert code == 1, output
    assert time.monotonic() - began < 60
    assert re.search(r"not moved for \d+ s \(limits.timeout_minutes 0.1\); it is at: step 3, reading data", output)
    assert "rank 1 is behind, at: step 3, reading data" in output
    assert "rank 0 is at: step 3, on" in output
    # Both processes may print their stacks at once; neither tears the other's.
    lines = [line for line in output.splitlines() if 'File "' in line]
    assert all(re.fullmatch(r' +File "[^"]+", line \d+,? in \S+', line) for line in lines), output
    assert re.search(r'^MainThread .+\n  File ".+test_dying.py", line \d+ in planted_hang$', output, re.M)
    assert (tmp_path / "run" / "latest").read_text() == "48\n"


def stops_dead(config: str, run: str) -> int:
    """In a child: the second process is frozen in its fourth step, for good."""

    def act(rank: int) -> None:
        if rank == 1:
            killer = f"sleep 20; kill -KILL {os.getpid()}"
            subprocess.Popen(["sh", "-c", killer], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    at_step(3, act)
    return train(config, run, *SHORT)


@pytest.mark.slow
def test_a_frozen_process_is_named_by_the_others(tmp_path: Path, tiny: Path, children: Children) -> None:
    code, output = children.run(tmp_path / "log", stops_dead, str(tiny), str(tmp_path / "run"), world=2)
    assert code == 1, output
    assert "rank 0 (" in output
    assert "rank 1 does not answer (for " in output


def saves_slowly(config: str, run: str) -> int:
    """In a child: a disk on which each piece takes most of the time-out, and a save longer than any collective may
    take."""
    original = os.fsync

    def fsync(handle: int) -> None:
        time.sleep(2.5)
        original(handle)

    os.fsync = fsync
    words = ("--limits.timeout_minutes", "0.06", "--schedule.total_kimg", "0.016", "--checkpoint.every_kimg", "100")
    return train(config, run, *words)


@pytest.mark.slow
def test_a_slow_disk_holds_a_run_up_and_does_not_end_it(tmp_path: Path, tiny: Path, children: Children) -> None:
    began = time.monotonic()
    code, output = children.run(tmp_path / "log", saves_slowly, str(tiny), str(tmp_path / "run"), world=2)
    assert code == 0, output
    assert time.monotonic() - began > 0.06 * 60 * 1.5 + 15
    assert checkpoint.fault(tmp_path / "run" / "checkpoints" / "16") is None


def loses_its_disk(config: str, run: str) -> int:
    """In a child: the disk of the checkpoints becomes read-only in the fifth step."""
    saved = f"{run}/checkpoints"
    remount = f"cp -a {saved} {run}/copy && mount -t tmpfs tmpfs {saved} && cp -a {run}/copy/. {saved}/"
    at_step(4, lambda rank: None if os.system(f"{remount} && mount -o remount,ro {saved}") == 0 else os._exit(77))
    return train(config, run)


def test_a_disk_that_becomes_read_only_is_one_clear_line(tmp_path: Path, tiny: Path, children: Children) -> None:
    run = tmp_path / "run"
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    try:
        code, output = children.run(tmp_path / "log", loses_its_disk, str(tiny), str(run))
        if code == 77:
            pytest.skip("this machine does not let root mount a tmpfs")
        assert code == 2, output
        assert "Read-only file system" in output
        assert "Traceback" not in output
        assert checkpoint.fault(run / "checkpoints" / (run / "latest").read_text().strip()) is None
        assert (run / "latest").read_text() == "64\n"
    finally:
        os.system(f"umount {run}/checkpoints")


# Loss of loss


def diverging(times: int, config: str, run: str, *words: str) -> int:
    """In a child: NaN in the reals from 80 images on, the first so many times that they are reached."""
    from dataclasses import replace

    import hrgan.train as loop

    original, seen = loop.prepare_step, {"steps": 0}

    def prepare_step(engine: Any, config: Any, phase: Any, nimg: int, *batch: Any) -> Any:
        micros = original(engine, config, phase, nimg, *batch)
        seen["steps"] += nimg == 80
        if nimg in (80, 96) and seen["steps"] <= times:
            micros = [replace(micro, real=micro.real * float("nan")) for micro in micros]
        return micros

    loop.prepare_step = prepare_step
    words = ("--optim.max_skipped", "1", "--optim.on_divergence", "rollback", "--optim.lr", "0.01", *words)
    return train(config, run, *words)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_diverges_goes_back_and_on_with_lower_learning_rates(
    world: int, tmp_path: Path, tiny: Path, children: Children
) -> None:
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", diverging, 2, str(tiny), str(run), world=world)
    assert code == 0, output
    assert "diverged at 0.112 kimg: back to 0.08 kimg with learning rates x 0.5 (rollback 1 of at most 3)" in output
    assert "back to 0.08 kimg with learning rates x 0.25 (rollback 2 of at most 3)" in output
    rows = {row["nimg"]: row for row in records(run, "log.jsonl")}
    assert [row["lr_g"] for row in rows.values()][:5] == [0.01] * 5
    assert (rows[160]["rollbacks"], rows[160]["lr_g"], rows[160]["lr_d"]) == (2, 0.0025, 0.0025)
    assert sorted(rows) == list(range(16, 161, 16))
    saved = json.loads((run / "checkpoints" / "160" / "state.json").read_text())["progress"]
    assert (saved["rollbacks"], saved["lr_scale"]) == (2, 0.25)


def test_a_run_that_diverges_again_and_again_ends_and_keeps_its_lower_rates_for_the_next_start(
    tmp_path: Path, tiny: Path, children: Children
) -> None:
    run = tmp_path / "run"
    words = ("--optim.max_rollbacks", "1")
    code, output = children.run(tmp_path / "log", diverging, 9, str(tiny), str(run), *words)
    assert code == 5, output
    assert "after 1 rollbacks, optim.max_rollbacks" in output
    code, output = children.run(tmp_path / "again", train, str(tiny), str(run), "--optim.lr", "0.01")
    assert code == 0, output
    assert records(run, "log.jsonl")[-1]["lr_g"] == 0.005
