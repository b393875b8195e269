"""Losses and penalties against closed-form values and gradients."""

from __future__ import annotations

import pytest
import torch

from hrgan import losses
from hrgan.config import Config, NetworkConfig
from hrgan.networks import make_discriminator

torch.manual_seed(0)
W = torch.randn(3 * 4 * 4, dtype=torch.float64)
REAL, FAKE = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)


def linear(weight: torch.Tensor) -> losses.Critic:
    """D(x) = w . x: its input gradient is w everywhere."""
    return lambda x: (x.flatten(1) @ weight).view(-1, 1)


def test_wasserstein_losses_and_their_gradients() -> None:
    real, fake = torch.randn(2, 8, 1, dtype=torch.float64, requires_grad=True).unbind()
    real.retain_grad(), fake.retain_grad()
    losses.wasserstein_d(real, fake, 0.001).backward()
    torch.testing.assert_close(real.grad, (-1 + 2 * 0.001 * real.detach()) / 8)  # Drift on reals only.
    torch.testing.assert_close(fake.grad, torch.full_like(fake, 1 / 8))
    assert losses.wasserstein_g(fake) == -fake.mean()


def test_logistic_losses_and_their_gradients() -> None:
    real, fake = torch.randn(2, 8, 1, dtype=torch.float64, requires_grad=True).unbind()
    real.retain_grad(), fake.retain_grad()
    losses.logistic_d(real, fake).backward()
    torch.testing.assert_close(real.grad, -torch.sigmoid(-real.detach()) / 8)
    torch.testing.assert_close(fake.grad, torch.sigmoid(fake.detach()) / 8)
    logits = fake.detach().requires_grad_(True)
    losses.logistic_g(logits).backward()
    torch.testing.assert_close(logits.grad, -torch.sigmoid(-logits.detach()) / 8)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of reals and fakes, (8, 1) each."""
    torch.manual_seed(1)
    return torch.randn(8, 1, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)


D_GRADIENTS = {  # d loss / d logit times 8, from the papers' formulas
    "wasserstein": (lambda r, f: -1 + 2 * 0.1 * r, lambda r, f: torch.ones_like(f)),
    "logistic": (lambda r, f: -torch.sigmoid(-r), lambda r, f: torch.sigmoid(f)),
    "least-squares": (lambda r, f: r - 1, lambda r, f: f),
    "hinge": (lambda r, f: -(r < 1).double(), lambda r, f: (f > -1).double()),
    "relativistic": (lambda r, f: -torch.sigmoid(f - r), lambda r, f: torch.sigmoid(f - r)),
}
G_GRADIENTS = {
    "wasserstein": lambda r, f: -torch.ones_like(f),
    "logistic": lambda r, f: -torch.sigmoid(-f),
    "least-squares": lambda r, f: f - 1,
    "hinge": lambda r, f: -torch.ones_like(f),
    "relativistic": lambda r, f: -torch.sigmoid(r - f),
}


@pytest.mark.parametrize("kind", D_GRADIENTS)
def test_each_kind_s_gradients_are_its_formula_s(kind: str) -> None:
    (real, fake), (of_real, of_fake) = pair(), D_GRADIENTS[kind]
    real.requires_grad_(True), fake.requires_grad_(True)
    losses.adversarial_d(kind, real, fake, drift=0.1).backward()
    torch.testing.assert_close(real.grad, of_real(real, fake).detach() / 8)
    torch.testing.assert_close(fake.grad, of_fake(real, fake).detach() / 8)
    logits = fake.detach().requires_grad_(True)
    losses.adversarial_g(kind, real.detach(), logits).backward()
    torch.testing.assert_close(logits.grad, G_GRADIENTS[kind](real.detach(), logits.detach()) / 8)


@pytest.mark.parametrize("kind", D_GRADIENTS)
def test_each_kind_is_lower_where_its_network_is_better(kind: str) -> None:
    good, bad = torch.full((4, 1), 2.0), torch.full((4, 1), -2.0)
    assert losses.adversarial_d(kind, good, bad, 0.0) < losses.adversarial_d(kind, bad, good, 0.0)
    # The least-squares G wants D(fake) = 1.
    assert losses.adversarial_g(kind, bad, good) < losses.adversarial_g(kind, good, bad)


def test_class_loss_is_the_cross_entropy() -> None:
    scores = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 0])
    loss = losses.class_loss(scores, labels)
    chance = scores.detach().softmax(1)
    torch.testing.assert_close(loss, -(chance[0, 2].log() + chance[1, 0].log()) / 2)
    loss.backward()
    torch.testing.assert_close(scores.grad, (chance - torch.nn.functional.one_hot(labels, 3)) / 2)


def test_path_lengths_of_a_linear_generator() -> None:
    """G(w) = A w: J is A, whatever w."""
    matrix = torch.randn(3 * 4 * 4, 5, dtype=torch.float64)
    weight = matrix.clone().requires_grad_(True)
    ws = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    images = (ws.sum(1) @ weight.t()).view(6, 3, 4, 4)
    noise = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    lengths = losses.path_lengths(images, ws, noise)
    expected = (noise.flatten(1) @ matrix / 4).norm(dim=1)  # y is divided by sqrt(H W); both layers have the same.
    torch.testing.assert_close(lengths, expected)
    losses.path_penalty(lengths, torch.tensor(1.0, dtype=torch.float64)).backward()
    y = noise.flatten(1) / 4
    reached = y @ matrix
    slope = 2 * (expected - 1) / 6 / expected
    torch.testing.assert_close(weight.grad, torch.einsum("n,ni,nj->ij", slope, y, reached))


def test_gradient_penalty_of_a_linear_critic() -> None:
    weight = W.clone().requires_grad_(True)
    mix = torch.rand(8, 1, 1, 1, dtype=torch.float64)
    penalty = losses.gradient_penalty(linear(weight), REAL, FAKE, mix, weight=10.0, target=2.0)
    torch.testing.assert_close(penalty, 10 / 4 * (W.norm() - 2) ** 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 10 / 4 * 2 * (W.norm() - 2) * W / W.norm())


def test_gradient_penalty_looks_between_real_and_fake() -> None:
    def quadratic(x: torch.Tensor) -> torch.Tensor:  # grad D(x) = x
        return x.square().flatten(1).sum(1, keepdim=True) / 2

    mix = torch.rand(8, 1, 1, 1, dtype=torch.float64)
    norms = (REAL + mix * (FAKE - REAL)).flatten(1).norm(dim=1)
    penalty = losses.gradient_penalty(quadratic, REAL, FAKE, mix, weight=10.0, target=1.0)
    torch.testing.assert_close(penalty, 10 * (norms - 1).square().mean())


def test_r1_of_a_linear_and_of_a_quadratic_critic() -> None:
    weight = W.clone().requires_grad_(True)
    penalty = losses.r1_penalty(linear(weight), REAL, gamma=3.0)
    torch.testing.assert_close(penalty, 3 / 2 * W.square().sum())
    penalty.backward()
    torch.testing.assert_close(weight.grad, 3 * W)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    critic = lambda x: scale * x.square().flatten(1).sum(1, keepdim=True) / 2  # noqa: E731  grad D(x) = scale x
    losses.r1_penalty(critic, REAL, gamma=3.0).backward()
    torch.testing.assert_close(scale.grad, 3 * scale.detach() * REAL.square().flatten(1).sum(1).mean())


def test_a_scaled_inner_gradient_is_the_same_and_survives_half_precision() -> None:
    weight = W.clone().requires_grad_(True)
    scale = torch.tensor([1024.0], dtype=torch.float64)
    torch.testing.assert_close(losses.r1_penalty(linear(weight), REAL, 3.0, scale), 3 / 2 * W.square().sum())
    small = (1e-9 * W).float()

    def in_half(x: torch.Tensor) -> torch.Tensor:  # Its gradient rounds to zero in float16.
        return (x.half().flatten(1) @ torch.ones(48, 1).half()).float() * small.norm()

    expected = 48 * small.norm().square() / 2
    assert losses.r1_penalty(in_half, REAL.float(), 1.0) == 0
    found = losses.r1_penalty(in_half, REAL.float(), 1.0, torch.tensor([2.0**16]))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_finite_differences_of_a_linear_critic_estimate_r1_without_bias_and_with_the_stated_variance() -> None:
    """Its gradient norm is |w| everywhere and its Hessian 0: bias 0, variance of one image's term 2 |w|^4."""
    images = torch.randn(20_000, 3, 4, 4, dtype=torch.float64)
    noise = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = W.clone().requires_grad_(True)
    exact = 3 / 2 * W.square().sum()
    penalty = losses.finite_difference_penalty(linear(weight), images, noise, 0.01, gamma=3.0)
    deviation = exact * (2 / len(images)) ** 0.5
    assert abs(penalty - exact) < 3 * deviation
    single = [
        losses.finite_difference_penalty(linear(W), images[i : i + 1], noise[i : i + 1], 0.01, 3.0) for i in range(4000)
    ]
    assert torch.stack(single).std().item() == pytest.approx((2**0.5 * exact).item(), rel=0.1)
    penalty.backward()  # The gradient of R1 is gamma w; each component's deviation is at most gamma |w| (3 / N)^0.5.
    assert (weight.grad - 3 * W).norm() < 3 * W.norm() * (50 / len(images)) ** 0.5 * 2


def test_finite_differences_take_logits_that_are_there_already() -> None:
    config = Config(network=NetworkConfig(resolution=8, latent=8, widths=[8, 8]))
    network, calls = make_discriminator(config, 8, False, None).double(), []

    def critic(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        logits: torch.Tensor = network(x, None, 1.0)
        return logits

    real, noise = (torch.randn(8, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    found = []
    for clean in (None, network(real, None, 1.0)):
        network.zero_grad()
        losses.finite_difference_penalty(critic, real, noise, 0.01, 1.0, clean).backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    assert calls == [16, 8]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-12)


def test_the_bias_of_finite_differences_is_as_stated_and_falls_with_sigma_squared() -> None:
    """D(x) = s |x|^2 / 2: gradient s x, Hessian s I, so the bias of one term is s^2 sigma^2 / 4 (2 n + n^2)."""
    s, n, count = 0.7, 48, 400_000
    image = REAL[:1].expand(count, -1, -1, -1)
    noise = torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = (s**2 * REAL[0].square().sum()).item()
    for sigma in (0.2, 0.4):
        critic = lambda x: s * x.square().flatten(1).sum(1, keepdim=True) / 2  # noqa: E731
        found = 2 * losses.finite_difference_penalty(critic, image, noise, sigma, 1.0).item()
        stated = s**2 * sigma**2 / 4 * (2 * n + n**2)
        assert found - exact == pytest.approx(stated, rel=0.05), sigma


def test_finite_differences_approach_exact_r1_on_a_network() -> None:
    config = Config(network=NetworkConfig(resolution=8, latent=8, widths=[8, 8]))
    network = make_discriminator(config, 8, False, None).double()
    critic = lambda x: network(x, None, 1.0)  # noqa: E731
    real = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    images = real.repeat(500, 1, 1, 1)
    noise = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x = real.clone().requires_grad_(True)
    logits = critic(x)
    jacobian = [torch.autograd.grad(logits[i, 0], x, retain_graph=True)[0] for i in range(4)]
    expected = sum(rows.square().sum() for rows in jacobian).item() / 4  # With what minibatch stddev mixes.
    found = 2 * losses.finite_difference_penalty(critic, images, noise, 0.01, 1.0).item()
    assert found == pytest.approx(expected, rel=3 * (2 / 2000) ** 0.5)
    assert expected == pytest.approx(2 * losses.r1_penalty(critic, real, 1.0).item(), rel=0.2)
