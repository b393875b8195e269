"""Adversarial losses and penalties: pure functions of tensors. Logits are (N, 1) float32, higher is more real."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Critic = Callable[[Tensor], Tensor]
"""(N, C, H, W) images -> (N, 1) logits."""


def wasserstein_d(real: Tensor, fake: Tensor, drift: float) -> Tensor:
    """E[D(fake)] - E[D(real)] + drift * E[D(real)^2], the last on reals only (Karras et al. 2018, appendix A.1)."""
    return fake.mean() - real.mean() + drift * real.square().mean()


def wasserstein_g(fake: Tensor) -> Tensor:
    """-E[D(fake)]."""
    return -fake.mean()


def logistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """E[softplus(D(fake))] + E[softplus(-D(real))] (Goodfellow et al. 2014)."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def logistic_g(fake: Tensor) -> Tensor:
    """E[softplus(-D(fake))]: the non-saturating form."""
    return F.softplus(-fake).mean()


def input_gradient(critic: Critic, x: Tensor) -> Tensor:
    """(N, C, H, W) gradient of each sample's logit by its own pixels, itself differentiable by the critic's
    parameters."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient


def gradient_penalty(critic: Critic, real: Tensor, fake: Tensor, mix: Tensor, weight: float, target: float) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017): weight / target^2 * E[(|grad D(x)| - target)^2] at x = real + mix (fake - real).

    real, fake: (N, C, H, W); mix: (N, 1, 1, 1) from U(0, 1). The norm is over C, H, W.
    """
    norm = input_gradient(critic, torch.lerp(real, fake, mix)).square().sum((1, 2, 3)).sqrt()
    return weight / target**2 * (norm - target).square().mean()


def r1_penalty(critic: Critic, real: Tensor, gamma: float) -> Tensor:
    """R1 (Mescheder et al. 2018): gamma / 2 * E[|grad D(real)|^2], the norm over C, H, W."""
    return gamma / 2 * input_gradient(critic, real).square().sum((1, 2, 3)).mean()
