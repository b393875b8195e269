"""Losses and rates since the last tick, summed on the device: nothing is read back until the tick."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

D_VALUES = ("loss_d", "logit_real", "logit_fake", "penalty", "sign_real", "sign_fake", "grad_norm_d", "skipped")
"""What a step of D returns: means over its pictures, the norm of its gradient, and 1 if it was skipped."""
G_VALUES = ("loss_g", "path_length", "grad_norm_g", "skipped")
"""The same of a step of G."""
LAZY = ("penalty", "path_length")
"""Values that only some steps have: means are over these steps."""
SIZES = (len(D_VALUES), len(G_VALUES), len(LAZY))


class Meter:
    """Sums over the steps of a tick. Skipped steps are counted and leave the sums alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streak = torch.zeros((), device=device)  # Steps skipped in a row, up to now.
        self.last_read = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Begin a tick now."""
        self.began, self.waited, self.images, self.steps = time.perf_counter(), 0.0, 0, 0
        # Sums of D_VALUES and G_VALUES, where the last stands for the steps counted; steps counted that have each of
        # LAZY; skipped steps; longest streak.
        self.sums = torch.zeros(len(D_VALUES) + len(G_VALUES) + len(LAZY) + 2, device=self.device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here counts as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, images: int, d_values: Tensor, g_values: Tensor, with_penalty: bool, with_path: bool) -> None:
        """A step: D_VALUES and G_VALUES of it."""
        self.images += images
        self.steps += 1
        parts = []
        for values in (d_values, g_values):
            counted = torch.cat([values[:-1], torch.ones_like(values[:1])])
            parts.append(torch.where(values[-1] > 0, torch.zeros_like(values), counted))
        parts += [parts[0][-1:] * with_penalty, parts[1][-1:] * with_path]
        skipped = torch.maximum(d_values[-1], g_values[-1])
        self.streak = (self.streak + 1) * skipped
        longest = torch.maximum(self.sums[-1], self.streak)
        sums = torch.cat([*parts, skipped.view(1)]) + self.sums[:-1]
        self.sums = torch.cat([sums, longest.view(1)])

    def read(self, mean: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Means over the steps since `restart` and, by `mean`, over the processes. A value is None where every step
        was skipped, or none had it."""
        sums = torch.split(mean(self.sums).cpu(), [*SIZES, 2])
        seconds = time.perf_counter() - self.began  # After the read, which waits for the device.
        rate = self.images / seconds if seconds > 0 else 0.0
        row: dict[str, Any] = {}
        d_sums, g_sums, rare, (skipped, longest) = (part.tolist() for part in sums)
        lazy = dict(zip(LAZY, rare, strict=True))
        for names, values in ((G_VALUES, g_sums), (D_VALUES, d_sums)):
            for name, value in zip(names[:-1], values[:-1], strict=True):
                steps = lazy.get(name, values[-1])
                row[name] = value / steps if steps else None
        return row | {
            "img_per_sec": rate,
            "data_wait": self.waited / seconds if seconds > 0 else 0.0,
            "sec_per_kimg": 1000 / rate if rate else 0.0,
            "skipped": round(skipped),
            "skipped_in_a_row": round(longest),
        }

    def seconds_since_read(self) -> float:
        """Wall-clock time since this was last asked."""
        now = time.perf_counter()
        seconds, self.last_read = now - self.last_read, now
        return seconds
