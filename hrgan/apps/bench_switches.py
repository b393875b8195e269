"""What each of the switches that make training faster or slower brings on this machine, at a configuration's full
size: torch.compile, CUDA graphs, the memory format, and which of torch's Adams."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hrgan.apps.bench_step import endless_reals, forget_peak, peak_gb, seconds_of, seconds_of_steps, stable_phase
from hrgan.config import Config
from hrgan.engine import Engine
from hrgan.train import one_step

Row = dict[str, Any]
ADAMS: dict[str, Any] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}


def bench_switches(config: Config, seconds: float) -> list[Row]:
    """A row for each combination, with img_per_sec of the whole step in the configured precision, memory_gb on a GPU,
    and start_seconds, what building and the first step took, in which networks are compiled; and adam_ms, one step of
    both networks by each of torch's Adams. CUDA graphs are tried on one GPU only."""
    engine = Engine(replace(config, compile=True))  # Where that is refused, it is at once.
    config = replace(config, precision=engine.config.precision)
    graphs = (False, True) if engine.can_record else (False,)
    rows = [
        _row(engine, replace(config, compile=compiled, cuda_graphs=recorded), seconds)
        for compiled in (False, True)
        for recorded in graphs
    ]
    rows.append(_row(engine, replace(config, network=replace(config.network, channels_last=False)), seconds))
    adams = {name: 1000 * _adam_seconds(engine, seconds / 4, words) for name, words in ADAMS.items()}
    return [row | {"adam_ms": adams} for row in rows]


def _row(engine: Engine, config: Config, seconds: float) -> Row:
    engine.config, phase = config, stable_phase(config, config.network.resolution)
    reals, _ = endless_reals(engine, config, phase)
    began = time.perf_counter()
    forget_peak(engine)
    engine.enter(phase, None)
    one_step(engine, config, phase, phase.nimg_from, *next(reals))[1].tolist()
    start = time.perf_counter() - began
    step, _ = seconds_of_steps(engine, config, phase, reals, seconds)
    return {
        "resolution": phase.resolution,
        "precision": config.precision,
        "batch": phase.batch,
        "channels_last": config.network.channels_last,
        "compile": config.compile,
        "cuda_graphs": engine.graphs.on,
        "img_per_sec": phase.batch / step,
        "memory_gb": peak_gb(engine),
        "start_seconds": start,
    }


def _adam_seconds(engine: Engine, seconds: float, words: dict[str, Any]) -> float:
    """Of one step of G's and D's parameters with random gradients."""
    copies = [
        torch.nn.Parameter(p.detach().clone())
        for net in (engine.generator, engine.discriminator)
        for p in net.module.parameters()
    ]
    for parameter in copies:
        parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.Adam(copies, lr=1e-6, **words)
    return seconds_of(lambda: adam.step(), engine, seconds)


def print_table(rows: list[Row]) -> None:
    """For people."""
    first = rows[0]
    table = Table(title=f"{first['resolution']}², {first['precision']}, batch {first['batch']}")
    for column in ("compile", "CUDA graphs", "channels_last", "img/s", "of the first", "GB", "start s"):
        table.add_column(column, justify="right")
    for row in rows:
        switches = ["on" if row[name] else "off" for name in ("compile", "cuda_graphs", "channels_last")]
        memory = "-" if row["memory_gb"] is None else f"{row['memory_gb']:.1f}"
        ratio = row["img_per_sec"] / first["img_per_sec"]
        table.add_row(*switches, f"{row['img_per_sec']:.1f}", f"{ratio:.2f}", memory, f"{row['start_seconds']:.1f}")
    Console(width=140).print(table)
    print("Adam, ms a step: " + ", ".join(f"{name} {ms:.3f}" for name, ms in first["adam_ms"].items()))
