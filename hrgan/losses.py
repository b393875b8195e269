"""Adversarial losses and penalties: pure functions of tensors. Logits are (N, 1) float32, higher is more real."""

from __future__ import annotations

import math
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


def least_squares_d(real: Tensor, fake: Tensor) -> Tensor:
    """(E[(D(real) - 1)^2] + E[D(fake)^2]) / 2 (Mao et al. 2017)."""
    return ((real - 1).square().mean() + fake.square().mean()) / 2


def least_squares_g(fake: Tensor) -> Tensor:
    """E[(D(fake) - 1)^2] / 2."""
    return (fake - 1).square().mean() / 2


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))] (Lim & Ye 2017, Miyato et al. 2018)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def relativistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """E[softplus(D(fake) - D(real))], pair by pair (Jolicoeur-Martineau 2018; Huang et al. 2024, arXiv 2501.05441)."""
    return F.softplus(fake - real).mean()


def relativistic_g(real: Tensor, fake: Tensor) -> Tensor:
    """E[softplus(D(real) - D(fake))]."""
    return F.softplus(real - fake).mean()


def adversarial_d(kind: str, real: Tensor, fake: Tensor, drift: float) -> Tensor:
    """D's loss of a config's loss.kind, without penalties. real, fake: (N, 1) logits; drift: of Wasserstein kinds."""
    match kind:
        case "wgan-gp" | "wasserstein":
            return wasserstein_d(real, fake, drift)
        case "logistic":
            return logistic_d(real, fake)
        case "least-squares":
            return least_squares_d(real, fake)
        case "hinge":
            return hinge_d(real, fake)
        case "relativistic":
            return relativistic_d(real, fake)
    raise ValueError(kind)


def adversarial_g(kind: str, real: Tensor | None, fake: Tensor) -> Tensor:
    """G's loss of a config's loss.kind. fake: (N, 1) logits; real: the same of as many reals, which only the
    relativistic kind needs."""
    match kind:
        case "wgan-gp" | "wasserstein" | "hinge":
            return wasserstein_g(fake)
        case "logistic":
            return logistic_g(fake)
        case "least-squares":
            return least_squares_g(fake)
        case "relativistic" if real is not None:
            return relativistic_g(real, fake)
    raise ValueError(kind)


def class_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of an auxiliary classifier (Odena et al. 2017). scores: (N, classes); labels: (N,) int64."""
    return F.cross_entropy(scores, labels)


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


def finite_difference_penalty(
    critic: Critic, real: Tensor, noise: Tensor, sigma: float, gamma: float, clean: Tensor | None = None
) -> Tensor:
    """R1 without a double backward: gamma / 2 * E[((D(x + sigma e) - D(x)) / sigma)^2], e from N(0, I) (`noise`, of the
    shape of `real`). clean: (N, 1) D(x), where it was computed in float32 before; None: it is computed here.

    With g and H the gradient and Hessian of D at x, one image's term is (g.e + sigma/2 e'He + ...)^2. Its mean is
    |g|^2 + sigma^2/4 (2 |H|_F^2 + (tr H)^2) + sigma^2 g.grad(tr H) + O(sigma^4): R1 with a bias that falls with
    sigma^2 (leaky ReLU networks are linear but at their kinks). Its variance is 2 |g|^4 + O(sigma^2), so the mean over
    N images of equal gradient norm has a relative standard deviation of sqrt(2 / N). Rounding of D adds about
    2 (error of D / sigma)^2: the critic must compute in float32. Where D mixes the images of a group (minibatch
    stddev), what other images' pixels do to an image's logit counts as part of its gradient.
    """
    if clean is None:
        clean, noisy = critic(torch.cat([real, real + sigma * noise])).chunk(2)
    else:
        noisy = critic(real + sigma * noise)
    return gamma / 2 * ((noisy - clean) / sigma).square().mean()


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor, scale: Tensor | None = None) -> Tensor:
    """(N,) length of the product of G's Jacobian and random images, |J^T y| (Karras et al. 2020, arXiv 1912.04958,
    section 3.2), itself differentiable by G's parameters.

    images: (N, C, H, W), computed from ws: (N, layers, W). noise: y sqrt(H W) from N(0, I). The norm is over W, its
    square's mean over the layers. scale: see input_gradient.
    """
    y = noise / math.sqrt(images.shape[2] * images.shape[3])
    total = (images * y).sum()
    (gradient,) = torch.autograd.grad(total if scale is None else total * scale, ws, create_graph=True)
    lengths = gradient.square().sum(2).mean(1).sqrt()
    return lengths if scale is None else lengths / scale


def path_penalty(lengths: Tensor, mean: Tensor) -> Tensor:
    """E[(length - mean)^2]. lengths: (N,); mean: () or (1,), a running mean of them, which is not learnt."""
    return (lengths - mean).square().mean()
