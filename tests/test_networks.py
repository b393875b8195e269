"""ProGAN's layers and networks: numbers of the paper, equality of the fused forms, growth by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hrgan.config import Config, NetworkConfig
from hrgan.networks import derivatives as D
from hrgan.networks import layers as L
from hrgan.networks import make_discriminator, make_generator, multiplications
from hrgan.networks.layers import sizes, width
from hrgan.networks.progan import Discriminator, Generator

SMALL = Config(network=NetworkConfig(resolution=32, latent=8, widths=[8, 8, 6, 4]))


@pytest.mark.parametrize(("family", "total"), [(Generator, 23_079_115), (Discriminator, 23_087_249)])
def test_parameter_counts_are_the_paper_s(family: type[torch.nn.Module], total: int) -> None:
    with torch.device("meta"):
        networks = [family(NetworkConfig(), size, False) for size in sizes(4, 1024)]
    largest = sum(p.numel() for p in networks[-1].parameters())
    other_rgb = sum(p.numel() for network in networks[:-1] for name, p in network.named_parameters() if "rgb" in name)
    assert largest + other_rgb == total


@pytest.mark.parametrize("family", ["dcgan", "progan", "style", "r3"])
def test_what_a_picture_costs_grows_as_torch_counts_it(family: str) -> None:
    network = NetworkConfig(resolution=32, latent=32, widths=[32, 32, 32, 16], family=family, mapping_layers=2)
    config, counted, told = replace(SMALL, network=network), [], []
    for size in (16, 32):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            images = make_generator(config, size, False, None)(torch.randn(4, 32), None, 1.0)
            make_discriminator(config, size, False, None)(images, None, 1.0)
        counted.append(counter.get_total_flops())
        told.append(multiplications(config, size))
    assert told[1] / told[0] == pytest.approx(counted[1] / counted[0], rel=0.15)


def test_widths_follow_the_paper_s_rule() -> None:
    assert [width(NetworkConfig(), size) for size in sizes(4, 1024)] == [512, 512, 512, 512, 256, 128, 64, 32, 16]


def test_a_phase_holds_only_the_rgb_layers_it_uses() -> None:
    def names(fading: bool) -> set[str]:
        return {n.split(".")[1] for n, _ in Generator(SMALL.network, 16, fading).named_parameters() if "rgb" in n}

    assert names(True) == {"8", "16"}
    assert names(False) == {"16"}


@pytest.mark.parametrize("mode", ["up", "down"])
def test_fused_resampling_equals_the_two_steps(mode: str) -> None:
    fused, plain = L.ScaledConv(5, 7, 3, resample=mode).double(), L.ScaledConv(5, 7, 3).double()
    L.initialise(fused, 0, "test")
    torch.nn.init.normal_(fused.bias)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    expected = plain(L.upsample(x)) if mode == "up" else L.downsample(plain(x))
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)


def test_equalised_learning_rate_gives_unit_variance() -> None:
    conv = L.ScaledConv(64, 64, 3, gain=1)
    L.initialise(conv, 0, "test")
    assert conv.weight.std().item() == pytest.approx(1, abs=0.02)
    assert conv(torch.randn(4, 64, 16, 16))[..., 1:-1, 1:-1].std().item() == pytest.approx(1, abs=0.05)


def test_pixel_norm_gives_each_pixel_unit_mean_square() -> None:
    x = D.pixel_norm(torch.randn(2, 16, 4, 4) * 37)
    torch.testing.assert_close(x.square().mean(1), torch.ones(2, 4, 4))


def test_pixel_norm_s_gradient_is_right() -> None:
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(D.pixel_norm, (x,))
    (mine,) = torch.autograd.grad((D.pixel_norm(x) ** 3).sum(), x)
    (theirs,) = torch.autograd.grad(((x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()) ** 3).sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_minibatch_stddev_is_the_mean_deviation_over_each_chunk_of_four() -> None:
    x = torch.randn(8, 3, 4, 4)
    out = L.minibatch_stddev(x)
    torch.testing.assert_close(out[:, :3], x)
    for chunk in range(2):
        expected = x[4 * chunk : 4 * chunk + 4].var(0, unbiased=False).add(1e-8).sqrt().mean()
        torch.testing.assert_close(out[4 * chunk : 4 * chunk + 4, 3], expected.expand(4, 4, 4))


def test_fades_blend_rgb_in_g_and_features_in_d() -> None:
    z, x = torch.randn(4, 8), torch.randn(4, 3, 16, 16)
    old_g, new_g = make_generator(SMALL, 8, False, None), make_generator(SMALL, 16, True, None)
    old_d, new_d = make_discriminator(SMALL, 8, False, None), make_discriminator(SMALL, 16, True, None)
    # At alpha 0 the grown networks compute what the ones before them did.
    torch.testing.assert_close(new_g(z, None, 0.0), L.upsample(old_g(z, None, 1.0)))
    torch.testing.assert_close(new_d(x, None, 0.0), old_d(L.downsample(x), None, 1.0))
    # At alpha 1 they compute what the stable networks after them do.
    torch.testing.assert_close(new_g(z, None, 1.0), make_generator(SMALL, 16, False, None)(z, None, 1.0))
    torch.testing.assert_close(new_d(x, None, 1.0), make_discriminator(SMALL, 16, False, None)(x, None, 1.0))
    # Between, G's image is linear in alpha.
    half = (new_g(z, None, 0.0) + new_g(z, None, 1.0)) / 2
    torch.testing.assert_close(new_g(z, None, 0.5), half)


def test_growing_adds_exactly_the_new_block_s_keys() -> None:
    for make in (make_generator, make_discriminator):
        old, new = set(make(SMALL, 8, False, False).state_dict()), set(make(SMALL, 16, True, False).state_dict())
        assert old < new
        assert all(".16." in name for name in new - old)


def test_shapes_ranges_and_initial_scale() -> None:
    config = Config(network=NetworkConfig(resolution=32, channels=1))
    g, d = make_generator(config, 32, False, None), make_discriminator(config, 32, False, None)
    images = g(torch.randn(8, 512), None, 1.0)
    assert images.shape == (8, 1, 32, 32)
    assert images.dtype == torch.float32
    assert 0.3 < images.std().item() < 3
    assert d(images, None, 1.0).shape == (8, 1)


def test_bf16_computes_nearly_the_same_in_float32_out() -> None:
    config = Config(network=NetworkConfig(resolution=32, latent=64, widths=[64, 64, 64, 64]))
    z = torch.randn(4, 64)
    full, half = (make_generator(config, 32, False, kind)(z, None, 1.0) for kind in (None, torch.bfloat16))
    assert half.dtype == torch.float32
    error = (full - half).square().mean().sqrt() / full.square().mean().sqrt()
    assert 1e-4 < error < 0.03  # Some rounding, so that it is known to have been on; bf16 has 8 bits.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 1), (3, 1, 2), (4, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_and_its_first_and_second_derivatives_are_torch_s(
    kernel: int, stride: int, groups: int, transposed: bool, bias: bool
) -> None:
    torch.manual_seed(kernel)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4 // groups, kernel, kernel, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(4, dtype=torch.float64, requires_grad=True) if bias else None
    arguments = [x, weight] if offset is None else [x, weight, offset]
    padding = (kernel - 1) // 2
    theirs = F.conv_transpose2d if transposed else F.conv2d

    def values(y: Tensor) -> list[Tensor]:
        # All derivatives of a sum of squares: by all, of the pixels' by all, and of the weights' by all.
        loss = y.square().sum()
        first = torch.autograd.grad(loss, arguments, create_graph=True)
        of_pixels = torch.autograd.grad(first[0].square().sum(), arguments, retain_graph=True, materialize_grads=True)
        of_others = torch.autograd.grad(
            sum(g.square().sum() for g in first[1:]), arguments, retain_graph=True, materialize_grads=True
        )
        (alone,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        of_alone = torch.autograd.grad(alone.square().sum(), arguments, materialize_grads=True, allow_unused=True)
        return [y, *first, *of_pixels, *of_others, alone, *of_alone]

    found = values(D.convolve(x, weight, offset, padding, stride, groups, transposed))
    expected = values(theirs(x, weight, offset, stride=stride, padding=padding, groups=groups))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_penalty_s_inner_derivative_computes_no_gradient_of_weights() -> None:
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                counted.append(list(args[-1]))
            return func(*args, **(kwargs or {}))

    conv = L.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with Count():
        y = conv(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert counted == [[True, False, False]]
        (slope.square().sum() + y.square().sum()).backward()
    assert counted[1:] == [[False, True, False], [True, True, True]]


def test_a_leaky_relu_s_derivatives_are_torch_s() -> None:
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    assert torch.equal(D.lrelu(x), F.leaky_relu(x, 0.2))
    assert torch.autograd.gradcheck(D.lrelu, x)
    assert torch.autograd.gradgradcheck(D.lrelu, x)


@pytest.mark.parametrize("family", ["dcgan", "progan", "style", "r3"])
def test_a_network_whose_kinks_are_held_is_its_linear_approximation(family: str) -> None:
    torch.manual_seed(0)
    network = NetworkConfig(resolution=16, latent=8, widths=[8, 8, 8], family=family, group_size=4, mapping_layers=2)
    critic = make_discriminator(replace(SMALL, network=network), 16, True, None).double()
    for parameter in critic.parameters():  # What begins as zero, too.
        torch.nn.init.normal_(parameter)
    x, step = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    kinks: D.Kinks = []
    with D.same_kinks(kinks):
        here = critic(x, None, 0.5)
    with D.same_kinks(kinks):
        ahead = critic(x + step, None, 0.5)
    with D.same_kinks(kinks):
        twice = critic(x + 2 * step, None, 0.5)
    torch.testing.assert_close(twice - here, 2 * (ahead - here), rtol=1e-9, atol=1e-9)
    again = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(again, None, 0.5).sum(), again, create_graph=True)
    sums = (ahead - here).sum(), (gradient * step).sum()
    torch.testing.assert_close(*sums, rtol=1e-9, atol=0)
    parameters = list(critic.parameters())
    slopes = [torch.autograd.grad(of, parameters, retain_graph=True, materialize_grads=True) for of in sums]
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()) + 1e-9)
    with D.same_kinks(kinks):
        far = critic(x + 10 * step, None, 0.5)
    torch.testing.assert_close(far - here, 10 * (ahead - here), rtol=1e-9, atol=1e-9)
    free = critic(x + 10 * step, None, 0.5)  # Outside, they are where they are.
    assert ((free - far).abs() > 0.01 * far.abs()).all()
    with pytest.raises(StopIteration), D.same_kinks(kinks):
        critic(x, None, 0.5), critic(x, None, 0.5)
    assert torch.equal(critic(x, None, 0.5), here)
