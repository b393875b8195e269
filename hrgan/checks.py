"""What the values of a configuration must be, beyond their types. Every problem is a line: field, value, reason,
nearest valid value."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict

from hrgan.config import CHUNK, EVAL_METRICS, EXTRACTORS, Config, at, leaves, resolutions
from hrgan.sizes import LONGEST, SHORTEST


def problems(config: Config) -> list[str]:
    """Every problem that the values have, one line each: field, value, reason, nearest valid value."""
    return [
        *_size_problems(config),
        *_batch_problems(config),
        *_loss_problems(config),
        *_eval_problems(config),
        *_range_problems(config),
    ]


def _power_of_two(name: str, value: int, low: int) -> list[str]:
    if value >= low and value & (value - 1) == 0:
        return []
    below = max(low, 1 << max(value, 1).bit_length() - 1)
    near = sorted({below, max(low, 2 * below)}) if value > low else [low]
    return [f"{name}: {value} is not a power of two from {low} up; nearest: {' or '.join(map(str, near))}"]


def _size_problems(config: Config) -> list[str]:
    network, schedule = config.network, config.schedule
    found = _power_of_two("network.resolution", network.resolution, 4)
    found += _power_of_two("schedule.start_resolution", schedule.start_resolution, 4)
    if not found and schedule.start_resolution > network.resolution:
        found.append(
            f"schedule.start_resolution: {schedule.start_resolution} is above network.resolution {network.resolution}; "
            f"nearest: {network.resolution}"
        )
    if network.channels not in (1, 3, 4):
        found.append(
            f"network.channels: {network.channels} is none of 1 (grey), 3 (RGB), 4 (RGBA); nearest: "
            f"{min((1, 3, 4), key=lambda channels: abs(channels - network.channels))}"
        )
    if network.bits not in (8, 16) or (network.bits == 16 and network.channels != 1):
        found.append(f"network.bits: {network.bits} with {network.channels} channels; nearest: 8, or 16 with 1 channel")
    if len(network.grid) != 2 or not all(SHORTEST <= side <= LONGEST for side in network.grid):
        found.append(
            f"network.grid: {network.grid} is not [height, width] of {SHORTEST} to {LONGEST}; nearest: [4, 4]"
        )
    stages = max(network.resolution, 4).bit_length() - 2
    if network.widths is not None and (len(network.widths) < stages or min(network.widths, default=0) < 1):
        found.append(
            f"network.widths: {network.widths} must be at least {stages} positive numbers, for 4 to "
            f"{network.resolution} pixels"
        )
    return found


def _batch_problems(config: Config) -> list[str]:
    found = []
    for name, value in (
        ("schedule.batch", config.schedule.batch),
        ("schedule.micro_batch", config.schedule.micro_batch),
    ):
        for size in sorted(set(value.values())) if isinstance(value, dict) else [value] if value is not None else []:
            if size < CHUNK or size % CHUNK:
                below = max(CHUNK, size // CHUNK * CHUNK)
                near = f"{below} or {below + CHUNK}" if size > CHUNK else str(CHUNK)
                found.append(
                    f"{name}: {size} is not a multiple of {CHUNK} (images that travel together); nearest: {near}"
                )
    if config.data.window < CHUNK or config.data.window % CHUNK:
        found.append(
            f"data.window: {config.data.window} is not a multiple of {CHUNK}; nearest: "
            f"{max(1, config.data.window // CHUNK) * CHUNK}"
        )
    return found


def _loss_problems(config: Config) -> list[str]:
    if config.loss.penalty == "finite_difference" and config.loss.kind == "wgan-gp":
        return [
            "loss.penalty: finite_difference estimates the squared gradient norm, from which WGAN-GP's distance to "
            "loss.gp_target does not follow; nearest: exact, or loss.kind logistic"
        ]
    return []


def _eval_problems(config: Config) -> list[str]:
    found, name = [], config.eval.extractor
    if name not in EXTRACTORS and ":" not in name and not name.endswith((".pt", ".pth", ".ts", ".torchscript")):
        near = difflib.get_close_matches(name, EXTRACTORS, 1, 0)[0]
        found.append(
            f"eval.extractor: {name} is none of {', '.join(EXTRACTORS[:4])}, clip-..., dinov2-vit-..., a TorchScript "
            f"FILE.pt or module:Class; nearest: {near}"
        )
    if name.startswith("random") and config.eval.weights is not None:
        found.append(f"eval.weights: {config.eval.weights} says nothing to the {name} extractor; leave it out")
    for metric in config.eval.metrics:
        if metric not in EVAL_METRICS:
            near = difflib.get_close_matches(metric, EVAL_METRICS, 1, 0)[0]
            found.append(f"eval.metrics: {metric} is none of {', '.join(EVAL_METRICS)}; nearest: {near}")
    return found


_LEAST: dict[str, float] = {
    "data.workers": 0,
    "data.prefetch": 1,
    "data.slots": 1,
    "data.retries": 0,
    "network.latent": 1,
    "network.fmap_base": 1,
    "network.fmap_max": 1,
    "loss.gp_lambda": 0,
    "loss.drift": 0,
    "loss.r1_gamma": 0,
    "loss.r1_every": 1,
    "optim.ema_kimg": 0,
    "optim.max_skipped": 1,
    "optim.max_rollbacks": 1,
    "limits.margin_minutes": 0,
    "schedule.stable_kimg": 0,
    "schedule.fade_kimg": 0,
    "eval.every_kimg": 0,
    "eval.num_fake": 2,
    "eval.num_real": 4,
    "eval.batch": 1,
    "eval.bootstrap": 0,
    "eval.kid_subset_size": 2,
    "checkpoint.keep": 2,
    "log.grid": 1,
    "seed": 0,
    "data.max_bad": 0,
    "optim.beta1": 0,
    "optim.beta2": 0,
}
_ABOVE_ZERO = (
    "optim.lr",
    "optim.lr_d",
    "optim.eps",
    "loss.fd_sigma",
    "optim.rollback_lr",
    "limits.hours",
    "eval.max_share",
    "data.cache_gb",
    "data.timeout_seconds",
    "limits.timeout_minutes",
    "loss.gp_target",
    "schedule.total_kimg",
    "checkpoint.every_kimg",
    "checkpoint.keep_every_kimg",
    "log.tick_kimg",
    "log.samples_kimg",
)
_MOST: dict[str, float] = {
    "data.max_bad": 1,
    "eval.max_share": 1,
    "optim.rollback_lr": 1,
    "optim.beta1": 0.9999,
    "optim.beta2": 0.99999,
}


def _range_problems(config: Config) -> list[str]:
    found = []
    sizes = resolutions(config) or [4]
    for key, value in leaves(asdict(config)):
        for number in value.values() if isinstance(value, dict) else [value]:
            if not isinstance(number, (int, float)) or isinstance(number, bool) or key == "data.path":
                continue
            if not math.isfinite(number):
                found.append(f"{key}: {number} is not a finite number")
                continue
            if key in _LEAST and number < _LEAST[key]:
                found.append(f"{key}: {number} is below the least, {_LEAST[key]:g}")
            if key in _ABOVE_ZERO and number <= 0:
                found.append(f"{key}: {number} must be above 0")
            if key in _MOST and number > _MOST[key]:
                found.append(f"{key}: {number} is above the most, {_MOST[key]:g}")
        # Nothing fades into the first resolution.
        first = (
            sizes[min(1, len(sizes) - 1)]
            if key == "schedule.fade_kimg" and config.schedule.order == "stable_first"
            else sizes[0]
        )
        if isinstance(value, dict) and key != "data.path" and (not value or min(value) > first):
            found.append(f"{key}: {value} says nothing for {first} pixels; add {first}: ...")
    return found


def world_problems(config: Config, world: int) -> list[str]:
    """Problems that show only when the number of processes is known."""
    unit, found = CHUNK * world, []
    for size in sorted({at(config.schedule.batch, resolution) for resolution in resolutions(config)}):
        if size % unit:
            below = size // unit * unit
            near = f"{below} or {below + unit}" if below else str(unit)
            found.append(
                f"schedule.batch: {size} is not a multiple of {world} processes x {CHUNK} images; nearest: {near}"
            )
    return found
