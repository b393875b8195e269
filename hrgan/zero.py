"""DeepSpeed's side of the engine: what its ZeRO needs to give the gradients that DDP gives.

Measured before (DeepSpeed 0.19.8): two networks need two engines under two Accelerators; everything must go through
the bare module, with one backward for each network's update and D frozen while G learns; gradients are clipped at 1.0
unless the configuration says 0. A double backward works at stages 0 to 2 and cannot work at stage 3, which frees the
weights that the second pass needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from hrgan.adam import Adam
from hrgan.config import Config
from hrgan.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
PERSISTENCE = 100_000
"""ZeRO-3 keeps parameters of at most so many elements whole between uses (DeepSpeed's own default)."""


def asked_for() -> bool:
    """Whether `accelerate launch` started this process for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def plugins(config: Config) -> dict[str, DeepSpeedPlugin]:
    """A plugin for each network, from what the launch says. UserError for a launch that would train wrongly.

    On a machine without CUDA, DeepSpeed is told so.
    """
    if "LOCAL_RANK" not in os.environ:
        raise UserError("launch: ACCELERATE_USE_DEEPSPEED is set, but no launcher started this; use accelerate launch")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _without_compiling()
    result = {name: DeepSpeedPlugin() for name in ("generator", "discriminator")}
    for plugin in result.values():
        settings = plugin.deepspeed_config
        _refuse_wrong(config, settings)
        settings |= {
            "gradient_clipping": 0.0,  # Left out, it would be 1.0.
            "train_micro_batch_size_per_gpu": 1,  # For DeepSpeed's own reports only: batches are made elsewhere.
            "gradient_accumulation_steps": 1,  # The engine says where an accumulation ends.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        settings.pop("train_batch_size", None)
        zero = settings["zero_optimization"]
        # D is called more than once a step: with overlapped communication some releases then summed wrongly.
        zero["overlap_comm"] = False
        zero["compute_grad_norm"] = True  # What sees non-finite gradients before the first group's step.
        if zero["stage"] == 3:
            zero.setdefault("stage3_param_persistence_threshold", PERSISTENCE)
    return result


def _refuse_wrong(config: Config, settings: dict[str, Any]) -> None:
    stage = settings["zero_optimization"]["stage"]
    if stage == 3 and config.loss.penalty == "exact":
        raise UserError(
            "launch: ZeRO-3 cannot train with loss.penalty exact, whose second backward pass needs weights that it has "
            "already freed; set --loss.penalty finite_difference, or launch with ZeRO-2, which divides all but the "
            "weights"
        )
    if stage == 3 and config.loss.path_weight > 0:
        raise UserError(
            "launch: ZeRO-3 cannot train with path lengths, whose second backward pass needs weights that it has "
            "already freed; set --loss.path_weight 0, or launch with ZeRO-2"
        )
    if config.precision == "fp16":
        raise UserError(
            "precision: fp16 needs a loss scale that follows overflows, but DeepSpeed drops such steps before they "
            "can be counted; set bf16 or float32, or launch with DDP"
        )
    for block in ("fp16", "bf16", "torch_autocast", "optimizer", "scheduler"):
        if settings.get(block):
            raise UserError(
                f"launch: the DeepSpeed configuration has {block}; remove it: precision, Adam and learning rates are "
                "hrgan's (--precision, --optim...), and weights stay float32"
            )
    clipping = settings.get("gradient_clipping", "auto")
    if clipping not in ("auto", 0, 0.0):
        raise UserError(
            f"launch: gradient_clipping is {clipping}; set 0.0: clipped gradients are another training than DDP's"
        )
    zero = settings["zero_optimization"]
    for name, allowed in (("offload_optimizer", ("none", "cpu")), ("offload_param", ("none",))):
        device = (zero.get(name) or {}).get("device", "none") or "none"
        if device not in allowed:
            raise UserError(f"launch: {name} to {device} is not supported; expected {' or '.join(allowed)}")
    if (zero.get("offload_optimizer") or {}).get("device") == "cpu" and stage not in (1, 2):
        raise UserError(f"launch: offload_optimizer needs ZeRO stage 1 or 2, found {stage}")


def _without_compiling() -> None:
    """Keep DeepSpeed from compiling its shared-memory module for CPUs, which only inference calls: it takes minutes and
    a C++ compiler."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def begin_micro_step(engine: Any, last: bool) -> None:
    """Tell DeepSpeed's engine whether gradients are complete after the coming backward; and what its own forward,
    which is gone round, would tell its optimizer: else ZeRO-3 replaces gradients where it should add."""
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    if engine.zero_optimization():
        engine.optimizer.clear_backward_seen_flag()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """In here every parameter is whole on every process: ZeRO-3 gathers them, at other stages they always are."""
    parameters = list(module.parameters())
    if parameters and hasattr(parameters[0], "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        yield


def by_age(module: nn.Module, tensors: dict[str, Tensor]) -> list[list[nn.Parameter]]:
    """A network's parameters, those together that have taken as many steps of Adam, as `moments` told: DeepSpeed keeps
    one step count for all of a group, and a block that joins begins at 0."""
    ages: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        age = float(tensors[f"{name}.step"]) if f"{name}.step" in tensors else 0.0
        ages.setdefault(age, []).append(parameter)
    return list(ages.values())


def _groups(engine: Any) -> list[tuple[list[nn.Parameter], Tensor]]:
    """DeepSpeed's groups: the parameters, and the flat tensor of this process's part of them that Adam holds."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True))
    return list(zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True))


def moments(engine: Any, module: nn.Module, adam: Adam) -> dict[str, Tensor]:
    """Adam's whole moments and step counts as {parameter name}.{moment}, on every process; {} before the first step.
    All processes must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if not any("step" in state for state in adam.state.values()):
        return {}
    counts = {id(p): adam.state[flat]["step"] for parameters, flat in _groups(engine) for p in parameters}
    tensors = {}
    for name, parameter in module.named_parameters():
        tensors[f"{name}.step"] = counts[id(parameter)].clone()
        for key in MOMENTS:
            tensors[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
    return tensors


def load_moments(engine: Any, module: nn.Module, adam: Adam, tensors: dict[str, Tensor]) -> None:
    """Give each process its partition of whole moments, as `moments` returns them; parameters without any begin. They
    must be in groups `by_age`."""
    from deepspeed.utils import safe_set_full_optimizer_state

    if not any(name.endswith(".step") for name in tensors):
        return
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    for parameters, flat in _groups(engine):
        step = tensors.get(f"{named[id(parameters[0])]}.step", torch.zeros(()))
        adam.state[flat]["step"] = step.to(flat.device, copy=True)
        for key in MOMENTS:
            adam.state[flat][key] = torch.zeros_like(flat, requires_grad=False)
    stage_3 = engine.zero_optimization_stage() == 3
    if not stage_3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # What its own first step would do.
    for name, parameter in module.named_parameters():
        for key in MOMENTS if f"{name}.step" in tensors else ():
            moment = tensors[f"{name}.{key}"].to(parameter.device)
            _divide_moment(parameter, moment, key) if stage_3 else safe_set_full_optimizer_state(parameter, moment, key)


def _divide_moment(parameter: Any, moment: Tensor, key: str) -> None:
    """Give this process of ZeRO-3 its part of a whole moment: DeepSpeed's own division fails where the processes do not
    divide its length."""
    from deepspeed.utils import safe_set_local_optimizer_state

    size: int = parameter.ds_tensor.numel()
    padded = nn.functional.pad(moment.flatten(), (0, size * dist.get_world_size() - moment.numel()))
    safe_set_local_optimizer_state(parameter, padded[size * dist.get_rank() :][:size], key)
