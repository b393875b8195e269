"""Layers that the families share. Equalised learning rate, pixel norm and minibatch stddev: Karras et al. 2018 (arXiv
1710.10196), section 4."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hrgan.config import CHUNK, NetworkConfig

LRELU_SLOPE = 0.2
HE_GAIN = math.sqrt(2)
"""Gain of He initialisation before a leaky ReLU."""


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a tuple: the same on every machine, unrelated for different tuples."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


Initial = Callable[[str, nn.Parameter], tuple[float, float]]
"""Name and parameter -> mean and standard deviation of its initial numbers."""


def scaled_initial(name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Under an equalised learning rate weights begin as N(0, 1) and biases as 0."""
    return 0.0, 0.0 if name.endswith("bias") else 1.0


def initialise(network: nn.Module, seed: int, role: str, initial: Initial = scaled_initial) -> None:
    """Fill parameters with normal numbers, each from (seed, role, its name).

    A name holds its block's resolution, so a block has the same initial weights whenever it joins.
    """
    for name, parameter in network.named_parameters():
        mean, spread = initial(name, parameter)
        generator = torch.Generator().manual_seed(keyed_seed(seed, role, name))
        with torch.no_grad():
            if spread:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(spread).add_(mean))
            else:
                parameter.fill_(mean)


def width(config: NetworkConfig, resolution: int) -> int:
    """Feature maps at a resolution: 512, 512, 512, 512, 256, ... for 4, 8, 16, 32, 64, ... with the paper's numbers."""
    if config.widths is not None:
        return config.widths[resolution.bit_length() - 3]
    return max(1, min(config.fmap_max, config.fmap_base * 2 // resolution))


def layout(config: NetworkConfig) -> torch.memory_format:
    """In which order the numbers of weights and features lie in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def sizes(first: int, last: int) -> list[int]:
    """Powers of two from first to last."""
    return [1 << power for power in range(first.bit_length() - 1, last.bit_length())]


def rgb_sizes(resolution: int, fading: bool) -> list[int]:
    """Resolutions of the RGB layers that a phase uses."""
    return [resolution // 2, resolution] if fading else [resolution]


class ScaledLinear(nn.Module):
    """x: (N, in) -> (N, out). Weights are N(0, 1) and scaled by gain / sqrt(fan in) at run time (equalised learning
    rate)."""

    def __init__(self, in_features: int, out_features: int, gain: float = HE_GAIN, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.scale = gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class ScaledConv(nn.Module):
    """x: (N, in, H, W) -> (N, out, H', W'). A convolution with equalised learning rate that keeps, doubles or halves
    H and W.

    resample "up" equals nearest x2 and then the convolution, "down" the convolution and then a 2x2 box mean; both are
    computed as one strided convolution with a kernel one pixel wider, which takes 2.25 times fewer multiplications
    for 3x3.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, gain: float = HE_GAIN, resample: str = "keep"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.scale = gain / math.sqrt(in_channels * kernel * kernel)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        padding = weight.shape[-1] // 2
        if self.resample == "up":
            weight = widened(weight).flip(2, 3).transpose(0, 1)
            return convolve(x, weight, self.bias, padding, stride=2, transposed=True)
        if self.resample == "down":
            return convolve(x, widened(weight) / 4, self.bias, padding, stride=2)
        return convolve(x, weight, self.bias, padding)


def widened(weight: Tensor) -> Tensor:
    """(out, in, k, k) -> (out, in, k + 1, k + 1): the kernel convolved with a 2x2 box of ones."""
    w = F.pad(weight, (1, 1, 1, 1))
    return w[..., 1:, 1:] + w[..., 1:, :-1] + w[..., :-1, 1:] + w[..., :-1, :-1]


class ClassEmbedding(nn.Module):
    """labels: (N,) int64 in [0, classes) -> (N, length), a learnt vector for each class, initially N(0, 1)."""

    def __init__(self, classes: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, length))

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.weight)


def logits_per_image(config: NetworkConfig) -> int:
    """Of a discriminator: one, and a score for each class with the auxiliary classifier."""
    return 1 + (config.num_classes if config.condition == "acgan" else 0)


def projection(config: NetworkConfig, length: int) -> ClassEmbedding | None:
    """What a projection discriminator multiplies features of this length by; None without one."""
    projects = config.condition == "projection" and config.num_classes > 0
    return ClassEmbedding(config.num_classes, length) if projects else None


def joined(z: Tensor, embedding: nn.Module | None, labels: Tensor | None) -> Tensor:
    """z: (N, L) -> (N, L) without classes, (N, 2 L) with the labels' embedding beside it."""
    return z if embedding is None else torch.cat([z, embedding(labels)], dim=1)


def project(features: Tensor, embedding: nn.Module | None, labels: Tensor | None) -> Tensor:
    """(N, F) features -> (N, 1), what a projection discriminator adds to its logits (Miyato & Koyama 2018); 0 without
    classes. Scaled to unit variance of unit features."""
    if embedding is None:
        return features.new_zeros(len(features), 1)
    added: Tensor = (embedding(labels) * features).sum(1, keepdim=True) / math.sqrt(features.shape[1])
    return added


def at_least_float32(x: Tensor) -> Tensor:
    """x as float32, or as float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logits_of(head: nn.Module, features: Tensor, embedding: nn.Module | None, labels: Tensor | None) -> Tensor:
    """(N, F) features -> (N, heads) logits: of a linear head, with the classes' projection added. At least in float32
    also under autocast: bf16 has steps of 0.25 at 64, and the relativistic loss lives on differences of logits."""
    with torch.autocast(features.device.type, enabled=False):
        features = at_least_float32(features)
        logits: Tensor = head(features) + project(features, embedding, labels)
    return logits


class _PixelNorm(torch.autograd.Function):
    """y = x s, s = 1 / rms(x) over the channels. Written out because it is in every layer: autograd's own backward of
    the same takes more than twice the time and memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = (length.square() / x.shape[1] + 1e-8).rsqrt().to(x.dtype)
        y: Tensor = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(1, keepdim=True, dtype=torch.promote_types(y.dtype, torch.float32))
        result: Tensor = torch.addcmul(gradient, y, along.to(y.dtype), value=-1) * scale
        return result


def pixel_norm(x: Tensor) -> Tensor:
    """x: (N, C, ...) of any float type: each pixel's feature vector to length sqrt(C), the statistic at least in
    float32.

    Differentiable once: a second backward through the generator raises.
    """
    y: Tensor = _PixelNorm.apply(x)
    return y


class _LeakyReLU(torch.autograd.Function):
    """x times 1 or 0.2, as `side`, or x itself, is above zero or not. Written out for its second derivative, which is
    nothing: torch's own adds up zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, side: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if side is None else side)
        return F.leaky_relu(x, LRELU_SLOPE) if side is None else _sided(x, side)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (side,) = ctx.saved_tensors
        return _sided(gradient, side.detach()), None


def _sided(x: Tensor, side: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten.leaky_relu_backward(x, side, LRELU_SLOPE, False)
    return y


def lrelu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2; inside of same_kinks, with the slopes of another pass."""
    side = earlier_input(x)
    y: Tensor = _LeakyReLU.apply(x, None if side is None else side.detach())
    return y


Kinks = list[Tensor]
"""What the layers that are not linear were given in one pass of a network, in their order."""
_earlier: Callable[[Tensor], Tensor | None] = lambda x: None  # noqa: E731


def earlier_input(x: Tensor) -> Tensor | None:
    """What a layer that is not linear was given in the pass whose kinks are held; None where none are. x: what it is
    given now. Each such layer calls it once in a pass."""
    return _earlier(x)


@contextmanager
def same_kinks(kinks: Kinks | None) -> Iterator[None]:
    """The pass inside fills an empty list; with one that is filled, each leaky ReLU inside has, everywhere, the slope
    that it had in that pass, and what uses a batch's statistics is the linear function that touches it there. Of a
    discriminator this makes its linear approximation around the first pass's pictures. None changes nothing."""
    global _earlier
    before, noted = _earlier, iter(kinks or ())
    if kinks is not None:
        _earlier = (lambda x: next(noted)) if kinks else kinks.append  # Backward keeps them anyway.
    try:
        yield
    finally:
        _earlier = before


def minibatch_stddev(x: Tensor) -> Tensor:
    """x: (N, C, H, W) -> (N, C + 1, H, W), N a multiple of 4: adds the mean standard deviation over each chunk of 4
    consecutive samples.

    Computed at least in float32. Groups are chunks, so that the result does not depend on how a batch is dealt over
    processes.
    """
    n, c, h, w = x.shape
    earlier = earlier_input(x)
    groups = at_least_float32(x if earlier is None else earlier).view(n // CHUNK, CHUNK, c, h, w)
    apart = groups - groups.mean(1, keepdim=True)
    spread = apart.square().mean(1).add(1e-8).sqrt()  # (N/4, C, H, W)
    if earlier is not None:
        spread = spread + (apart * (at_least_float32(x).view_as(groups) - groups)).mean(1) / spread
    feature = spread.mean((1, 2, 3)).repeat_interleave(CHUNK).view(n, 1, 1, 1).expand(n, 1, h, w)
    return torch.cat([x, feature.to(x.dtype)], dim=1)


def upsample(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W), nearest."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H/2, W/2), 2x2 box mean."""
    return F.avg_pool2d(x, 2)


class _Convolution(torch.autograd.Function):
    """Written out for its second derivative, which penalties of gradients want: torch's own goes group by group, and
    finds weights' gradients by convolutions with kernels as large as the pictures. Here all are convolutions and their
    gradients, as any network's: a convolution is linear in both of its factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rest = rest
        return torch.convolution(x, weight, bias, *rest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # What requires a gradient need not get one now: a penalty's inner derivative is by the pictures alone.
        nodes = [*(node for node, _ in ctx.next_functions[1:]), None]  # of the weight, and of a bias
        which = [ctx.needs_input_grad[0], _is_wanted(nodes[0]), _is_wanted(nodes[1])]
        act: Any = _ConvolutionBackward.apply if torch.is_grad_enabled() else _slopes
        return *act(gradient, *ctx.saved_tensors, ctx.rest, which), None


def _is_wanted(node: Any) -> bool:
    """Whether the backward that runs needs the gradient that a node of the graph takes."""
    if node is None or torch.compiler.is_compiling():
        return node is not None
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # It does not say so of a leaf that autograd.grad was asked for.
        return True


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, rest: tuple[Any, ...], which: list[bool]) -> Any:
        ctx.save_for_backward(gradient, x, weight)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return _slopes(gradient, x, weight, rest, which)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along_x: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None) -> Any:
        gradient, x, weight = ctx.saved_tensors
        of_x, of_weight, of_gradient = None, None, []
        if along_x is not None:
            of_gradient.append(torch.convolution(along_x, weight, None, *ctx.rest))
            _, of_weight, _ = _slopes(gradient, along_x, weight, ctx.rest, [False, True, False])
        if along_weight is not None:
            of_gradient.append(torch.convolution(x, along_weight, None, *ctx.rest))
            of_x, _, _ = _slopes(gradient, x, along_weight, ctx.rest, [True, False, False])
        if along_bias is not None:
            of_gradient.append(along_bias.view(1, -1, 1, 1).expand_as(gradient))
        return sum(of_gradient[1:], of_gradient[0]) if of_gradient else None, of_x, of_weight, None, None


def _slopes(gradient: Tensor, x: Tensor, weight: Tensor, rest: tuple[Any, ...], which: list[bool]) -> Any:
    """A convolution's gradients by x, weight and bias: those of them that are wanted, None for the others."""
    return torch.ops.aten.convolution_backward(gradient, x, weight, [gradient.shape[1]], *rest, which)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    stride: int = 1,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """F.conv2d, or F.conv_transpose2d, whose second derivative is as fast as the first."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rest = ((stride, stride), (padding, padding), (1, 1), transposed, (0, 0), groups)
    y: Tensor = _Convolution.apply(x, weight, bias, rest)
    return y


class Conv2d(nn.Conv2d):
    """torch's, of that second derivative, for square kernels, zeros as padding and no dilation. x: (N, in, H, W) ->
    (N, out, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, int(self.padding[0]), self.stride[0], self.groups)


@cache
def _kernel(device: torch.device, dtype: torch.dtype) -> Tensor:
    # Made on the device and kept: a copy from the host would hold it up, here in each layer.
    taps = (4 - 2 * (torch.arange(4, device=device) - 1.5).abs()) / 8  # [1, 3, 3, 1] / 8
    return torch.outer(taps, taps).to(dtype)


class _Filter(torch.autograd.Function):
    """[1, 3, 3, 1] x [1, 3, 3, 1] / 64 on each channel, and its transpose. Written out because autograd's second
    backward of a depthwise convolution goes channel by channel on the CPU (two to four times slower in all)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int, stride: int, transposed: bool) -> Tensor:
        ctx.arguments = padding, stride, not transposed
        kernel = _kernel(x.device, x.dtype).expand(x.shape[1], 1, 4, 4)
        with torch.autocast(x.device.type, enabled=False):  # Images stay in float32.
            if not transposed:
                return F.conv2d(x, kernel, padding=padding, stride=stride, groups=x.shape[1])
            return F.conv2d(spread(x) if stride == 2 else x, kernel, padding=3 - padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Filter.apply(gradient, *ctx.arguments), None, None, None


def spread(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H - 1, 2W - 1): zeros between the pixels."""
    n, c, h, w = x.shape
    like = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    y = torch.empty((n, c, 2 * h - 1, 2 * w - 1), dtype=x.dtype, device=x.device, memory_format=like).zero_()
    y[:, :, ::2, ::2] = x
    return y


def filtered(x: Tensor, padding: int) -> Tensor:
    """(N, C, H, W) -> (N, C, H + 2 padding - 3, W + 2 padding - 3)."""
    y: Tensor = _Filter.apply(x, padding, 1, False)
    return y


def filtered_upsample(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W): zeros between the pixels, filtered, times 4. Beyond the border are zeros."""
    y: Tensor = _Filter.apply(x, 1, 2, True)
    return 4 * y


def filtered_downsample(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H/2, W/2): filtered, every second pixel. Beyond the border are zeros."""
    y: Tensor = _Filter.apply(x, 1, 2, False)
    return y


def _wrapped(constant: int, bits: int) -> int:
    """An unsigned constant as the signed number of the same bits: torch's integers wrap around but are signed."""
    return constant - (1 << bits) if constant >> (bits - 1) else constant


def _mix64(x: Tensor) -> Tensor:
    """x: int64 -> int64, each input bit changing each output bit with odds of 1/2 (splitmix64's finaliser, Steele et
    al. 2014)."""
    # `>>` copies the sign: the masks make it a shift of zeros.
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _wrapped(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _wrapped(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & (1 << 33) - 1)


def _mix32_(x: Tensor, key: Tensor | int) -> Tensor:
    """The same of int32, in place, with a key in the middle (constants: Wellons 2018, lowbias32)."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D).bitwise_xor_(key)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_wrapped(0x846CA68B, 32))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


@torch.no_grad()
def latent_normal(z: Tensor, stream: int, count: int) -> Tensor:
    """z: (N, L) -> (N, count) float32 from N(0, 1), a pure function of each row's float32 bits and the stream: of
    neither the other rows nor any generator's state. A larger count begins with the same numbers.

    Whole numbers are the same on every device; the logarithm and the cosine after them to rounding.
    """
    bits = z.float().contiguous().view(torch.int32).long()  # (N, L)
    place = torch.arange(z.shape[1], device=z.device) * _wrapped(0x9E3779B97F4A7C15, 64)
    key = _mix64(_mix64(bits + place).sum(1) + stream)  # (N,)
    first, second = key.view(torch.int32).view(-1, 2, 1, 1).unbind(1)  # (N, 1, 1) each
    pairs = (count + 1) // 2
    index = torch.arange(2 * pairs, dtype=torch.int32, device=z.device).view(pairs, 2).t().contiguous()
    hashed = _mix32_(_mix32_(index, 0) ^ first, second)  # (N, 2, pairs)
    uniform = (hashed >> 8).bitwise_and_(0xFFFFFF).add_(1) * 2.0**-24  # (0, 1]
    radius = uniform[:, 0].log().mul_(-2).sqrt_()  # Box & Muller 1958
    angle = uniform[:, 1] * (2 * math.pi)
    return torch.stack([angle.cos().mul_(radius), angle.sin().mul_(radius)], dim=2).flatten(1)[:, :count]
