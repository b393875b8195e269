"""What each of the switches that make training faster or slower brings on this machine, at a configuration's full
size: torch.compile, CUDA graphs, the memory format, and which of torch's Adams."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hrgan.apps.bench_step import endless_reals, seconds_of, seconds_of_steps, stable_phase
from hrgan.config import Config
from hrgan.engine import Engine

Row = dict[str, Any]
ADAMS: dict[str, Any] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}


def bench_switches(config: Config, seconds: float) -> list[Row]:
    """A row for each combination, with img_per_sec of the whole step in the configured precision, memory_gb on a GPU,
    and start_seconds, what building, compiling, recording and the first steps took; and adam_ms, one step of both
    networks by each of torch's Adams. CUDA graphs are tried on one GPU only."""
    engine = Engine(config)
    cuda = engine.device.type == "cuda"
    pairs = [(compiled, graphs) for compiled in (False, True) for graphs in ((False, True) if cuda else (False,))]
    rows = [_row(engine, replace(config, compile=a, cuda_graphs=b), seconds, channels_last=True) for a, b in pairs]
    rows.append(_row(engine, replace(config, compile=False, cuda_graphs=cuda), seconds, channels_last=False))
    adams = {name: 1000 * _adam_seconds(engine, seconds / 4, words) for name, words in ADAMS.items()}
    return [row | {"adam_ms": adams} for row in rows]


def _row(engine: Engine, config: Config, seconds: float, channels_last: bool) -> Row:
    engine.config, phase = config, stable_phase(config, config.network.resolution)
    reals, _ = endless_reals(engine, config, phase)
    began = time.perf_counter()
    engine.enter(phase, None)
    if not channels_last:
        for net in (engine.generator, engine.discriminator):
            net.module.to(memory_format=torch.contiguous_format)
        reals = _contiguous(reals)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    seconds_of_steps(engine, config, phase, reals, 0.0)
    start = time.perf_counter() - began
    step, _ = seconds_of_steps(engine, config, phase, reals, seconds)
    return {
        "resolution": phase.resolution,
        "precision": config.precision,
        "batch": phase.batch,
        "channels_last": channels_last,
        "compile": config.compile,
        "cuda_graphs": engine.graphs.on,
        "img_per_sec": phase.batch / step,
        "memory_gb": torch.cuda.max_memory_allocated(engine.device) / 1e9 if engine.device.type == "cuda" else None,
        "start_seconds": start,
    }


def _contiguous(reals: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in reals:
        yield images.contiguous(), labels


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
