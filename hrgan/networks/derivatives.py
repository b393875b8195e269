"""Operations whose derivatives are written out, because torch's own are slow or fill memory; and a pass of a network
with the kinks of another one, for penalties by finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LRELU_SLOPE = 0.2


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
