"""Losses and penalties against closed-form values and gradients."""

from __future__ import annotations

import torch

from hrgan import losses

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
