"""What the values of a configuration must be, beyond their types. Every problem is a line: field, value, reason,
nearest valid value."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict

from hrgan.config import (
    ADA,
    AUGMENTATIONS,
    CHUNK,
    DIFFAUGMENT,
    EVAL_METRICS,
    EXTRACTORS,
    Config,
    at,
    leaves,
    resolutions,
)
from hrgan.sizes import LONGEST, SHORTEST

SIGNED = ("logistic", "hinge", "relativistic")
"""Values of loss.kind under which a sign says whether D is right: its logit's, or of a pair's difference."""
READERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("network.family", ("style",), ("network.mapping_layers", "network.mixing", "network.noise")),
    ("network.family", ("r3",), ("network.blocks", "network.group_size")),
    ("network.condition", ("acgan",), ("loss.class_weight",)),
    ("loss.kind", ("wgan-gp",), ("loss.gp_lambda", "loss.gp_target", "loss.gp_every")),
    ("loss.kind", ("wgan-gp", "wasserstein"), ("loss.drift",)),
    (
        "loss.kind",
        ("wasserstein", "logistic", "least-squares", "hinge", "relativistic"),
        ("loss.r1_gamma", "loss.r2_gamma", "loss.r1_every", "ramp.gamma"),
    ),
    ("loss.penalty", ("finite_difference",), ("loss.fd_sigma",)),
)
"""A field, values of it, and the fields that are read under these alone."""


def problems(config: Config) -> list[str]:
    """Every problem that the values have, one line each: field, value, reason, nearest valid value."""
    return [
        *_size_problems(config),
        *_batch_problems(config),
        *_loss_problems(config),
        *_augment_problems(config),
        *_family_problems(config),
        *_eval_problems(config),
        *_place_problems(config),
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
    if not found and network.grow and schedule.start_resolution > network.resolution:
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
    loss, network, found = config.loss, config.network, []
    if loss.r1_gamma is None and loss.kind == "relativistic":
        found.append(
            "loss.r1_gamma: null is StyleGAN2-ADA's rule for the logistic loss, far below what the relativistic loss "
            "needs; nearest: a number for each resolution, such as {4: 0.5, 32: 1, 256: 150}"
        )
    if loss.path_weight > 0 and network.family != "style":
        found.append(
            f"loss.path_weight: {loss.path_weight:g}, but {network.family} has no w to measure paths in; nearest: 0"
        )
    if config.augment.target is not None and loss.kind not in SIGNED:
        found.append(
            f"augment.target: {config.augment.target:g}, but under loss.kind {loss.kind} the sign of D on reals says "
            "nothing; nearest: null, with augment.strength and ramp.augment, or loss.kind logistic"
        )
    return found


def _usual_strength(config: Config) -> str:
    """What the operations' paper has: DiffAugment's, ADA's (also for the sign of pairs), else R3GAN's."""
    if {"diffaugment", *DIFFAUGMENT}.issuperset(config.augment.ops):
        return "1"
    return "augment.target: 0.6" if config.loss.kind in SIGNED else "ramp.augment: 0.3, with ramp.kimg"


def _augment_problems(config: Config) -> list[str]:
    augment, names, found = config.augment, (*AUGMENTATIONS, "diffaugment", "ada"), []
    for op in augment.ops:
        if op not in names:
            near = difflib.get_close_matches(op, names, 1, 0)[0]
            found.append(f"augment.ops: {op} is none of {', '.join(names)}; nearest: {near}")
    rises = bool(config.ramp.kimg and config.ramp.augment)
    if augment.ops and augment.strength == 0 and augment.target is None and not rises:
        found.append(f"augment.strength: 0 does nothing; nearest: {_usual_strength(config)}")
    if not augment.ops and (augment.strength > 0 or augment.target is not None):
        found.append("augment.ops: empty, so that nothing has a strength or a target; nearest: [ada] or [diffaugment]")
    if augment.target is not None and augment.most < augment.strength <= 1:
        found.append(f"augment.strength: {augment.strength:g} is above augment.most; nearest: {augment.most:g}")
    if augment.target is not None and config.ramp.augment is not None:
        found.append("ramp.augment: given, but augment.target adapts the strength; nearest: null")
    return found


def cautions(config: Config) -> list[str]:
    """What is allowed and hardly meant, a line each."""
    augment, ramp, found = config.augment, config.ramp, []
    strongest = max(augment.strength, ramp.augment or 0.0 if ramp.kimg else 0.0)
    if {"ada", *ADA}.intersection(augment.ops) and strongest > augment.most:
        found.append(f"augmentation gets a strength of {strongest:g}: above {augment.most:g} G draws what ADA does")
    values, defaults = (dict(leaves(asdict(which))) for which in (config, Config()))
    given = [key for key in values if values[key] != defaults[key]]
    idle = [key for key in given if key.startswith("ramp.")]
    if idle and ramp.kimg == 0:
        found.append(f"{', '.join(idle)}: nothing changes while ramp.kimg is 0")
    for switch, readers, names in READERS:
        unread = [key for key in names if key in given]
        if unread and values[switch] not in readers:
            under = " or ".join(readers)
            found.append(f"{', '.join(unread)}: not read while {switch} is {values[switch]}, but under {under}")
    return found


def _family_problems(config: Config) -> list[str]:
    network, found = config.network, []
    if network.classes is not None and network.condition == "none":
        found.append("network.classes: given, but network.condition is none; nearest: null")
    if network.family == "dcgan":
        first = config.schedule.start_resolution if network.grow else network.resolution
        if first < 8:
            found.append(
                f"{'schedule.start_resolution' if network.grow else 'network.resolution'}: {first}, but dcgan begins "
                "at 8 pixels; nearest: 8"
            )
        if config.schedule.micro_batch is not None:
            found.append(
                "schedule.micro_batch: given, but dcgan's batch statistics need the whole batch at once; nearest: null"
            )
    return found


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


def _place_problems(config: Config) -> list[str]:
    found, source, held_out = [], config.init_from, config.data.held_out
    if source is not None and (not source.strip() or "://" in source):
        found.append(f"init_from: {source!r} is no run directory or checkpoint folder of this machine; nearest: null")
    if held_out is not None and not held_out.strip():
        found.append(f"data.held_out: {held_out!r} names no set of shards; nearest: null")
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
    "loss.gp_every": 1,
    "loss.r2_gamma": 0,
    "loss.path_weight": 0,
    "loss.path_every": 1,
    "loss.class_weight": 0,
    "network.mapping_layers": 1,
    "network.mixing": 0,
    "network.blocks": 1,
    "network.group_size": 1,
    "augment.strength": 0,
    "augment.target": -1,
    "ramp.kimg": 0,
    "ramp.beta2": 0,
    "ramp.ema_kimg": 0,
    "ramp.augment": 0,
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
    "log.max_share": 0,
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
    "loss.path_decay",
    "augment.adapt_kimg",
    "augment.most",
    "ramp.lr",
    "ramp.gamma",
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
    "log.max_share": 1,
    "optim.rollback_lr": 1,
    "optim.beta1": 0.9999,
    "loss.path_decay": 1,
    "augment.strength": 1,
    "augment.target": 1,
    "augment.most": 1,
    "network.mixing": 1,
    "ramp.beta2": 0.99999,
    "ramp.augment": 1,
    "optim.beta2": 0.99999,
}


def _range_problems(config: Config) -> list[str]:
    found = []
    sizes = resolutions(config)
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
        if sizes and isinstance(value, dict) and key != "data.path":
            # Nothing fades into the first resolution.
            unfaded = key == "schedule.fade_kimg" and config.schedule.order == "stable_first"
            first = sizes[1 if unfaded and len(sizes) > 1 else 0]
            if not value or min(value) > first:
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
