"""StyleGAN2: the paper's numbers and definitions, growth, noise and mixing as functions of z, derivatives of any
order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hrgan import noise as N
from hrgan.config import Config, NetworkConfig
from hrgan.networks import derivatives as D
from hrgan.networks import layers as L
from hrgan.networks import make_discriminator, make_generator
from hrgan.networks.derivatives import filtered_downsample, filtered_upsample
from hrgan.networks.layers import sizes
from hrgan.networks.style import ActivatedLinear, Conv, Discriminator, Generator, ResidualBlock, StyleLayer, ToRGB
from hrgan.noise import latent_normal

SMALL = Config(
    network=NetworkConfig(family="style", resolution=32, latent=8, widths=[8, 8, 6, 4], mapping_layers=2, mixing=0.5)
)
FIR = torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8] * 2)


def generator(resolution: int, fading: bool, config: Config = SMALL, loud: bool = True) -> Generator:
    """In eval mode, with noise that can be seen."""
    g = make_generator(config, resolution, fading, None).eval()
    for name, parameter in g.named_parameters():
        if loud and name.endswith("strength"):
            torch.nn.init.constant_(parameter, 0.5)
    return g


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, every parameter from N(0, 1)."""
    module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


# The paper's numbers


def test_parameter_counts_are_those_of_config_f() -> None:
    """Against a sum over the paper's list of layers, and the figures published with the authors' code."""
    widths = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}

    def styled(before: int, after: int, kernel: int, noise: int) -> int:
        return before * after * kernel**2 + after + (512 * before + before) + noise

    g = 8 * (512 * 512 + 512) + 512 * 4 * 4 + styled(512, 512, 3, 1) + styled(512, 3, 1, 0)
    d = (3 * 32 + 32) + (513 * 512 * 9 + 512) + (512 * 16 * 512 + 512) + (512 + 1)
    for size in sizes(8, 1024):
        low, high = widths[size // 2], widths[size]
        g += styled(low, high, 3, 1) + styled(high, high, 3, 1) + styled(high, 3, 1, 0)
        d += (high * high * 9 + high) + (high * low * 9 + low) + high * low
    assert (g, d) == (30_370_060, 29_012_513)
    config = NetworkConfig(fmap_base=16384)
    with torch.device("meta"):
        networks = Generator(config, 1024, False), Discriminator(config, 1024, False)
    assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == (g, d)


def test_initial_weights_are_those_of_the_paper() -> None:
    g = make_generator(Config(network=NetworkConfig(family="style", resolution=8)), 8, False, None)
    numbers = dict(g.named_parameters())
    assert numbers["mapping.layer0.weight"].std().item() == pytest.approx(100, rel=0.02)
    assert numbers["blocks.8.0.weight"].std().item() == pytest.approx(1, rel=0.02)
    assert numbers["constant"].std().item() == pytest.approx(1, rel=0.05)
    for name, parameter in numbers.items():
        if name.endswith(("strength", "bias")):
            assert (parameter == (1 if name.endswith("affine.bias") else 0)).all(), name
    w = g.mapped(torch.randn(512, 512), None)[:, 0]
    # Gain sqrt(2) is that of ReLU: slope 0.2 lets 4 % more through each of 8 layers.
    assert w.square().mean().item() == pytest.approx(1.04**8, rel=0.2)


def test_layers_take_w_in_the_paper_s_order() -> None:
    g, z = generator(8, False), torch.randn(4, 8)
    ws = g.mapped(z, None).clone()
    assert ws.shape == (4, 4, 8)
    assert (
        generator(1024, False, replace(SMALL, network=NetworkConfig(family="style", fmap_max=1, latent=2))).layers == 18
    )
    seen: list[Tensor] = []
    places = [g.blocks["4"][0], g.to_rgb["4"], g.blocks["8"][0], g.blocks["8"][1], g.to_rgb["8"]]  # type: ignore[index]
    for place in places:
        place.affine.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))  # type: ignore[union-attr]
    g.drawn(torch.arange(4.0)[None, :, None].expand(4, 4, 8), z, 1.0)
    assert [int(w[0, 0]) for w in seen] == [0, 1, 1, 2, 3]


# Definitions


def test_a_learning_rate_multiplies_weights_and_bias() -> None:
    layer = randomised(ActivatedLinear(5, 7, 0.01))
    x = torch.randn(3, 5).double()
    expected = F.leaky_relu(x @ layer.weight.T * 0.01 / 5**0.5 + layer.bias * 0.01, 0.2) * 2**0.5
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("up", [False, True])
def test_a_style_layer_equals_the_paper_s_weights_for_each_sample(up: bool) -> None:
    layer = randomised(StyleLayer(5, 7, 4, up, True))
    x, w, side = torch.randn(3, 5, 6, 6).double(), torch.randn(3, 4).double(), 12 if up else 6
    noise = torch.randn(3, 1, side, side).double()
    s = w @ layer.affine.weight.T / 4**0.5 + layer.affine.bias  # (N, in)
    weights = layer.weight / (5 * 9) ** 0.5 * s[:, None, :, None, None]  # (N, out, in, 3, 3), equation 1
    weights = weights / (weights.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()  # equation 3
    inputs = upsampled_by_definition(x, margin=2) if up else F.pad(x, (1,) * 4)
    parts = [F.conv2d(one[None], weight) for one, weight in zip(inputs, weights, strict=True)]
    expected = torch.cat(parts)[..., 1:-1, 1:-1] if up else torch.cat(parts)
    expected = expected + noise * layer.strength + layer.bias.view(1, -1, 1, 1)
    expected = F.leaky_relu(expected, 0.2) * 2**0.5
    torch.testing.assert_close(layer(x, w, noise), expected, rtol=1e-10, atol=1e-10)


def upsampled_by_definition(x: Tensor, margin: int = 0) -> Tensor:
    """Zeros between and around the pixels, filtered with gain 4; (N, C, 2H + 2 margin, ...)."""
    n, c, h, w = x.shape
    spread = torch.zeros(n, c, 2 * h + 2 * margin + 3, 2 * w + 2 * margin + 3, dtype=x.dtype)
    spread[:, :, margin + 2 : margin + 2 + 2 * h : 2, margin + 2 : margin + 2 + 2 * w : 2] = x
    return 4 * F.conv2d(spread, FIR.to(x.dtype).expand(c, 1, 4, 4), groups=c)


def downsampled_by_definition(x: Tensor) -> Tensor:
    """Filtered within zeros, every second pixel."""
    c = x.shape[1]
    return F.conv2d(F.pad(x, (1,) * 4), FIR.expand(c, 1, 4, 4), groups=c)[:, :, ::2, ::2]


def test_to_rgb_is_modulated_and_not_demodulated() -> None:
    layer = randomised(ToRGB(5, 3, 4))
    x, w = torch.randn(2, 5, 6, 6).double(), torch.randn(2, 4).double()
    s = w @ layer.affine.weight.T / 2 + layer.affine.bias
    expected = torch.einsum("oi,ni,nihw->nohw", layer.weight[:, :, 0, 0] / 5**0.5, s, x) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x, w), expected, rtol=1e-10, atol=1e-10)


def test_resampling_equals_its_definition() -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(filtered_upsample(x), upsampled_by_definition(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(filtered_downsample(x), downsampled_by_definition(x), rtol=1e-12, atol=1e-12)
    one = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(filtered_upsample(one)[..., 2:-2, 2:-2], torch.ones(1, 1, 12, 12))
    torch.testing.assert_close(filtered_downsample(one)[..., 1:-1, 1:-1], torch.ones(1, 1, 2, 2))


def test_resampling_s_derivatives_are_right() -> None:
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    for resample in (filtered_upsample, filtered_downsample, lambda y: D.filtered(y, 1), lambda y: D.filtered(y, 2)):
        assert torch.autograd.gradcheck(resample, (x,))
        assert torch.autograd.gradgradcheck(lambda y, f=resample: f(y).square(), (x,))


def test_a_residual_block_equals_its_definition() -> None:
    block = randomised(ResidualBlock(5, 7))
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)

    def activated(conv: Conv, x: Tensor, stride: int, padding: int) -> Tensor:
        y = F.conv2d(x, conv.weight / (5 * 9) ** 0.5, conv.bias, stride=stride, padding=padding)
        return F.leaky_relu(y, 0.2) * 2**0.5

    main = F.conv2d(F.pad(activated(block.first, x, 1, 1), (2,) * 4), FIR.expand(5, 1, 4, 4), groups=5)
    main = activated(block.second, main, 2, 0)
    skip = F.conv2d(downsampled_by_definition(x), block.skip / 5**0.5)
    torch.testing.assert_close(block(x), (main + skip) / 2**0.5, rtol=1e-10, atol=1e-10)


def test_d_compares_the_images_of_a_chunk() -> None:
    d, x = make_discriminator(SMALL, 16, False, None), torch.randn(8, 3, 16, 16)
    other = x.clone()
    other[5] *= 3
    moved = (d(x, None, 1.0) - d(other, None, 1.0)).abs().flatten() > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 4


# Growth


def test_fades_blend_rgb_in_g_and_features_in_d() -> None:
    z, x = torch.randn(4, 8), torch.randn(4, 3, 16, 16)
    old_g, new_g, next_g = generator(8, False), generator(16, True), generator(16, False)
    old_d, new_d = make_discriminator(SMALL, 8, False, None), make_discriminator(SMALL, 16, True, None)
    # At alpha 0 the grown networks compute what the ones before them did.
    torch.testing.assert_close(new_g(z, None, 0.0), filtered_upsample(old_g(z, None, 1.0)))
    torch.testing.assert_close(new_d(x, None, 0.0), old_d(L.downsample(x), None, 1.0))
    # At alpha 1 they compute what the stable networks after them do.
    torch.testing.assert_close(new_g(z, None, 1.0), next_g(z, None, 1.0))
    torch.testing.assert_close(new_d(x, None, 1.0), make_discriminator(SMALL, 16, False, None)(x, None, 1.0))
    # Between, G's image is linear in alpha, and the new block is not without effect.
    torch.testing.assert_close(new_g(z, None, 0.5), (new_g(z, None, 0.0) + new_g(z, None, 1.0)) / 2)
    assert (new_g(z, None, 0.0) - new_g(z, None, 1.0)).abs().max() > 0.1
    # A stable network takes no notice of alpha.
    torch.testing.assert_close(next_g(z, None, 0.0), next_g(z, None, 1.0))


@pytest.mark.parametrize("before", [4, 8, 16])
def test_growing_adds_exactly_the_new_block_s_keys(before: int) -> None:
    many = replace(SMALL, network=replace(SMALL.network, mapping_layers=18))
    for make in (make_generator, make_discriminator):
        old = set(make(many, before, False, None).state_dict())
        for fading in (True, False):
            new = set(make(many, 2 * before, fading, None).state_dict())
            assert {name for name in new if f".{2 * before}." in name} == new - old
            assert not {name for name in old if f".{2 * before}." in name}
        # A stable D has let go of the old RGB layer.
        assert all(name.startswith(f"from_rgb.{before}.") for name in old - new)


# Noise and mixing are functions of z


def test_latent_normal_is_normal() -> None:
    x = latent_normal(torch.randn(64, 16), 0, 32768).double()
    # 2.1 million numbers: five standard errors of each moment.
    assert x.mean().item() == pytest.approx(0, abs=0.0035)
    assert x.var().item() == pytest.approx(1, abs=0.005)
    assert (x**3).mean().item() == pytest.approx(0, abs=0.014)
    assert (x**4).mean().item() == pytest.approx(3, abs=0.034)
    assert 4.7 < x.abs().max().item() < 5.8
    shares = torch.histc(torch.special.ndtr(x), 100, 0, 1) / x.numel()
    assert ((shares - 0.01).abs() < 5 * (0.01 / x.numel()) ** 0.5).all()


def test_latent_normal_is_independent_over_pixels_streams_and_samples() -> None:
    count = 1 << 16
    base = torch.randn(1, 16)
    near = base.clone()
    near[0, 3] = torch.nextafter(near[0, 3], torch.tensor(9.0))
    swapped = base.clone()
    swapped[0, :2] = base[0, [1, 0]]
    rows = torch.cat([latent_normal(torch.cat([base, near, swapped, -base]), stream, count) for stream in range(4)])
    limit = 5 / count**0.5
    correlation = torch.corrcoef(rows) - torch.eye(16)
    assert correlation.abs().max() < limit
    # Not in size either, which Box and Muller's pairs share.
    assert (torch.corrcoef(rows.abs()) - torch.eye(16)).abs().max() < limit
    for lag in (1, 2, 3, 4, 32, 64, 128, 256, 1024):
        for kind in (rows, rows.abs()):
            a, b = kind[:, :-lag] - kind.mean(), kind[:, lag:] - kind.mean()
            assert ((a * b).mean(1) / kind.var()).abs().max() < limit * 1.02, lag


def test_latent_normal_depends_on_its_row_s_bits_and_the_stream_alone() -> None:
    z = torch.randn(8, 16)
    x = latent_normal(z, 3, 999)
    assert x.dtype == torch.float32
    assert x.shape == (8, 999)
    assert torch.equal(latent_normal(z[[5, 2]], 3, 999), x[[5, 2]])
    assert torch.equal(latent_normal(z, 3, 5000)[:, :999], x)
    assert torch.equal(latent_normal(z.double().requires_grad_(), 3, 999), x)
    other = z.clone()
    other[4, 11] += 1e-6
    changed = (latent_normal(other, 3, 999) != x).float().mean(1)
    assert changed[4] > 0.99
    assert changed.sum() == changed[4]


@pytest.mark.parametrize("bits", [0, -1])
def test_latent_normal_is_finite_at_both_ends_of_the_hash(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(N, "_mix32_", lambda x, key: torch.full_like(x, bits))
    assert latent_normal(torch.randn(1, 8), 0, 4).abs().max() < 5.8


def test_latent_normal_s_numbers_stay() -> None:
    """A change of the hash would change every run: these were written down when it was made."""
    z = torch.linspace(-1, 1, 6).view(2, 3)
    expected = torch.tensor(
        [[-0.7290057, -0.0155727, 2.3682280, -1.7810333], [0.7471099, -0.6156207, 1.8532465, -0.6301543]]
    )
    torch.testing.assert_close(latent_normal(z, 1, 4), expected, rtol=1e-5, atol=1e-6)
    if torch.cuda.is_available():
        torch.testing.assert_close(latent_normal(z.cuda(), 1, 4).cpu(), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_s_noise_stays_when_the_network_grows() -> None:
    z = torch.randn(4, 8)
    old, new = generator(8, False).noise(z), generator(16, True).noise(z)
    assert [tuple(part.shape) for part in new] == [(4, 1, n, n) for n in (4, 8, 8, 16, 16)]
    for a, b in zip(old, new, strict=False):
        assert torch.equal(a, b)


def test_noise_is_in_the_image_by_its_strength() -> None:
    z, other = torch.randn(4, 8), torch.randn(4, 8)
    g = generator(16, False)
    ws = g.mapped(z, None)
    assert (g.drawn(ws, z, 1.0) - g.drawn(ws, other, 1.0)).abs().max() > 0.05
    silent = generator(16, False, loud=False)
    assert torch.equal(silent.drawn(ws, z, 1.0), silent.drawn(ws, other, 1.0))


def test_mixing_is_in_training_only_and_a_function_of_z() -> None:
    g, z = generator(32, False), torch.randn(4096, 8)
    assert torch.equal(g.mapped(z, None), g.w(z, None)[:, None].expand(-1, 8, -1))
    g.train()
    ws = g.mapped(z, None)
    torch.testing.assert_close(g.mapped(z[8:16], None), ws[8:16])
    own = (ws == ws[:, :1]).all(2)  # (N, layers): the first layer is always z's own
    assert (own == own.cummin(1).values).all()  # One crossover, from which on the other is taken.
    mixed = ~own[:, -1]
    assert mixed.float().mean().item() == pytest.approx(0.5, abs=0.04)
    places = own[mixed].sum(1).bincount(minlength=9)
    assert places[[0, 8]].sum() == 0
    assert (places[1:8] / mixed.sum() - 1 / 7).abs().max() < 0.04
    g.mixing = 0.0
    assert torch.equal(g.mapped(z, None), g.eval().mapped(z, None))


def test_an_image_does_not_depend_on_its_batch() -> None:
    z = torch.randn(8, 8)
    g, d = generator(16, False).train(), make_discriminator(SMALL, 16, False, None)
    images = g(z, None, 1.0)
    torch.testing.assert_close(torch.cat([g(z[:4], None, 1.0), g(z[4:], None, 1.0)]), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(g(z[6:7], None, 1.0), images[6:7], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d(images[4:], None, 1.0), d(images, None, 1.0)[4:], rtol=1e-4, atol=1e-5)


# Derivatives


def test_images_are_twice_differentiable_by_ws() -> None:
    config = replace(SMALL, network=replace(SMALL.network, latent=2, widths=[2, 2, 2, 2]))
    g = generator(8, True, config).double()
    z = torch.randn(1, 2)
    ws = torch.randn(1, g.layers, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: g.drawn(w, z, 0.7), (ws,))
    assert torch.autograd.gradgradcheck(lambda w: g.drawn(w, z, 0.7), (ws,))


def test_path_length_s_gradient_reaches_every_layer_with_a_style() -> None:
    g, z = generator(16, False).train(), torch.randn(4, 8)
    ws = g.mapped(z, None)
    images = g.drawn(ws, z, 1.0)
    (gradient,) = torch.autograd.grad((images * torch.randn_like(images)).sum(), ws, create_graph=True)
    gradient.square().sum(2).mean(1).sqrt().mean().backward()
    none = {name for name, p in g.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert all(name.endswith(".bias") and "to_rgb" in name and "affine" not in name for name in none), none


def test_a_residual_block_is_twice_differentiable() -> None:
    block = randomised(ResidualBlock(2, 3))
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))
    assert torch.autograd.gradgradcheck(block, (x,))


# Shapes and precision


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("grid", [[4, 4], [4, 6]])
def test_shapes_ranges_and_initial_scale(channels: int, grid: list[int]) -> None:
    config = Config(network=NetworkConfig(family="style", resolution=16, channels=channels, grid=grid, fmap_max=64))
    for resolution, fading in ((4, False), (16, False), (16, True)):
        g = make_generator(config, resolution, fading, None)
        images = g(torch.randn(8, 512), None, 0.5)
        assert images.shape == (8, channels, grid[0] * resolution // 4, grid[1] * resolution // 4)
        assert images.dtype == torch.float32
        assert 0.3 < images.std().item() < 3
        assert make_discriminator(config, resolution, fading, None)(images, None, 0.5).shape == (8, 1)


@pytest.mark.parametrize(("condition", "heads"), [("projection", 1), ("acgan", 4)])
def test_classes_change_images_and_logits(condition: str, heads: int) -> None:
    network = replace(SMALL.network, condition=condition, classes=["a", "b", "c"])
    config = replace(SMALL, network=network)  # type: ignore[arg-type]
    g, d = generator(8, False, config).train(), make_discriminator(config, 8, False, None)
    z, labels, others = torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 1, 1])
    assert g.classes == 3
    a, b = g(z, labels, 1.0), g(z, others, 1.0)
    assert torch.equal(a[0], b[0])
    assert ((a - b).abs().amax((1, 2, 3)) > 0.01).tolist() == [False, True, True, True]
    logits = d(a, labels, 1.0)
    assert logits.shape == (4, heads)
    assert ((logits - d(a, others, 1.0)).abs().amax(1) > 1e-4).tolist() == [
        False,
        *[condition == "projection"] * 3,
    ]


def test_bf16_computes_nearly_the_same_in_float32_out() -> None:
    config = Config(network=NetworkConfig(family="style", resolution=32, latent=64, widths=[64, 64, 64, 64]))
    z = torch.randn(4, 64)
    full, half = (make_generator(config, 32, False, kind)(z, None, 1.0) for kind in (None, torch.bfloat16))
    assert half.dtype == torch.float32
    error = (full - half).square().mean().sqrt() / full.square().mean().sqrt()
    assert 1e-4 < error < 0.03  # Some rounding, so that it is known to have been on; bf16 has 8 bits.
    true, rough = (make_discriminator(config, 32, False, kind)(full, None, 1.0) for kind in (None, torch.bfloat16))
    assert rough.dtype == torch.float32
    assert 1e-5 < (true - rough).abs().max() < 0.1


def test_bf16_has_finite_second_derivatives() -> None:
    g, d = make_generator(SMALL, 16, True, torch.bfloat16), make_discriminator(SMALL, 16, True, torch.bfloat16)
    z = torch.randn(4, 8)
    ws = g.mapped(z, None)
    images = g.drawn(ws, z, 0.5)
    (by_ws,) = torch.autograd.grad(images.sum(), ws, create_graph=True)
    (by_image,) = torch.autograd.grad(d(images, None, 0.5).sum(), images, create_graph=True)
    (by_ws.square().sum() + by_image.square().sum()).backward()
    for network in (g, d):
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert g.constant.grad is not None
