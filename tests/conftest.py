"""Small sets, small configurations, and training in child processes that share one import of torch."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Tests run several processes on few cores.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Read once, whichever test is the first on a GPU.

TINY = """
data: {{path: {shards}, workers: 0, slots: 2, window: 8}}
network: {{resolution: 16, latent: 8, widths: [8, 8, 8]}}
schedule: {{total_kimg: 0.16, stable_kimg: 0.032, fade_kimg: 0.032, batch: 16}}
eval: {{every_kimg: 0, num_fake: 16, num_real: 32, bootstrap: 2, extractor: random, max_share: 1}}
checkpoint: {{every_kimg: 0.016, keep: 12}}
log: {{tick_kimg: 0.016, samples_kimg: 0.1, grid: 2, tensorboard: false, max_share: 0}}
"""
"""10 steps: 4² stable, 8² fading, 8² stable, 16² fading, 16² stable, two of each."""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 drawn pictures up to 32²."""
    from hrgan.data.build import build

    out = tmp_path_factory.mktemp("sets") / "drawn"
    build("drawn:96", out, 32, workers=1, seed=0, shard_samples=40)
    return out


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 drawn pictures up to 32² with their shapes as classes."""
    from hrgan.data.build import build

    out = tmp_path_factory.mktemp("sets") / "labelled"
    build("drawn:96", out, 32, workers=1, seed=0, shard_samples=40, labels="folder")
    return out


@pytest.fixture
def tiny(tmp_path: Path, shards: Path) -> Path:
    """A configuration file of a run of ten steps."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(shards=shards))
    return path


def _child(target: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], output: str) -> None:
    os.environ.update(environment)
    with open(output, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    try:
        code = target(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    gc.unfreeze()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code or 0)


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Children:
    """Runs functions in processes forked from one that has imported hrgan, so that each starts in a moment."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        os.environ["DS_ACCELERATOR"] = "cpu"  # Read when deepspeed is imported.
        # The last two each child with DeepSpeed would import else, for 8 s.
        late = ("transformers", "deepspeed.runtime.zero.muon.muon_optimizer")
        self.context.set_forkserver_preload(["hrgan.train", "hrgan.cli", "hrgan.apps.generate", "deepspeed", *late])

    def run(
        self,
        output: Path,
        target: Callable[..., Any],
        *arguments: Any,
        world: int = 1,
        zero: int | None = None,
        **more: str,
    ) -> tuple[int, str]:
        """(exit code of the first process, or -9 if killed; what they printed); `codes` has those of all. zero:
        DeepSpeed's stage, as a launch for DeepSpeed would set it; more: variables of the environment."""
        port, children = free_port(), []
        for rank in range(world):
            environment = {"ACCELERATE_USE_CPU": "true"}
            if zero is not None:
                environment = {
                    "ACCELERATE_USE_DEEPSPEED": "true",
                    "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero),
                    "DS_ACCELERATOR": "cpu",
                }
            if world > 1 or zero is not None:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            environment |= more
            child = self.context.Process(target=_child, args=(target, arguments, environment, str(output)))
            child.start()
            children.append(child)
        for child in children:
            child.join(480)  # The longest takes 60 s alone on two cores.
            if child.exitcode is None:
                for hanging in children:
                    hanging.kill()
            assert child.exitcode is not None, f"a child process hangs\n{output.read_text()}"
        self.codes = [child.exitcode for child in children]
        return children[0].exitcode, output.read_text()


@pytest.fixture(scope="session")
def children() -> Children:
    return Children()


def cli(*words: str) -> int:
    """`hrgan` in this process."""
    from hrgan.cli import main

    return main([str(word) for word in words])


def lacking(commands: tuple[str, ...], packages: tuple[str, ...]) -> str | None:
    """Why root cannot run these commands here, after trying to install Debian's packages; None when they are there."""
    if os.geteuid() != 0:
        return f"{commands[0]} takes root"
    if all(map(shutil.which, commands)):
        return None
    if shutil.which("apt-get") is None:
        return f"no {commands[0]} and no apt-get to install it with"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Another test file may be installing something, too.
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=240", "-qq"]
    for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        with (Path(tempfile.gettempdir()) / "hrgan-tests-apt.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            done = subprocess.run([*apt, *words], env=quiet, capture_output=True, text=True, timeout=300)
        if done.returncode:
            return f"apt-get {words[0]} failed: {done.stderr.strip()[-200:]}"
    return None


# Browsers


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if reason := lacking(("chromium", "chromedriver"), ("chromium", "chromium-driver")):
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{word}")
    for word in ("disable-background-networking", "disable-component-update", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"), log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options, service)
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, path: Path, width: int, scheme: str = "light") -> None:
    """Open a page in a window of this width, as a phone's for a small one."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(path.as_uri())


LONGEST = ("slurm", "engines", "dying", "metrics", "train", "launch", "chaos", "namespaces", "forms", "waiting")
"""Files of tests by the time they take, from where that is over half a minute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that none of several processes is left with one at the end."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """Leave what was imported out of each later gc.collect(), which otherwise takes most of a small training's time:
    accelerate calls it at each phase."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
