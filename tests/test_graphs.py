"""Steps replayed as CUDA graphs, and compiled networks, are the same steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from hrgan.config import Config
from hrgan.engine import Engine
from hrgan.graphs import WARM_UP, Graphs
from hrgan.schedule import make_schedule
from hrgan.train import Micro, Now, device_step, moment, one_step, prepare_step
from tests.test_step import STEPS

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def trained(config: Config, steps: int) -> tuple[dict[str, Tensor], Tensor, int]:
    """All tensors after some steps of the stable 8² phase, what the steps returned, and the number of graphs."""
    engine, phase = Engine(config), make_schedule(config).phases[2]
    assert not phase.fading
    engine.enter(phase, None)
    values = []
    size = phase.resolution
    for nimg in range(phase.nimg_from, phase.nimg_from + 16 * steps, 16):
        pictures = torch.Generator().manual_seed(nimg)
        images = torch.randint(0, 256, (16, config.network.channels, size, size), dtype=torch.uint8, generator=pictures)
        _, d_values, g_values = one_step(engine, config, phase, nimg, images, torch.arange(16) % 2)
        values.append(torch.cat([d_values, g_values]))
    parts = engine.state().parts
    tensors = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    return tensors, torch.stack(values).cpu(), len(engine.graphs)


@pytest.fixture
def deterministic_after() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def first_unlike(found: Tensor, expected: Tensor) -> list[int] | None:
    """(step, column) of the first number that differs; NaN equals NaN, as in fp16's first, overflowing steps."""
    unlike = ((found != expected) & ~(found.isnan() & expected.isnan())).nonzero().tolist()
    return unlike[0] if unlike else None


@needs_cuda
@pytest.mark.usefixtures("deterministic_after")
@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "bf16") for name in STEPS), ("style", "float32"), ("wgan-gp", "fp16")]
)
def test_replayed_steps_give_the_same_bits_as_launched_ones(name: str, precision: str) -> None:
    config = replace(STEPS[name], precision=precision, deterministic=True)
    launched, values, none = trained(config, 40)
    assert first_unlike(trained(config, 40)[1], values) is None, "launched twice"
    replayed, same_values, graphs = trained(replace(config, cuda_graphs=True), 40)
    assert none == 0
    # A ramp makes each step another.
    assert (graphs > 0) == (config.ramp.kimg == 0)
    assert first_unlike(same_values, values) is None
    unlike = [key for key, tensor in replayed.items() if not torch.equal(tensor, launched[key])]
    assert unlike == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_compiled_networks_train_like_those_that_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written, graphs = torch.nn.Module.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        """What torch traces and derives; the code that it makes of it is torch's to test, and takes a minute."""
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: written(module, backend=backend))
    plain, values, _ = trained(STEPS[name], 3)
    assert not graphs
    counters["graph_break"].clear()
    compiled, close_values, _ = trained(replace(STEPS[name], compile=True), 3)
    assert len(graphs) >= 3  # D, and G with and without a gradient.
    assert not counters["graph_break"], "compiled in pieces"
    torch.testing.assert_close(close_values, values, rtol=1e-3, atol=1e-4)
    for key, tensor in compiled.items():
        torch.testing.assert_close(tensor, plain[key], rtol=1e-3, atol=1e-4)


class Log(TorchDispatchMode):
    """Every operation, with all of its arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shown = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, (args, kwargs))
        if func.namespace != "profiler":
            self.lines.append(f"{func} {shown}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_one_key_do_the_same_operations_with_the_same_numbers(name: str) -> None:
    """Else a graph of the first would not be the next one's."""
    config = STEPS[name]
    engine, phase = Engine(config), make_schedule(config).phases[2]
    engine.enter(phase, None)
    logs: dict[Now, list[str]] = {}
    kinds = 0
    size = phase.resolution
    for step in range(24):
        nimg = phase.nimg_from + 16 * step
        images = torch.randint(0, 256, (16, config.network.channels, size, size), dtype=torch.uint8)
        now = moment(config, phase, nimg)
        engine.set_rates(now.rates)
        micros = prepare_step(engine, config, phase, nimg, images, torch.arange(16) % 2)
        with Log() as log:
            device_step(engine, config, micros, now)
        if step >= 4:  # Not the first of each kind, which makes Adam's moments.
            kinds += now in logs
            assert logs.setdefault(now, log.lines) == log.lines, now
    assert kinds >= 10 or config.ramp.kimg


def test_what_differs_from_step_to_step_is_in_the_key_or_in_tensors() -> None:
    """Else a graph would repeat the first step's: noise of penalties above all."""
    config = STEPS["style"]
    engine, phase = Engine(config), make_schedule(config).phases[2]
    engine.enter(phase, None)
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)

    def tensors_of(nimg: int) -> list[Tensor]:
        micros: list[Micro] = prepare_step(engine, config, phase, nimg, images, torch.arange(16) % 2)
        return [tensor for micro in micros for tensor in Graphs.tensors([micro])]

    first, later = tensors_of(phase.nimg_from), tensors_of(phase.nimg_from + 8 * 16)
    assert [tensor.shape for tensor in first] == [tensor.shape for tensor in later]
    differ = [not torch.equal(a, b) for a, b in zip(first, later, strict=True)]
    micros = prepare_step(engine, config, phase, phase.nimg_from, images, torch.arange(16) % 2)
    assert differ.count(False) == 2 * len(micros)  # Reals and labels, which are the same here.
    assert all(micro.path is not None for micro in micros)


def test_without_graphs_each_step_runs_as_it_is() -> None:
    graphs, ran = Graphs(False), []
    for number in range(2 * WARM_UP):
        (result,) = graphs.run(lambda x, key: (ran.append(key) or x + key,), torch.ones(1), number)
        assert result == 1 + number
    assert ran == list(range(2 * WARM_UP))
    assert len(graphs) == 0
