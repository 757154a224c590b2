"""Sizes of a network, from the shape in a preset or a config.json. Loads no model and no torch."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from runner import flops
from runner.checks.paths import is_local
from runner.config.schema import Config, Lora, ModelPart, frozen_models
from runner.families import FAMILIES
from runner.files import read_json


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network, in numbers (not bytes)."""

    family: str
    layers: int
    hidden: int
    inner: int  # of the MLP
    query_width: int  # heads x head_dim
    key_width: int  # key heads x head_dim
    vocabulary: int
    embedding: int  # width of the embedding table and of the head's input; in OPT-350M not the hidden size
    tied: bool
    scalar: bool  # a reward model: its head is too small to count

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of the matrices of one layer, in the order of the family's lora_targets."""
        names = FAMILIES[self.family].lora_targets
        up = [(self.hidden, self.inner)] * (2 if "gate_proj" in names else 1)
        reads = [(self.hidden, self.query_width), (self.hidden, self.key_width), (self.hidden, self.key_width)]
        if "query_key_value" in names:
            reads = [(self.hidden, self.query_width + 2 * self.key_width)]
        return [*reads, (self.query_width, self.hidden), *up, (self.inner, self.hidden)]

    @property
    def body(self) -> int:
        projections = 2 * self.embedding * self.hidden if self.embedding != self.hidden else 0
        return self.layers * sum(i * o for i, o in self.matrices) + projections

    @property
    def head(self) -> int:
        return 0 if self.scalar else self.vocabulary * self.embedding

    @property
    def weights(self) -> int:
        """All matrices, embeddings included, and the head if it is not tied. Vectors (norms, biases) are left out."""
        return self.body + self.vocabulary * self.embedding + (0 if self.tied else self.head)

    @property
    def kept(self) -> float:
        """Values per token that a layer keeps for its backward pass."""
        of_hidden, of_inner = FAMILIES[self.family].kept
        return of_hidden * self.hidden + of_inner * self.inner

    @property
    def cache(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.layers * self.key_width

    def adapters(self, lora: Lora) -> int:
        named = zip(FAMILIES[self.family].lora_targets, self.matrices, strict=True)
        return self.layers * lora.dim * sum(i + o for name, (i, o) in named if not lora.targets or name in lora.targets)

    def trained(self, lora: Lora) -> int:
        if not lora.dim:
            return self.weights
        return self.adapters(lora) + (self.weights - self.body if lora.train_rest else 0)

    def matrix_sizes(self, lora: Lora) -> flops.MatrixSizes:
        extra, full = self.adapters(lora), not lora.dim
        trained = self.head if full or lora.train_rest else 0
        return flops.MatrixSizes(
            self.body + extra, self.body if full else extra, self.head, trained, self.layers * self.query_width, self.cache
        )


def sizes_of(family: str, shape: dict, scalar: bool) -> Sizes | None:
    """From the shape in a preset, or from a config.json; None if sizes are missing."""
    layers, heads = (shape.get(a) or shape.get(b) for a, b in (("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads")))
    hidden, vocabulary = shape.get("hidden_size") or shape.get("n_embed"), shape.get("vocab_size")
    if not all(isinstance(size, int) and size > 0 for size in (layers, heads, hidden, vocabulary)):  # a config.json may hold anything
        return None
    width = shape.get("head_dim") or hidden // heads
    key_heads = shape.get("num_key_value_heads") or heads
    inner = shape.get("ffn_dim") or shape.get("intermediate_size") or 4 * hidden
    embedding = shape.get("word_embed_proj_dim") or hidden
    tied = shape.get("tie_word_embeddings", FAMILIES[family].tied)
    return Sizes(family, layers, hidden, inner, heads * width, key_heads * width, vocabulary, embedding, tied, scalar)


def model_sizes(cfg: Config) -> tuple[Sizes, Sizes] | None:
    """Actor and reward model; None unless the sizes of both are known."""
    parts = ((cfg.model.actor, cfg.sft, False), (cfg.model.reward, cfg.reward, True))
    found = [sizes_of(cfg.model.family, _shape(part, block and block.use), scalar) for part, block, scalar in parts]
    return (found[0], found[1]) if all(found) else None


def trained(cfg: Config, engine: str) -> tuple[Sizes, Lora]:
    """The network of an engine (actor or critic), and its adapters."""
    actor, reward = model_sizes(cfg)
    return (actor, cfg.model.actor.lora) if engine == "actor" else (reward, cfg.model.reward.lora)


def frozen(cfg: Config, stage: str) -> dict[str, Sizes]:
    """The networks of the models that a stage only reads."""
    actor, reward = model_sizes(cfg)
    return {name: actor if name == "ref" else reward for name in frozen_models(cfg, stage)}


def _shape(part: ModelPart, pinned: str | None) -> dict:
    """The shape of random weights is the configuration's, that of a folder is in its config.json, and that of a hub model is in the preset
    that names it. Never the configured shape for another path: it belongs to the preset's own."""
    if part.random and not pinned:
        return part.shape
    path = pinned or part.path
    settings = Path(path) / "config.json"
    if is_local(path) and settings.exists():
        return read_json(settings)
    return _described().get(path, {})


@cache
def _described() -> dict[str, dict]:
    """Hub id (or folder) -> shape, for all models in conf/model."""
    found = {}
    for file in sorted((Path(__file__).parents[2] / "conf" / "model").rglob("*.yaml")):
        preset = OmegaConf.load(file)
        for part in (preset.get("actor"), preset.get("reward")):
            if part and part.get("path") and part.get("shape"):
                found[part.path] = OmegaConf.to_container(part.shape)
    return found
