"""Two machines, as far as their networks go: two network namespaces with their own addresses and a link between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hrgan import checkpoint
from hrgan.monitor.log import read_rows
from tests.conftest import TINY, Children, lacking
from tests.test_train import assert_same_bits, train

ROOT = Path(__file__).parents[1]
LINK, ADDRESSES, PORT = "link0", ("10.213.77.1", "10.213.77.2"), 29500
TIMEOUT_SECONDS = 15
WORDS = (
    *("--schedule.total_kimg", "0.48", "--schedule.stable_kimg", "0.096", "--schedule.fade_kimg", "0.096"),
    *("--checkpoint.every_kimg", "0.032", "--limits.timeout_minutes", str(TIMEOUT_SECONDS / 60)),
)
"""30 steps in five phases of six, a checkpoint every second step."""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that reach each other only over LINK."""
    names = (f"hrgan-{os.getpid()}-0", f"hrgan-{os.getpid()}-1")
    if reason := lacking(("ip",), ("iproute2",)):
        pytest.skip(reason)
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made, it takes root: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", LINK, "type", "veth", "peer", LINK, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/30", "dev", LINK)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", LINK, "up")
        yield names
    finally:
        there = [name for name in names if Path("/run/netns", name).exists()]
        for process in [int(word) for name in there for word in ip("netns", "pids", name).split()]:
            os.kill(process, signal.SIGKILL)
        for name in there:  # Takes the link with it.
            ip("netns", "delete", name)


@dataclass(frozen=True)
class Machine:
    """What `accelerate launch` runs in one namespace."""

    launcher: subprocess.Popen[bytes]
    output: Path

    def ended(self, seconds: float) -> int:
        """Its exit code."""
        try:
            return self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds:.0f} s: {self.output.read_text()}")


def launch(machines: tuple[str, str], config: Path, run: Path) -> list[Machine]:
    """The README's line for several machines, on each."""
    started = []
    for rank, name in enumerate(machines):
        line = ["ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        line += ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
        line += ["--main_process_ip", ADDRESSES[0], "--main_process_port", str(PORT), "--rdzv_backend", "static"]
        line += ["-m", "hrgan", "train", "--config", str(config), "--run", str(run), *WORDS]
        variables = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"}
        output = run.with_name(f"machine-{rank}.log")
        with output.open("a") as stream:
            launcher = subprocess.Popen(
                line, cwd=ROOT, env={**os.environ, **variables}, stdout=stream, stderr=subprocess.STDOUT
            )
        started.append(Machine(launcher, output))
    return started


def wait_for(run: Path, nimg: int, sides: list[Machine]) -> None:
    """Until log.jsonl says that so many images were seen."""
    give_up = time.monotonic() + 180
    while (read_rows(run / "log.jsonl") or [{"nimg": 0}])[-1]["nimg"] < nimg:
        assert time.monotonic() < give_up, sides[0].output.read_text()
        assert sides[0].launcher.poll() is None, sides[0].output.read_text()
        time.sleep(0.01)


def bytes_sent(machine: str) -> int:
    """Over the link, by a machine."""
    (link,) = json.loads(ip("-n", machine, "-s", "-j", "link", "show", LINK))
    sent: int = link["stats64"]["tx"]["bytes"]
    return sent


@pytest.mark.slow
def test_a_run_over_two_machines_ends_on_both_when_the_link_is_cut_and_goes_on_bit_for_bit_when_it_is_back(
    machines: tuple[str, str], tmp_path: Path, shards: Path, children: Children
) -> None:
    config, run, whole = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "whole"
    config.write_text(TINY.format(shards=shards))
    code, text = children.run(tmp_path / "whole.log", train, str(config), str(whole), *WORDS, world=2)
    assert code == 0, text

    sides = launch(machines, config, run)
    wait_for(run, 160, sides)
    assert all(bytes_sent(machine) > 100_000 for machine in machines)
    cut = time.monotonic()
    ip("-n", machines[0], "link", "set", LINK, "down")
    # The watch's time-out, then what the launcher takes to end.
    codes = [side.ended(4 * TIMEOUT_SECONDS) for side in sides]
    took = time.monotonic() - cut
    outputs = [side.output.read_text() for side in sides]
    print(f"both sides ended with {codes} {took:.1f} s after the link was cut")
    assert 0 not in codes, outputs
    latest = run / "checkpoints" / (run / "latest").read_text().strip()
    assert checkpoint.fault(latest) is None
    assert 160 <= int(latest.name) < 480
    for output in outputs:
        assert "has not moved for" in output or "has lost" in output, output

    ip("-n", machines[0], "link", "set", LINK, "up")
    sides = launch(machines, config, run)
    for side in sides:
        assert side.ended(180) == 0, side.output.read_text()
    assert f"going on at {int(latest.name) / 1000:g} kimg" in sides[0].output.read_text()
    assert "2 x cpu (DDP)" in sides[0].output.read_text()
    assert_same_bits(run, whole)
