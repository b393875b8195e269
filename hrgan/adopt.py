"""The first weights of a run from another run's checkpoint, as far as names and shapes fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from hrgan import checkpoint
from hrgan.config import Config, NetworkConfig
from hrgan.engine import State
from hrgan.errors import UserError
from hrgan.networks import make_discriminator, make_generator
from hrgan.schedule import Phase
from hrgan.sizes import size_text

NETWORKS = ("generator", "ema", "discriminator")
Rows = list[tuple[int, int]]
"""(place in the old tensor, place in the new one) of each row that is taken."""


@dataclass
class Fit:
    """What became of one network's tensors."""

    taken: list[str] = field(default_factory=list)
    in_part: list[str] = field(default_factory=list)
    """Those of which the rows of classes that both have were taken; the other rows begin anew."""
    initial: list[str] = field(default_factory=list)
    """Those that the checkpoint lacks, or has in another shape."""
    unused: list[str] = field(default_factory=list)
    """Those of the checkpoint that the network has no place for."""


def source_of(config: Config) -> Path:
    """The checkpoint that init_from means now: a run that is still trained has another one later."""
    try:
        return checkpoint.find(Path(config.init_from or ""))
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


def adopted(config: Config, phase: Phase, folder: Path, saved: checkpoint.Saved, say: Callable[[str], None]) -> State:
    """The state that a run begins its first phase with: weights of a checkpoint's networks, Adam anew. Says what was
    taken and what was not. UserError where nothing fits. folder: where `saved` was.

    Blocks have the same name at every resolution, so a checkpoint may be of another resolution, and rows that belong
    to a class go to the class of the same name.
    """
    old, new = saved.config.network, config.network
    if old.family != new.family:
        raise UserError(
            f"init_from: {folder} holds {old.family} networks, this run has {new.family}; set --network.family "
            f"{old.family} or name a checkpoint of {new.family}"
        )
    rows = class_rows(old.classes or [] if old.num_classes else [], new.classes or [] if new.num_classes else [])
    head = head_rows(old, new, rows)
    parts: dict[str, dict[str, Tensor]] = {"adam_generator": {}, "adam_discriminator": {}, "feedback": {}}
    for part in NETWORKS:
        make = make_discriminator if part == "discriminator" else make_generator
        own = make(config, phase.resolution, phase.fading, None).state_dict()
        parts[part], fit = fitted(own, saved.state.parts[part], rows, head)
        if not any(parts[part][name].dim() > 1 for name in fit.taken):  # A few biases fit anywhere.
            pairs = zip(asdict(old).items(), asdict(new).values(), strict=True)
            differ = "; ".join(
                f"network.{key} {theirs} there, {ours} here" for (key, theirs), ours in pairs if theirs != ours
            )
            raise UserError(f"init_from: nothing of {folder} fits the {part} ({differ})")
        if part != "ema":  # It has the generator's shapes.
            say(described(part, fit))
    there, here = size_text(old.grid, saved.state.resolution), size_text(new.grid, phase.resolution)
    say(f"init_from: {folder} ({there}, {saved.progress.nimg / 1000:g} kimg) into {here}")
    wasted = min(saved.state.resolution, new.resolution)
    if wasted > phase.resolution:
        say(
            f"warning: init_from: the checkpoint's blocks above {here} are not used, as this run grows them anew; "
            f"--schedule.start_resolution {wasted} begins with them"
        )
    return State(phase.resolution, phase.fading, parts)


def class_rows(old: list[str], new: list[str]) -> Rows:
    """(place in the old names, place in the new ones) of each class that both have."""
    return [(old.index(name), place) for place, name in enumerate(new) if name in old]


def head_rows(old: NetworkConfig, new: NetworkConfig, rows: Rows) -> Rows | None:
    """Rows of D's last layer: the first says real or fake, the others, under acgan, which class. None: all, as they
    are. rows: class_rows'."""
    if old.condition == new.condition == "acgan":
        return [(0, 0), *((there + 1, here + 1) for there, here in rows)]
    if old.condition == new.condition:
        return None
    features = new.family == "r3" and "projection" in (old.condition, new.condition)  # For the projection, no logit.
    return [] if features else [(0, 0)]


def fitted(
    own: dict[str, Tensor], theirs: dict[str, Tensor], rows: Rows, head: Rows | None
) -> tuple[dict[str, Tensor], Fit]:
    """Tensors of `own`'s names and shapes, filled from `theirs` where they fit. rows: class_rows'; head: head_rows'."""
    made, fit = {}, Fit()
    for name, tensor in own.items():
        other, pairs = theirs.get(name), {"embedding": rows, "logit": head}.get(name.split(".")[0])
        made[name] = tensor.detach().clone()
        if other is None or other.shape[1:] != tensor.shape[1:] or pairs == []:
            fit.initial.append(name)
        elif pairs is not None:
            for old, new in pairs:
                made[name][new] = other[old]
            (fit.taken if len(pairs) == len(tensor) else fit.in_part).append(name)
        elif other.shape == tensor.shape:
            made[name].copy_(other)
            fit.taken.append(name)
        else:
            fit.initial.append(name)
    fit.unused = [name for name in theirs if name not in own]
    return made, fit


def described(part: str, fit: Fit) -> str:
    """One line for a person."""
    whole = len(fit.taken) + len(fit.in_part) + len(fit.initial)
    line = f"init_from: {part}: {len(fit.taken)} of {whole} tensors taken"
    for names, what in (
        (fit.in_part, "in part, without classes that the checkpoint lacks"),
        (fit.initial, "begin anew"),
        (fit.unused, "of the checkpoint not used"),
    ):
        if names:
            line += f"; {what}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return line
