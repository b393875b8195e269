"""Two networks on this machine: one process, DDP or DeepSpeed's ZeRO behind one face, through Accelerate, as
`accelerate launch` started the program.

Which calls are right was measured before. DDP reduces gradients only for what went through its wrapper, once a
backward: the adversarial term goes through `wrapped`, what a penalty asks D again through `module`, all in one scalar
with one backward; in the generator's step the discriminator is frozen and bare. Under DeepSpeed all goes through the
bare module, so `wrapped` is the module there. Parameters, Adam and EMA are float32; precision is autocast inside the
forward.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hrgan import watch, zero
from hrgan.adam import Adam, LossScale
from hrgan.config import Config, Precision
from hrgan.errors import REFUSALS, Drifted, HrganError, UserError, refused_by_system
from hrgan.graphs import Graphs
from hrgan.networks import AUTOCAST, make_discriminator, make_generator
from hrgan.networks.layers import layout
from hrgan.schedule import Phase, Rates, rates

Tensors = dict[str, Tensor]
TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch does not say that it exports them
PrefixStore: Any = dist.PrefixStore  # type: ignore[attr-defined]
PARTS = ("generator", "discriminator", "ema", "adam_generator", "adam_discriminator", "feedback")
FEEDBACK = {"augment_strength": 1, "augment_signs": 2, "path_mean": 1}
"""Name and length of each: float32 tensors."""
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
    """What reduces gradients over the processes; under DeepSpeed the bare network."""
    adam: Adam
    deepspeed: Any = None
    """DeepSpeed's engine for it; None without DeepSpeed."""


def join() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this one, joined to the others that `accelerate launch` started: for
    programs that train nothing."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # As in training.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The first process may be long at what it alone does.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    _check_world(state.num_processes)
    return state.process_index, state.num_processes, state.device


def _check_world(world: int) -> None:
    if int(os.environ.get("WORLD_SIZE", world)) != world:
        raise UserError(
            f"launch: WORLD_SIZE is {os.environ['WORLD_SIZE']} but Accelerate formed a world of {world}; on CPUs start "
            "with ACCELERATE_USE_CPU=true accelerate launch --config_file launch/cpu-2.yaml"
        )


def on_first(rank: int, world: int, act: Callable[[], Result]) -> Result:
    """The result of a function that only the first process runs; an HrganError in it is raised on all alike."""
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = act()
        except HrganError as error:
            outcome[1] = error
    if world > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def from_all(value: Result, world: int) -> list[Result]:
    """What each process says, by rank."""
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 itself. Others emulate it, several times as slowly as float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # The last is Arm's.


class Engine:
    """Holds G, D, their Adams and the EMA of G for one phase at a time."""

    def __init__(self, config: Config) -> None:
        """Join the processes that `accelerate launch` started. UserError for a kind of launch that is not supported."""
        # Above the watch's, which says more (watch.py).
        timeout = timedelta(minutes=config.limits.timeout_minutes * 1.5, seconds=15)
        _meet_after_restart(timeout)
        if zero.asked_for():
            plugins = zero.plugins(config)
            # On CPUs DeepSpeed would else make a world of one of each process, silently.
            group = InitProcessGroupKwargs(backend=None if torch.cuda.is_available() else "gloo", timeout=timeout)
            # The second takes over the plugins of the first; each serves one network.
            self.accelerator = Accelerator(deepspeed_plugins=plugins, kwargs_handlers=[group])
            self.accelerators = {"generator": self.accelerator, "discriminator": Accelerator()}
        else:
            self.accelerator = Accelerator(
                mixed_precision="no",
                kwargs_handlers=[
                    # Buffers (batch statistics) are the same on all processes by themselves.
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                    InitProcessGroupKwargs(timeout=timeout),
                ],
            )
            self.accelerators = {"generator": self.accelerator, "discriminator": self.accelerator}
        kind = self.accelerator.distributed_type
        supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        if kind not in (*supported, DistributedType.DEEPSPEED):
            raise UserError(f"launch: {kind} is not supported; start with one of launch/*.yaml")
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.zero_stage: int | None = None
        """Of DeepSpeed; None without it."""
        if zero.asked_for() and kind != DistributedType.DEEPSPEED:
            raise UserError(
                f"launch: DeepSpeed was asked for but Accelerate formed {kind}; leave ACCELERATE_USE_CPU unset with it"
            )
        if kind == DistributedType.DEEPSPEED:
            self.zero_stage = self.accelerator.state.deepspeed_plugin.zero_stage
        _check_world(self.world)
        self.store: Any = None
        """Where the processes say where they are (watch.py); None for one process."""
        if self.world > 1:
            # What only the hosts agree on neither waits for the GPUs nor makes them wait. The main process may keep the
            # others waiting as long as it takes; the watch ends a wait for a process that does not move.
            self._hosts: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
            self.store = self._make_store(timeout)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = not config.deterministic
            if config.deterministic:  # Without it cuBLAS refuses.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(config.deterministic)
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            # Else a penalty's inner derivative runs in another thread, whose count of operations decides in which order
            # gradients are summed: a process just started would round otherwise than one that goes on.
            torch.autograd.set_multithreading_enabled(False)
        if config.compile and self.zero_stage is not None:
            raise UserError("compile: true, but DeepSpeed's hooks are not compiled; nearest: false, or DDP")
        self.graphs = Graphs(False)
        self.config = config if config.precision != "auto" else replace(config, precision=self.best_precision)

    @cached_property
    def has_bf16(self) -> bool:
        """Whether the devices of all processes do. Asked first by all at the same place."""
        return self.agree(None if has_bf16(self.device) else f"{self.device.type} {self.rank} has no bf16") is None

    @property
    def best_precision(self) -> Precision:
        """What `precision: auto` begins with."""
        return "bf16" if self.has_bf16 else "float32"

    def _make_store(self, timeout: timedelta) -> Any:
        """A store that rank 0 keeps, for the watch: the launcher's own may end before the processes do."""
        host, port = os.environ["MASTER_ADDR"], [0]
        kept = TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.rank == 0 else None
        if kept is not None:
            port = [kept.port]
        dist.broadcast_object_list(port, group=self._hosts)
        return kept or TCPStore(host, port[0], is_master=False, timeout=timeout)

    @property
    def can_record(self) -> bool:
        """Whether CUDA graphs can hold a step: those of several processes would have to hold their collectives, too."""
        return self.device.type == "cuda" and self.name == "one process"

    @property
    def name(self) -> str:
        """How the processes share the work: one process, DDP, ZeRO-1, ..."""
        if self.zero_stage is not None:
            return f"ZeRO-{self.zero_stage}"
        return "DDP" if self.world > 1 else "one process"

    # Phases

    def enter(self, phase: Phase, state: State | None) -> None:
        """Build everything for a phase from the tensors of the phase before it, of a checkpoint, or of none.

        Growing takes what has the same name; exactly the new blocks keep the initial weights that (seed, name)
        decide. Adam is taken over where the phase goes on or does not reset it.
        """
        for accelerator in self.accelerators.values():
            accelerator.free_memory()  # Else DeepSpeed's old engines go on taking the gradients.
        self.graphs = Graphs(self.config.cuda_graphs and self.can_record)
        if self.config.compile:
            torch.compiler.reset()  # What was compiled for the phase before, else counted as so many variants.
        size, fading, autocast = phase.resolution, phase.fading, AUTOCAST[self.config.precision]
        goes_on = state is not None and (state.resolution, state.fading) == (size, fading)
        generator, ema = (make_generator(self.config, size, fading, autocast) for _ in range(2))
        discriminator = make_discriminator(self.config, size, fading, autocast)
        if state is not None:
            for name, network in (("generator", generator), ("ema", ema), ("discriminator", discriminator)):
                _load(network, state.parts[name], name, None if goes_on else size)
        self.phase = phase
        self.ema = ema.to(self.device, memory_format=layout(self.config.network)).requires_grad_(False).eval()  # type: ignore[call-overload]
        kept = state.parts if state is not None and (goes_on or not phase.resets_adam) else {}
        self.generator = self._prepare("generator", generator, kept.get("adam_generator", {}))
        self.discriminator = self._prepare("discriminator", discriminator, kept.get("adam_discriminator", {}))
        self.feedback = {name: torch.zeros(length, device=self.device) for name, length in FEEDBACK.items()}
        """What the steps before tell the next ones, besides weights and Adam."""
        self.feedback["augment_strength"].fill_(self.config.augment.strength)
        self.set_rates(rates(self.config, phase, phase.nimg_from))
        if state is not None:
            for net, part in ((self.generator, "adam_generator"), (self.discriminator, "adam_discriminator")):
                self._load_adam(net, kept.get(part, {}))
                net.adam.load_scale(state.parts[part])
            for name, value in state.parts["feedback"].items():
                self.feedback[name].copy_(value)

    def set_rates(self, now: Rates) -> None:
        """Learning rates and betas for the next step. A lazy penalty changes none: it joins a step that is taken
        anyway, where StyleGAN2 takes one more for it and therefore less of each (arXiv 1912.04958, appendix B)."""
        for net, lr in ((self.generator, now.lr_g), (self.discriminator, now.lr_d)):
            for group in net.adam.param_groups:
                group["lr"], group["betas"] = lr, (self.config.optim.beta1, now.beta2)

    def _prepare(self, name: str, module: nn.Module, kept: Tensors) -> Net:
        """A network with its Adam, into which `kept` will be loaded."""
        scale = LossScale.first(self.device) if self.config.precision == "fp16" else None
        # Under ZeRO-1 and above each process holds a part of the gradients, else all of them.
        copies = 1 if self.zero_stage else self.world
        module.to(self.device)
        groups = zero.by_age(module, kept) if self.zero_stage else [list(module.parameters())]
        adam = Adam(groups, self.config.optim.eps, self._over_processes, copies, scale)
        if self.zero_stage is None:
            module.to(memory_format=layout(self.config.network))  # DeepSpeed takes no such weights
            if self.config.compile:
                module.compile()
            return Net(module, self.accelerator.prepare(module), adam)
        self.accelerator.state.select_deepspeed_plugin(name)
        engine, _ = self.accelerators[name].prepare(module, adam)
        return Net(module, module, adam, engine)

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def _load_adam(self, net: Net, tensors: Tensors) -> None:
        if self.zero_stage:
            zero.load_moments(net.deepspeed, net.module, net.adam, tensors)
        else:
            _load_adam(net, tensors)

    def state(self) -> State:
        """The tensors as they are, whole on every process: references where this process holds them whole, else
        gathered. All processes must call it."""
        parts = {
            "generator": self._weights(self.generator),
            "discriminator": self._weights(self.discriminator),
            "ema": _tensors(self.ema),
            "adam_generator": self._adam(self.generator),
            "adam_discriminator": self._adam(self.discriminator),
            "feedback": dict(self.feedback),
        }
        return State(self.phase.resolution, self.phase.fading, parts)

    def _weights(self, net: Net) -> Tensors:
        if self.zero_stage != 3:
            return _tensors(net.module)
        with zero.whole(net.module):
            return {name: tensor.clone() for name, tensor in _tensors(net.module).items()}

    def _adam(self, net: Net) -> Tensors:
        tensors = zero.moments(net.deepspeed, net.module, net.adam) if self.zero_stage else _adam_tensors(net)
        return tensors | net.adam.scale_tensors()

    def weights(self) -> dict[str, list[Tensor]]:
        """Copies of the parameters of both networks. All processes must call it."""
        nets = {"generator": self.generator, "discriminator": self.discriminator}
        return {name: [tensor.clone() for tensor in self._weights(net).values()] for name, net in nets.items()}

    # Steps

    @contextmanager
    def micro_step(self, net: Net, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are reduced over the processes in the last one only
        (ZeRO-2 and 3 reduce them in each, because no process keeps them whole)."""
        if net.deepspeed is not None:
            zero.begin_micro_step(net.deepspeed, last)
        with nullcontext() if last or net.deepspeed is not None else self.accelerator.no_sync(net.wrapped):
            yield

    def backward(self, net: Net, loss: Tensor) -> None:
        """Add the gradient of a scalar. Once a micro-step: DeepSpeed would drop the first of two, silently."""
        if net.deepspeed is not None:
            net.deepspeed.backward(loss)
        else:
            self.accelerator.backward(loss if net.adam.scale is None else (loss * net.adam.scale).sum())

    def update(self, net: Net, loss: Tensor) -> Tensor:
        """One Adam step, skipped on all processes if the loss or a gradient is non-finite on any. Returns a float32
        scalar: 1 if skipped.

        Nothing is read back to the host, except by DeepSpeed.
        """
        net.adam.expect(loss)
        if net.deepspeed is not None:
            net.deepspeed.step()
        else:
            net.adam.step()
            net.adam.zero_grad(set_to_none=True)
        return net.adam.skipped

    def update_ema(self, kimg: float) -> None:
        """Move the EMA towards G by one step's share of the half-life, in thousands of images. Other tensors than
        weights, as running statistics, are G's; see settle_ema."""
        keep = 0.5 ** (self.phase.batch / (kimg * 1000)) if kimg else 0.0
        with zero.whole(self.generator.module) if self.zero_stage == 3 else nullcontext():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.module.parameters()), 1 - keep)
        for average, buffer in zip(self.ema.buffers(), self.generator.module.buffers(), strict=True):
            average.copy_(buffer)

    def settle_ema(self) -> None:
        """Give averaged weights batch statistics of their own, before anyone sees the EMA. All processes must call
        it."""
        averages = self.config.optim.ema_kimg or self.config.ramp.ema_kimg
        if not averages or not self.discriminator.module.batch_statistics:
            return
        self.ema.measure_statistics()
        if self.world > 1:  # Convolutions of a GPU may round otherwise on each.
            for buffer in self.ema.buffers():
                dist.broadcast(buffer, 0)

    # Processes

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        reduced: Tensor = self.accelerator.reduce(values, "mean")
        return reduced

    def gather(self, value: float) -> list[float]:
        """The value of each process, by rank."""
        gathered: Tensor = self.accelerator.gather(torch.tensor([value], device=self.device))
        numbers: list[float] = gathered.tolist()
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        value = torch.tensor([float(flag)], device=self.device)
        return bool(self.accelerator.reduce(value, "sum").item() > 0)

    def agree(self, reason: str | None) -> str | None:
        """A reason that a process has, the same on all, or None when none has one. The GPUs are not waited for."""
        if self.world == 1:
            return reason
        flag = torch.tensor([float(reason is not None)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._hosts)
        if flag == 0:
            return None
        reasons: list[str | None] = [None] * self.world
        dist.all_gather_object(reasons, reason, group=self._hosts)
        return next(f"{found} on rank {rank}" for rank, found in enumerate(reasons) if found is not None)

    def on_main(self, act: Callable[[], Result]) -> Result:
        """The result of a function that only the main process runs; an HrganError in it is raised on all processes
        alike. The others wait as long as it takes, in a collective whose time does not run out."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = act()
            except HrganError as error:
                outcome[1] = error
            except Exception as error:
                outcome[1] = _known(error) or HrganError(f"rank 0 failed: {type(error).__name__}: {error}")
                if _known(error) is None:
                    self._share_main(outcome)
                    raise
        self._share_main(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def _share_main(self, outcome: list[Any]) -> None:
        """Bring the main process's outcome to all, once it is there."""
        if self.world > 1:
            with watch.waiting_for_main() if self.rank else nullcontext():
                dist.broadcast_object_list(outcome, group=self._hosts)

    def check_same(self, state: State) -> None:
        """Drifted if a tensor of the state has other bits on some process than on most. All processes must call it."""
        if self.world == 1:
            return
        names = [f"{part}/{name}" for part in PARTS for name in sorted(state.parts[part])]
        tensors = [state.parts[part][name] for part in PARTS for name in sorted(state.parts[part])]
        mine = torch.stack([_bit_sums(tensor).to(self.device) for tensor in tensors])
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        sums = torch.stack(every).cpu()  # (world, tensors, 2)
        for index in (sums != sums[0]).any(2).any(0).nonzero().flatten().tolist():
            of_rank = [tuple(row) for row in sums[:, index].tolist()]
            usual = Counter(of_rank).most_common(1)[0][0]
            odd = [str(rank) for rank, found in enumerate(of_rank) if found != usual]
            raise Drifted(
                f"rank {', '.join(odd)} of {self.world} has drifted: {names[index]} differs from the other "
                "processes' bit for bit; nothing was saved, so the same command goes on from the checkpoint before; "
                "if it happens again, test the memory and GPU of that rank"
            )

    def close(self) -> None:
        """Leave the process group."""
        self.accelerator.end_training()


def _meet_after_restart(timeout: timedelta) -> None:
    """Join the processes that a launcher restarted (--max_restarts). It keeps its store over a restart, where gloo and
    NCCL would find the addresses of the dead; Accelerate takes over a group that is there."""
    attempt, world = (int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"))
    if attempt == 0 or world < 2:
        return
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"attempt_{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=world,
        timeout=timeout,
    )


def _known(error: Exception) -> UserError | None:
    """A refusal of the system as a UserError; None for any other error."""
    return refused_by_system(error) if isinstance(error, OSError) and error.errno in REFUSALS else None


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
    state = net.adam.state
    return {
        f"{name}.{key}": value for name, p in net.module.named_parameters() for key, value in state.get(p, {}).items()
    }


def _load_adam(net: Net, tensors: Tensors) -> None:
    state = net.adam.state
    for name, parameter in net.module.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{name}.{key}" in tensors:
                like = parameter if key != "step" else torch.empty((), device=parameter.device)
                state[parameter][key] = torch.empty_like(like, requires_grad=False).copy_(tensors[f"{name}.{key}"])


def _bit_sums(tensor: Tensor) -> Tensor:
    """Two 64-bit sums over a float32 tensor's bits, plain and by position: (2,) int64, equal for equal bits."""
    bits = tensor.detach().contiguous().flatten().view(torch.int32).to(torch.int64)
    return torch.stack([bits.sum(), (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()])
