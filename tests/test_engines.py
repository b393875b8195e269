"""Every way of running gives the same training: DDP and ZeRO against one process, and what must not be done."""

from __future__ import annotations

import gc
import itertools
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file as load
from safetensors.torch import save_file

import hrgan.engine as engine_module
import hrgan.train as loop
from hrgan import zero
from hrgan.adam import GROWTH_STEPS, Adam, LossScale
from hrgan.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    ScheduleConfig,
    from_dict,
)
from hrgan.engine import PARTS, Engine, Net, State
from hrgan.errors import Drifted, UserError
from hrgan.networks.progan import Discriminator
from hrgan.noise import draw, local_rows
from hrgan.schedule import make_schedule
from tests.conftest import Children
from tests.test_train import FAMILIES as FAMILY_WORDS
from tests.test_train import assert_same_bits, initial_tensors, killed_before_step, relative_error, train

Result = dict[str, torch.Tensor]

LOSSES = {
    "WGAN-GP": LossConfig(kind="wgan-gp"),
    "exact R1": LossConfig(kind="logistic", r1_every=2),
    # A larger sigma than the default: rounding is divided by it.
    "finite-difference R1": LossConfig(kind="logistic", r1_every=2, penalty="finite_difference", fd_sigma=0.2),
    "finite-difference WGAN-GP": LossConfig(kind="wgan-gp", gp_every=2, penalty="finite_difference", fd_sigma=0.2),
}
ENGINES: dict[str, int | None] = {"DDP": None, "ZeRO-0": 0, "ZeRO-1": 1, "ZeRO-2": 2}
ADAPTED = AugmentConfig(ops=["flip", "shift", "brightness", "cutout"], strength=0.2, target=0.1, adapt_kimg=0.2)
FAMILIES = {
    "style": (
        LossConfig(kind="logistic", r1_every=2, path_weight=2.0, path_every=2),
        {"family": "style", "mapping_layers": 2, "condition": "projection", "classes": ["a", "b", "c"]},
        ADAPTED,
    ),
    "r3": (
        LossConfig(kind="relativistic", r1_gamma=1.0, r2_gamma=None, r1_every=1),
        {"family": "r3", "group_size": 4},
        AugmentConfig(ops=["diffaugment"], strength=1.0),
    ),
    "ProGAN with classes": (
        LossConfig(kind="wgan-gp"),
        {"condition": "acgan", "classes": ["a", "b", "c"]},
        AugmentConfig(),
    ),
    "dcgan": (
        LossConfig(kind="logistic", r1_every=2, penalty="finite_difference"),
        {"family": "dcgan"},
        AugmentConfig(),
    ),
}
"""Loss, network and augmentation: with all that a step carries over to the next one."""
MATRIX = [
    *itertools.product(list(LOSSES)[:3], ("float32", "bf16"), (1, 2)),
    ("finite-difference WGAN-GP", "float32", 2),
    # DCGAN's batch statistics need the whole batch at once.
    *((name, "float32", micros) for name in FAMILIES for micros in ((1,) if name == "dcgan" else (1, 2))),
]
"""(loss or family, precision, micro-batches of each of two processes in a step)."""


LAUNCH = Config(loss=LOSSES["exact R1"])
"""What an engine is made for; each combination then sets its own."""


def configuration(loss: str, precision: Any, micros: int, world: int) -> Config:
    settings, network, twisting = FAMILIES.get(loss) or (LOSSES[loss], {}, AugmentConfig())
    whole = loss == "dcgan"
    # DeepSpeed's weights are contiguous, and bf16 rounds otherwise in each layout on a CPU without AMX.
    alike = precision == "float32" or torch.cpu.get_capabilities().get("amx_bf16", False)
    network = {"channels_last": alike} | network
    # With Adam's usual epsilon a gradient that is zero but for rounding moves a weight by a whole learning rate.
    return Config(
        network=NetworkConfig(**{"resolution": 32 if whole else 16, "latent": 8, "widths": [8] * 4} | network),  # type: ignore[arg-type]
        loss=settings,
        augment=twisting,
        # Batch normalisation of a block that has just joined makes large steps of rounding.
        optim=OptimConfig(lr=0.0005 if whole else 0.01, eps=1e-3, ema_kimg=0.1),
        schedule=ScheduleConfig(
            total_kimg=0.16,
            start_resolution=8 if whole else 4,
            stable_kimg=0.032,
            fade_kimg=0.032,
            batch=16,
            micro_batch=None if whole else 16 // world // micros,
            # Then blocks that join begin with step counts of their own.
            reset_adam="never" if loss in ("finite-difference R1", "r3") else "both",
        ),
        checkpoint=CheckpointConfig(every_kimg=0.016),
        precision=precision,
    )


def trained(engine: Engine, config: Config, phases: slice, state: State | None = None) -> tuple[Result, State]:
    """Losses of each step, and the tensors after the last, of some phases of a run on noise for images."""
    engine.config = config
    losses = []
    for phase in make_schedule(config).phases[phases]:
        engine.enter(phase, state)
        before = engine.weights()
        for nimg in range(phase.nimg_from, phase.nimg_to, phase.batch):
            shape = (phase.batch, 3, phase.resolution, phase.resolution)
            images = (draw(torch.rand, shape, "images", nimg) * 255).to(torch.uint8)
            mine = local_rows(nimg, phase.batch, engine.rank, engine.world)
            _, d_values, g_values = loop.one_step(engine, config, phase, nimg, images[mine], mine % 3)
            losses.append(engine.mean(torch.cat([d_values, g_values])))
        after = engine.weights()
        moved = [not torch.equal(a, b) for name in after for a, b in zip(after[name], before[name], strict=True)]
        assert any(moved), "nothing was trained"
        state = engine.state()
    assert state is not None
    engine.check_same(state)
    copies = {part: {name: tensor.clone() for name, tensor in state.parts[part].items()} for part in PARTS}
    flat = {f"{part}/{name}": tensor for part in PARTS for name, tensor in copies[part].items()}
    return flat | {"losses": torch.stack(losses)}, replace(state, parts=copies)


def write(result: Result, out: str, name: str, engine: Engine) -> None:
    if engine.rank == 0:
        tensors = {key: tensor.clone().contiguous() for key, tensor in result.items()}
        save_file(tensors, Path(out, f"{name}.safetensors"))


def whole_matrix(out: str) -> None:
    """In a child: every combination of MATRIX over the borders into a fade, out of it, and into the next size. One
    process takes twice as many micro-batches, and the whole batch at once where two take one each."""
    engine = Engine(LAUNCH)
    for number, (loss, precision, micros) in enumerate(MATRIX):
        alone = {1: 1, 2: 4}[micros]
        config = configuration(loss, precision, micros if engine.world > 1 else alone, engine.world)
        write(trained(engine, config, slice(0, 4))[0], out, str(number), engine)
    engine.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, children: Children) -> Callable[[str], list[Result]]:
    """The results of MATRIX under an engine, made once."""
    made: dict[str, list[Result]] = {}

    def of(engine: str) -> list[Result]:
        if engine not in made:
            folder = tmp_path_factory.mktemp("matrix")
            world, zero = (1, None) if engine == "one process" else (2, ENGINES[engine])
            code, output = children.run(folder / "log", whole_matrix, str(folder), world=world, zero=zero)
            assert code == 0, output
            made[engine] = [load(folder / f"{number}.safetensors") for number in range(len(MATRIX))]
        return made[engine]

    return of


def distance(found: Result, expected: Result) -> float:
    """Largest distance of a part's tensors from the expected ones, relative to how large those are together."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for part in (*PARTS, "losses"):
        names = [name for name in expected if name.split("/")[0] == part]
        size = sum(expected[name].double().square().sum() for name in names) ** 0.5
        apart = sum((found[name].double() - expected[name].double()).square().sum() for name in names) ** 0.5
        # Of a run that feeds nothing back all such numbers are 0.
        worst = max(worst, float(apart / size) if size else float(apart))
    return worst


ROUNDING = 2e-6
"""Float32's, through eight steps of two networks and their Adams. Found: up to 3e-7."""


@pytest.mark.slow
@pytest.mark.timeout(1200)  # The first of an engine trains its whole matrix, on a busy machine for minutes.
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("loss", "precision", "micros"), MATRIX)
def test_two_processes_train_like_one(
    engine: str, loss: str, precision: str, micros: int, results: Callable[[str], list[Result]]
) -> None:
    number = MATRIX.index((loss, precision, micros))
    found, expected = results(engine)[number], results("one process")[number]
    if precision == "float32" or micros == 2:  # Then the same images go through the networks together.
        assert distance(found, expected) < ROUNDING
    else:  # Else sums over other images round otherwise in bf16, as far as bf16 is from float32; all engines alike.
        assert distance(found, expected) < 0.1
        assert distance(found, results("DDP")[number]) < ROUNDING


@pytest.mark.slow
def test_another_loss_or_precision_would_be_seen(results: Callable[[str], list[Result]]) -> None:
    one = dict(zip(MATRIX, results("one process"), strict=True))
    assert distance(one["WGAN-GP", "float32", 1], one["exact R1", "float32", 1]) > 0.1
    assert distance(one["finite-difference R1", "float32", 1], one["exact R1", "float32", 1]) > 1e-2
    assert distance(one["exact R1", "bf16", 2], one["exact R1", "float32", 2]) > 1e-3


# ZeRO-3 and offload


def one_combination(loss: str, micros: int, out: str) -> None:
    """In a child. Parameters of ZeRO-3 are divided however small they are."""
    zero.PERSISTENCE = 0
    engine = Engine(replace(LAUNCH, loss=LOSSES[loss]))
    config = configuration(loss, "float32", micros, engine.world)
    result, _ = trained(engine, config, slice(0, 4))
    divided = [
        p.ds_tensor.numel() < p.ds_numel for p in engine.discriminator.module.parameters() if hasattr(p, "ds_id")
    ]
    offloaded = [
        state["exp_avg"].device.type == "cpu" and not engine.discriminator.deepspeed.optimizer.cpu_offload
        for state in engine.discriminator.adam.state.values()
        if engine.zero_stage in (1, 2)
    ]
    assert any(divided) == (engine.zero_stage == 3), "nothing is divided"
    assert not any(offloaded), "nothing is offloaded"
    write(result, out, "found", engine)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "micros"), [("finite-difference R1", 1), ("finite-difference R1", 2), ("finite-difference WGAN-GP", 2)]
)
def test_zero_3_trains_like_one_process_with_finite_differences(
    loss: str, micros: int, tmp_path: Path, results: Callable[[str], list[Result]], children: Children
) -> None:
    code, output = children.run(tmp_path / "log", one_combination, loss, micros, str(tmp_path), world=2, zero=3)
    assert code == 0, output
    expected = results("one process")[MATRIX.index((loss, "float32", micros))]
    assert distance(load(tmp_path / "found.safetensors"), expected) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_adam_in_the_cpu_s_memory_gives_the_same(
    stage: int, tmp_path: Path, results: Callable[[str], list[Result]], children: Children
) -> None:
    loss, compiled = "finite-difference R1", tmp_path / "compiled"
    more = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "TORCH_EXTENSIONS_DIR": str(compiled)}
    code, output = children.run(tmp_path / "log", one_combination, loss, 2, str(tmp_path), world=2, zero=stage, **more)
    assert code == 0, output
    assert not compiled.exists(), "DeepSpeed compiled a module, which takes minutes and a compiler"
    expected = results("one process")[MATRIX.index((loss, "float32", 2))]
    assert distance(load(tmp_path / "found.safetensors"), expected) < ROUNDING


# What must not be done: each of these was seen to train wrongly, most of them silently


@contextmanager
def planted(trap: str, engine: Engine) -> Iterator[None]:
    """Make the engine do what must not be done."""
    with pytest.MonkeyPatch.context() as patch:
        if trap == "all through the bare module under DDP":
            prepare = engine._prepare
            patch.setattr(engine, "_prepare", lambda *words: bare(prepare(*words)))
        if trap == "R1 under DDP with a static graph":
            patch.setattr(engine.accelerator.ddp_handler, "static_graph", True)
        if trap == "gradients clipped at 1.0, the default":
            for plugin in engine.accelerator.state.deepspeed_plugins.values():
                patch.setitem(plugin.deepspeed_config, "gradient_clipping", 1.0)
        if trap == "D not frozen in the generator's step":
            patch.setattr(Discriminator, "requires_grad_", lambda module, flag=True: module)
        if trap == "two backwards for one update":
            patch.setattr(loop, "d_step", d_step_with_two_backwards)
        if trap == "DeepSpeed not told that a micro-batch begins":
            patch.setattr(zero, "begin_micro_step", DeepSpeedEngine.set_gradient_accumulation_boundary)
        if trap == "R1 through DeepSpeed's wrapper":
            prepare = engine._prepare
            patch.setattr(engine, "_prepare", lambda *words: through_deepspeed(prepare(*words)))
        yield


def bare(net: Net) -> Net:
    return replace(net, wrapped=net.module)


def through_deepspeed(net: Net) -> Net:
    return replace(net, wrapped=net.deepspeed, module=net.deepspeed)


def d_step_with_two_backwards(engine: Engine, config: Config, micros: list[Any], now: Any) -> torch.Tensor:
    """The loss, then the penalty."""
    net, (micro,) = engine.discriminator, micros
    with torch.no_grad():
        fake = engine.generator.module(micro.z_d, None, now.alpha)
    with engine.micro_step(net, last=True):
        real_logits, fake_logits = loop.judged(config, net, micro.real, fake, None, now.alpha, (None, None))
        loss = loop.losses.adversarial_d(config.loss.kind, real_logits, fake_logits, config.loss.drift)
        engine.backward(net, loss)
        x = micro.real.detach().requires_grad_()
        definition = partial(loop.losses.r1_penalty, gamma=now.rates.r1_gamma)
        penalty = loop.losses.exact_penalty(definition, net.module(x, None, now.alpha), x)
        engine.backward(net, now.penalty * penalty)
    skipped = engine.update(net, loss)
    return torch.stack([loss, loss, loss, penalty, loss, loss, net.adam.norm, skipped]).detach()


TRAPS = {
    "all through the bare module under DDP": (None, "drifted"),
    "R1 under DDP with a static graph": (None, "drifted"),
    "gradients clipped at 1.0, the default": (1, "differs"),
    "D not frozen in the generator's step": (1, "differs"),
    "two backwards for one update": (1, "differs"),
    "R1 through DeepSpeed's wrapper": (1, "raises"),
    "DeepSpeed not told that a micro-batch begins": (3, "differs"),
}
"""What must not be done: ZeRO's stage (None: DDP), and how it shows."""


def fall_into(trap: str) -> int:
    """In a child: what the comparison with the right way says of the trap."""
    zero.PERSISTENCE = 0
    engine = Engine(replace(LAUNCH, loss=LOSSES["finite-difference R1"]))
    finite = engine.zero_stage == 3
    config = configuration("finite-difference R1" if finite else "exact R1", "float32", 2 if finite else 1, 2)
    right, _ = trained(engine, config, slice(0, 2))
    with planted(trap, engine):
        try:
            wrong, _ = trained(engine, config, slice(0, 2))
        except Drifted as error:
            print(f"drifted: {error}")
        except AssertionError as error:
            print(error)
        except Exception as error:
            print(f"raises: {error}")
        else:
            moments = [name for name in right if not name.startswith("losses")]
            far = distance({name: wrong[name] for name in moments} | {"losses": wrong["losses"]}, right)
            print(f"differs by {far:.1e}" if far > 100 * ROUNDING else "not seen")
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS)
def test_what_must_not_be_done_would_be_seen(trap: str, tmp_path: Path, children: Children) -> None:
    stage, expected = TRAPS[trap]
    code, output = children.run(tmp_path / "log", fall_into, trap, world=2, zero=stage)
    assert code == 0, output
    assert expected in output


def a_world_of_one_each() -> int:
    """In a child: DeepSpeed without being told to use gloo."""
    engine_module.InitProcessGroupKwargs = lambda backend, timeout: InitProcessGroupKwargs(timeout=timeout)
    try:
        Engine(LAUNCH)
    except UserError as error:
        print(error)
    return 0


@pytest.mark.slow
def test_processes_that_would_each_train_alone_are_refused(tmp_path: Path, children: Children) -> None:
    code, output = children.run(tmp_path / "log", a_world_of_one_each, world=2, zero=1)
    assert code == 0, output
    assert output.count("WORLD_SIZE is 2 but Accelerate formed a world of 1") == 2


def left_behind_by_growth(forget: bool) -> int:
    """In a child: whether the network of the phase before is still held after growth."""
    engine = Engine(LAUNCH)
    with pytest.MonkeyPatch.context() as patch:
        if forget:
            patch.setattr(Accelerator, "free_memory", lambda accelerator: ())
        first, second = make_schedule(LAUNCH).phases[:2]
        engine.enter(first, None)
        old = weakref.ref(engine.generator.module)
        engine.enter(second, engine.state())
        gc.collect()
        print("held" if old() is not None else "released")
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(("forget", "expected"), [(False, "released"), (True, "held")])
def test_growth_releases_deepspeed_s_old_engines(
    forget: bool, expected: str, tmp_path: Path, children: Children
) -> None:
    code, output = children.run(tmp_path / "log", left_behind_by_growth, forget, zero=1)
    assert code == 0, output
    assert expected in output


# Portable state


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_WORDS)
def test_a_checkpoint_of_any_engine_and_world_goes_on_with_any_other(
    family: str, tmp_path: Path, tiny: Path, labelled: Path, children: Children
) -> None:
    lr = "0.0005" if family == "dcgan" else "0.01"  # Else its batch statistics make large steps of rounding.
    words = (*FAMILY_WORDS[family], "--data.path", str(labelled), "--optim.eps", "1e-3", "--optim.lr", lr)
    words += ("--schedule.reset_adam", "never")  # So that step counts differ from block to block.
    one, run = tmp_path / "one", tmp_path / "run"
    assert children.run(tmp_path / "log", train, str(tiny), str(one), *words)[0] == 0
    # Within phases too, where Adam goes on.
    for kimg, world, stage in (
        (0.048, 2, 2),
        (0.064, 1, None),
        (0.112, 2, 1),
        (0.128, 1, 0),
        (0.144, 2, None),
        (0.16, 1, 2),
    ):
        total = ("--schedule.total_kimg", str(kimg))
        code, output = children.run(
            tmp_path / f"{kimg}", train, str(tiny), str(run), *words, *total, world=world, zero=stage
        )
        assert code == 0, output
    initial = initial_tensors(from_dict(yaml.safe_load((one / "config.yaml").read_text())))
    assert relative_error(run, one, initial) < 2e-5
    for part in ("adam_generator", "adam_discriminator", "feedback"):
        name = f"checkpoints/160/{part}.safetensors"
        found, expected = load(run / name), load(one / name)
        assert found.keys() == expected.keys()
        for key in found:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-6, msg=key)


# Drift


def drifting(part: str, config: str, run: str) -> int:
    """In a child: one bit of one process's tensor turns before the third save."""
    original, count = Engine.check_same, iter(range(10**6))

    def check_same(engine: Engine, state: State) -> None:
        if next(count) == 2 and engine.rank == 1:
            tensor = state.parts[part]["blocks.4.0.bias" + ".exp_avg" * part.startswith("adam")]
            tensor.view(torch.int32)[-1] ^= 1
        original(engine, state)

    Engine.check_same = check_same  # type: ignore[method-assign]
    return train(config, run)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["generator", "ema", "adam_discriminator"])
def test_one_bit_that_differs_between_processes_stops_the_run(
    part: str, tmp_path: Path, tiny: Path, children: Children
) -> None:
    code, output = children.run(tmp_path / "log", drifting, part, str(tiny), str(tmp_path / "run"), world=2)
    assert code == 1, output
    assert f"has drifted: {part}/blocks.4.0.bias" in output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "latest").read_text() == "32\n"


# Half precision


def test_the_loss_scale_halves_on_overflow_and_doubles_after_many_good_steps() -> None:
    scale = LossScale.first(torch.device("cpu"))
    scale.follow(torch.tensor(1.0))
    assert (scale.value.item(), scale.good_steps.item()) == (2.0**15, 0)
    for _ in range(GROWTH_STEPS):
        scale.follow(torch.tensor(0.0))
    assert (scale.value.item(), scale.good_steps.item()) == (2.0**16, 0)
    scale.follow(torch.tensor(0.0))
    assert (scale.value.item(), scale.good_steps.item()) == (2.0**16, 1)


def test_scaled_gradients_give_the_same_step_and_infinite_ones_none() -> None:
    def parameter_after(scale: LossScale | None, gradient: float) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(5))
        adam = Adam([[p]], 1e-8, lambda values: values, 1, scale)
        adam.param_groups[0] |= {"lr": 0.1, "betas": (0.0, 0.99)}
        p.grad = torch.full((5,), gradient)
        adam.expect(torch.ones(()))
        adam.step()
        assert adam.skipped == float(not torch.isfinite(torch.tensor(gradient)))
        return p.detach()

    plain = parameter_after(None, 0.25)
    torch.testing.assert_close(parameter_after(LossScale.first(torch.device("cpu")), 0.25 * 2**16), plain)
    assert torch.equal(parameter_after(LossScale.first(torch.device("cpu")), float("inf")), torch.ones(5))


def overflowing_once(step: int | None, config: str, run: str, *words: str) -> int:
    """In a child: fp16, with one loss too large for it, so that the scale is not the first; killed before a step."""
    original = Adam.expect
    count = iter(range(10**6))

    def expect(adam: Adam, loss: torch.Tensor) -> None:
        if next(count) == 1:
            loss = loss * float("inf")
        original(adam, loss)

    Adam.expect = expect  # type: ignore[method-assign]
    more = ("--precision", "fp16", *words)
    return train(config, run, *more) if step is None else killed_before_step(step, config, run, *more)


@pytest.mark.slow
def test_fp16_goes_on_bit_for_bit_with_its_loss_scale(tmp_path: Path, tiny: Path, children: Children) -> None:
    words = ("--loss.kind", "logistic", "--loss.r1_every", "2", "--data.workers", "0")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert children.run(tmp_path / "log", overflowing_once, None, str(tiny), str(whole), *words)[0] == 0
    code, output = children.run(tmp_path / "log", overflowing_once, 5, str(tiny), str(run), *words)
    assert code == -signal.SIGKILL, output
    code, output = children.run(tmp_path / "log", train, str(tiny), str(run), "--precision", "fp16", *words)
    assert code == 0, output
    assert_same_bits(run, whole)
    scales = [load(run / f"checkpoints/160/adam_{name}.safetensors") for name in ("generator", "discriminator")]
    assert any(scale["loss_scale.value"].item() < 2**16 for scale in scales)


@pytest.mark.parametrize("loss", ["WGAN-GP", "exact R1"])
def test_fp16_gives_nearly_float32_s_losses_and_gradients(loss: str) -> None:
    found = {}
    for precision in ("float32", "fp16"):
        config = configuration(loss, precision, 1, 1)
        engine, phase = Engine(config), make_schedule(config).phases[2]
        engine.enter(phase, None)
        images = (draw(torch.rand, (16, 3, 8, 8), "images") * 255).to(torch.uint8)
        micros = loop.prepare_step(engine, config, phase, phase.nimg_from, images)
        if precision == "fp16":  # As it is after the first overflows.
            engine.discriminator.adam.load_scale(
                {"loss_scale.value": torch.tensor([256.0]), "loss_scale.good_steps": torch.zeros(1)}
            )
        now = replace(loop.moment(config, phase, phase.nimg_from), penalty=1.0)
        values = loop.d_step(engine, config, micros, now)
        assert values[-1] == 0, "the step was skipped"
        state = engine.discriminator.adam.state
        found[precision] = values, torch.cat([moments["exp_avg"].flatten() for moments in state.values()])
    assert found["fp16"][0].tolist() == pytest.approx(found["float32"][0].tolist(), rel=2e-2, abs=2e-3)
    gradient, expected = found["fp16"][1], found["float32"][1]  # beta1 is 0: the first moment is the gradient.
    assert 1e-5 < (gradient - expected).norm() / expected.norm() < 4e-2


# Launches that would train wrongly


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words", "more", "expected"),
    [
        (3, (), {}, "ZeRO-3 cannot train with loss.penalty exact, whose second backward pass needs weights"),
        (2, ("--precision", "fp16"), {}, "precision: fp16 needs a loss scale that follows overflows"),
        (1, (), {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping is 1.0; set 0.0"),
        (
            2,
            (),
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
            "offload_optimizer to nvme is not supported",
        ),
        (0, (), {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer needs ZeRO stage 1 or 2"),
    ],
)
def test_launches_that_would_train_wrongly_are_refused_with_the_reason(
    stage: int,
    words: tuple[str, ...],
    more: dict[str, str],
    expected: str,
    tmp_path: Path,
    tiny: Path,
    children: Children,
) -> None:
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "run"), *words, zero=stage, **more)
    assert code == 2, output
    assert expected in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
