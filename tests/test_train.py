"""The training loop: stop anywhere, any world, no silence."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from hrgan import checkpoint
from hrgan.config import Config, from_dict
from hrgan.data.build import build
from tests.conftest import Children, cli

STEPS = {"4² stable": 1, "at the first border": 2, "8² fade": 3, "8² stable": 5, "16² fade": 7, "16² stable": 9}


def train(config: str, run: str, *words: str) -> int:
    return cli("train", "--config", config, "--run", run, *words)


def killed_before_step(step: int, config: str, run: str, *words: str) -> int:
    """Train until SIGKILL just before the step of this number."""
    import hrgan.train as loop

    original, count = loop.d_step, iter(range(10**6))

    def d_step(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    loop.d_step = d_step
    return train(config, run, *words)


def killed_in_a_save(writes: int, config: str, run: str) -> int:
    """Train until SIGKILL in the middle of the file write of this number."""
    original, count = checkpoint.write_durably, iter(range(10**6))

    def write_durably(path: Path, content: bytes) -> str:
        if next(count) == writes:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, content)

    checkpoint.write_durably = write_durably
    return train(config, run)


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    folder = run / "checkpoints" / (run / "latest").read_text().strip()
    assert checkpoint.fault(folder) is None
    return {
        f"{path.stem}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def records(run: Path, name: str, leave_out: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in leave_out} for row in rows]


TIMES = ("img_per_sec", "data_wait", "data_wait_ranks", "sec_per_kimg", "gpu_mem_gb", "cpu_mem_gb", "seconds")


def assert_same_bits(run: Path, reference: Path) -> None:
    a, b = final_tensors(run), final_tensors(reference)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} tensors differ, first {different[0]}"
    for name in ("log.jsonl", "metrics.jsonl"):
        assert records(run, name, TIMES) == records(reference, name, TIMES)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shards: Path, children: Children) -> tuple[Path, Path]:
    """(configuration, run directory) of ten uninterrupted steps."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("reference")
    (folder / "tiny.yaml").write_text(TINY.format(shards=shards))
    code, output = children.run(folder / "log", train, str(folder / "tiny.yaml"), str(folder / "run"))
    assert code == 0, output
    return folder / "tiny.yaml", folder / "run"


# Stop anywhere


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_a_run_killed_anywhere_resumes_bit_for_bit(
    step: int, reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, expected = reference
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", killed_before_step, step, str(config), str(run))
    assert code == -signal.SIGKILL, output
    code, output = children.run(tmp_path / "log", train, str(config), str(run))
    assert code == 0, output
    assert_same_bits(run, expected)


@pytest.mark.parametrize(
    "writes", [0, 3, 7, 8, 19], ids=["first file", "Adam", "manifest", "latest", "third checkpoint"]
)
def test_a_run_killed_during_a_save_resumes_bit_for_bit(
    writes: int, reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, expected = reference
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", killed_in_a_save, writes, str(config), str(run))
    assert code == -signal.SIGKILL, output
    code, output = children.run(tmp_path / "log", train, str(config), str(run))
    assert code == 0, output
    assert_same_bits(run, expected)
    assert not list(run.glob("checkpoints/.writing-*"))


FAMILIES = {
    "style": (
        *("--network.family", "style", "--network.mapping_layers", "2", "--network.condition", "projection"),
        *("--loss.kind", "logistic", "--loss.path_weight", "2", "--loss.path_every", "2", "--loss.r1_every", "2"),
        *("--augment.ops", "[ada]", "--augment.target", "-1", "--augment.strength", "0.3"),
    ),
    "r3": (
        *("--network.family", "r3", "--loss.kind", "relativistic", "--loss.r2_gamma", "1", "--loss.r1_every", "1"),
        *("--network.condition", "projection"),
        *("--augment.ops", "[diffaugment]", "--augment.strength", "1", "--ramp.kimg", "0.1", "--ramp.lr", "0.2"),
        *("--ramp.beta2", "0.9", "--ramp.ema_kimg", "1", "--ramp.gamma", "0.1", "--ramp.augment", "0.3"),
    ),
    "progan": ("--network.condition", "acgan"),
    "dcgan": (
        *("--network.family", "dcgan", "--schedule.start_resolution", "8", "--loss.kind", "logistic"),
        *("--loss.r1_gamma", "0", "--optim.ema_kimg", "0.1", "--network.condition", "acgan"),
    ),
}
"""With all that a step carries over to the next one."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_killed_twice_resumes_bit_for_bit(
    family: str, tmp_path: Path, tiny: Path, labelled: Path, children: Children
) -> None:
    words = ("--data.path", str(labelled), *FAMILIES[family])
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "expected"), *words)
    assert code == 0, output
    for step in (4, 3):  # The eighth step of the run in the end.
        code, output = children.run(
            tmp_path / "log", killed_before_step, step, str(tiny), str(tmp_path / "run"), *words
        )
        assert code == -signal.SIGKILL, output
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "run"), *words)
    assert code == 0, output
    assert_same_bits(tmp_path / "run", tmp_path / "expected")
    fed_back = {name: t for name, t in final_tensors(tmp_path / "run").items() if name.startswith("feedback/")}
    assert len(fed_back) == 3
    if family == "style":
        assert fed_back["feedback/path_mean"] > 0
        # Twice up: every mean sign is above -1.
        assert fed_back["feedback/augment_strength"].item() == pytest.approx(0.3 + 2 * 4 * 16 / 500_000, abs=1e-6)


def test_a_run_killed_again_and_again_with_lazy_r1_and_loader_processes(
    tmp_path: Path, tiny: Path, children: Children
) -> None:
    words = (
        "--loss.kind",
        "logistic",
        "--loss.r1_every",
        "2",
        "--data.workers",
        "2",
        "--data.mirror",
        "true",
        "--precision",
        "bf16",
    )
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "whole"), *words)
    assert code == 0, output
    for step in (3, 3, 2):
        code, output = children.run(
            tmp_path / "log", killed_before_step, step, str(tiny), str(tmp_path / "run"), *words
        )
        assert code == -signal.SIGKILL, output
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "run"), *words)
    assert code == 0, output
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_stop_file_saves_and_exits_3_and_the_same_command_goes_on(
    reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, expected = reference
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", stopped_by_file, str(config), str(run))
    assert code == 3, output
    assert "stopped at 0.048 kimg with everything saved" in output
    assert (run / "STOP").exists()
    assert (run / "latest").read_text() == "48\n"
    code, output = children.run(tmp_path / "log", train, str(config), str(run))
    assert code == 0, output
    assert not (run / "STOP").exists()
    assert (run / "FINISHED").exists()
    for name, tensor in final_tensors(run).items():
        assert torch.equal(tensor, final_tensors(expected)[name]), name


def stopped_by_file(config: str, run: str) -> int:
    import hrgan.train as loop

    original, count = loop.d_step, iter(range(10**6))

    def d_step(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if next(count) == 2:
            Path(run, "STOP").touch()
        return original(*arguments, **keywords)

    loop.d_step = d_step
    return train(config, run)


def test_sigterm_saves_and_exits_3(tmp_path: Path, tiny: Path, children: Children) -> None:
    code, output = children.run(tmp_path / "log", stopped_by_signal, str(tiny), str(tmp_path / "run"))
    assert code == 3, output
    assert (tmp_path / "run" / "latest").read_text() == "48\n"


def stopped_by_signal(config: str, run: str) -> int:
    import hrgan.train as loop

    original, count = loop.d_step, iter(range(10**6))

    def d_step(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keywords)

    loop.d_step = d_step
    return train(config, run)


def test_sigterm_to_the_whole_process_group_leaves_the_loader_running_until_all_is_saved(
    tiny: Path, tmp_path: Path
) -> None:
    """What SLURM, timeout and systemd do: every process gets the signal, the loader's too."""
    words = [sys.executable, "-m", "hrgan", "train", "--config", str(tiny), "--run", str(tmp_path / "run")]
    words += ["--data.workers", "2", "--schedule.total_kimg", "1000"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 3, log.read_text()
    assert "with everything saved" in log.read_text()
    assert log.read_text().count("SIGTERM: saving") == 1
    assert (
        checkpoint.fault(tmp_path / "run" / "checkpoints" / (tmp_path / "run" / "latest").read_text().strip()) is None
    )


def test_two_trainings_in_one_run_directory_are_refused(tmp_path: Path, tiny: Path, children: Children) -> None:
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", trained_beside_another, str(tiny), str(run))
    assert code == 2, output
    assert "another training is running here" in output


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, tiny: Path, children: Children) -> None:
    words = ("--schedule.total_kimg", "0.016")
    code, output = children.run(tmp_path / "log", without_locks, str(tiny), str(tmp_path / "run"), *words)
    assert code == 0, output
    assert "cannot be locked (No locks available)" in output


def without_locks(config: str, run: str, *words: str) -> int:
    import errno
    import fcntl

    def lockf(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.lockf = lockf
    return train(config, run, *words)


@pytest.mark.slow
def test_the_command_that_a_newcomer_would_guess_trains(tmp_path: Path, children: Children) -> None:
    """Of a preset with all its own settings, but for the lengths: 4² to 128², to a picture and a number."""
    build("drawn:64", tmp_path / "shards", 128, workers=1, seed=0)
    words = ("train", "--config", "configs/clothing-128.yaml", "--data.path", str(tmp_path / "shards"))
    words += ("--schedule.stable_kimg", "0.032", "--schedule.fade_kimg", "0.032", "--schedule.total_kimg", "0.3")
    words += ("--eval.num_fake", "16", "--eval.max_share", "1", "--run", str(tmp_path / "run"))
    code, output = children.run(tmp_path / "log", cli, *words)
    assert code == 0, output
    assert "Traceback" not in output
    assert [row["resolution"] for row in records(tmp_path / "run", "log.jsonl")][-1] == 128
    assert "fd_random" in json.dumps(records(tmp_path / "run", "metrics.jsonl")[-1])
    assert list((tmp_path / "run" / "samples").glob("*-128px.png"))


def trained_beside_another(config: str, run: str) -> int:
    """The child of a process that holds the run's lock tries to train in it."""
    import fcntl

    Path(run).mkdir()
    with open(Path(run, ".lock"), "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        words = ["-m", "hrgan", "train", "--config", config, "--run", run]
        return subprocess.run([sys.executable, *words], check=False).returncode


def test_a_run_killed_in_its_first_moments_starts_with_the_same_command(
    reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, expected = reference
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", "environment.json"):
        shutil.copy(expected / name, run / name)
        code, output = children.run(tmp_path / "log", train, str(config), str(run), "--schedule.total_kimg", "0.016")
        assert code == 0, output
        shutil.rmtree(run)
        run.mkdir()


# Precision


def on_a_device(able: bool, config: str, run: str, *words: str) -> int:
    """Train where the CPU has bf16 of its own, or has not."""
    import hrgan.engine

    hrgan.engine.has_bf16 = lambda device: able
    return train(config, run, *words)


def precision_of(run: Path) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text())["precision"]


def test_auto_is_bf16_where_the_device_has_it_and_a_run_goes_on_in_what_it_began_with(
    tmp_path: Path, tiny: Path, children: Children
) -> None:
    run, auto = tmp_path / "run", ("--precision", "auto", "--schedule.total_kimg")
    code, output = children.run(tmp_path / "first", on_a_device, True, str(tiny), str(run), *auto, "0.032")
    assert code == 0, output
    assert ", bf16, " in output
    assert "emulated" not in output
    assert precision_of(run) == "bf16"
    code, output = children.run(tmp_path / "second", on_a_device, False, str(tiny), str(run), *auto, "0.048")
    assert code == 0, output
    assert ", bf16, " in output
    assert "bf16 is emulated here" in output
    assert precision_of(run) == "bf16"


def test_auto_does_not_go_on_in_fp16(tmp_path: Path, tiny: Path, children: Children) -> None:
    run, words = str(tmp_path / "run"), ("--schedule.total_kimg", "0.016", "--precision")
    code, output = children.run(tmp_path / "first", train, str(tiny), run, *words, "fp16")
    assert code == 0, output
    code, output = children.run(tmp_path / "second", on_a_device, True, str(tiny), run, *words, "auto")
    assert code == 2, output
    assert "precision: fp16 in the run, bf16 asked for" in output


def test_auto_is_float32_where_the_device_has_no_bf16(
    reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, expected = reference
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", on_a_device, False, str(config), str(run), "--precision", "auto")
    assert code == 0, output
    assert ", float32, " in output
    assert precision_of(run) == "float32"
    assert_same_bits(run, expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86's flags")
def test_a_cpu_has_bf16_where_its_flags_say_so() -> None:
    from hrgan.engine import has_bf16

    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split()
    assert has_bf16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16"} & set(flags))


# Any world


def relative_error(run: Path, reference: Path, initial: dict[str, torch.Tensor]) -> float:
    """Largest distance of a network's weights from the reference's, as a share of how far training moved them."""
    a, b = final_tensors(run), final_tensors(reference)
    worst = 0.0
    for part in ("generator", "discriminator", "ema"):
        names = [name for name in b if name.startswith(f"{part}/") and name in initial]
        moved = sum((b[name] - initial[name]).square().sum() for name in names) ** 0.5
        apart = sum((b[name] - a[name]).square().sum() for name in names) ** 0.5
        worst = max(worst, float(apart / moved))
    return worst


def initial_tensors(config: Config) -> dict[str, torch.Tensor]:
    from hrgan.networks import make_discriminator, make_generator

    networks = {
        "generator": make_generator(config, 16, False, None),
        "discriminator": make_discriminator(config, 16, False, None),
    }
    networks["ema"] = networks["generator"]
    return {
        f"{part}/{name}": tensor for part, network in networks.items() for name, tensor in network.state_dict().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["wgan-gp", "logistic"])
def test_any_world_gives_the_same_losses_and_weights_over_growth_borders(
    loss: str, tmp_path: Path, tiny: Path, children: Children
) -> None:
    # With Adam's usual epsilon a gradient that is zero but for rounding moves a weight by a whole learning rate in
    # either direction; a larger one keeps rounding as small as it is. At twice this rate the run itself makes it large.
    words = ("--loss.kind", loss, "--loss.r1_every", "2", "--optim.eps", "1e-3", "--optim.lr", "0.005")
    one = tmp_path / "one"
    assert children.run(tmp_path / "log", train, str(tiny), str(one), *words)[0] == 0
    initial = initial_tensors(from_dict(yaml.safe_load((one / "config.yaml").read_text())))
    for name, world, more in (
        ("two", 2, ()),
        ("parts", 1, ("--schedule.micro_batch", "8")),
        ("both", 2, ("--schedule.micro_batch", "4")),
    ):
        code, output = children.run(
            tmp_path / f"{name}.log", train, str(tiny), str(tmp_path / name), *words, *more, world=world
        )
        assert code == 0, output
        assert relative_error(tmp_path / name, one, initial) < 2e-4, name
        for mine, theirs in zip(records(tmp_path / name, "log.jsonl"), records(one, "log.jsonl"), strict=True):
            for key in ("loss_g", "loss_d", "logit_real", "logit_fake", "penalty"):
                if theirs[key] is None:  # A tick without a lazy penalty.
                    assert mine[key] is None
                else:
                    assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), (name, mine["nimg"], key)
        (mine,), (theirs,) = records(tmp_path / name, "metrics.jsonl")[-1:], records(one, "metrics.jsonl")[-1:]
        assert mine["fd_random"] == pytest.approx(theirs["fd_random"], rel=1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_loads_on_one(
    reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, expected = reference
    run = tmp_path / "run"
    assert (
        children.run(tmp_path / "log", train, str(config), str(run), "--schedule.total_kimg", "0.08", world=2)[0] == 0
    )
    code, output = children.run(tmp_path / "log", train, str(config), str(run))
    assert code == 0, output
    assert [row["nimg"] for row in records(run, "log.jsonl")] == [row["nimg"] for row in records(expected, "log.jsonl")]


# No silence


@pytest.mark.slow
def test_a_shard_that_one_process_cannot_read_stops_all_with_a_line_each(
    tmp_path: Path, tiny: Path, shards: Path, children: Children
) -> None:
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(shards, copy)
    code, output = children.run(
        tmp_path / "log", unreadable_for_rank_1, str(tiny), str(run), "--data.path", str(copy), world=2
    )
    assert code == 4, output
    assert "Traceback" not in output
    assert "planted" in output
    assert "another process cannot read its shards" in output
    assert (run / "latest").read_text() == "48\n"


def unreadable_for_rank_1(config: str, run: str, *words: str) -> int:
    import hrgan.train as loop
    from hrgan.errors import DataError

    original = loop.open_reals

    def open_reals(config: Config, engine: Any, manifest: Any, phase: Any, nimg: int) -> Any:
        for batch in original(config, engine, manifest, phase, nimg):
            if nimg >= 48 and engine.rank == 1:
                raise DataError("planted: a shard of this process")
            nimg += phase.batch
            yield batch

    loop.open_reals = open_reals
    return train(config, run, *words)


def non_finite_from(step: int, config: str, run: str, rank: int, *words: str) -> int:
    """Train with NaN in one process's reals from a step on."""
    import hrgan.train as loop

    original, count = loop.prepare_step, iter(range(10**6))

    def prepare_step(engine: Any, *arguments: Any) -> Any:
        micros = original(engine, *arguments)
        if next(count) in range(step, step + 2) and engine.rank == rank:
            micros = [replace(micro, real=micro.real * float("nan")) for micro in micros]
        return micros

    loop.prepare_step = prepare_step
    return train(config, run, *words)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_non_finite_steps_are_skipped_on_all_processes_and_counted(
    world: int, tmp_path: Path, tiny: Path, children: Children
) -> None:
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", non_finite_from, 4, str(tiny), str(run), world - 1, world=world)
    assert code == 0, output
    assert records(run, "log.jsonl")[-1]["skipped_steps"] == 2
    assert all(tensor.isfinite().all() for tensor in final_tensors(run).values())


def test_too_many_non_finite_steps_in_a_row_exit_5_and_leave_latest(
    tmp_path: Path, tiny: Path, children: Children
) -> None:
    run = tmp_path / "run"
    words = ("--optim.max_skipped", "1")
    code, output = children.run(tmp_path / "log", non_finite_from, 4, str(tiny), str(run), 0, *words)
    assert code == 5, output
    assert "2 steps in a row had non-finite losses" in output
    assert "Traceback" not in output
    assert (run / "latest").read_text() == "80\n"
    assert checkpoint.fault(run / "checkpoints" / "80") is None


def test_a_skipped_step_leaves_weights_and_moments_alone() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    adam = torch.optim.Adam([p], 0.1, fused=True)
    p.grad = torch.ones(5)
    adam.step()
    before = {key: value.clone() for key, value in adam.state[p].items()} | {"p": p.detach().clone()}
    p.grad = torch.full((5,), float("nan"))
    adam.found_inf = torch.tensor(1.0)
    adam.step()
    for key, value in (adam.state[p] | {"p": p.detach()}).items():
        assert torch.equal(value, before[key]), key


def test_a_network_that_does_not_move_is_an_error(tmp_path: Path, tiny: Path, children: Children) -> None:
    code, output = children.run(tmp_path / "log", frozen, str(tiny), str(tmp_path / "run"))
    assert code == 1
    assert "the discriminator did not move in the first step of a phase" in output


def frozen(config: str, run: str) -> int:
    from hrgan.engine import Engine

    original = Engine._prepare

    def _prepare(self: Engine, name: str, *arguments: Any) -> Any:
        net = original(self, name, *arguments)
        if name == "discriminator":
            net.adam.step = lambda: setattr(net.adam, "skipped", torch.zeros(()))
        return net

    Engine._prepare = _prepare
    return train(config, run)


# Bad input


def test_a_finished_run_says_so(reference: tuple[Path, Path], tmp_path: Path, children: Children) -> None:
    config, run = reference
    code, output = children.run(tmp_path / "log", train, str(config), str(run))
    assert code == 0
    assert "is finished at 0.16 kimg" in output


def test_a_finished_run_goes_on_when_it_is_made_longer(
    reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, run = reference
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    words = ("--schedule.total_kimg", "0.19", "--cuda_graphs", "true")
    code, output = children.run(tmp_path / "log", train, str(config), str(copy), *words)
    assert code == 0, output
    assert (copy / "FINISHED").read_text() == "192\n"
    assert "cuda_graphs: only on one GPU in one process; here each step is launched" in output


@pytest.mark.parametrize(
    ("damage", "words", "code", "expected"),
    [
        (
            "",
            ("--optim.lr", "0.5"),
            2,
            "optim.lr: {4: 0.001, 128: 0.0015, 256: 0.002, 512: 0.003} in the run, 0.5 asked for",
        ),
        (
            "",
            ("--network.resolution", "64", "--network.widths", "[8,8,8,8,8]"),
            2,
            "set --network.resolution 32 or build with --resolution 64",
        ),
        ("", ("--network.channels", "1"), 2, "network.channels: 1, but"),
        ("", ("--data.path", "/nowhere"), 4, "/nowhere"),
        ("no checkpoint", ("--optim.lr", "0.5"), 2, "0.5 asked for"),  # A log and FINISHED are worth keeping.
        ("version", (), 2, "written by run format 0, this hrgan reads 1"),
        ("foreign", (), 2, "not a run of this hrgan"),
        ("every checkpoint", (), 2, "no checkpoint can be used (160: manifest.json is missing"),
    ],
)
def test_a_run_that_cannot_go_on_says_why_in_one_line(
    damage: str,
    words: tuple[str, ...],
    code: int,
    expected: str,
    reference: tuple[Path, Path],
    tmp_path: Path,
    children: Children,
) -> None:
    config, run = reference
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    if damage == "version":
        (copy / "environment.json").write_text(json.dumps({"run_format": 0}))
    if damage == "no checkpoint":
        shutil.rmtree(copy / "checkpoints")
    if damage == "foreign":
        (copy / "environment.json").unlink()
    if damage == "every checkpoint":
        for manifest in copy.glob("checkpoints/*/manifest.json"):
            manifest.unlink()
    found, output = children.run(tmp_path / "log", train, str(config), str(copy), *words)
    assert found == code, output
    assert expected in output
    assert "Traceback" not in output


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    damage: str, reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, expected = reference
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    file = run / "checkpoints" / "160" / "ema.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    code, output = children.run(tmp_path / "log", train, str(config), str(run))
    assert code == 0, output
    assert f"160 passed over: ema.safetensors is {damage}" in output
    assert "going on at 0.144 kimg" in output
    assert_same_bits(run, expected)


def test_a_batch_that_does_not_divide_over_the_processes(tmp_path: Path, tiny: Path, children: Children) -> None:
    code, output = children.run(
        tmp_path / "log", train, str(tiny), str(tmp_path / "run"), "--schedule.batch", "12", world=2
    )
    assert code == 2, output
    assert "schedule.batch: 12 is not a multiple of 2 processes x 4 images; nearest: 8 or 16" in output


def test_a_full_disk_in_a_save_is_one_clear_line_and_earlier_checkpoints_stay(
    tmp_path: Path, tiny: Path, children: Children
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    run = tmp_path / "run"
    run.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs {run}") != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        code, output = children.run(tmp_path / "log", train, str(tiny), str(run))
        assert code == 2, output
        assert "No space left on device while saving" in output
        assert "Traceback" not in output
        latest = run / "checkpoints" / (run / "latest").read_text().strip()
        assert checkpoint.fault(latest) is None
        assert not list(run.glob("checkpoints/.writing-*"))
    finally:
        os.system(f"umount {run}")


# Evaluations within their share of the time


def test_evaluations_that_take_too_much_of_the_run_are_left_out_but_the_last(
    reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    config, expected = reference
    run = tmp_path / "run"
    code, output = children.run(tmp_path / "log", train, str(config), str(run), "--eval.max_share", "1e-9")
    assert code == 0, output
    # What the first takes, a single round, cannot be foreseen.
    assert [row["nimg"] for row in records(run, "metrics.jsonl")] == [32, 160]
    assert "evaluation at 0.096 kimg left out: " in output
    assert "eval.max_share 1e-09 leaves 0.0 s of" in output
    assert_same_weights(run, expected)


def with_slow_features(config: str, run: str, *words: str) -> int:
    from hrgan.metrics.extractor import RandomConv

    original = RandomConv.forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        time.sleep(0.1)
        return original(self, x)

    RandomConv.forward = forward  # type: ignore[method-assign]
    return train(config, run, *words)


def test_an_evaluation_that_turns_out_too_dear_is_given_up_at_once(
    reference: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    """200 rounds of a tenth of a second would take most of a run of some seconds."""
    config, _ = reference
    run, words = tmp_path / "run", ("--eval.max_share", "0.4", "--eval.num_fake", "800", "--eval.batch", "4")
    code, output = children.run(
        tmp_path / "log", with_slow_features, str(config), str(run), *words, "--schedule.total_kimg", "0.1", world=2
    )
    assert code == 0, output
    assert "evaluation at 0.032 kimg left out: it would take about 1" in output  # 100 rounds on two processes.
    assert [row["nimg"] for row in records(run, "metrics.jsonl")] == [112]
    progress = json.loads((run / "checkpoints" / "112" / "state.json").read_text())["progress"]
    assert progress["eval_seconds"] > 10  # The last is made whatever it takes.


def assert_same_weights(run: Path, expected: Path) -> None:
    a, b = final_tensors(run), final_tensors(expected)
    assert all(torch.equal(a[name], b[name]) for name in b)
