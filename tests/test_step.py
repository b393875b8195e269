"""One training step: nothing is read back to the host, and accumulation is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hrgan import losses
from hrgan.config import (
    AugmentConfig,
    Config,
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    RampConfig,
    ScheduleConfig,
)
from hrgan.engine import Engine, Net
from hrgan.monitor.meter import D_VALUES, G_VALUES, Meter
from hrgan.networks.derivatives import Kinks
from hrgan.networks.layers import downsample, upsample
from hrgan.noise import local_rows
from hrgan.pictures import to_float
from hrgan.schedule import make_schedule
from hrgan.train import IN_D, d_step, judged, micro_size, moment, one_step, penalise, prepare_step, twisted

SMALL = Config(
    network=NetworkConfig(resolution=8, latent=8, widths=[8, 8]),
    schedule=ScheduleConfig(total_kimg=1, stable_kimg=0.1, fade_kimg=0.1, batch=16, micro_batch=8),
)


def stepper(config: Config) -> Callable[[int], Engine]:
    """Steps of the fade into 8², as the loop makes them; call with nimg."""
    engine = Engine(config)
    phase = make_schedule(config).phases[1]
    assert phase.fading
    engine.enter(phase, None)
    meter = Meter(engine.device)
    size = phase.resolution
    images = torch.randint(0, 256, (16, config.network.channels, size, size), dtype=torch.uint8)
    labels = torch.arange(16) % 2
    if engine.device.type == "cuda":
        images = images.pin_memory()

    def step(nimg: int) -> Engine:
        now, d_values, g_values = one_step(engine, config, phase, nimg, images, labels)
        meter.add(phase.batch, d_values, g_values, with_penalty=now.penalty > 0, with_path=now.path > 0)
        return engine

    return step


def test_means_of_a_tick_are_over_the_steps_that_were_not_skipped_and_had_the_value() -> None:
    meter = Meter(torch.device("cpu"))
    for value, penalised, skipped in ((1.0, True, 0.0), (2.0, False, 0.0), (100.0, True, 1.0), (3.0, True, 0.0)):
        d_values = torch.full((len(D_VALUES),), value)
        d_values[D_VALUES.index("penalty")] *= penalised
        g_values = torch.full((len(G_VALUES),), 10 * value)
        d_values[-1] = skipped
        g_values[-1] = 0.0
        g_values[G_VALUES.index("path_length")] *= penalised
        meter.add(4, d_values, g_values, with_penalty=penalised, with_path=penalised)
    row = meter.read(lambda sums: sums)
    assert (row["loss_d"], row["penalty"], row["loss_g"]) == (2, 2, 265)
    assert row["path_length"] == pytest.approx(1040 / 3)
    assert (row["skipped"], row["skipped_in_a_row"]) == (1, 1)


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a value (.item(), bool()) or a size that needs one."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # local_rows makes row numbers on the CPU from a CPU mask, by design; everything else would wait for the device.
        if name in ("_local_scalar_dense", "masked_select") or (name == "nonzero" and args[0].is_floating_point()):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


ADAPTED = AugmentConfig(ops=["ada", "diffaugment"], strength=0.5, target=0.6)
STEPS = {
    "wgan-gp": SMALL,
    "logistic": replace(SMALL, loss=LossConfig(kind="logistic", r1_every=2)),
    "style": replace(
        SMALL,
        network=replace(SMALL.network, family="style", mapping_layers=2, condition="projection", classes=["a", "b"]),
        loss=LossConfig(kind="logistic", r1_every=2, path_weight=2.0, path_every=2),
        augment=ADAPTED,
    ),
    "r3": replace(
        SMALL,
        network=replace(SMALL.network, family="r3", group_size=4, channels=1, condition="acgan", classes=["a", "b"]),
        loss=LossConfig(kind="relativistic", r2_gamma=None, r1_every=1),
        ramp=RampConfig(kimg=1.0, lr=0.5, gamma=0.1, beta2=0.9, ema_kimg=1.0),
    ),
    "finite difference": replace(
        SMALL,
        loss=LossConfig(kind="hinge", r2_gamma=1.0, r1_every=2, penalty="finite_difference"),
        optim=OptimConfig(eps=1e-4),  # R1 has no gradient by biases, and differences have rounding.
    ),
    "dcgan": replace(
        SMALL,
        network=replace(SMALL.network, resolution=16, widths=[8, 8, 8], family="dcgan", channels=4),
        loss=LossConfig(kind="logistic", r1_gamma=0.0),
        schedule=replace(SMALL.schedule, start_resolution=8, micro_batch=None),
    ),
}
"""All that a step may do, family by family."""


@pytest.mark.parametrize("name", STEPS)
def test_a_step_reads_nothing_back_to_the_host(name: str) -> None:
    step = stepper(STEPS[name])
    step(112)
    with CountReads() as counter:
        for nimg in (128, 144, 160, 176):
            step(nimg)
    assert counter.reads == []
    with CountReads() as counter:  # It would have seen these.
        torch.ones(1).item()
        bool(torch.ones(2).isfinite().all())
    assert counter.reads == ["_local_scalar_dense"] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's own count of synchronisations needs a CUDA GPU")
@pytest.mark.parametrize("name", STEPS)
def test_cuda_counts_no_synchronisation_in_a_step(name: str) -> None:
    step = stepper(STEPS[name])
    step(112)
    step(128)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for nimg in (144, 160, 176, 192):
            step(nimg)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gammas", [(2.0, 0.0), (0.0, 2.0), (3.0, 2.0)])
@pytest.mark.parametrize("family", ["progan", "style", "r3"])
@pytest.mark.parametrize("penalty", ["exact", "finite_difference"])
def test_a_penalty_s_gradient_is_its_definition_s(
    penalty: Any, family: str, gammas: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of passes of their own, where the step takes that of the adversarial term; r3's through an augmentation. By
    finite differences, too: D's kinks are held, of which their steps cross so many that the gradient is another one."""
    network = NetworkConfig(resolution=8, latent=8, widths=[8, 8], family=family, mapping_layers=2, group_size=4)
    augmented = AugmentConfig(ops=["ada"] if family == "r3" else [], strength=0.8)
    loss = LossConfig("relativistic", r1_gamma=gammas[0], r2_gamma=gammas[1], r1_every=2, penalty=penalty)
    config = replace(SMALL, network=network, loss=loss, augment=augmented, precision="float32")
    engine = stepper(config)(112)  # Biases and what begins as zero have moved.
    phase = make_schedule(config).phases[1]
    micros = prepare_step(engine, config, phase, 128, torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8))
    now = replace(moment(config, phase, 128), penalty=2.0)
    critic = engine.discriminator.module
    expected: dict[str, torch.Tensor] = {}
    for micro in micros:
        fake = engine.generator.module(micro.z_d, None, now.alpha).detach()

        def judge(x: torch.Tensor, use: str) -> torch.Tensor:
            of_x: torch.Tensor = critic(twisted(engine, config, x, micro, use), None, now.alpha)  # noqa: B023
            return of_x

        total = losses.relativistic_d(judge(micro.real, IN_D[0]), judge(fake, IN_D[1]))
        for use, images, gamma in zip(IN_D, (micro.real, fake), gammas, strict=True):
            x = images.detach().requires_grad_()
            (slope,) = torch.autograd.grad(judge(x, use).sum(), x, create_graph=True)
            total = total + now.penalty * gamma / 2 * slope.square().sum((1, 2, 3)).mean()
        for name, gradient in _gradients(critic, total / len(micros)).items():
            expected[name] = expected.get(name, torch.zeros_like(gradient)) + gradient
    found: dict[str, torch.Tensor] = {}

    def keep(net: Net, loss: torch.Tensor) -> torch.Tensor:
        found.update({name: p.grad.clone() for name, p in net.module.named_parameters() if p.grad is not None})
        return torch.zeros(())

    monkeypatch.setattr(engine, "update", keep)
    d_step(engine, config, micros, now)
    assert found.keys() == expected.keys()
    if penalty == "finite_difference":
        found, expected = ({"all": torch.cat([g.flatten() for g in of.values()])} for of in (found, expected))
        assert (found["all"] - expected["all"]).norm() < 1e-5 * expected["all"].norm()
        return
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


def test_finite_differences_pass_each_side_s_own_augmentation() -> None:
    gammas: dict[str, Any] = {"r1_gamma": 2.0, "r2_gamma": 3.0, "r1_every": 1}
    network = replace(STEPS["r3"].network, condition="none", classes=None)
    augmented = AugmentConfig(ops=["ada"], strength=0.8)
    exact = replace(
        STEPS["r3"], network=network, loss=LossConfig(kind="relativistic", **gammas), augment=augmented
    )
    loss = replace(exact.loss, penalty="finite_difference")
    engine = stepper(exact)(112)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    micro = prepare_step(engine, exact, engine.phase, 128, images)[0]
    now = moment(exact, engine.phase, 128)
    sides = [x.detach().requires_grad_() for x in (micro.real, torch.rand_like(micro.real))]
    real, fake = (twisted(engine, exact, x, micro, use) for use, x in zip(IN_D, sides, strict=True))
    kinks: tuple[Kinks, Kinks] = ([], [])
    logits = judged(exact, engine.discriminator, real, fake, None, now.alpha, kinks)
    found, expected = (
        penalise(engine, config, micro, (sides[0], sides[1]), logits, kinks, now)
        for config in (replace(exact, loss=loss), exact)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    parameters = list(engine.discriminator.module.parameters())
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(of, parameters, retain_graph=True, materialize_grads=True)])
        for of in (found, expected)
    ]
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("penalty", ["exact", "finite_difference"])
def test_wgan_gp_looks_between_real_and_fake(penalty: Any) -> None:
    size = torch.ones((), requires_grad=True)

    def quadratic(x: torch.Tensor, labels: None, alpha: float) -> torch.Tensor:  # grad D(x) = size x
        return size * x.square().flatten(1).sum(1, keepdim=True) / 2

    quadratic.batch_statistics = False  # type: ignore[attr-defined]
    engine, config = Engine(SMALL), replace(SMALL, loss=LossConfig(penalty=penalty, fd_sigma=1e-3))
    engine.enter(make_schedule(config).phases[1], None)
    engine.discriminator.module = quadratic  # type: ignore[assignment]
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    micro = prepare_step(engine, config, engine.phase, 112, images)[0]
    fake, nothing, now = torch.randn_like(micro.real), torch.zeros(8, 1), moment(config, engine.phase, 112)
    found = penalise(engine, config, micro, (micro.real, fake), (nothing, nothing), (None, None), now)
    norms = (micro.real + micro.mix * (fake - micro.real)).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, 10 * (norms - 1).square().mean(), rtol=2e-3, atol=0)
    (slope,) = torch.autograd.grad(found, size)
    torch.testing.assert_close(slope, 20 * ((norms - 1) * norms).mean(), rtol=1e-2, atol=0)


def test_wgan_gp_by_finite_differences_has_the_exact_one_s_gradient() -> None:
    exact = replace(SMALL, precision="float32")
    engine = stepper(exact)(112)
    micro = prepare_step(engine, exact, engine.phase, 128, torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8))[0]
    now, sides = moment(exact, engine.phase, 128), (micro.real, torch.randn_like(micro.real))
    nothing = torch.zeros(8, 1)
    gradients = []
    for config in (exact, replace(exact, loss=replace(exact.loss, penalty="finite_difference"))):
        penalty = penalise(engine, config, micro, sides, (nothing, nothing), (None, None), now)
        found = torch.autograd.grad(penalty, list(engine.discriminator.module.parameters()), materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert (gradients[1] - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def _gradients(network: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_lazy_penalties_come_every_so_many_steps_and_weigh_as_many_times() -> None:
    config = replace(STEPS["style"], schedule=replace(SMALL.schedule, fade_kimg=1, total_kimg=3))
    phase = make_schedule(config).phases[1]
    steps = [moment(config, phase, phase.nimg_from + 16 * n) for n in range(5)]
    assert [(now.penalty, now.path) for now in steps] == [(2, 2), (0, 0), (2, 2), (0, 0), (2, 2)]
    config = replace(config, loss=LossConfig(kind="wgan-gp", gp_every=3))
    assert [moment(config, phase, phase.nimg_from + 16 * n).penalty for n in range(5)] == [3, 0, 0, 3, 0]


def test_what_a_ramp_ends_at_is_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    optim = OptimConfig(lr=0.01, lr_d=0.02, beta1=0.5, beta2=0.99, ema_kimg=5.0)
    plain = replace(SMALL, loss=LossConfig(kind="logistic", r1_gamma=2.0, r1_every=1), optim=optim)
    ramped = replace(plain, ramp=RampConfig(kimg=0.1, lr=0.5, gamma=0.25, beta2=0.9, ema_kimg=2.0, augment=0.5))
    images, half_lives = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), []
    monkeypatch.setattr(Engine, "update_ema", lambda engine, kimg: half_lives.append(kimg))

    def taken(config: Config) -> tuple[list[Any], float]:
        """Adam's numbers and the strength of augmentation in a step past the ramp's end, and its penalty."""
        engine, phase = Engine(config), make_schedule(config).phases[1]
        torch.manual_seed(0)
        engine.enter(phase, None)
        _, d_values, _ = one_step(engine, config, phase, 112, images)
        groups = [net.adam.param_groups[0] for net in (engine.generator, engine.discriminator)]
        adam = [group[key] for group in groups for key in ("lr", "betas")]
        return [*adam, float(engine.feedback["augment_strength"])], float(d_values[3])

    numbers, penalty = taken(plain)
    assert numbers == [0.01, (0.5, 0.99), 0.02, (0.5, 0.99), 0.0]
    numbers, ramped_penalty = taken(ramped)
    assert numbers == [0.005, (0.5, 0.9), 0.01, (0.5, 0.9), 0.5]
    assert ramped_penalty == pytest.approx(penalty / 4)
    assert penalty > 0
    assert half_lives == [5.0, 2.0]


def test_path_lengths_are_of_the_same_pictures_however_a_batch_is_divided() -> None:
    weights = []
    for size in (16, 8, 4):
        config = replace(STEPS["style"], schedule=replace(SMALL.schedule, micro_batch=size))
        torch.manual_seed(0)
        step = stepper(config)
        for nimg in (112, 128, 144):
            engine = step(nimg)
        weights.append(torch.cat([p.detach().flatten() for p in engine.generator.module.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=2e-5, rtol=2e-5)


def test_the_moving_average_has_the_half_life_it_names() -> None:
    engine = stepper(SMALL)(112)
    with torch.no_grad():
        for average, weight in zip(engine.ema.parameters(), engine.generator.module.parameters(), strict=True):
            average.fill_(0)
            weight.fill_(1)
    engine.update_ema(0.032)
    engine.update_ema(0.032)  # 2 x 16 images: one half-life
    for average in engine.ema.parameters():
        torch.testing.assert_close(average, torch.full_like(average, 0.5))


def test_micro_batches_are_the_largest_that_divide() -> None:
    config = replace(SMALL, schedule=ScheduleConfig(micro_batch={4: 32, 64: 12}))
    assert micro_size(config, 4, 64) == 32
    assert micro_size(config, 64, 64) == 8
    assert micro_size(config, 64, 24) == 12
    assert micro_size(replace(SMALL, schedule=ScheduleConfig(micro_batch=None)), 64, 40) == 40


def test_reals_fade_in_as_the_fakes_do_and_flip_where_asked() -> None:
    engine = stepper(SMALL)(112)
    phase, images = engine.phase, torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)

    def reals(nimg: int, config: Config = SMALL) -> torch.Tensor:
        return torch.cat([micro.real for micro in prepare_step(engine, config, phase, nimg, images)])

    sharp = to_float(images)
    blurred = upsample(downsample(sharp))
    assert phase.alpha(100) == 0.0
    assert phase.alpha(150) == pytest.approx(0.5)
    torch.testing.assert_close(reals(100), blurred)
    torch.testing.assert_close(reals(150), (sharp + blurred) / 2)
    torch.testing.assert_close(reals(200), sharp)
    mirrored = reals(200, replace(SMALL, data=DataConfig(mirror=True)))
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(mirrored, sharp, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(mirrored, sharp, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 0 < sum(flipped) < 16


def test_a_phase_border_keeps_the_weights_and_starts_adam_anew_only_where_the_schedule_says() -> None:
    for policy, kept in (("both", False), ("never", True)):
        config = replace(SMALL, schedule=replace(SMALL.schedule, reset_adam=policy))
        engine = stepper(config)(112)
        before = engine.state()
        stable = make_schedule(config).phases[2]
        engine.enter(stable, before)
        after = engine.state()
        for part in ("generator", "discriminator", "ema"):
            assert set(after.parts[part]) < set(before.parts[part])  # The old RGB layers go.
            assert all(torch.equal(tensor, before.parts[part][name]) for name, tensor in after.parts[part].items())
        for part in ("adam_generator", "adam_discriminator"):
            assert bool(after.parts[part]) == kept
            assert all(torch.equal(tensor, before.parts[part][name]) for name, tensor in after.parts[part].items())


def test_the_generator_s_step_leaves_no_gradient_in_the_discriminator() -> None:
    engine = stepper(SMALL)(112)
    assert all(p.grad is None and p.requires_grad for p in engine.discriminator.module.parameters())


def test_noise_is_decided_by_seed_nimg_and_role_and_dealt_by_chunk() -> None:
    config = replace(SMALL, schedule=replace(SMALL.schedule, micro_batch=None))
    engine = stepper(config)(112)
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)

    def noise(nimg: int, config: Config = config) -> list[torch.Tensor]:
        (micro,) = prepare_step(engine, config, engine.phase, nimg, images)
        return [micro.z_d, micro.z_g, micro.mix]

    first = noise(128)
    assert all(map(torch.equal, first, noise(128)))
    assert not any(map(torch.equal, first, noise(144)))
    assert not any(map(torch.equal, first, noise(128, replace(config, seed=1))))
    assert not torch.equal(first[0], first[1])
    assert 0 <= first[2].min() <= first[2].max() < 1
    for nimg, world in ((128, 2), (132, 2), (4, 4)):
        rows = [local_rows(nimg, 32, rank, world).tolist() for rank in range(world)]
        assert sorted(row for mine in rows for row in mine) == list(range(32))
        assert all((nimg + row) // 4 % world == rank for rank, mine in enumerate(rows) for row in mine)
