"""Adam that skips a step with non-finite numbers on all processes, without reading anything back to the host.

It checks the gradients that it is about to apply, whatever they are: whole ones, or the partition that DeepSpeed's
ZeRO leaves to this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GROWTH_STEPS = 2000
"""Good steps after which the loss scale doubles (as in torch's GradScaler)."""


@dataclass
class LossScale:
    """What a loss in float16 is multiplied by, so that its small gradients do not round to zero: halved when a step
    overflows, doubled after GROWTH_STEPS good ones. Both are training state and are saved."""

    value: Tensor
    """(1,) float32."""
    good_steps: Tensor
    """(1,) float32, steps since it last changed."""

    @classmethod
    def first(cls, device: torch.device) -> LossScale:
        """2^16, as in torch's GradScaler."""
        return cls(torch.full((1,), 2.0**16, device=device), torch.zeros(1, device=device))

    def follow(self, skipped: Tensor) -> None:
        """Adapt to a step: skipped is 1 or 0."""
        grows = (self.good_steps + 1 >= GROWTH_STEPS) & (skipped == 0)
        # In place, so that a CUDA graph finds them where they were.
        self.value.copy_(torch.where(skipped > 0, self.value / 2, torch.where(grows, self.value * 2, self.value)))
        zeros = torch.zeros_like(self.good_steps)
        self.good_steps.copy_(torch.where((skipped > 0) | grows, zeros, self.good_steps + 1))


class Adam(torch.optim.Adam):
    """torch's fused Adam. `step` leaves parameters, moments and step counts alone when a gradient, or the loss that
    `expect` was given, is non-finite on any process."""

    def __init__(
        self,
        groups: list[list[nn.Parameter]],
        eps: float,
        over_processes: Callable[[Tensor], Tensor],
        copies: int,
        scale: LossScale | None = None,
    ) -> None:
        """Learning rate and betas are set before each step. over_processes: the sum of a tensor over the processes.
        copies: processes that hold the same gradients. scale: what the gradients are multiplied by."""
        named = [{"params": parameters} for parameters in groups]
        super().__init__(named, eps=eps, fused=True, capturable=groups[0][0].is_cuda)
        self._over_processes, self._copies, self._loss_scale = over_processes, copies, scale

    @property
    def scale(self) -> Tensor | None:
        """(1,) float32, what losses are multiplied by before their backward; None: nothing."""
        return self._loss_scale.value if self._loss_scale else None

    def expect(self, loss: Tensor) -> None:
        """Say this process's loss of the coming step. Until `step` is called, the step counts as skipped: DeepSpeed
        drops one with non-finite gradients by itself."""
        self._wrong = 1 - loss.isfinite().float()
        self.skipped = torch.ones_like(self._wrong)
        """() float32: 1 if the last step was skipped."""
        self.norm = torch.zeros_like(self._wrong)
        """() float32: the gradient's L2 norm in the last step that was not skipped."""
        self._groups_before: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closures here
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        square = torch.stack(torch._foreach_norm(gradients)).square().sum().to(self._wrong.device)
        wrong = torch.maximum(self._wrong, 1 - square.isfinite().float())
        found, total = self._over_processes(torch.stack([wrong, square / self._copies])).unbind()
        if self._groups_before:  # DeepSpeed steps group by group, after it has seen that all are finite.
            found, total = torch.maximum(found, self._groups_before[0]), total + self._groups_before[1]
        self._groups_before = found, total
        self.skipped = (found > 0).float()
        norm = total.sqrt() if self.scale is None else (total.sqrt() / self.scale).sum()
        self.norm = torch.where(self.skipped > 0, torch.zeros_like(norm), norm)
        # What torch's own scaler sets: fused Adam takes both as tensors on the device.
        self.found_inf, self.grad_scale = self.skipped.to(gradients[0].device), self.scale
        super().step()
        if self._loss_scale:
            self._loss_scale.follow(self.skipped)

    def scale_tensors(self) -> dict[str, Tensor]:
        """The loss scale for a checkpoint; {} without one."""
        if self._loss_scale is None:
            return {}
        return {f"loss_scale.{name}": value for name, value in vars(self._loss_scale).items()}

    def load_scale(self, tensors: dict[str, Tensor]) -> None:
        """Take the loss scale of a checkpoint, where both have one."""
        if self._loss_scale and "loss_scale.value" in tensors:
            self._loss_scale.value.copy_(tensors["loss_scale.value"])
            self._loss_scale.good_steps.copy_(tensors["loss_scale.good_steps"])
