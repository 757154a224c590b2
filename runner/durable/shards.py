"""What a rank holds of a model in training, in one form for every ZeRO stage: ranges of elements of flattened parameters.

DeepSpeed keeps fp32 weights and AdamW's moments in five ways: as the parameters themselves (stage 0 in fp32), next to each
parameter (stage 0 in half precision), or cut out of flat partitions (stages 1, 2, 3, bf16). A Shard hides which. Since it
knows its parameter and position, any number of ranks can read checkpoints made of shards, under any stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runner import ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
# Names under which DeepSpeed's optimizers and their loss scalers keep their counters
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class Shard:
    """Elements start .. start + n of a flattened parameter. The tensors are flat views: writing to them changes the weights in training."""

    name: str
    start: int
    tensors: dict[str, Tensor]  # "weight" (fp32, or the parameter's own precision), and AdamW's moments once there are any
    everywhere: bool = False  # every rank holds the same elements


def shards(engine) -> list[Shard]:
    """The trainable parameters of this rank with their optimizer states."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    found = []
    for name, parameter in engine.module.named_parameters():
        for start, flat, offset, n in _places(engine, parameter) if parameter.requires_grad else ():
            views = {"weight": flat.detach().view(-1)[offset : offset + n]}
            state = inner.state.get(flat, {})
            views |= {key: state[key].view(-1)[offset : offset + n] for key in MOMENTS if key in state}
            found.append(Shard(name, start, views, everywhere=not engine.zero_optimization_stage()))
    return found


def local_shard(name: str, parameter: nn.Parameter, tensor: Tensor) -> Shard:
    """A Shard for a tensor laid out like this rank's part of a parameter: all of it, or its ZeRO-3 piece without padding."""
    if not hasattr(parameter, "ds_tensor"):
        return Shard(name, 0, {"weight": tensor.view(-1)}, everywhere=True)
    start = ranks.rank() * parameter.ds_tensor.ds_numel
    n = max(0, min(tensor.numel(), parameter.ds_numel - start))
    return Shard(name, start, {"weight": tensor.view(-1)[:n]})


def _places(engine, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor, int, int]]:
    """Where the fp32 elements of a parameter lie: (first element, the optimizer's own tensor, offset in it, how many)."""
    zero = engine.optimizer
    if hasattr(parameter, "ds_id"):  # stage 3
        group, offset, n = zero.grad_position[zero.get_param_id(parameter)]
        start = ranks.rank() * parameter.ds_tensor.ds_numel
        n = min(n, parameter.ds_numel - start)  # the last rank's piece is padded
        if n > 0:
            yield start, zero.fp32_partitioned_groups_flat[group], offset, n
    elif hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
        if (held := parameter._hp_mapping) is not None:
            flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
            yield (
                held.lp_fragment_address.start,
                flats[held.param_group_index],
                held.hp_fragment_address.start,
                held.hp_fragment_address.numel,
            )
    elif hasattr(zero, "fp32_groups"):  # stage 0 in half precision
        for halves, wholes in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            yield from ((0, whole, 0, whole.numel()) for half, whole in zip(halves, wholes, strict=True) if half is parameter)
    else:
        yield 0, parameter, 0, parameter.numel()


# --- putting a state back ---------------------------------------------------------------------------------------------


def make_moments(engine, steps: int) -> None:
    """Create the optimizer state as after `steps` steps, with zero moments where there are none, so that `shards` can show it."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    flats = {flat: None for p in engine.module.parameters() if p.requires_grad for _, flat, _, _ in _places(engine, p)}
    for flat in flats:
        state = inner.state[flat]
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(flat, requires_grad=False))
        if isinstance(inner, torch.optim.Optimizer) and type(inner).__module__.startswith("torch."):
            fused = inner.param_groups[0].get("fused")
            state["step"] = torch.tensor(float(steps), device=flat.device if fused else "cpu")
        else:  # DeepSpeedCPUAdam counts in a plain integer
            state["step"] = steps


def steps_taken(engine) -> int:
    """Steps that AdamW has taken, without those skipped because of an overflow."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return int(max((state["step"] for state in inner.state.values() if "step" in state), default=0))


def publish(engine) -> None:
    """Copy what was written to fp32 shards into the weights that the model computes with. Collective."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.checkpoint_event_prologue()
        for half, whole in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            half.data.copy_(whole.data)
        republish(engine.module.parameters())
        zero.checkpoint_event_epilogue()
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
    elif hasattr(zero, "fp32_groups"):
        for halves, wholes in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for half, whole in zip(halves, wholes, strict=True):
                half.data.copy_(whole.data)


def republish(parameters) -> None:
    """ZeRO-3 keeps small parameters whole on every rank: refresh these copies from the pieces. Collective."""
    whole = [p for p in parameters if getattr(p, "ds_persist", False)]
    if whole:
        whole[0].partition(whole)
        whole[0].all_gather(whole)


def scaler_state(engine) -> dict[str, float]:
    """Counters of dynamic loss scaling (fp16); {} for other precisions."""
    if not engine.fp16_enabled():
        return {}
    return {name: getattr(_scaler(engine), name) for name in SCALER_FIELDS if hasattr(_scaler(engine), name)}


def set_scaler_state(engine, state: dict[str, float]) -> None:
    """Restore the counters, unless the engine now has another precision."""
    for name, value in state.items() if engine.fp16_enabled() else ():
        setattr(_scaler(engine), name, value)


def _scaler(engine):
    """The object that holds the counters: ZeRO's loss scaler, or stage 0's."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if hasattr(scaler, "cur_scale") else engine.optimizer.loss_scale_config
