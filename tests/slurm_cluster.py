"""A real SLURM of two nodes on this machine: a controller, two node daemons and their own munge, all in one folder."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")


CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdDebug=debug
SlurmctldPidFile={folder}/controller.pid
SlurmctldLogFile={folder}/controller.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
ReturnToService=1
MpiDefault=none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={nodes} Default=YES MaxTime=60 PriorityTier=1 GraceTime=25
PartitionName=urgent Nodes={nodes} MaxTime=60 PriorityTier=2
"""
# cred_expire is also how long a requeued job is held, 120 s by default. With ReturnToService=2 a node that a test sets
# DOWN is back with its daemon's next answer, milliseconds later, and a requeued job may begin while the node ends it.


class Cluster:
    """Starts on construction; `stop` ends every daemon that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "state").mkdir()
        ports = [_free_port() for _ in (0, *NODES)]
        text = CONFIG.format(host=socket.gethostname(), folder=folder, controller=ports[0], nodes=",".join(NODES))
        for node, port in zip(NODES, ports[1:], strict=True):
            (folder / node).mkdir()
            text += (
                f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=1 "
                "RealMemory=4000 State=UNKNOWN\n"
            )
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/munge.{ending}" for option, ending in options.items()]
        daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"]]
        daemons += [["slurmd", "-D", "-N", node] for node in NODES]
        self.daemons: list[subprocess.Popen[bytes]] = []
        with (folder / "daemons.log").open("ab") as log:
            for words in daemons:
                self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))
                time.sleep(0.5)  # Each needs the one before.
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", 30, "both nodes to be idle")

    def run(self, *words: str | Path) -> str:
        """The output of a command that talks to this SLURM; empty where it fails."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        """Until a function says True; what the jobs are and have printed, where that takes too long."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}\n{self._jobs()}"
            time.sleep(0.3)

    def _jobs(self) -> str:
        jobs = self.run("scontrol", "show", "job")
        lines = (line.strip() for line in jobs.splitlines())
        logs = [Path(line.removeprefix("StdOut=")) for line in lines if line.startswith("StdOut=")]
        return jobs + "".join(f"{log.name}:\n{log.read_text()}\n" for log in logs if log.exists())

    def cancel_all(self) -> None:
        """End all jobs, at once."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root")
        self.run("scancel", "--user=root")
        self.wait(lambda: self.run("squeue", "-h") == "", 60, "all jobs to end")

    def stop(self) -> None:
        """End every daemon."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
