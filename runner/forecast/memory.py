"""GPU memory at the moments of a stage when it can peak, with micro batches of sequences of maximum length.

Counted: weights, gradients, optimizer states, activations, logits, the cache of sampling. Left out: CUDA itself (half a gigabyte) and
fragmentation. tests/test_forecast.py compares it with measured runs.
"""

from dataclasses import dataclass

from runner.batch_sizes import PREFILL_TOKENS, fits_whole, micro_positions
from runner.config.schema import ENGINES, Config
from runner.forecast.sizes import Sizes, frozen, model_sizes, trained


@dataclass(frozen=True)
class Trainee:
    """Bytes of a model in training, on one GPU."""

    weights: float
    gradients: float
    optimizer: float  # fp32 copies and moments
    step: float  # on top, while the optimizer steps

    @property
    def at_rest(self) -> float:
        return self.weights + self.optimizer

    @property
    def trains(self) -> float:
        return self.at_rest + self.gradients


def itemsize(cfg: Config) -> int:
    return 4 if cfg.hardware.precision == "fp32" else 2


def trainee(cfg: Config, engine: str) -> Trainee:
    """engine: actor or critic."""
    h, size, (net, lora) = cfg.hardware, itemsize(cfg), trained(cfg, engine)
    count, stage, moved = net.trained(lora), getattr(h.zero, engine), h.offload.optimizer

    def shared(from_stage: int) -> int:
        return h.world_size if stage >= from_stage else 1

    weights = (net.weights + (net.adapters(lora) if lora.dim else 0)) * size / shared(3)
    return Trainee(
        weights=0.0 if h.offload.params and engine == "actor" else weights,
        # With offloading, ZeRO-2 and -3 move them to the CPU as they are made
        gradients=0.0 if moved and stage >= 2 else count * size / shared(2),
        # Two moments; and an fp32 copy of the weights, except in fp32 without ZeRO
        optimizer=0.0 if moved else count * (8 if size == 4 and not stage else 12) / shared(1),
        step=0.0 if moved or size == 4 else count * 4 / shared(1),
    )


def read_only(cfg: Config, stage: str) -> float:
    """Bytes of the models that a stage only reads."""
    h, kept = cfg.hardware, {name: net for name, net in frozen(cfg, stage).items() if not getattr(cfg.hardware.offload, name)}
    return sum(net.weights * itemsize(cfg) / (h.world_size if getattr(h.zero, name) == 3 else 1) for name, net in kept.items())


def activations(cfg: Config, net: Sizes, tokens: float, checkpointing: bool) -> float:
    """Bytes that a forward pass keeps for the backward, plus the response logits and their gradient."""
    layers = net.layers * net.kept
    if checkpointing:  # the input of each layer; of the one being recomputed everything, and gradients half that size
        layers = net.layers * net.hidden + 1.5 * net.kept
    responses = tokens * cfg.model.max_response_tokens / (cfg.model.max_prompt_tokens + cfg.model.max_response_tokens)
    logits = 0 if net.scalar else 2 * net.vocabulary * min(responses, _chunk(cfg) or responses)
    return itemsize(cfg) * (tokens * layers + logits)


def _chunk(cfg: Config) -> int:
    return 0 if cfg.hardware.zero.actor == 3 else cfg.hardware.logits_chunk


def peaks(cfg: Config, stage: str) -> dict[str, float]:
    """Bytes on the fullest GPU when memory can peak, by phase. states: without any batch."""
    if stage == "ppo":
        return _of_ppo(cfg, *model_sizes(cfg))
    (engine,) = ENGINES[stage]
    net, _ = trained(cfg, engine)
    model, tokens = trainee(cfg, engine), micro_positions(cfg, stage) * (1 if stage == "sft" else 2)
    kept = activations(cfg, net, tokens, getattr(cfg.hardware.gradient_checkpointing, engine))
    states = model.trains + read_only(cfg, stage)
    return {"states": states, "train": states + max(kept, model.step)}


def _of_ppo(cfg: Config, actor: Sizes, reward: Sizes) -> dict[str, float]:
    recompute, tokens = cfg.hardware.gradient_checkpointing, micro_positions(cfg, "ppo")
    policy, critic = trainee(cfg, "actor"), trainee(cfg, "critic")
    resting = _resting(cfg, actor, reward)
    training = resting + policy.gradients + critic.gradients
    gathered = actor.weights * itemsize(cfg) if cfg.hardware.zero.actor == 3 and samples_whole(cfg) else 0.0
    kept = max(activations(cfg, actor, tokens, recompute.actor), activations(cfg, reward, tokens, recompute.critic))
    rollout = resting + gathered + _cache(cfg, actor)
    return {"states": training, "rollout": rollout, "update": training + max(kept, policy.step, critic.step)}


def samples_whole(cfg: Config) -> bool:
    """Whether each GPU holds all weights of the actor while it samples, as engine.whole_weights will decide."""
    (actor, reward), h = model_sizes(cfg), cfg.hardware
    free = h.memory_gb * 1e9 - _resting(cfg, actor, reward)
    return h.zero.actor != 3 or fits_whole(actor.weights * itemsize(cfg), free)


def _resting(cfg: Config, actor: Sizes, reward: Sizes) -> float:
    """Bytes of PPO's models while none of them trains, averaged weights (fp32) included."""
    policy, critic = trainee(cfg, "actor"), trainee(cfg, "critic")
    average = 4 * actor.trained(cfg.model.actor.lora) if cfg.ppo.ema_decay else 0.0
    average /= cfg.hardware.world_size if cfg.hardware.zero.actor == 3 else 1
    return policy.at_rest + critic.at_rest + read_only(cfg, "ppo") + average


def host_bytes(cfg: Config, stage: str) -> float:
    """Bytes of CPU memory that offloading takes on each machine; 0 without offloading."""
    (actor, _), h, size = model_sizes(cfg), cfg.hardware, itemsize(cfg)
    trains = [trained(cfg, engine) for engine in ENGINES[stage]]
    # Moments, fp32 copies and gradients
    found = 16 * sum(net.trained(lora) for net, lora in trains) if h.offload.optimizer else 0
    found += size * actor.weights if h.offload.params and "actor" in ENGINES[stage] else 0
    found += sum(size * net.weights for name, net in frozen(cfg, stage).items() if getattr(h.offload, name))
    return found / h.nodes


def slots(cfg: Config) -> int:
    """Responses that a GPU samples at a time."""
    return max(1, min(cfg.hardware.micro_batch.rollout, cfg.ppo.rollout_batch // cfg.hardware.world_size))


def _cache(cfg: Config, actor: Sizes) -> float:
    """Bytes of sampling: keys and values of the responses sampled at a time, activations of the prefill, one step's logits."""
    tokens = slots(cfg) * (cfg.model.max_prompt_tokens + cfg.model.max_response_tokens)
    reading = min(PREFILL_TOKENS, slots(cfg) * cfg.model.max_prompt_tokens) * actor.kept
    return itemsize(cfg) * (tokens * actor.cache + reading + slots(cfg) * actor.vocabulary)
