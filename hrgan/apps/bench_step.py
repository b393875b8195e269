"""Training speed on this machine: images per second at each resolution in float32 and bf16, and where a step's time
goes.

The parts are the training loop's own functions (`hrgan.train`), timed whole and one by one; on CUDA the clock stops
only when the device is done. Networks are those of the configuration at each resolution, in a stable phase.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hrgan import checkpoint
from hrgan.checkpoint import Progress
from hrgan.config import Config, DataConfig, LossConfig, NetworkConfig, Precision, ScheduleConfig, resolutions
from hrgan.data.dataset import open_dataset
from hrgan.engine import Engine
from hrgan.errors import DataError, UserError
from hrgan.graphs import WARM_UP
from hrgan.networks import AUTOCAST
from hrgan.run import LOOK_SECONDS
from hrgan.schedule import Phase, make_schedule
from hrgan.sizes import size_at
from hrgan.train import ADAPT_EVERY, Micro, Now, d_step, g_step, moment, one_step, open_reals, prepare_step
from hrgan.watch import Watch

Row = dict[str, Any]
Act = Callable[[], Tensor | list[Any] | None]
Step = Callable[[Engine, Config, list[Micro], Now], Tensor]

PEER = {16: (64, [64, 64, 64], 120.0), 32: (32, [64, 64, 64, 32], 51.0), 64: (16, [64, 64, 64, 64, 32], 14.0)}
"""resolution: (batch, widths from 4x4 up, images/s) of pytorch_GAN_zoo's ProGAN with WGAN-GP and drift, latent 128,
float32, 2 threads, as measured on 2 CPU cores like those of the README's figures: on another machine the ratio means
nothing."""


def bench_step(
    config: Config,
    seconds: float,
    with_saves: bool = False,
    sizes: Collection[int] = (),
    precisions: Sequence[Precision] = (),
) -> list[Row]:
    """A row for each resolution (of `sizes`, where some are given) and precision (without any: float32, and bf16 where
    the device has it): img_per_sec of the whole step; the shares of D, G, penalty, EMA and data in it; penalty_cost and
    penalty_operations, its time, and its counted operations, over those of a step without penalties; matmul_share,
    what its convolutions and products reach of the rate at which this process multiplies large matrices in that
    precision; memory_gb, the most that it held on the GPU (null without one). Batches come from the loader where
    data.path holds a set, else from memory. with_saves: also what checkpoints and looks for a reason to stop take of a
    run's time."""
    rows = []
    unknown = sorted(set(sizes) - set(resolutions(config)))
    if unknown:
        raise UserError(f"--resolutions: {unknown} are none of the run's, {resolutions(config)}")
    engine = Engine(config)
    for size in (size for size in resolutions(config) if not sizes or size in sizes):
        for precision in precisions or (("float32", "bf16") if engine.has_bf16 else ("float32",)):
            engine.config = replace(config, precision=precision)
            phase = stable_phase(config, size)
            engine.enter(phase, None)
            row: Row = {"resolution": size, "precision": precision, "batch": phase.batch}
            row |= _measure(engine, config, phase, seconds)
            rows.append(row | (_overhead(engine, config, row["img_per_sec"]) if with_saves else {}))
    return rows


def stable_phase(config: Config, size: int) -> Phase:
    """The phase of a resolution in which nothing fades."""
    phases = make_schedule(config).phases
    return next(phase for phase in phases if phase.resolution == size and not phase.fading)


def _overhead(engine: Engine, config: Config, img_per_sec: float) -> Row:
    """Seconds of a checkpoint (gathered, compared over the processes, written to the temporary folder's disk) and of a
    look for a reason to stop, and the share of a run's time that both take at their intervals."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(engine.rank, engine.world, 3600, None, None)

        def save() -> None:
            state = engine.state()
            engine.check_same(state)
            engine.on_main(lambda: checkpoint.save(Path(folder), state, Progress(nimg=next(numbers)), config, ""))

        def look() -> None:
            engine.agree(watch.reason() or ("STOP" if Path(folder, "STOP").exists() else None))

        numbers = count()
        saving, looking = seconds_of(save, engine, 1.0), seconds_of(look, engine, 0.2)
    between_saves = config.checkpoint.every_kimg * 1000 / img_per_sec
    share = saving / between_saves + looking / LOOK_SECONDS
    return {"save_seconds": saving, "look_seconds": looking, "overhead": share}


def bench_peer(data: DataConfig, seconds: float, sizes: Collection[int], precisions: Sequence[Precision]) -> list[Row]:
    """The same rows for the networks, batches and loss that PEER was measured with, with the ratio of the speeds."""
    rows = []
    for size in sizes or PEER:
        if size not in PEER:
            raise UserError(f"--resolutions: {size} is none of the peer's, {list(PEER)}")
        batch, widths, peer = PEER[size]
        network = NetworkConfig(resolution=size, latent=128, widths=widths, grow=False)
        config = Config(
            data=data, network=network, loss=LossConfig(kind="wgan-gp"), schedule=ScheduleConfig(batch=batch)
        )
        found = bench_step(config, seconds, precisions=precisions)
        rows += [{**row, "ratio": row["img_per_sec"] / peer} for row in found]
    return rows


def lazily(config: Config) -> tuple[int, int]:
    """Steps of D and of G for one penalty; 1 without any."""
    loss = config.loss
    d_every = loss.r1_every if (loss.r1_gamma, loss.r2_gamma) != (0.0, 0.0) else 1
    return loss.gp_every if loss.kind == "wgan-gp" else d_every, loss.path_every if loss.path_weight else 1


def endless_reals(engine: Engine, config: Config, phase: Phase) -> tuple[Iterator[tuple[Tensor, Tensor]], str]:
    """Endless local batches of uint8 images with their labels, and where they come from."""
    try:
        dataset = open_dataset(config.data) if config.data.path else None
    except DataError:  # The presets name sets that need not have been built.
        dataset = None
    if dataset is not None:
        batches = open_reals(config, engine, dataset, phase, 0)
        return ((batch.images, batch.labels) for batch in batches), "loader"
    size = size_at(config.network.grid, phase.resolution)
    shape = (phase.batch // engine.world, config.network.channels, *size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return repeat((images, torch.arange(len(images)) % max(1, config.network.num_classes))), "memory"


def _measure(engine: Engine, config: Config, phase: Phase, seconds: float) -> Row:
    reals, source = endless_reals(engine, config, phase)
    micros = prepare_step(engine, config, phase, phase.nimg_from, *next(reals))
    forget_peak(engine)
    step, waiting = seconds_of_steps(engine, config, phase, reals, seconds)
    memory = peak_gb(engine)
    loss = replace(config.loss, gp_lambda=0.0, r1_gamma=0.0, r2_gamma=0.0, path_weight=0.0)
    plain_step, _ = seconds_of_steps(engine, replace(config, loss=loss), phase, reals, seconds)
    first = replace(moment(config, phase, phase.nimg_from), alpha=1.0)
    plain = replace(first, penalty=0.0, path=0.0)

    def time_of(step: Step, now: Now) -> float:
        def act(held: list[Micro], _: object) -> tuple[Tensor, ...]:
            return (step(engine, config, held, now),)

        return seconds_of(lambda: engine.graphs.run(act, micros, (step.__name__, now))[0], engine, seconds / 8)

    def average(engine: Engine, config: Config, micros: list[Micro], now: Now) -> Tensor:
        engine.update_ema(now.rates.ema_kimg)
        return engine.feedback["path_mean"]

    def operations_of(step: Step, now: Now) -> float:
        return _operations(lambda: step(engine, config, micros, now))

    without, penalised = ([time_of(step, now) for step in (d_step, g_step)] for now in (plain, first))
    every = lazily(config)  # A lazy penalty costs its share of the steps.
    extra = [max(0.0, b - a) / steps for a, b, steps in zip(without, penalised, every, strict=True)]
    counted = [[operations_of(step, now) for step in (d_step, g_step)] for now in (plain, first)]
    operations = sum(a + (b - a) / steps for a, b, steps in zip(*counted, every, strict=True))
    each = {
        "d": without[0],
        "g": without[1],
        "penalty": sum(extra),
        "ema": time_of(average, first),
        # As the step met it: the loader works beside the networks, so only the wait for it counts.
        "data": waiting,
    }
    return {
        "img_per_sec": phase.batch / step,
        "step_ms": step * 1000,
        "penalty_cost": step / plain_step,
        "penalty_operations": operations / sum(counted[0]),
        "matmul_share": operations / step / _matmul_rate(engine, seconds / 16),
        "memory_gb": memory,
        "share": {name: value / step for name, value in each.items()},
        "reals": source,
    }


def seconds_of_steps(
    engine: Engine, config: Config, phase: Phase, reals: Iterator[tuple[Tensor, Tensor]], seconds: float
) -> tuple[float, float]:
    """Mean seconds of a whole step, and how many of them it waited for its reals."""
    data, numbers = {"seconds": 0.0, "steps": 0}, count()

    def whole() -> None:
        began = time.perf_counter()
        images, labels = next(reals)
        data["seconds"] += time.perf_counter() - began
        data["steps"] += 1
        one_step(engine, config, phase, phase.nimg_from + phase.batch * next(numbers), images, labels)

    # Where steps are recorded, those of each kind are before the clock starts.
    period = math.lcm(*lazily(config), ADAPT_EVERY if config.augment.target is not None else 1)
    for _ in range((WARM_UP + 1) * period if engine.graphs.on else 0):
        whole()
    step = seconds_of(whole, engine, seconds)
    return step, data["seconds"] / data["steps"]


def forget_peak(engine: Engine) -> None:
    """Let `peak_gb` count from here on."""
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(engine.device)


def peak_gb(engine: Engine) -> float | None:
    """The most that this process kept of the GPU's memory, that of its graphs included; None without a GPU."""
    return torch.cuda.max_memory_reserved(engine.device) / 1e9 if engine.device.type == "cuda" else None


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own lacks types
    """Counts the floating point operations of convolutions and products, by torch's own formulas (its FlopCounterMode
    does not follow a double backward)."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        return result


def _operations(act: Act) -> float:
    with _Count() as count:  # type: ignore[no-untyped-call]
        act()
    return float(count.operations)


def _matmul_rate(engine: Engine, seconds: float) -> float:
    """Floating point operations a second of one large product of matrices, in the run's precision."""
    emulated = engine.config.precision != "float32" and not engine.has_bf16  # Else half a minute for each product.
    side = 8192 if engine.device.type == "cuda" else 256 if emulated else 2048
    # Random numbers: a GPU multiplies ones at less power, and so faster.
    a = torch.randn(side, side, device=engine.device).to(AUTOCAST[engine.config.precision] or torch.float32)
    return 2 * side**3 / seconds_of(lambda: a @ a, engine, seconds)


def seconds_of(act: Act, engine: Engine, seconds: float) -> float:
    """Mean seconds of a call over about `seconds`, after a few calls to warm up and three to choose how many."""

    def timed(calls: int) -> float:
        _wait(engine)
        began = time.perf_counter()
        for _ in range(calls):
            act()
        _wait(engine)
        return (time.perf_counter() - began) / calls

    timed(WARM_UP + 1)
    first = timed(3)
    # All processes make the same number of calls, because they meet in each.
    return timed(engine.on_main(lambda: max(3, round(seconds / first))))


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def print_table(rows: list[Row]) -> None:
    """For people."""
    table = Table(
        title=f"training step, {torch.get_num_threads()} CPU threads"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    overhead = "overhead" in rows[0]
    for column in (
        "size",
        "precision",
        "batch",
        "img/s",
        "step ms",
        "D",
        "G",
        "penalty",
        "EMA",
        "data",
        "x no penalty",
        "in operations",
        "of matmul",
        "GB",
        "reals",
        "x peer",
        *(("save s", "look ms", "both") if overhead else ()),
    ):
        table.add_column(column, justify="right")
    for row in rows:
        shares = [f"{row['share'][name]:.0%}" for name in ("d", "g", "penalty", "ema", "data")]
        speed = [str(row["batch"]), f"{row['img_per_sec']:.1f}", f"{row['step_ms']:.1f}"]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        ends = []
        if overhead:
            ends = [f"{row['save_seconds']:.3f}", f"{row['look_seconds'] * 1000:.3f}", f"{row['overhead']:.3%}"]
        limits = [f"{row['matmul_share']:.0%}", "-" if row["memory_gb"] is None else f"{row['memory_gb']:.1f}"]
        costs = [f"{row[name]:.2f}" for name in ("penalty_cost", "penalty_operations")]
        cells = [*speed, *shares, *costs, *limits, row["reals"], ratio, *ends]
        table.add_row(f"{row['resolution']}²", row["precision"], *cells)
    Console(width=140).print(table)
    if overhead:
        worst = max(row["overhead"] for row in rows)
        verdict = "met" if worst < 0.01 else "missed"
        print(f"checkpoints and looks for a stop take at most {worst:.3%} of the time, asked less than 1%: {verdict}")
