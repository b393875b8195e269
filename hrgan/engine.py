"""Two networks on this machine: one process or DDP behind one face, through Accelerate.

Which calls are right was measured before (DDP reduces gradients only for what went through its wrapper, once a
backward): the adversarial term goes through `wrapped`, the penalty through `module`, both in one scalar with one
backward; in the generator's step the discriminator is frozen and bare. Parameters, Adam and EMA are float32;
precision is autocast inside the forward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn

from hrgan.config import Config
from hrgan.errors import HrganError, UserError, refused_by_system
from hrgan.networks import make_discriminator, make_generator
from hrgan.schedule import Phase

Tensors = dict[str, Tensor]
PARTS = ("generator", "discriminator", "ema", "adam_generator", "adam_discriminator")
Result = TypeVar("Result")


@dataclass(frozen=True)
class State:
    """All tensors of a run at a moment, whole and by parameter name, and the kind of phase that they belong to."""

    resolution: int
    fading: bool
    parts: dict[str, Tensors]
    """One dict for each of PARTS."""


@dataclass
class Net:
    """A network under training."""

    module: nn.Module
    """The bare network."""
    wrapped: nn.Module
    """What reduces gradients over the processes."""
    optimizer: Any
    """Adam as Accelerate wrapped it."""


class Engine:
    """Holds G, D, their Adams and the EMA of G for one phase at a time."""

    def __init__(self, config: Config) -> None:
        """Join the processes that `accelerate launch` started. UserError for a kind of launch that is not supported."""
        self.config = config
        self.accelerator = Accelerator(
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # Evaluations and saves hold the other processes in a collective for longer than the
                # default of 10 minutes.
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            ],
        )
        supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        if self.accelerator.distributed_type not in supported:
            raise UserError(
                f"launch: {self.accelerator.distributed_type} is not supported; start with accelerate "
                "launch --multi_gpu"
            )
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if int(os.environ.get("WORLD_SIZE", self.world)) != self.world:
            raise UserError(
                f"launch: WORLD_SIZE is {os.environ['WORLD_SIZE']} but Accelerate formed a world of {self.world}; "
                "on CPUs start with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
            )
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = not config.deterministic
            torch.use_deterministic_algorithms(config.deterministic)
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    # Phases

    def enter(self, phase: Phase, state: State | None) -> None:
        """Build everything for a phase from the tensors of the phase before it, of a checkpoint, or of none.

        Growing takes what has the same name; exactly the new blocks keep the initial weights that (seed, name)
        decide. Adam is taken over where the phase goes on or does not reset it.
        """
        self.accelerator.free_memory()
        size, fading, bf16 = phase.resolution, phase.fading, self.config.precision == "bf16"
        goes_on = state is not None and (state.resolution, state.fading) == (size, fading)
        generator, ema = (make_generator(self.config, size, fading, bf16) for _ in range(2))
        discriminator = make_discriminator(self.config, size, fading, bf16)
        if state is not None:
            for name, network in (("generator", generator), ("ema", ema), ("discriminator", discriminator)):
                _load(network, state.parts[name], name, None if goes_on else size)
        self.phase = phase
        self.ema = ema.to(self.device, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
        betas = (self.config.optim.beta1, self.config.optim.beta2)
        self.generator = self._prepare(generator, phase.lr_g, betas)
        ratio = d_correction(self.config)
        self.discriminator = self._prepare(discriminator, phase.lr_d * ratio, (betas[0] ** ratio, betas[1] ** ratio))
        if state is not None and (goes_on or not phase.resets_adam):
            _load_adam(self.generator, state.parts["adam_generator"])
            _load_adam(self.discriminator, state.parts["adam_discriminator"])

    def _prepare(self, module: nn.Module, lr: float, betas: tuple[float, float]) -> Net:
        module = module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(module.parameters(), lr, betas, self.config.optim.eps, fused=True)
        wrapped, optimizer = self.accelerator.prepare(module, optimizer)
        return Net(module, wrapped, optimizer)

    def state(self) -> State:
        """The tensors as they are: references, not copies."""
        parts = {
            "generator": _tensors(self.generator.module),
            "discriminator": _tensors(self.discriminator.module),
            "ema": _tensors(self.ema),
            "adam_generator": _adam_tensors(self.generator),
            "adam_discriminator": _adam_tensors(self.discriminator),
        }
        return State(self.phase.resolution, self.phase.fading, parts)

    # Steps

    @contextmanager
    def micro_step(self, net: Net, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are reduced over the processes in the last one only."""
        with nullcontext() if last else self.accelerator.no_sync(net.wrapped):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar. Once a micro-step."""
        self.accelerator.backward(loss)

    def update(self, net: Net, loss: Tensor) -> Tensor:
        """One Adam step, skipped on all processes if the loss or a gradient is non-finite on any. Returns a float32
        scalar: 1 if skipped.

        Nothing is read back to the host: fused Adam takes the flag as a tensor on the device and leaves parameters
        and moments alone.
        """
        gradients = [p.grad for p in net.module.parameters() if p.grad is not None]
        norm: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
        skipped: Tensor = 1 - (loss.isfinite() & norm.isfinite()).float()
        if self.world > 1:
            dist.all_reduce(skipped, dist.ReduceOp.MAX)
        adam = net.optimizer.optimizer
        adam.found_inf = skipped
        net.optimizer.step()
        net.optimizer.zero_grad(set_to_none=True)
        return skipped

    def update_ema(self) -> None:
        """Move the EMA towards G by one step's share of the half-life."""
        half_life = self.config.optim.ema_kimg * 1000
        keep = 0.5 ** (self.phase.batch / half_life) if half_life else 0.0
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.module.parameters()), 1 - keep)

    # Processes

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        reduced: Tensor = self.accelerator.reduce(values, "mean")
        return reduced

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        value = torch.tensor([float(flag)], device=self.device)
        return bool(self.accelerator.reduce(value, "sum").item() > 0)

    def on_main(self, act: Callable[[], Result]) -> Result:
        """The result of a function that only the main process runs; an HrganError in it is raised on all processes
        alike."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = act()
            except HrganError as error:
                outcome[1] = error
            except OSError as error:
                outcome[1] = refused_by_system(error)
        if self.world > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def close(self) -> None:
        """Leave the process group."""
        self.accelerator.end_training()


def d_correction(config: Config) -> float:
    """Exponent and factor for D's Adam under lazy regularisation: interval / (interval + 1) (Karras et al. 2020,
    appendix B)."""
    every = config.loss.r1_every
    return every / (every + 1) if config.loss.kind == "logistic" and every > 1 else 1.0


def _load(network: nn.Module, tensors: Tensors, role: str, grown_to: int | None) -> None:
    """Take the tensors that the network has; what is missing must belong to the resolution that it grew to (None:
    nothing may miss)."""
    own = network.state_dict()
    missing = [name for name in own if name not in tensors and (grown_to is None or f".{grown_to}." not in name)]
    wrong = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or wrong:
        raise UserError(
            f"{role}: the saved state does not fit this network ({(missing + wrong)[0]} is missing or has "
            "another shape); "
            "use the configuration that it was saved with"
        )
    network.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)


def _tensors(module: nn.Module) -> Tensors:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def _adam_tensors(net: Net) -> Tensors:
    """Adam's moments and step count as {parameter name}.{moment}; empty before the first step."""
    state = net.optimizer.optimizer.state
    return {
        f"{name}.{key}": value for name, p in net.module.named_parameters() for key, value in state.get(p, {}).items()
    }


def _load_adam(net: Net, tensors: Tensors) -> None:
    state = net.optimizer.optimizer.state
    for name, parameter in net.module.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{name}.{key}" in tensors:
                like = parameter if key != "step" else torch.empty((), device=parameter.device)
                state[parameter][key] = torch.empty_like(like, requires_grad=False).copy_(tensors[f"{name}.{key}"])
