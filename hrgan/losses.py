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


def input_gradient(logits: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """(N, C, H, W) gradient of each sample's logit by its own pixels, itself differentiable by the critic's
    parameters.

    logits: (N, 1), what the critic said of x, which requires a gradient. scale: (1,) float32; the gradient is computed
    multiplied by it and divided by it at the end, so that a critic in float16 does not round small gradients to zero on
    the way. None: not scaled.
    """
    gradient = _gradient(logits, x, scale, differentiable=True)
    return gradient if scale is None else gradient / scale


def _gradient(logits: Tensor, x: Tensor, scale: Tensor | None, differentiable: bool) -> Tensor:
    """The gradient multiplied by the scale."""
    total = logits.sum()
    total = total if scale is None else total * scale
    (gradient,) = torch.autograd.grad(total, x, retain_graph=True, create_graph=differentiable)
    return gradient


def gradient_penalty(squares: Tensor, weight: float, target: float) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017): weight / target^2 * E[(|grad D(x)| - target)^2]. squares: (N,) |grad D(x)|^2 at
    points x between reals and fakes, over C, H, W."""
    norms = squares.add(torch.finfo(squares.dtype).tiny).sqrt()  # A root has no slope at zero.
    return weight / target**2 * (norms - target).square().mean()


def r1_penalty(squares: Tensor, gamma: float) -> Tensor:
    """R1 (Mescheder et al. 2018): gamma / 2 * E[|grad D(x)|^2]; R2 where x are fakes. squares: (N,) |grad D(x)|^2, over
    C, H, W."""
    return gamma / 2 * squares.mean()


Penalty = Callable[[Tensor], Tensor]
"""(N,) squared norms of D's gradients by each picture -> a number, as the two above."""


def exact_penalty(penalty: Penalty, logits: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """A penalty of input_gradient, differentiable by the critic's parameters by a double backward. With the logits of
    the adversarial term, D is computed once for both: a penalty then costs half of what it does with a second pass."""
    return penalty(_squares(input_gradient(logits, x, scale)))


def _squares(gradient: Tensor) -> Tensor:
    return gradient.square().sum((1, 2, 3))


def finite_difference_penalty(
    penalty: Penalty,
    critic: Critic,
    x: Tensor,
    clean: Tensor,
    sigma: float,
    scale: Tensor | None = None,
    mean: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """The same without a double backward: with g the gradients and v = d penalty / dg, both held constant, the
    penalty's gradient by the parameters is that of v . g, which is the slope of all logits' sum along v:
    sum(D(x + h v) - D(x)) / h. The value is that of g itself.

    x: (N, C, H, W); clean: (N, 1) D(x), differentiable by the critic's parameters. sigma: root mean square of the step
    h v over all pictures. scale: see input_gradient. mean: over processes, whose h must be the same where D's batch
    statistics are of all their pictures. Where x requires no gradient (ZeRO-3 lets nothing pass backwards twice), D(x)
    is computed once more for g.

    This is the exact penalty's gradient to rounding where D is linear along the step: D must hold its kinks between its
    calls (networks.derivatives.same_kinks). Where steps may cross the kinks of leaky ReLUs it is another gradient, at
    any h, often the opposite one (docs/results). Where D bends otherwise, there is an error of the first order in h. A
    quotient along random noise has, squared, R1's expectation, too, but a gradient that is noise, 300 times as long.
    """
    if x.requires_grad:
        gradient = _gradient(clean, x, scale, differentiable=False)
    else:
        again = x.detach().requires_grad_()
        gradient = _gradient(critic(again), again, scale, differentiable=False)
    gradient = (gradient if scale is None else gradient / scale).requires_grad_()
    value = penalty(_squares(gradient))
    (along,) = torch.autograd.grad(value, gradient)
    # In float64 small squares are not lost; where D is flat, nothing is not divided by nothing.
    squares = torch.linalg.vector_norm(along, dtype=torch.float64).square()
    length = mean(squares / along.numel()).sqrt().clamp_min(1e-30).to(x.dtype)
    ahead = critic(x.detach() + sigma * along / length)
    slope = (ahead - clean).sum() * (length / sigma)
    result: Tensor = value.detach() + slope - slope.detach()
    return result


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor, scale: Tensor | None = None) -> Tensor:
    """(N,) length of the product of G's Jacobian and random images, |J^T y| (Karras et al. 2020, arXiv 1912.04958,
    section 3.2), itself differentiable by G's parameters.

    images: (N, C, H, W), computed from ws: (N, layers, W). noise: y sqrt(H W) from N(0, I). The norm is over W, its
    square's mean over the layers. scale: see input_gradient.
    """
    y = noise / math.sqrt(images.shape[2] * images.shape[3])
    total = (images * y).sum()
    (gradient,) = torch.autograd.grad(total if scale is None else total * scale, ws, create_graph=True)
    squares = gradient.square().sum(2).mean(1)
    lengths = squares.add(torch.finfo(squares.dtype).tiny).sqrt()  # A root has no slope at zero.
    return lengths if scale is None else lengths / scale


def path_penalty(lengths: Tensor, mean: Tensor) -> Tensor:
    """E[(length - mean)^2]. lengths: (N,); mean: () or (1,), a running mean of them, which is not learnt."""
    return (lengths - mean).square().mean()
