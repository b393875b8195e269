"""Losses and penalties against closed-form values and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from hrgan import losses

torch.manual_seed(0)
W = torch.randn(3 * 4 * 4, dtype=torch.float64)
REAL, FAKE = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)


def linear(weight: torch.Tensor) -> losses.Critic:
    """D(x) = w . x: its input gradient is w everywhere."""
    return lambda x: (x.flatten(1) @ weight).view(-1, 1)


def r1(critic: losses.Critic, images: torch.Tensor, gamma: float, scale: torch.Tensor | None = None) -> torch.Tensor:
    x = images.detach().requires_grad_()
    return losses.exact_penalty(partial(losses.r1_penalty, gamma=gamma), critic(x), x, scale)


def quotient_r1(critic: losses.Critic, x: torch.Tensor, sigma: float, gamma: float) -> torch.Tensor:
    penalty = partial(losses.r1_penalty, gamma=gamma)
    return losses.finite_difference_penalty(penalty, critic, x, critic(x), sigma)


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


def test_path_lengths_of_a_generator_that_is_flat_move_nothing() -> None:
    weight, ws = torch.zeros(1, requires_grad=True), torch.randn(6, 2, 48, requires_grad=True)
    lengths = losses.path_lengths((ws.sum(1) * weight).view(6, 3, 4, 4), ws, torch.randn(6, 3, 4, 4))
    losses.path_penalty(lengths, torch.tensor(1.0)).backward()
    assert weight.grad == 0


@pytest.mark.parametrize("exact", [True, False])
def test_gradient_penalty_of_a_linear_critic(exact: bool) -> None:
    weight, x = W.clone().requires_grad_(True), REAL.clone().requires_grad_(exact)
    critic = linear(weight)
    of_x, definition = critic(x), partial(losses.gradient_penalty, weight=10.0, target=2.0)
    if exact:
        penalty = losses.exact_penalty(definition, of_x, x)
    else:
        penalty = losses.finite_difference_penalty(definition, critic, x, of_x, 0.01)
    torch.testing.assert_close(penalty, 10 / 4 * (W.norm() - 2) ** 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 10 / 4 * 2 * (W.norm() - 2) * W / W.norm())


def test_r1_of_a_linear_and_of_a_quadratic_critic() -> None:
    weight = W.clone().requires_grad_(True)
    penalty = r1(linear(weight), REAL, 3.0)
    torch.testing.assert_close(penalty, 3 / 2 * W.square().sum())
    penalty.backward()
    torch.testing.assert_close(weight.grad, 3 * W)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    critic = lambda x: scale * x.square().flatten(1).sum(1, keepdim=True) / 2  # noqa: E731  grad D(x) = scale x
    r1(critic, REAL, 3.0).backward()
    torch.testing.assert_close(scale.grad, 3 * scale.detach() * REAL.square().flatten(1).sum(1).mean())


def test_a_scaled_inner_gradient_is_the_same_and_survives_half_precision() -> None:
    weight = W.clone().requires_grad_(True)
    scale = torch.tensor([1024.0], dtype=torch.float64)
    torch.testing.assert_close(r1(linear(weight), REAL, 3.0, scale), 3 / 2 * W.square().sum())
    small = (1e-9 * W).float()

    def in_half(x: torch.Tensor) -> torch.Tensor:  # Its gradient rounds to zero in float16.
        return (x.half().flatten(1) @ torch.ones(48, 1).half()).float() * small.norm()

    expected = 48 * small.norm().square() / 2
    assert r1(in_half, REAL.float(), 1.0) == 0
    found = r1(in_half, REAL.float(), 1.0, torch.tensor([2.0**16]))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_finite_differences_of_a_linear_critic_are_r1_with_its_gradient() -> None:
    """Also where one picture's logit hangs on another's pixels, and the pictures' slopes differ."""
    images, weight = torch.randn(8, 3, 4, 4, dtype=torch.float64), W.clone().requires_grad_(True)
    shares = torch.randn(8, 8, dtype=torch.float64)
    critic = lambda x: shares @ (x.flatten(1) @ weight).view(-1, 1)  # noqa: E731
    penalty = quotient_r1(critic, images, 0.01, gamma=3.0)
    penalty.backward()
    each = shares.sum(0).square().mean()
    assert penalty.item() == pytest.approx((3 / 2 * each * W.square().sum()).item(), rel=1e-9)
    torch.testing.assert_close(weight.grad, 3 * each * W, rtol=1e-9, atol=1e-12)


def test_the_bias_of_finite_differences_is_as_stated() -> None:
    """D(x) = s |x|^2 / 2: gradients g = s x, v = g / N, slope along v of the sum: s x . v + h s |v|^2 / 2."""
    for sigma in (0.01, 0.1):
        s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        critic = lambda x: s * x.square().flatten(1).sum(1, keepdim=True) / 2  # noqa: B023, E731
        found = quotient_r1(critic, REAL, sigma, 1.0)
        squares = REAL.square().sum()
        torch.testing.assert_close(found, s.square() / 2 * squares / len(REAL), rtol=1e-9, atol=0)
        found.backward()
        assert s.grad is not None
        v = s.detach() * REAL / len(REAL)
        h = sigma / v.square().mean().sqrt()
        torch.testing.assert_close(s.grad, (REAL * v).sum() + h * v.square().sum() / 2, rtol=1e-9, atol=0)


def test_finite_differences_approach_exact_r1_and_its_gradient_on_a_smooth_network() -> None:
    torch.manual_seed(3)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.Softplus(), torch.nn.Linear(16, 1)
    ).double()
    images = torch.randn(8, 3, 4, 4, dtype=torch.float64)

    def gradients(penalty: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    expected = gradients(r1(network, images, 1.0))
    apart = []
    for sigma in (1e-2, 1e-4):
        found = gradients(quotient_r1(network, images, sigma, 1.0))
        apart.append(((found - expected).norm() / expected.norm()).item())
    assert apart[0] < 0.05
    assert apart[1] < apart[0] / 50  # Of first order.


@pytest.mark.parametrize("definition", [losses.r1_penalty, losses.gradient_penalty])
@pytest.mark.parametrize("exact", [True, False])
def test_where_a_critic_is_flat_a_penalty_s_gradient_is_nothing(exact: bool, definition: Any) -> None:
    numbers = {"gamma": 1.0} if definition is losses.r1_penalty else {"weight": 1.0, "target": 2.0}
    weight, x = torch.zeros(1, requires_grad=True), torch.randn(8, 3, 64, 64, requires_grad=True)
    critic = lambda x: x.flatten(1).sum(1, keepdim=True) * weight  # noqa: E731
    if exact:
        penalty = losses.exact_penalty(partial(definition, **numbers), critic(x), x)
    else:
        penalty = losses.finite_difference_penalty(partial(definition, **numbers), critic, x, critic(x), 0.01)
    penalty.backward()
    assert penalty == (0 if definition is losses.r1_penalty else 1)
    assert weight.grad == 0
