"""Memory of a GPU at the moments of a stage that can be its largest, with micro batches full of the longest sequences.

Counted: weights, gradients, what the optimizer holds, activations, logits, the cache of sampling. Left out: CUDA itself (half a gigabyte)
and what the allocator wastes. tests/test_forecast.py holds it against what runs have measured.
"""

from dataclasses import dataclass

from runner.batch_sizes import micro_positions
from runner.config import ENGINES, Config
from runner.forecast.network import Network, networks, trained
from runner.plan import shares_reference
from runner.sampling_sizes import PREFILL_TOKENS, fits_whole


@dataclass(frozen=True)
class Trainee:
    """Bytes of a model that trains, on one GPU."""

    weights: float
    gradients: float
    optimizer: float  # fp32 copies and moments
    step: float  # more, for the moment in which the optimizer moves

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
        # ZeRO 2 and 3 send them to the CPU as they come
        gradients=0.0 if moved and stage >= 2 else count * size / shared(2),
        # Two moments; and fp32 copies in half precision, and wherever ZeRO lays weights out
        optimizer=0.0 if moved else count * (8 if size == 4 and not stage else 12) / shared(1),
        step=0.0 if moved or size == 4 else count * 4 / shared(1),
    )


def frozen(cfg: Config, engine: str, net: Network) -> float:
    """Bytes of the reference or of the reward model."""
    h = cfg.hardware
    if (engine == "ref" and shares_reference(cfg.model.actor)) or getattr(h.offload, engine):
        return 0.0
    return net.weights * itemsize(cfg) / (h.world_size if getattr(h.zero, engine) == 3 else 1)


def activations(cfg: Config, net: Network, tokens: float, checkpointing: bool) -> float:
    """Bytes that a forward pass keeps, with the logits of its responses and their gradient."""
    layers = net.layers * net.kept
    if checkpointing:  # the input of each layer; one layer is computed again, and has gradients half as large
        layers = net.layers * net.hidden + 1.5 * net.kept
    responses = tokens * cfg.model.max_response_tokens / (cfg.model.max_prompt_tokens + cfg.model.max_response_tokens)
    logits = 0 if net.scalar else 2 * net.vocabulary * min(responses, _chunk(cfg) or responses)
    return itemsize(cfg) * (tokens * layers + logits)


def _chunk(cfg: Config) -> int:
    return 0 if cfg.hardware.zero.actor == 3 else cfg.hardware.logits_chunk


def moments(cfg: Config, stage: str) -> dict[str, float]:
    """Bytes on the fullest GPU at the moments that can be the largest, by the phase that they belong to. states: without any batch."""
    if stage == "ppo":
        return _of_ppo(cfg, *networks(cfg))
    (engine,) = ENGINES[stage]
    net, _ = trained(cfg, engine)
    model, tokens = trainee(cfg, engine), micro_positions(cfg, stage) * (1 if stage == "sft" else 2)
    kept = activations(cfg, net, tokens, getattr(cfg.hardware.gradient_checkpointing, engine))
    states = model.trains + (frozen(cfg, "ref", net) if stage == "dpo" else 0.0)
    return {"states": states, "train": states + max(kept, model.step)}


def _of_ppo(cfg: Config, actor: Network, reward: Network) -> dict[str, float]:
    recompute, tokens = cfg.hardware.gradient_checkpointing, micro_positions(cfg, "ppo")
    teacher, critic = trainee(cfg, "actor"), trainee(cfg, "critic")
    resting = _resting(cfg, actor, reward)
    training = resting + teacher.gradients + critic.gradients
    gathered = actor.weights * itemsize(cfg) if cfg.hardware.zero.actor == 3 and samples_whole(cfg) else 0.0
    kept = max(activations(cfg, actor, tokens, recompute.actor), activations(cfg, reward, tokens, recompute.critic))
    rollout = resting + gathered + _cache(cfg, actor)
    return {"states": training, "rollout": rollout, "update": training + max(kept, teacher.step, critic.step)}


def samples_whole(cfg: Config) -> bool:
    """Whether each GPU has all weights of the actor while it samples, as engine.whole_weights will decide."""
    (actor, reward), h = networks(cfg), cfg.hardware
    free = h.memory_gb * 1e9 - _resting(cfg, actor, reward)
    return h.zero.actor != 3 or fits_whole(actor.weights * itemsize(cfg), free)


def _resting(cfg: Config, actor: Network, reward: Network) -> float:
    """Bytes of PPO's models while none of them trains, and of the average, which is in fp32."""
    teacher, critic = trainee(cfg, "actor"), trainee(cfg, "critic")
    average = 4 * actor.trained(cfg.model.actor.lora) if cfg.ppo.ema_decay else 0.0
    average /= cfg.hardware.world_size if cfg.hardware.zero.actor == 3 else 1
    return teacher.at_rest + critic.at_rest + frozen(cfg, "ref", actor) + frozen(cfg, "reward", reward) + average


def host_bytes(cfg: Config, stage: str) -> float:
    """Bytes of CPU memory on each machine that offloading takes; 0 without."""
    (actor, reward), h, size = networks(cfg), cfg.hardware, itemsize(cfg)
    trains = [trained(cfg, engine) for engine in ENGINES[stage]]
    # Moments, fp32 copies and gradients
    found = 16 * sum(net.trained(lora) for net, lora in trains) if h.offload.optimizer else 0
    found += size * actor.weights if h.offload.params and "actor" in ENGINES[stage] else 0
    if stage in ("ppo", "dpo"):
        found += size * (actor.weights if h.offload.ref and not shares_reference(cfg.model.actor) else 0)
    if stage == "ppo":
        found += size * (reward.weights if h.offload.reward else 0)
    return found / h.nodes


def slots(cfg: Config) -> int:
    return max(1, min(cfg.hardware.micro_batch.rollout, cfg.ppo.rollout_batch // cfg.hardware.world_size))


def _cache(cfg: Config, actor: Network) -> float:
    """Keys and values of the responses that are sampled at one time, and what reading their prompts takes."""
    tokens = slots(cfg) * (cfg.model.max_prompt_tokens + cfg.model.max_response_tokens)
    reading = min(PREFILL_TOKENS, slots(cfg) * cfg.model.max_prompt_tokens) * actor.kept
    return itemsize(cfg) * (tokens * actor.cache + reading + slots(cfg) * actor.vocabulary)
