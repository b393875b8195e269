"""Losses and rates since the last tick, summed on the device: nothing is read back until the tick."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums over the steps of a tick. Skipped steps are counted and leave the sums alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streak = torch.zeros((), device=device)  # Steps skipped in a row, up to now.
        self.last_read = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Begin a tick now."""
        self.began, self.waited, self.images, self.steps, self.penalties = time.perf_counter(), 0.0, 0, 0, 0
        # loss_d, logit_real, logit_fake, penalty, steps of D; loss_g, steps of G; skipped steps; longest streak
        self.sums = torch.zeros(9, device=self.device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here counts as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, images: int, d_values: Tensor, g_values: Tensor, with_penalty: bool) -> None:
        """A step: D's loss, logit_real, logit_fake, penalty, skipped (5,); G's loss, skipped (2,)."""
        self.images += images
        self.steps += 1
        self.penalties += with_penalty
        d_skipped, g_skipped = d_values[4], g_values[1]
        d_part = torch.where(
            d_skipped > 0, torch.zeros_like(d_values), torch.cat([d_values[:4], torch.ones_like(d_values[:1])])
        )
        g_part = torch.where(
            g_skipped > 0, torch.zeros_like(g_values), torch.stack([g_values[0], torch.ones_like(g_skipped)])
        )
        skipped = torch.maximum(d_skipped, g_skipped)
        self.streak = (self.streak + 1) * skipped
        longest = torch.maximum(self.sums[8], self.streak)
        self.sums = torch.cat(
            [self.sums[:7] + torch.cat([d_part, g_part]), (self.sums[7] + skipped).view(1), longest.view(1)]
        )

    def read(self, mean: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Means over the steps since `restart` and, by `mean`, over the processes. A value is None where every step
        was skipped."""
        loss_d, real, fake, penalty, d_steps, loss_g, g_steps, skipped, streak = mean(self.sums).tolist()
        seconds = time.perf_counter() - self.began  # After the read, which waits for the device.
        rate = self.images / seconds if seconds > 0 else 0.0

        def over(value: float, steps: float) -> float | None:
            return value / steps if steps else None

        return {
            "loss_g": over(loss_g, g_steps),
            "loss_d": over(loss_d, d_steps),
            "logit_real": over(real, d_steps),
            "logit_fake": over(fake, d_steps),
            "penalty": over(penalty, self.penalties),
            "img_per_sec": rate,
            "data_wait": self.waited / seconds if seconds > 0 else 0.0,
            "sec_per_kimg": 1000 / rate if rate else 0.0,
            "skipped": round(skipped),
            "skipped_in_a_row": round(streak),
        }

    def seconds_since_read(self) -> float:
        """Wall-clock time since this was last asked."""
        now = time.perf_counter()
        seconds, self.last_read = now - self.last_read, now
        return seconds
