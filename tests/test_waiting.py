"""Processes that wait: for the main one, for a stop that all agree on, for another training in the same directory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hrgan import checkpoint
from tests.conftest import Children
from tests.test_dying import RARE, SHORT, at_step, diverging
from tests.test_train import assert_same_bits, records, train

# For the main process


def frozen_in_a_save(config: str, run: str) -> int:
    """In a child: the main process is frozen in the save of 48 images, with the store that it keeps."""
    original = checkpoint.write_durably

    def write_durably(path: Path, content: bytes) -> str:
        if path.parent.name == ".writing-48":
            subprocess.Popen(["sh", "-c", f"sleep 18; kill -KILL {os.getpid()}"], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(path, content)

    checkpoint.write_durably = write_durably
    began = time.monotonic()
    try:
        return train(config, run, *SHORT)
    finally:
        print(f"ended after {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_nobody_waits_for_ever_for_a_frozen_main_process(tmp_path: Path, tiny: Path, children: Children) -> None:
    code, output = children.run(tmp_path / "log", frozen_in_a_save, str(tiny), str(tmp_path / "run"), world=2)
    assert code == -signal.SIGKILL, output  # Only by the test's own hand.
    assert children.codes[1] == 1, output
    assert "rank 1 (" in output
    assert re.search(r"has not moved for \d+ s \(limits.timeout_minutes 0.1\)", output)
    assert "rank 0, which keeps the processes' store, does not answer" in output
    assert (tmp_path / "run" / "latest").read_text() == "32\n"


def unreadable_on_rank_1(config: str, run: str, *words: str) -> int:
    import hrgan.run as loop

    original = loop.checkpoint.load

    def load(folder: Path, *arguments: Any) -> Any:
        if os.environ.get("RANK") == "1":
            raise OSError(5, "planted: Input/output error", str(folder))
        return original(folder, *arguments)

    loop.checkpoint.load = load
    return train(config, run, *words)


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_said_by_all(
    tmp_path: Path, tiny: Path, children: Children
) -> None:
    run = tmp_path / "run"
    words = ("--schedule.total_kimg", "0.032")
    assert children.run(tmp_path / "first", train, str(tiny), str(run), *words)[0] == 0
    code, output = children.run(tmp_path / "log", unreadable_on_rank_1, str(tiny), str(run), world=2)
    assert (code, children.codes[1]) == (2, 2), output
    assert "cannot be read ([Errno 5] planted: Input/output error" in output
    assert "the disk must be shared by all machines" in output
    assert "Traceback" not in output


# For a stop


def counting_looks(config: str, run: str, *words: str) -> int:
    from hrgan.engine import Engine

    original, looks = Engine.agree, iter(range(10**6))

    def agree(engine: Engine, reason: str | None) -> str | None:
        number = next(looks)
        Path(run, f"looks-{engine.rank}").write_text(str(number + 1))
        return original(engine, reason)

    Engine.agree = agree
    return train(config, run, *words)


@pytest.mark.slow
def test_short_steps_look_for_a_stop_every_two_seconds_and_all_processes_at_the_same_steps(
    tmp_path: Path, tiny: Path, children: Children
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    # 100 steps at 16² with a tick in each 10; the borders before take 8 steps.
    words = (*RARE, "--schedule.total_kimg", "1.728", "--log.tick_kimg", "0.16", "--log.samples_kimg", "100")
    code, output = children.run(tmp_path / "log", counting_looks, str(tiny), str(run), *words, world=2)
    assert code == 0, output
    looks = [int((run / f"looks-{rank}").read_text()) for rank in (0, 1)]
    assert looks[0] == looks[1]
    ticks = len(records(run, "log.jsonl"))
    rounds = 3 * 2  # of evaluations
    assert ticks <= looks[0] <= 8 + 10 + ticks + rounds + 2, (looks, ticks)  # Each step only until the first tick.


def signals_for_its_loader_too(config: str, run: str) -> int:
    """In a child: the whole process group is asked to stop, the loader's processes first."""
    import multiprocessing

    def act(rank: int) -> None:
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGUSR1)
        time.sleep(0.2)
        assert all(worker.is_alive() for worker in workers)
        os.kill(os.getpid(), signal.SIGUSR1)

    at_step(2, act)
    return train(config, run, *RARE, "--data.workers", "2")


def test_a_loader_s_processes_leave_sigusr1_to_the_training(tmp_path: Path, tiny: Path, children: Children) -> None:
    code, output = children.run(tmp_path / "log", signals_for_its_loader_too, str(tiny), str(tmp_path / "run"))
    assert code == 3, output
    assert "everything saved" in output
    assert output.count("SIGUSR1: saving at the next step") == 1


def interrupted_after_sigterm(config: str, run: str) -> int:
    """In a child: SIGTERM, then Ctrl-C twice, while the training waits in one long call."""

    def act(rank: int) -> None:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.3)
        time.sleep(60)

    at_step(3, act)
    return train(config, run)


def test_a_second_ctrl_c_ends_at_once_also_after_sigterm(tmp_path: Path, tiny: Path, children: Children) -> None:
    began = time.monotonic()
    code, output = children.run(tmp_path / "log", interrupted_after_sigterm, str(tiny), str(tmp_path / "run"))
    assert code == 130, output
    assert time.monotonic() - began < 50


# For another training


HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "w") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print(flush=True)
    time.sleep(float(sys.argv[2]))
"""


def trained_while_another_ends(seconds: str, config: str, run: str) -> int:
    """In a child: another process holds the run's lock for so long; a start waits 4 s."""
    from hrgan import rundir

    rundir.PATIENCE_SECONDS = 4
    Path(run).mkdir()
    words = [sys.executable, "-c", HOLDER, f"{run}/.lock", seconds]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        return train(config, run, "--schedule.total_kimg", "0.016")


@pytest.mark.parametrize(("seconds", "code"), [("2", 0), ("9", 2)], ids=["ends", "stays"])
def test_a_start_waits_a_while_for_a_training_that_is_just_ending(
    seconds: str, code: int, tmp_path: Path, tiny: Path, children: Children
) -> None:
    run = tmp_path / "run"
    found, output = children.run(tmp_path / "log", trained_while_another_ends, seconds, str(tiny), str(run))
    assert found == code, output
    assert "another training is running here; waiting 4 s for it to end" in output
    assert ("wait for it, stop it or choose another --run" in output) == (code == 2)
    assert (run / "FINISHED").exists() == (code == 0)


# Nothing is lost by a kill while going back


def killed_while_going_back(moment: str, config: str, run: str) -> int:
    """In a child: SIGKILL in the middle of a rollback."""
    name = {"before deleting": "forget_after", "before saving": "save"}[moment]
    original = getattr(checkpoint, name)

    def act(*arguments: Any) -> Any:
        if name == "forget_after" or arguments[2].rollbacks > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(checkpoint, name, act)
    return diverging(1, config, run)


@pytest.mark.parametrize("moment", ["before deleting", "before saving"])
def test_a_kill_while_a_run_goes_back_costs_no_rows(
    moment: str, tmp_path: Path, tiny: Path, children: Children
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ("--optim.max_skipped", "1", "--optim.on_divergence", "rollback", "--optim.lr", "0.01")
    code, output = children.run(tmp_path / "log", killed_while_going_back, moment, str(tiny), str(run))
    assert code == -signal.SIGKILL, output
    code, output = children.run(tmp_path / "again", train, str(tiny), str(run), *words)
    assert code == 0, output
    assert [row["nimg"] for row in records(run, "log.jsonl")] == list(range(16, 161, 16))
    assert [row["nimg"] for row in records(run, "metrics.jsonl")] == [32, 96, 160]
    if moment == "before saving":  # Back at 80 images, before any harm: as if nothing had happened.
        assert children.run(tmp_path / "plain", train, str(tiny), str(whole), *words)[0] == 0
        assert_same_bits(run, whole)


# Older checkpoints


def test_a_checkpoint_from_before_rollbacks_were_counted_loads(tmp_path: Path, tiny: Path, children: Children) -> None:
    import hashlib

    run = tmp_path / "run"
    assert children.run(tmp_path / "log", train, str(tiny), str(run), "--schedule.total_kimg", "0.016")[0] == 0
    folder = run / "checkpoints" / "16"
    description = json.loads((folder / "state.json").read_text())
    for name in ("rollbacks", "lr_scale"):
        del description["progress"][name]
    (folder / "state.json").write_text(json.dumps(description))
    hashes = json.loads((folder / "manifest.json").read_text())
    hashes["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(hashes))
    progress = checkpoint.load(folder).progress
    assert (checkpoint.fault(folder), progress.rollbacks, progress.lr_scale) == (None, 0, 1.0)
