"""What every family of networks promises, and DCGAN's and R3GAN's own numbers. ProGAN's and StyleGAN2's are in
test_networks.py and test_style.py."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hrgan.apps.generate import load_generator
from hrgan.checkpoint import numbered
from hrgan.config import Config, NetworkConfig, from_dict, read_yaml
from hrgan.networks import FAMILIES, full_precision, make_discriminator, make_generator
from hrgan.networks import layers as L
from hrgan.networks.dcgan import PICTURES, BatchNorm
from hrgan.networks.r3 import ResidualBlock
from hrgan.noise import draw, keyed_seed
from hrgan.schedule import make_schedule, rates
from hrgan.train import moment
from tests.conftest import Children
from tests.test_train import train

NAMES = ["a", "b", "c"]


def small(family: str, **words: Any) -> Config:
    settings = {"resolution": 32, "latent": 16, "widths": [16, 16, 12, 8], "mapping_layers": 2} | words
    return Config(network=NetworkConfig(family=family, **settings))  # type: ignore[arg-type]


def networks(
    config: Config, resolution: int = 32, fading: bool = False, kind: Any = None
) -> tuple[nn.Module, nn.Module]:
    g, d = make_generator(config, resolution, fading, kind), make_discriminator(config, resolution, fading, kind)
    if config.network.family == "r3":  # Its blocks begin as the identity: these do something.
        for network in (g, d):
            for name, parameter in network.named_parameters():
                if name.endswith("project.weight"):
                    generator = torch.Generator().manual_seed(keyed_seed(name))
                    nn.init.normal_(parameter, std=0.1, generator=generator)
    return g, d


families = pytest.mark.parametrize("family", FAMILIES)


@families
@pytest.mark.parametrize(("channels", "grid"), [(1, [4, 4]), (3, [4, 6]), (4, [4, 4])])
def test_shapes_and_dtypes(family: str, channels: int, grid: list[int]) -> None:
    g, d = networks(small(family, channels=channels, grid=grid))
    images = g(torch.randn(8, 16), None, 1.0)
    assert images.shape == (8, channels, 8 * grid[0], 8 * grid[1])
    assert images.dtype == torch.float32
    assert 0.005 < images.std() < 6  # style adds the images of four resolutions, each about 1
    logits = d(images, None, 1.0)
    assert logits.shape == (8, 1)
    assert logits.dtype == torch.float32


@families
def test_growing_adds_exactly_the_new_resolution_s_tensors(family: str) -> None:
    for index in range(2):
        for fading in (True, False):
            old = networks(small(family), 16)[index].state_dict()
            new = networks(small(family), 32, fading)[index].state_dict()
            added = set(new) - set(old)
            assert added
            assert all(".32." in name for name in added)
            gone = set(old) - set(new)
            assert gone == set() if fading else all("rgb.16." in name for name in gone)
            assert all(old[name].shape == new[name].shape for name in set(old) & set(new))
            # A block begins with the same weights, whenever it joins.
            assert all(torch.equal(old[name], new[name]) for name in set(old) & set(new))


@families
def test_fades_begin_with_the_network_before_and_end_with_the_one_after(family: str) -> None:
    z, x = torch.randn(4, 16), torch.randn(4, 3, 32, 32)
    (old_g, old_d), (new_g, new_d), (after_g, after_d) = (
        networks(small(family), *place) for place in ((16, False), (32, True), (32, False))
    )
    for network in (old_g, old_d, new_g, new_d, after_g, after_d):
        network.eval()  # DCGAN's batch statistics would else be of different batches.
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(new_g(z, None, 0.0), new_g.enlarged(old_g(z, None, 1.0)), **close)
    torch.testing.assert_close(new_d(x, None, 0.0), old_d(L.downsample(x), None, 1.0), **close)
    torch.testing.assert_close(new_g(z, None, 1.0), after_g(z, None, 1.0), **close)
    torch.testing.assert_close(new_d(x, None, 1.0), after_d(x, None, 1.0), **close)
    half = (new_g(z, None, 0.0) + new_g(z, None, 1.0)) / 2
    torch.testing.assert_close(new_g(z, None, 0.5), half, **close)


@families
@pytest.mark.parametrize("condition", ["projection", "acgan"])
def test_classes_matter_to_both_networks_and_reach_every_weight(family: str, condition: str) -> None:
    g, d = networks(small(family, condition=condition, classes=NAMES))
    g.eval(), d.eval()
    assert g.classes == 3
    z, labels, others = torch.randn(8, 16), torch.arange(8) % 3, (torch.arange(8) + 1) % 3
    images = g(z, labels, 1.0)
    assert not torch.allclose(images, g(z, others, 1.0), atol=1e-4)
    out = d(images, labels, 1.0)
    assert out.shape == (8, 1 if condition == "projection" else 4)
    assert torch.allclose(out, d(images, others, 1.0)) == (condition == "acgan")
    out.square().sum().backward()
    for network in (g, d):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            if "strength" not in name and "bias" not in name:
                assert parameter.grad.abs().sum() > 0, name


@families
def test_unconditional_networks_have_no_class_weights(family: str) -> None:
    for network in networks(small(family, classes=None)):
        assert not any("embedding" in name for name, _ in network.named_parameters())


@families
def test_penalties_reach_d_s_weights_through_a_second_backward(family: str) -> None:
    _, d = networks(small(family))
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(d(x, None, 1.0).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    still = [name for name, p in d.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [name for name in still if not name.endswith("bias")] == []


@families
def test_bf16_computes_nearly_the_same_in_float32_out(family: str) -> None:
    config = small(family, latent=64, widths=[64, 64, 64, 64])
    z, x = torch.randn(8, 64), torch.randn(8, 3, 32, 32)
    for index, inputs in enumerate((z, x)):
        full, half = (networks(config, 32, False, kind)[index] for kind in (None, torch.bfloat16))
        expected, found = full(inputs, None, 1.0), half(inputs, None, 1.0)
        assert found.dtype == torch.float32
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert 1e-4 < error < 0.05
        # Steps of bf16 in a logit would be as large as what the relativistic loss compares.
        assert index == 0 or not torch.equal(found, found.bfloat16().float())
        with full_precision(half):
            torch.testing.assert_close(half(inputs, None, 1.0), expected)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "dcgan"])
def test_a_sample_does_not_depend_on_its_batch(family: str) -> None:
    g, d = networks(small(family))
    z, x = torch.randn(8, 16), torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(g(z, None, 1.0)[4:], g(z[4:], None, 1.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(d(x, None, 1.0)[4:], d(x[4:], None, 1.0), atol=1e-5, rtol=1e-5)


# DCGAN

SCRIPT = Config(network=NetworkConfig(family="dcgan", resolution=64, latent=100, fmap_base=1024, grow=False))


def test_the_preset_of_dcgan_trains_as_the_script_does() -> None:
    """Binary cross-entropy of batches of 64, Adam at 0.0002 with betas 0.5 and 0.999; no penalty, average or growth."""
    config = from_dict(read_yaml(Path("configs/dcgan-64.yaml")))
    assert config.network == SCRIPT.network
    assert (config.loss.kind, config.augment.ops, config.schedule.batch) == ("logistic", [], 64)
    (phase,) = make_schedule(config).phases
    now = moment(config, phase, 0)
    assert (now.rates, now.penalty, now.path) == (rates(config, phase, 900_000), 0, 0)
    assert (now.rates.lr_g, now.rates.lr_d, now.rates.beta2, now.rates.ema_kimg) == (0.0002, 0.0002, 0.999, 0)
    assert (config.optim.beta1, config.optim.eps) == (0.5, 1e-8)


def scripted() -> tuple[nn.Sequential, nn.Sequential]:
    """The script's networks: G and D."""
    g: list[nn.Module] = []
    for into, out, stride, padding in ((100, 512, 1, 0), (512, 256, 2, 1), (256, 128, 2, 1), (128, 64, 2, 1)):
        g += [nn.ConvTranspose2d(into, out, 4, stride, padding, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    d: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for into, out in ((64, 128), (128, 256), (256, 512)):
        d += [nn.Conv2d(into, out, 4, 2, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
    return (
        nn.Sequential(*g, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh()),
        nn.Sequential(*d, nn.Conv2d(512, 1, 4, 1, 0, bias=False)),
    )


def in_order(g: nn.Module, d: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Our parameters in the order of the script's layers."""

    def block(network: Any, size: str) -> list[nn.Parameter]:
        return [network.blocks[size]["conv"].weight, *network.blocks[size]["norm"].parameters()]

    made: Any = g
    seen: Any = d
    of_g = [made.first.weight, *made.first_norm.parameters()]
    of_g += [p for size in ("16", "32", "64") for p in block(made, size)] + [made.to_rgb["64"].weight]
    of_d = [seen.from_rgb["64"].weight, *[p for size in ("64", "32", "16") for p in block(seen, size)]]
    return of_g, [*of_d, seen.logit.weight]


def test_dcgan_is_the_script_s_layer_for_layer() -> None:
    ours, theirs = networks(SCRIPT, 64), scripted()
    totals = [sum(p.numel() for p in network.parameters()) for network in ours]
    assert totals == [3_576_704, 2_765_568]
    assert totals == [sum(p.numel() for p in network.parameters()) for network in theirs]
    for mine, yours in zip(in_order(*ours), theirs, strict=True):
        for a, b in zip(mine, yours.parameters(), strict=True):
            assert a.shape == b.shape
            b.data.copy_(a.data)
    for network in (*ours, *theirs):
        network.double()  # Else rounding decides on which side of ReLU's kink some numbers lie.
    z, x = torch.randn(8, 100, dtype=torch.float64), torch.randn(8, 3, 64, 64, dtype=torch.float64)
    aims = torch.randn(8, 3, 64, 64)
    close = {"atol": 1e-5, "rtol": 1e-5}  # Images come out in float32.
    images, expected = ours[0](z, None, 1.0), theirs[0](z[:, :, None, None]).float()
    torch.testing.assert_close(images, expected, **close)
    logits, expected_logits = ours[1](x, None, 1.0), theirs[1](x).flatten(1)
    torch.testing.assert_close(logits, expected_logits, **close)
    for result in (images * aims, expected * aims, logits.square(), expected_logits.square()):
        result.mean().backward()
    for mine, yours in zip(in_order(*ours), theirs, strict=True):
        for a, b in zip(mine, yours.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm()
    buffers = [dict(network.named_buffers()) for network in (ours[0], theirs[0])]
    torch.testing.assert_close(buffers[0]["blocks.64.norm.running_var"], buffers[1]["10.running_var"])
    torch.testing.assert_close(buffers[0]["first_norm.running_mean"], buffers[1]["1.running_mean"])


def test_dcgan_begins_as_the_paper_says() -> None:
    g, _ = networks(SCRIPT, 64)
    for name, parameter in g.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        else:
            assert parameter.mean().item() == pytest.approx(1.0 if "norm" in name else 0.0, abs=0.01)
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("classes", [None, NAMES])
def test_averaged_weights_are_given_the_statistics_of_their_own_pictures(classes: list[str] | None) -> None:
    words = {"condition": "projection", "classes": classes} if classes else {}
    g, _ = networks(small("dcgan", **words), 32, fading=True)
    torch.manual_seed(0)
    for parameter in g.parameters():
        nn.init.normal_(parameter, std=0.3)
    z, labels = draw(torch.randn, (PICTURES, 16), "batch statistics"), torch.arange(PICTURES) % 3 if classes else None
    with torch.no_grad():
        expected = g(z, labels, 0.3)  # By the batch's own statistics: it is in training.
        g.eval()
        assert (g(z, labels, 0.3) - expected).abs().mean() > 0.02
        g.measure_statistics()
        assert not g.training
        # The unbiased variance of the 4,096 numbers or more, or another sum of them.
        torch.testing.assert_close(g(z, labels, 0.3), expected, atol=0.02, rtol=0)
        assert (g(z, labels, 0.3) - expected).abs().mean() < 1e-3


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_averaged_weights_has_their_own_statistics(
    world: int, tmp_path: Path, tiny: Path, children: Children
) -> None:
    words = ("--network.family", "dcgan", "--schedule.start_resolution", "8", "--loss.kind", "logistic")
    words += ("--loss.r1_gamma", "0", "--optim.ema_kimg", "0.1")
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "run"), *words, world=world)
    assert code == 0, output
    for folder in numbered(tmp_path / "run"):
        averaged, *_ = load_generator(folder, True, torch.device("cpu"), as_trained=True)
        found = {name: buffer.clone() for name, buffer in averaged.named_buffers()}
        averaged.measure_statistics()  # type: ignore[operator]
        for name, buffer in averaged.named_buffers():
            assert torch.equal(found[name], buffer), (folder.name, name)


def normalised(out: str) -> int:
    """In a child: a batch normalisation of this process's half of a batch, in and out and gradients."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    norm = BatchNorm(5)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    # Far from zero, as features may be: float32 has no digits left in the mean of their squares.
    whole = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(3)) * 2 + 100
    aims = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(4))
    x = whole.chunk(world)[rank].clone().requires_grad_(True)
    y = norm(x)
    # A loss with a penalty, as D has: second derivatives go over the processes, too.
    (gradient,) = torch.autograd.grad((y * aims.chunk(world)[rank]).square().sum(), x, create_graph=True)
    (y.square() * aims.chunk(world)[rank] + gradient.square()).sum().backward()
    assert x.grad is not None
    weights = torch.stack([norm.weight.grad, norm.bias.grad])
    if world > 1:
        dist.all_reduce(weights)  # DDP's part.
    tensors = [y, gradient, x.grad, weights, norm.running_mean, norm.running_var]
    torch.save([tensor.detach() for tensor in tensors], f"{out}.{world}.{rank}")
    if world > 1:
        dist.destroy_process_group()
    return 0


def test_batch_statistics_are_of_all_processes(tmp_path: Path, children: Children) -> None:
    for world in (1, 2):
        code, output = children.run(tmp_path / "log", normalised, str(tmp_path / "out"), world=world)
        assert code == 0, output
    whole: list[Tensor] = torch.load(tmp_path / "out.1.0")
    parts: list[list[Tensor]] = [torch.load(tmp_path / f"out.2.{rank}") for rank in range(2)]
    close = {"atol": 1e-5, "rtol": 1e-4}
    for index in range(3):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), whole[index], **close)
    for index in range(3, 6):
        for part in parts:
            torch.testing.assert_close(part[index], whole[index], **close)


def test_batch_normalisation_is_torch_s() -> None:
    mine, theirs = BatchNorm(5), nn.BatchNorm2d(5)
    for parameter, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(parameter)
        other.data.copy_(parameter.data)
    for step in range(3):
        x = torch.randn(8, 5, 3, 3) * 2 + step
        torch.testing.assert_close(mine(x), theirs(x), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mine.running_mean, theirs.running_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mine.running_var, theirs.running_var, atol=1e-6, rtol=1e-6)
    mine.eval(), theirs.eval()
    before = mine.running_mean.clone()
    torch.testing.assert_close(mine(x), theirs(x), atol=1e-6, rtol=1e-6)
    assert torch.equal(mine.running_mean, before)
    assert mine(x.bfloat16()).dtype == torch.bfloat16
    assert mine.running_var.dtype == torch.float32


def test_batch_normalisation_has_two_right_derivatives() -> None:
    norm = BatchNorm(3).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_a_batch_that_is_not_finite_leaves_running_statistics_alone() -> None:
    norm = BatchNorm(2)
    nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
    x = torch.randn(4, 2, 3, 3) + 1
    x[0, 1, 0, 0] = torch.nan
    norm(x)
    assert norm.running_mean[0] != 0
    assert (norm.running_mean[1], norm.running_var[1]) == (0, 1)


# R3GAN

R3GAN = {
    "r3-cifar10": (32, [768] * 4, 512, 0.05, 0.005, 5000, 0.55, 20_000),
    "r3-64": (64, [768] * 4 + [384], 256, 2, 0.2, 500, 0.3, 20_000),
    "r3-256": (256, [768] * 4 + [384, 192, 96], 256, 150, 15, 500, 0.3, 20_000),
}
"""Of R3GAN's paper at full size: resolution, widths, batch, gamma at the start and at the end, half-life of the average
and strength of augmentation at the end, length of the ramps in kimg."""


@pytest.mark.parametrize("name", R3GAN)
def test_the_presets_of_r3_end_with_the_paper_s_numbers(name: str) -> None:
    config = from_dict(read_yaml(Path(f"configs/{name}.yaml")))
    resolution, widths, batch, gamma, last_gamma, half_life, strength, kimg = R3GAN[name]
    phase = make_schedule(config).phases[-1]
    assert (phase.resolution, config.network.widths, phase.batch) == (resolution, widths, batch)
    first, last = (rates(config, phase, nimg) for nimg in (0, kimg * 1000))
    found = {key: (getattr(first, key), pytest.approx(getattr(last, key))) for key in vars(first)}
    for key, expected in {
        "lr_g": (2e-4, 5e-5),
        "lr_d": (2e-4, 5e-5),
        "beta2": (0.9, 0.99),
        "r1_gamma": (gamma, last_gamma),
        "r2_gamma": (gamma, last_gamma),
        "ema_kimg": (0, half_life),
        "augment": (0, strength),
    }.items():
        assert found[key] == expected, key
    assert (config.loss.kind, config.loss.r1_every, config.optim.beta1) == ("relativistic", 1, 0)
    assert (config.network.latent, config.network.blocks, config.network.group_size) == (64, 2, 16)


@pytest.mark.parametrize(
    ("widths", "g_total", "d_total"),
    [
        # reference: 22.4M / 22.4M, 23.1M / 23.0M; with classes below
        ([768] * 4, 20_732_160, 20_683_776),
        ([768] * 4 + [384], 22_429_824, 22_381_440),
        ([768] * 4 + [384, 192, 96], 23_057_952, 23_009_568),
    ],
)
def test_r3_has_the_paper_s_parameters(widths: list[int], g_total: int, d_total: int) -> None:
    resolution = 2 ** (len(widths) + 1)
    network = NetworkConfig(family="r3", resolution=resolution, latent=64, widths=widths)
    with torch.device("meta"):
        g, d = (FAMILIES["r3"].Generator, FAMILIES["r3"].Discriminator)
        found = [sum(p.numel() for p in kind(network, resolution, False).parameters()) for kind in (g, d)]

    def block(width: int) -> int:
        return width * 2 * width + 2 * width + 2 * width * 16 * 9 + 2 * width + 2 * width * width

    changes = sum(a * b for a, b in pairwise(widths) if a != b)
    body = sum(2 * block(width) for width in widths) + changes
    ends = 16 * widths[0] + 3 * widths[-1]  # the basis, and the RGB layer
    assert found == [body + ends + 64 * widths[0], body + ends + widths[0]] == [g_total, d_total]


@pytest.mark.parametrize(
    ("widths", "group_size", "classes", "g_millions", "d_millions"),
    [([768] * 4, 16, 10, 20.8, 21.3), ([1536] * 4, 32, 1000, 82.9, 86.5), ([1536] * 5, 32, 1000, 103.6, 107.2)],
)
def test_r3_with_classes_has_the_paper_s_parameters(
    widths: list[int], group_size: int, classes: int, g_millions: float, d_millions: float
) -> None:
    resolution = 2 ** (len(widths) + 1)
    names = [str(number) for number in range(classes)]
    network = NetworkConfig(
        family="r3",
        resolution=resolution,
        latent=64,
        widths=widths,
        group_size=group_size,
        condition="projection",
        classes=names,
    )
    with torch.device("meta"):
        pair = [kind(network, resolution, False) for kind in (FAMILIES["r3"].Generator, FAMILIES["r3"].Discriminator)]
    found = [round(sum(p.numel() for p in net.parameters()) / 1e6, 1) for net in pair]
    assert found == [g_millions, d_millions]


def test_an_r3_block_begins_as_the_identity_with_groups_that_fit() -> None:
    network = make_generator(small("r3", widths=[24, 24, 24, 24]), 32, False, None)
    block: Any = network.blocks["8"].blocks[0]  # type: ignore[index,union-attr]
    x = torch.randn(4, 24, 8, 8)
    assert torch.equal(block(x), x)
    assert block.mix.groups == 3  # 48 channels in groups of 16
    assert ResidualBlock(10, 16).mix.groups == 2  # 20 channels: the largest divisor of at most 16 is 10.


def test_an_r3_block_is_a_bottleneck_turned_inside_out() -> None:
    block = ResidualBlock(8, 4)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 5, 5)
    y = nn.functional.leaky_relu(nn.functional.conv2d(x, block.expand.weight, block.expand.bias), 0.2)  # (2, 16, 5, 5)
    weights, biases = block.mix.weight.split(4), block.mix.bias.split(4)
    groups = [nn.functional.conv2d(part, weight, bias, padding=1)
              for part, weight, bias in zip(y.split(4, 1), weights, biases, strict=True)]  # fmt: skip
    y = nn.functional.conv2d(nn.functional.leaky_relu(torch.cat(groups, 1), 0.2), block.project.weight)
    torch.testing.assert_close(block(x), x + y, atol=1e-4, rtol=1e-4)


def test_r3_s_initial_gains_fall_with_the_depth_of_the_final_network() -> None:
    config = small("r3", widths=[64] * 4)
    for resolution in (8, 32):
        parameters = dict(make_generator(config, resolution, False, None).named_parameters())
        weight = parameters["blocks.8.blocks.0.expand.weight"]
        expected = math.sqrt(2 / 1.04 / 64) * 8**-0.25  # 2 blocks at 4 resolutions
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    deep = replace(config, network=replace(config.network, blocks=4))
    weight = dict(make_generator(deep, 8, False, None).named_parameters())["blocks.8.blocks.0.expand.weight"]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 1.04 / 64) * 16**-0.25, rel=0.05)


@pytest.mark.parametrize("kind", [None, torch.bfloat16])
def test_r3_begins_a_fade_without_a_change_in_what_d_says(kind: Any) -> None:
    (old_g, old_d), (g, d) = (networks(small("r3"), *place, kind) for place in ((16, False), (32, True)))
    z = torch.randn(4, 16)
    expected = old_d(old_g(z, None, 1.0), None, 1.0)
    assert expected.std() > 0.01
    assert torch.equal(d(g(z, None, 0.0), None, 0.0), expected)


def test_r3_begins_with_images_and_logits_of_order_one() -> None:
    for widths in ([64] * 5, [128, 96, 64, 32, 16]):
        config = small("r3", resolution=64, widths=widths)
        g, d = make_generator(config, 64, False, None), make_discriminator(config, 4, False, None)
        assert 0.3 < g(torch.randn(64, 16), None, 1.0).std() < 1.5
        assert 0.4 < d(torch.randn(64, 3, 4, 4), None, 1.0).std() < 1.5


def test_r3_changes_width_where_there_are_fewest_pixels() -> None:
    config = small("r3", widths=[16, 16, 16, 8])
    pair = make_generator(config, 32, False, None), make_discriminator(config, 32, False, None)
    for network, before in zip(pair, (16, 8), strict=True):
        seen: list[Tensor] = []
        change: Any = network.blocks["32"].change  # type: ignore[index,union-attr]
        change.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
        network(torch.randn(4, 16) if network is pair[0] else torch.randn(4, 3, 32, 32), None, 1.0)
        assert seen[0].shape == (4, before, 16, 16)
        assert sorted(name for name, _ in network.named_parameters() if "change" in name) == ["blocks.32.change.weight"]
