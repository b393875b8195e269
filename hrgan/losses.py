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


def input_gradient(critic: Critic, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """(N, C, H, W) gradient of each sample's logit by its own pixels, itself differentiable by the critic's
    parameters.

    scale: (1,) float32; the gradient is computed multiplied by it and divided by it at the end, so that a critic in
    float16 does not round small gradients to zero on the way. None: not scaled.
    """
    x = x.detach().requires_grad_(True)
    total = critic(x).sum()
    (gradient,) = torch.autograd.grad(total if scale is None else total * scale, x, create_graph=True)
    return gradient if scale is None else gradient / scale


def gradient_penalty(
    critic: Critic, real: Tensor, fake: Tensor, mix: Tensor, weight: float, target: float, scale: Tensor | None = None
) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017): weight / target^2 * E[(|grad D(x)| - target)^2] at x = real + mix (fake - real).

    real, fake: (N, C, H, W); mix: (N, 1, 1, 1) from U(0, 1). The norm is over C, H, W. scale: see input_gradient.
    """
    norm = input_gradient(critic, torch.lerp(real, fake, mix), scale).square().sum((1, 2, 3)).sqrt()
    return weight / target**2 * (norm - target).square().mean()


def r1_penalty(critic: Critic, real: Tensor, gamma: float, scale: Tensor | None = None) -> Tensor:
    """R1 (Mescheder et al. 2018): gamma / 2 * E[|grad D(real)|^2], the norm over C, H, W. scale: see input_gradient."""
    return gamma / 2 * input_gradient(critic, real, scale).square().sum((1, 2, 3)).mean()


def finite_difference_penalty(critic: Critic, real: Tensor, noise: Tensor, sigma: float, gamma: float) -> Tensor:
    """R1 without a double backward: gamma / 2 * E[((D(x + sigma e) - D(x)) / sigma)^2], e from N(0, I) (`noise`, of the
    shape of `real`).

    With g and H the gradient and Hessian of D at x, one image's term is (g.e + sigma/2 e'He + ...)^2. Its mean is
    |g|^2 + sigma^2/4 (2 |H|_F^2 + (tr H)^2) + sigma^2 g.grad(tr H) + O(sigma^4): R1 with a bias that falls with
    sigma^2 (leaky ReLU networks are linear but at their kinks). Its variance is 2 |g|^4 + O(sigma^2), so the mean over
    N images of equal gradient norm has a relative standard deviation of sqrt(2 / N). Rounding of D adds about
    2 (error of D / sigma)^2: the critic must compute in float32. Where D mixes the images of a group (minibatch
    stddev), what other images' pixels do to an image's logit counts as part of its gradient.
    """
    clean, noisy = critic(torch.cat([real, real + sigma * noise])).chunk(2)
    return gamma / 2 * ((noisy - clean) / sigma).square().mean()
