"""slurm/: every road on a real SLURM of two nodes, in folders with spaces in their names."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import TINY, cli, lacking
from tests.slurm_cluster import COMMANDS, PACKAGES, Cluster
from tests.test_train import assert_same_bits, records

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SITE = """
SBATCH_ALL=() SBATCH_TRAIN=(--time=10) SBATCH_EVAL=(--time=10) SBATCH_DATA=(--time=10)
PROCESSES_PER_NODE=1 LAUNCH= CONTAINER=(env "NOTE=a b") MARGIN_SECONDS={margin} CHAIN={chain} MAX_ATTEMPTS={attempts}
site_setup() {{
    export PATH={bin}:$PATH PYTHONPATH={place} OMP_NUM_THREADS=1 {cpu}
}}
"""
PACE = """
import pathlib, sys, threading, time

def slow_down():
    while not hasattr(sys.modules.get("hrgan.train"), "run_phases"):
        time.sleep(0.02)
    loop, pace = sys.modules["hrgan.train"], pathlib.Path(__file__).with_name("pace")
    step = loop.d_step

    def d_step(*arguments, **keywords):
        if pace.exists():
            time.sleep(float(pace.read_text()))
        return step(*arguments, **keywords)

    loop.d_step = d_step

threading.Thread(target=slow_down, daemon=True).start()
"""
"""Lets a test hold a training up at each step, by seconds in a file, so that things happen in its middle."""


@dataclass
class Place:
    """A cluster, and a folder with a configuration and the runs of this module."""

    cluster: Cluster
    folder: Path

    def submit(
        self,
        kind: str,
        *words: str | Path,
        chain: str = "requeue",
        attempts: int = 4,
        margin: int = 30,
        cpu: str = "ACCELERATE_USE_CPU=true",
    ) -> str:
        """slurm/submit; the number of the job."""
        site = self.folder / f"site {chain} {attempts} {margin} {cpu}.sh"
        here, place = shlex.quote(str(Path(sys.executable).parent)), shlex.quote(str(self.folder))
        site.write_text(SITE.format(bin=here, place=place, chain=chain, attempts=attempts, margin=margin, cpu=cpu))
        environment = {**self.cluster.environment, "HRGAN_SITE": str(site)}
        command = [ROOT / "slurm" / "submit", kind, *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def train(self, run: Path, *options: str, more: tuple[str, ...] = (), **settings: object) -> str:
        words = ("--config", self.folder / "tiny.yaml", "--run", run, *more)
        return self.submit("train", *options, "--", *words, **settings)  # type: ignore[arg-type]

    def pace(self, seconds: float) -> None:
        """How long trainings wait before each step."""
        (self.folder / "pace").write_text(str(seconds))

    def wait_for_step(self, run: Path, number: int) -> None:
        def reached() -> bool:
            log = run / "log.jsonl"
            return log.exists() and len(log.read_text().splitlines()) >= number

        self.cluster.wait(reached, 120, f"step {number} of {run}")

    def wait_for_requeue(self, job: str) -> None:
        """Until SLURM holds the job for its second attempt."""
        held = {"JobState": "PENDING", "Restarts": "1"}
        self.cluster.wait(lambda: held.items() <= self.cluster.job(job).items(), 90, f"job {job} to be requeued")

    def ended(self, job: str) -> tuple[str, str]:
        """State and exit code of a job once it has ended, or is held for another attempt."""

        def is_over() -> bool:
            fields = self.cluster.job(job)
            return fields["JobState"] not in ("RUNNING", "COMPLETING", "CONFIGURING") and (
                fields["JobState"] != "PENDING" or (fields["Restarts"] != "0" and fields["Reason"] == "BeginTime")
            )

        # A busy machine takes minutes to compile DeepSpeed's module where no test before has.
        self.cluster.wait(is_over, 300, f"job {job} to end")
        return self.cluster.job(job)["JobState"], self.cluster.job(job)["ExitCode"]

    def start_now(self, job: str, *changes: str) -> None:
        """End the hold of a requeued job."""
        time.sleep(2)  # A node refuses what is allocated within the second in which the job was taken from it.
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", *changes)
        self.cluster.wait(lambda: self.cluster.job(job)["JobState"] == "RUNNING", 30, f"job {job} to start")


def said(run: Path) -> str:
    """All that the jobs of a run have printed."""
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted((run / "slurm").glob("*.log")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Place]:
    if reason := lacking(COMMANDS, PACKAGES):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm") / "two words"
    folder.mkdir()
    shutil.copytree(shards, folder / "the set")
    (folder / "tiny.yaml").write_text(TINY.format(shards=f'"{folder / "the set"}"'))
    (folder / "sitecustomize.py").write_text(PACE)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield Place(cluster, folder)
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def _nothing_left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "place" in request.fixturenames:
        place: Place = request.getfixturevalue("place")
        place.pace(0)
        place.cluster.cancel_all()


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    """An uninterrupted run of ten steps on two nodes."""
    run = place.folder / "whole run"
    job = place.train(run, "--nodes=2")
    assert place.ended(job) == ("COMPLETED", "0:0"), said(run)
    return run


def test_two_nodes_train_as_one_world(place: Place, finished: Path) -> None:
    assert (finished / "FINISHED").read_text() == "160\n", said(finished)
    assert "96 images, 2 x cpu (DDP)" in said(finished)
    assert said(finished).count("attempt 1 of 4: finished") == 1
    assert place.cluster.job("1")["JobState"] == "COMPLETED"
    assert place.cluster.job("1")["NumNodes"] == "2"
    assert [row["nimg"] for row in records(finished, "log.jsonl")] == list(range(16, 161, 16))


def test_two_nodes_train_with_the_engine_of_a_launch_file(place: Place, finished: Path) -> None:
    run = place.folder / "zero"
    job = place.train(run, "--nodes=2", "--launch", "nodes-zero2", cpu="DS_ACCELERATOR=cpu")
    assert place.ended(job) == ("COMPLETED", "0:0"), said(run)
    assert "2 x cpu (ZeRO-2)" in said(run)
    zero, ddp = ([row["loss_d"] for row in records(folder, "log.jsonl")] for folder in (run, finished))
    assert zero == pytest.approx(ddp, rel=1e-3)


def test_the_time_limit_saves_and_the_requeued_job_ends_with_the_same_bits(place: Place, finished: Path) -> None:
    run = place.folder / "limited run"
    place.pace(4)
    job = place.train(run, "--nodes=2", "--time=1")
    place.wait_for_requeue(job)
    stopped = int((run / "latest").read_text())
    assert 0 < stopped < 160
    assert f"stopped for the time limit at {stopped} images; it goes on in the next attempt" in said(run)
    assert len((run / "log.jsonl").read_text().splitlines()) == stopped / 16
    place.pace(0)
    place.start_now(job, "TimeLimit=5")
    assert place.ended(job) == ("COMPLETED", "0:0"), said(run)
    assert f"going on at {stopped / 1000:g} kimg" in (run / "slurm" / f"{job}-2.log").read_text()
    assert_same_bits(run, finished)
    assert not (run / "STOP").exists()


def test_a_training_stops_for_the_time_limit_also_where_no_signal_comes(place: Place) -> None:
    run = place.folder / "by the clock"
    place.pace(2)
    job = place.train(run, "--time=1", "--signal=B:URG@1", margin=40)
    place.wait_for_requeue(job)
    assert "(the time limit less limits.margin_minutes)" in said(run)
    assert "stopped for the time limit at" in said(run)


def test_a_lost_node_brings_the_job_back_with_the_same_bits(place: Place, finished: Path) -> None:
    run = place.folder / "lost node"
    place.pace(2)
    job = place.train(run, "--nodes=2")
    place.wait_for_step(run, 3)
    place.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    place.wait_for_requeue(job)
    # A lost node is gone; this one's slurmd lives, and looks each second, later each tenth, whether its step has ended.
    # If it doesn't see that before the job's next one begins, it kills that one after KillWait (30 s).
    log = place.cluster.folder / "n2.log"
    place.cluster.wait(lambda: f"completed epilog for jobid {job}" in log.read_text(), 60, "n2 to see its step's end")
    place.cluster.run("scontrol", "update", "NodeName=n2", "State=IDLE")
    assert "SLURM has put it back into the queue" in said(run)
    place.pace(0)
    place.start_now(job)
    assert place.ended(job) == ("COMPLETED", "0:0"), said(run)
    assert_same_bits(run, finished)


def test_cancelled_or_stopped_by_a_person_it_is_saved_and_not_requeued(place: Place, finished: Path) -> None:
    run, rarely = place.folder / "stopped run", ("--checkpoint.every_kimg", "100")
    place.pace(2)
    job = place.train(run, "--nodes=2", more=rarely)
    place.wait_for_step(run, 2)
    place.cluster.run("scancel", job)
    assert place.ended(job)[0] == "CANCELLED", said(run)
    assert "cancelled; submit it again to go on" in said(run)
    cancelled = len((run / "log.jsonl").read_text().splitlines())
    assert (run / "latest").read_text() == f"{16 * cancelled}\n"  # Saved in the moment, not where a save was due.

    job = place.train(run, "--nodes=2", more=rarely)
    place.wait_for_step(run, cancelled + 1)
    (run / "STOP").touch()
    assert place.ended(job) == ("FAILED", "3:0"), said(run)
    assert "stopped on request; submit it again to go on" in said(run)

    place.pace(0)
    job = place.train(run, "--nodes=2", more=rarely)
    assert place.ended(job) == ("COMPLETED", "0:0"), said(run)
    assert_same_bits(run, finished)


def test_a_training_that_died_is_run_again_only_if_its_checkpoints_advanced(place: Place) -> None:
    run = place.folder / "dying run"
    place.pace(5)
    job = place.train(run, "--nodes=2")
    place.cluster.wait(lambda: "phase 1/5" in said(run), 120, "the first step")
    kill_a_process(run)
    assert place.ended(job) == ("FAILED", "1:0"), said(run)
    assert "died without a newer checkpoint than 0 images" in said(run)

    place.pace(2)
    job = place.train(run, "--nodes=2")
    place.wait_for_step(run, 3)
    kill_a_process(run)
    place.wait_for_requeue(job)
    assert f"died at {(run / 'latest').read_text().strip()} images; it goes on in the next attempt" in said(run)
    place.cluster.run("scancel", job)


def kill_a_process(run: Path) -> None:
    """SIGKILL to the training process of rank 1."""
    for folder in Path("/proc").iterdir():
        try:
            words, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except (OSError, ValueError):  # No process, or one that has just ended.
            continue
        if str(run).encode() in words and b"RANK=1" in variables:
            os.kill(int(folder.name), signal.SIGKILL)
            return
    raise AssertionError(f"no process of rank 1 in {run}")


def test_wrong_words_are_not_tried_again(place: Place) -> None:
    run = place.folder / "wrong words"
    job = place.train(run, "--nodes=2", more=("--optim.lr", "fast"))
    assert place.ended(job) == ("FAILED", "2:0"), said(run)
    assert "optim.lr" in (run / "slurm" / f"{job}-1.log").read_text()
    assert "ended with exit code 2" in said(run)


def test_a_stop_is_heard_while_a_training_starts_and_attempts_are_capped(place: Place) -> None:
    run = place.folder / "last attempt"
    place.pace(1)
    job = place.train(run, attempts=1)
    place.cluster.wait(lambda: "processes from 0 images" in said(run), 120, "the job to start")
    place.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert place.ended(job) == ("FAILED", "3:0"), said(run)
    assert "MAX_ATTEMPTS are used up" in said(run)
    assert 0 < int((run / "latest").read_text()) < 160  # In its middle, however slow the machine is.


def test_a_preempted_training_saves_and_goes_back_into_the_queue(place: Place) -> None:
    run = place.folder / "preempted run"
    place.pace(1)
    job = place.train(run)
    place.wait_for_step(run, 1)
    urgent = place.cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    place.wait_for_requeue(job)
    assert f"preempted at {(run / 'latest').read_text().strip()} images" in said(run)
    place.cluster.run("scancel", job)
    assert place.ended(urgent) == ("COMPLETED", "0:0")


def test_where_requeueing_is_forbidden_each_job_queues_the_next(place: Place) -> None:
    run = place.folder / "chained run"
    place.pace(1)
    first = place.train(run, chain="singleton")
    place.wait_for_step(run, 1)
    second = str(int(first) + 1)
    assert place.cluster.job(second)["Dependency"].startswith("singleton")
    assert place.cluster.job(first)["Requeue"] == "0"
    place.cluster.run("scancel", "--batch", "--signal=USR1", first)
    assert place.ended(first) == ("FAILED", "3:0"), said(run)
    place.pace(0)
    place.cluster.wait(lambda: place.cluster.job(second)["JobState"] == "RUNNING", 30, "the next job to start")
    assert place.ended(second) == ("COMPLETED", "0:0"), said(run)
    assert "attempt 2 of 4: finished" in said(run)
    assert "going on at" in (run / "slurm" / f"{second}-2.log").read_text()
    assert place.ended(str(int(first) + 2))[0] == "CANCELLED", said(run)

    place.pace(1)
    cancelled = place.train(place.folder / "cancelled chain", chain="singleton")
    place.wait_for_step(place.folder / "cancelled chain", 1)
    place.cluster.run("scancel", cancelled)
    assert place.ended(cancelled)[0] == place.ended(str(int(cancelled) + 1))[0] == "CANCELLED"


def test_an_evaluation_follows_a_training_as_its_own_job(place: Place) -> None:
    run = place.folder / "followed run"
    place.pace(1)
    training = place.train(run)
    job = place.submit("eval", "--", run, "--every", "0.5")
    place.cluster.wait(lambda: "reals at 0.016 kimg" in said(run), 120, "the evaluation of the first checkpoint")
    place.cluster.run("scancel", "--signal=USR1", job)  # As SLURM does a minute before the time limit.
    place.wait_for_requeue(job)
    place.pace(0)
    assert place.ended(training) == ("COMPLETED", "0:0"), said(run)
    place.start_now(job)
    assert place.ended(job) == ("COMPLETED", "0:0"), said(run)
    assert sorted(row["nimg"] for row in records(run, "metrics.jsonl")) == list(range(16, 161, 16))
    assert "SIGUSR1: stopped following" in said(run)
    assert "finished and measured; checkpoints passed over: 0" in said(run)


def test_an_array_of_jobs_builds_the_set_that_one_build_would(place: Place) -> None:
    source, alone, parts = (place.folder / name for name in ("the pictures", "one build", "three parts"))
    source.mkdir()
    for number in range(20):
        Image.effect_noise((40, 40), 10 + number).save(source / f"{number}.png")
    words = ("--resolution", "32", "--shard-samples", "8", "--max-skipped", "0.5")
    (source / "broken.png").write_bytes(b"no picture")
    assert cli("data", "build", source, alone, *words, "--workers", "1") == 0
    merge = place.submit("data", "--parts=3", "--", source, parts, *words)
    assert place.ended(merge) == ("COMPLETED", "0:0"), [path.read_text() for path in parts.parent.glob("*-slurm/*")]
    assert cli("data", "check", parts) == 0
    a, b = ({path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")} for out in (alone, parts))
    assert a == b
    assert len(list((place.folder / "three parts-slurm").glob("hrgan-part-*-[123].log"))) == 3


REFUSED = {
    "no kind": (["tran"], "expected train, eval or data, found 'tran'"),
    "no words": (["train", "--nodes=2"], "slurm/submit train --nodes=2 -- WORDS"),
    "no run": (["train", "--", "--optim.lr", "1"], "--config or --run"),
    "no config": (["train", "--", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    "no launch file": (["train", "--launch=fast", "--", "--run", "x"], "--launch: fast is neither a file nor"),
    "no run to evaluate": (["eval", "--", "nowhere", "--every=1"], "nowhere: no such folder"),
    "no parts": (["data", "--parts", "0", "--", "a", "b"], "--parts: '0', expected the number of jobs"),
    "no folder": (["data", "--parts=2", "--", "--resolution", "32"], "expected SRC and OUT first"),
}


@pytest.mark.parametrize(("words", "line"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_submissions_are_refused_in_one_line(words: list[str], line: str, place: Place) -> None:
    done = subprocess.run([ROOT / "slurm" / "submit", *words], cwd=place.folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]


def test_the_scripts_pass_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    scripts = sorted((ROOT / "slurm").iterdir())
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
