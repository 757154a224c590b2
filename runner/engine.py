"""Models inside DeepSpeed: building, stepping, gathering for generation, and the few workarounds it needs."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from runner import ranks
from runner.batch_sizes import fits_whole
from runner.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def skip_cpu_op_builds() -> None:
    """On a CPU, deepspeed.initialize compiles a shared-memory collective for a minute and fails without a compiler.

    Gloo does as well at our sizes. DeepSpeed has no switch for it, hence the private name.
    """
    try:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    except (ImportError, AttributeError):
        pass


@contextmanager
def building(ds_config: dict):
    """Inside this block transformers builds models as the engine needs them: already partitioned under ZeRO-3.

    The HfDeepSpeedConfig must be alive while the model is built, and gone when the next, unpartitioned one is.
    """
    alive = HfDeepSpeedConfig(ds_config) if ds_config.get("zero_optimization", {}).get("stage") == 3 else None
    try:
        with settings_in_words(ds_config):
            yield
    finally:
        del alive


@contextmanager
def settings_in_words(ds_config: dict):
    """Turn DeepSpeed's complaint about a setting, whose type only it knows, into an error that names hardware.deepspeed."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        blocks = [name for name, block in ds_config.items() if isinstance(block, dict) and first["loc"] and first["loc"][0] in block]
        key = ".".join(map(str, ("hardware.deepspeed", *blocks[:1], *first["loc"])))
        raise UserError(f"{key}={first['input']} is refused by DeepSpeed: {first['msg']}") from error


def check_settings(ds_config: dict) -> None:
    """Let DeepSpeed read a config. Raises UserError for what it refuses, and it raises anything."""
    try:
        with settings_in_words(ds_config):
            DeepSpeedConfig(ds_config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"hardware.deepspeed is refused by DeepSpeed: {str(error) or repr(error)}") from error


def trainable(wrapper: nn.Module, ds_config: dict, *, lr: float, lora_lr: float, weight_decay: float, betas, eps: float):
    """A DeepSpeed engine with AdamW around an Actor or a Scalar."""
    groups = parameter_groups(wrapper, lr, lora_lr, weight_decay)
    # We bring the optimizer: DeepSpeed would take "AdamW" in its config for its own FusedAdam, which must be compiled
    optimizer = _adamw(ds_config)(groups, lr=lr, betas=tuple(betas), eps=eps)
    with settings_in_words(ds_config):
        engine, *_ = deepspeed.initialize(model=wrapper, optimizer=optimizer, config=ds_config)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _undo_first_step(engine.optimizer)
        engine.optimizer.step = partial(_step_at_once, engine.optimizer)
    return engine


def _undo_first_step(optimizer: FP16_UnfusedOptimizer) -> None:
    """DeepSpeed makes AdamW's moments by a step without gradients. It moves no moment, but counts, and decays the fp32 weights."""
    for moments in optimizer.optimizer.state.values():
        moments["step"].zero_()
    optimizer.refresh_fp32_params()


def parameter_groups(model: nn.Module, lr: float, lora_lr: float, weight_decay: float) -> list[dict]:
    """AdamW groups: weight decay on matrices, none on vectors; adapters have their own learning rate. The schedule scales `peak_lr`."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 the local piece is flat; ds_shape is the true shape
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            groups.setdefault(("lora_" in name, decays), []).append(parameter)
    options = []
    for (adapter, decays), parameters in groups.items():
        rate = lora_lr if adapter else lr
        options.append({"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": weight_decay if decays else 0.0})
    return options


def _step_at_once(optimizer: FP16_UnfusedOptimizer) -> bool:
    """DeepSpeed's step in half precision without ZeRO, for all parameters at once. Returns whether it was skipped for an overflow.

    DeepSpeed's own loops over the parameters, with some sixty launches and two waits for each: 0.1 s for 1.3 B parameters on an H200,
    where the arithmetic takes 0.02 s.
    """
    halves = [half for group in optimizer.fp16_groups for half in group]
    masters = [master for group in optimizer.fp32_groups for master in group]
    scale = optimizer.loss_scale_config.cur_scale
    grads = [(torch.zeros_like if half.grad is None else torch.empty_like)(master) for half, master in zip(halves, masters, strict=True)]
    given = [(grad, half.grad) for grad, half in zip(grads, halves, strict=True) if half.grad is not None]
    torch._foreach_copy_(*map(list, zip(*given, strict=True)))
    norm = float(torch.nn.utils.get_total_norm(grads))  # the only wait for the GPU
    if not math.isfinite(norm):
        return optimizer._skip_invalid_grad_norm()
    optimizer.overflow, optimizer._global_grad_norm = False, norm / scale
    # unscale_and_clip_grads divides the norm by the scale itself. It must come before the scale grows, because the gradients were made with
    # the old one. DeepSpeed's own step gets that wrong: each time the scale doubles, it halves the gradients
    torch._foreach_mul_(grads, 1.0 / optimizer.unscale_and_clip_grads(norm, apply_scale=False))
    optimizer._update_scale(False)
    for master, grad in zip(masters, grads, strict=True):
        master.grad = grad
    optimizer.optimizer.step()
    for master in masters:
        master.grad = None
    torch._foreach_copy_([half.data for half in halves], [master.data for master in masters])
    return False


def _adamw(ds_config: dict):
    """torch's AdamW, which needs no compilation; for offloaded states DeepSpeed's own if it can be compiled, which is 5x faster."""
    offloaded = "offload_optimizer" in ds_config["zero_optimization"]
    if offloaded and torch.cuda.is_available() and shutil.which("nvcc") and shutil.which("ninja"):
        return deepspeed.ops.adam.DeepSpeedCPUAdam
    # One kernel for all tensors: five times as fast on a CPU, which matters for tiny models
    fused = not (torch.cuda.is_available() and offloaded)
    return lambda groups, **options: torch.optim.AdamW(groups, fused=fused, **options)


def frozen(wrapper: nn.Module, ds_config: dict, device: torch.device) -> nn.Module:
    """A model that never trains: in ZeRO-3 if the config says so, otherwise a replica on the device."""
    wrapper.eval().requires_grad_(False)
    if ds_config.get("zero_optimization", {}).get("stage") == 3:
        with settings_in_words(ds_config):
            engine, *_ = deepspeed.initialize(model=wrapper, config=ds_config)
        engine.eval()  # returns nothing
        return engine
    return wrapper.to(device)


def reference(actor, ref: nn.Module | None):
    """(model, context) whose log-probabilities are the reference's: ref, or the actor without its adapters where there is none."""
    return (actor, actor.module.without_adapter()) if ref is None else (ref, nullcontext())


def set_learning_rate(engine, share: float) -> None:
    """Give every group `share` of its own peak: adapters and full weights follow one schedule."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def learning_rate(engine) -> float:
    """The largest rate of any group; the adapters' where only they train."""
    return max(group["lr"] for group in engine.optimizer.param_groups)


def backward(engine, loss_sum: Tensor, total: float, last: bool) -> None:
    """Backward for `loss_sum`, one micro batch's share of a loss that is divided by `total` over the whole optimizer step.

    DeepSpeed divides by the accumulation steps and averages over ranks; both are compensated, so that the gradient is
    that of (sum over all micro batches and ranks) / total, whatever their number and however uneven they are.

    last: no other micro batch follows before `step`. Their number varies, so DeepSpeed cannot count them.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss_sum * (ranks.world() * engine.gradient_accumulation_steps() / total))
    if not last:
        engine.step()  # moves nothing, but DeepSpeed requires it after each backward


def step(engine) -> float:
    """Take the optimizer step, after the last backward. Returns the gradient norm before clipping. Waits for the GPU."""
    norm = None
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        # fp32 without ZeRO: DeepSpeed keeps no norm. All ranks hold the same averaged gradients
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    _check_scale(engine)
    norm = engine.get_global_grad_norm() if norm is None else norm
    return float(norm) if norm is not None else 0.0


def _check_scale(engine) -> None:
    """Raise as ZeRO does when the loss scale cannot fall any further: stage 0 would skip every step from here on."""
    scale = getattr(engine.optimizer, "loss_scale_config", None)
    dynamic = scale and scale.dynamic_loss_scale  # one that the user has fixed has no minimum
    if engine.fp16_enabled() and dynamic and engine.optimizer.overflow and scale.cur_scale <= scale.min_loss_scale:
        raise RuntimeError("Current loss scale already at minimum - cannot decrease scale anymore")


@contextmanager
def whole_weights(engine):
    """Yield (module, True) with complete weights on every rank, gathered once: sampling reads them for every token. Collective.

    (module, False) under ZeRO-3 if they do not fit: then every forward gathers layer by layer, on all ranks together.
    """
    if engine.zero_optimization_stage() != 3:
        yield engine.module, True
    elif not _fits_whole(engine):
        yield engine.module, False
    else:
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(engine):
            yield engine.module, True


def _fits_whole(engine) -> bool:
    """Whether all parameters fit into the device's memory at once, on every rank."""
    if engine.device.type != "cuda":
        return True
    whole = sum(p.ds_numel * p.element_size() for p in engine.module.parameters())
    fits = torch.tensor(int(fits_whole(whole, free_memory(engine.device))), device=engine.device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on the device, including what the allocator holds unused. Infinite on a CPU."""
    if device.type != "cuda":
        return float("inf")
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def align_overflow(*engines) -> None:
    """fp16: if one engine overflows in this optimizer step, the others skip it too. Call after the last backward, before `step`.

    If only one model skipped, actor and critic would drift apart. The others are made to skip by faking an overflow of their own, which
    also lowers their loss scale once; it recovers.
    """
    if not engines[0].fp16_enabled():
        return
    overflowed = torch.tensor([_overflowed(e) for e in engines], dtype=torch.int32, device=engines[0].device)
    dist.all_reduce(overflowed, op=dist.ReduceOp.MAX)
    if overflowed.any():
        for one in engines:
            _overflow(one)


def _overflowed(engine) -> bool:
    """Whether the gradients that this rank will step with (whole, or its ZeRO partition) are not finite."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return not zero.grad_partitions_flat_buffer.isfinite().all()
    if _offloads(engine):  # its fp32 gradients are on the CPU, and were checked on their way there
        return zero.local_overflow
    return any(not g.isfinite().all() for g in _gradients(engine))


def _overflow(engine) -> None:
    """Make DeepSpeed believe that this step overflowed."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        zero.inf_or_nan_tracker.fill_(True)
    elif _offloads(engine):
        zero.local_overflow = True
    else:
        for gradient in _gradients(engine):
            gradient.fill_(torch.inf)


def _offloads(engine) -> bool:
    return getattr(engine.optimizer, "cpu_offload", False)


def _gradients(engine) -> Iterator[Tensor]:
    """The gradients that this rank will step with: whole, or its partitions under ZeRO-1 and -2."""
    if engine.zero_optimization_stage():
        for tensors in engine.optimizer.averaged_gradients.values():
            yield from (t for t in tensors or [] if t is not None)
    else:
        yield from (p.grad for p in engine.module.parameters() if p.grad is not None)
