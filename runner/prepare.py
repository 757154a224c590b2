"""Everything that can be wrong with the inputs is found here, before the first stage trains.

Runs once, in the launcher: looks up models and data sets, compares tokenizers, reads, splits and tokenises the data into the store. The
workers only open files.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile

from runner.amounts import check_amounts
from runner.checks.paths import is_local, no_folder
from runner.checks.secrets import redact
from runner.config.limits import too_long
from runner.config.schema import Config, ModelPart
from runner.data.sources import data_key
from runner.durable.lock import lock
from runner.errors import UserError, did_you_mean
from runner.families import check_family, check_same_family
from runner.files import hash_of, whole_folder
from runner.model_folders import positions_of
from runner.plan import Step
from runner.preflight import preflight

NO_TEMPLATE = "Leave model.chat_template out, which is the Human/Assistant format, or type a template"


def prepare(cfg: Config, steps: list[Step]) -> dict[str, dict]:
    """Inputs of each step that is still to run: {"tokenizer": folder or id, "base": model or None, "data": ..., "ptx": ...}."""
    missing = [step for step in steps if not step.done]
    if not missing:
        return {}
    preflight(cfg, steps)

    from runner.data import cache

    for client in ("httpx", "httpx2", "urllib3"):  # Hydra logs what they say: every address, in which there may be a password
        logging.getLogger(client).setLevel(logging.WARNING)
    store = _writable(cfg.store)
    by_stage = {step.stage: step for step in steps}
    tokenizers = _tokenizers(cfg, store, by_stage)
    for step in steps:
        if step.pinned:
            _check_context(cfg, step.pinned, _config(cfg, f"{step.stage}.use", step.pinned, None))
    inputs = {}
    for step in missing:
        part = "reward" if step.stage == "reward" else "actor"
        path, tokenizer = tokenizers[part]
        base = None if step.parents else base_model(cfg, store, part, tokenizer)
        data = cache.build(store, cfg.dataset, step.stage, tokenizer, cfg.model)
        inputs[step.stage] = {"tokenizer": path, "base": base, "data": str(data), "ptx": None}
        check_amounts(cfg, step.stage, cache.counts_of(data))
        if step.stage == "ppo" and cfg.ppo.ptx_coef:
            if cfg.dataset.pretrain:
                texts = cache.build_pretrain(store, cfg.dataset, tokenizer, cfg.model)
            else:  # the demonstrations of SFT
                texts = cache.build(store, cfg.dataset, "sft", tokenizer, cfg.model)
            inputs["ppo"]["ptx"] = str(texts)
    return inputs


def _writable(store: str) -> Path:
    path = Path(store).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"store={store} cannot be created ({error.strerror}): type store=/a/folder/of/yours") from error
    try:
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"store={store} cannot be written to ({error.strerror}): type store=/a/folder/of/yours") from error
    return path


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _tokenizers(cfg: Config, store: Path, steps: dict[str, Step]) -> dict[str, tuple[str, object]]:
    """(path, tokenizer) of actor and reward model, as far as the steps need them. They must agree."""
    found = {}
    for part, stage in (("actor", "sft"), ("reward", "reward")):
        if stage in steps:
            pinned, source, key = steps[stage].pinned, getattr(cfg.model, part), f"model.{part}.path"
            if pinned:
                source, key = ModelPart(pinned, None, {}, source.lora), f"{stage}.use"
            found[part] = _tokenizer(cfg, store, source, key)
    if "ppo" in steps and "actor" in found:
        _check_stops(cfg.ppo.stop, *found["actor"])
    if len(found) == 2:
        from runner.models.tokenizer import same_tokens

        (actor, a), (reward, b) = found["actor"], found["reward"]
        if not same_tokens(a, b):
            raise UserError(
                f"actor {actor} and reward model {reward} have different tokenizers: the reward model could not read what the actor "
                f"writes. {_one_tokenizer(cfg, steps)}"
            )
    return found


def _check_stops(strings: list[str], path: str, tokenizer) -> None:
    from runner.models.token_bytes import token_bytes
    from runner.models.tokenizer import encode, special_in

    for string in strings:
        if (token := special_in(tokenizer, string)) is not None:
            instead = (
                "responses end there anyway" if token == tokenizer.eos_token else f"to end responses there, type model.end_token='{token}'"
            )
            raise UserError(f"ppo.stop: {string!r} holds {token}, a special token of {path}, which no text shows: leave it out; {instead}")
        written = b"".join(token_bytes(tokenizer, encode(tokenizer, [string])[0]))
        if string.encode() not in written:
            as_read = written.decode(errors="replace")
            raise UserError(f"ppo.stop: {string!r} would never be found, for {path} writes it as {as_read!r}: leave it out, or type that")


def _one_tokenizer(cfg: Config, steps: dict[str, Step]) -> str:
    """How to get two models with the same tokenizer."""
    pinned = [stage for stage in ("sft", "reward") if steps[stage].pinned]
    random = [stage for stage, part in (("sft", cfg.model.actor), ("reward", cfg.model.reward)) if part.random]
    own = [stage for stage in random if stage not in pinned]
    if pinned and own:
        given, made = f"{pinned[0]}.use", own[0]
        return (
            f"{given} brings the tokenizer of its own run; the {made} model starts from random weights and gets one trained on the data of "
            f"this command. Use the data and model of the run that {given} comes from, or give both models of one run: {made}.use=..."
        )
    if not pinned and own == ["sft"]:
        return "The actor starts from random weights, with a tokenizer trained on the data: type model.actor.path=... too"
    key = "reward.use" if "reward" in pinned else "model.reward.path"
    return f"Give a reward model that has the actor's: {key}=..."


def _tokenizer(cfg: Config, store: Path, part: ModelPart, key: str) -> tuple[str, object]:
    from runner.models.tokenizer import check_template, load_tokenizer, read_tokenizer, set_template

    path = part.path or _own_tokenizer(cfg, store)
    options = {"revision": part.revision, "trust_remote_code": cfg.model.trust_remote_code}
    with _loading("the tokenizer of this data, in the store" if part.random else key, path):
        if cfg.model.end_token and cfg.model.end_token not in (vocabulary := read_tokenizer(path, **options).get_vocab()):
            _new_end(cfg, path, key, vocabulary)
        tokenizer = load_tokenizer(path, end_token=cfg.model.end_token, **options)
        own = tokenizer.chat_template
        if cfg.model.chat_template is not None:
            set_template(tokenizer, cfg.model.chat_template)
    if tokenizer.chat_template is None:
        raise UserError(f"{path} has no chat template, and model.chat_template=null asks for it. {NO_TEMPLATE}")
    check_template(tokenizer, "model.chat_template")
    if own not in (None, tokenizer.chat_template):
        _note_template(path)
    return path, tokenizer


def _new_end(cfg: Config, path: str, key: str, vocabulary: dict[str, int]) -> None:
    """Say that model.end_token is a new token, or refuse it: its rows are not among the adapters, which alone are trained and exported."""
    from runner.models.tokenizer import ENDS

    part = "reward" if "reward" in key else "actor"
    new = f"model.end_token={cfg.model.end_token} is not in the vocabulary of {path}"
    if getattr(cfg.model, part).adapters_only:
        ends = [token for token in ENDS if token in vocabulary]
        raise UserError(
            f"{new}, and adapters alone neither train nor export a new token: type a token of the vocabulary"
            f"{f' (such as {ends[0]})' if ends else ''}, or model.{part}.lora.train_rest=true"
        )
    _note_new_end(new)


@lru_cache
def _note_new_end(new: str) -> None:
    print(f"note: {new}: it is added as a new token, and training has to teach it", file=sys.stderr)


@lru_cache
def _note_template(path: str) -> None:
    """Once, though actor and reward model may be the same checkpoint."""
    print(
        f"note: {path} has a chat template of its own, which model.chat_template replaces. To keep it, type model.chat_template=null",
        file=sys.stderr,
    )


def _own_tokenizer(cfg: Config, store: Path) -> str:
    """A tokenizer for models with random weights, trained on the demonstrations."""
    from runner.data.encoder import training_texts
    from runner.models.tokenizer import check_template, train_tokenizer

    if cfg.model.chat_template is None:
        raise UserError(f"model.chat_template=null asks for that of a checkpoint, and random weights have none. {NO_TEMPLATE}")
    facts = [data_key(cfg.dataset, "sft"), cfg.model.chat_template, cfg.model.tokenizer_vocab]
    name = f"tokenizer-{hash_of(facts)[:10]}"
    folder = store / "base" / name
    with lock(store / "locks" / name, "the tokenizer"):
        if not folder.exists():
            blank = train_tokenizer([], 300)
            blank.chat_template = cfg.model.chat_template
            check_template(blank, "model.chat_template")
            tokenizer = train_tokenizer(training_texts(cfg.dataset, blank), cfg.model.tokenizer_vocab)
            with whole_folder(folder) as work:
                tokenizer.save_pretrained(work)
    return str(folder)


# --- models -----------------------------------------------------------------------------------------------------------


def base_model(cfg: Config, store: Path, name: str, tokenizer) -> str:
    """Where the worker loads the first weights of `name` (actor or reward) from: a checkpoint, or for random ones a config alone."""
    from transformers import AutoConfig

    part = getattr(cfg.model, name)
    if not part.random:
        config = _config(cfg, f"model.{name}.path", part.path, part.revision)
        check_same_family(f"model.{name}.path={part.path}", config.model_type, cfg.model.name, cfg.model.family)
        _check_context(cfg, part.path, config)
        return part.path
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    shape = part.shape | {"vocab_size": max(part.shape.get("vocab_size", 0), len(tokenizer))}
    with _sizing(f"model.{name}.shape"):
        config = AutoConfig.for_model(cfg.model.family, **shape, **ids)
    _check_names_of_sizes(config, shape, f"model.{name}.shape")
    _check_context(cfg, f"model.{name}.shape", config)
    folder = store / "base" / f"{cfg.model.family}-{hashlib.sha256(config.to_json_string().encode()).hexdigest()[:10]}"
    with lock(store / "locks" / folder.name, "the random model"):
        if not folder.exists():
            _check_network(config, f"model.{name}.shape")
            with whole_folder(folder) as work:
                config.save_pretrained(work)
    return str(folder)


def _config(cfg: Config, key: str, path: str, revision: str | None):
    """The config.json of a checkpoint that was typed under `key`."""
    from transformers import AutoConfig

    with _loading(key, path):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=cfg.model.trust_remote_code)
    check_family(f"{key}={path}", config.model_type)
    return config


def _check_names_of_sizes(config, shape: dict, key: str) -> None:
    """Refuse sizes that the family does not have: transformers silently ignores them. Old names are fine, it translates those."""
    known = vars(type(config)())
    for size in shape:
        if size in vars(config) and size not in known:
            raise UserError(f"{key}.{size}: the family {config.model_type} has no such size{did_you_mean(size, list(known))}")


def _check_network(config, key: str) -> None:
    """Check that the sizes fit together, by building the network on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with _sizing(key), torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


@contextmanager
def _sizing(key: str) -> Iterator[None]:
    """Turn whatever transformers raises about a size into one message."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise UserError(f"{key} is refused by transformers: {lines[-1].strip()}") from error


def _check_context(cfg: Config, of: str, config) -> None:
    if message := too_long(cfg.model, of, positions_of(config.to_dict())):
        raise UserError(message)


@contextmanager
def _loading(key: str, path: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into one message about the checkpoint at `path`: libraries raise anything on a broken file.

    key: where the path was given, and where to type another one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_cannot_load(key, path, redact(_first_line(error)))) from error


def _first_line(error: Exception) -> str:
    if isinstance(error, LookupError):  # its message is the key alone
        return repr(error)
    return (str(error) or repr(error)).splitlines()[0].removesuffix(" from one of: ")


def _cannot_load(key: str, path: str, why: str) -> str:
    if is_local(path):
        return f"{key}={path} cannot be loaded: {why}" if Path(path).exists() else no_folder(key, path)
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return (
            f"model {path} is not in the local Hugging Face cache, and the hub cannot be reached. Download it where there is a network "
            f"(`hf download {path} --local-dir FOLDER`) and type {key}=FOLDER; behind a proxy set HTTPS_PROXY; without any model: "
            "model=tiny, or random weights with model.actor.path=null model.reward.path=null"
        )
    return f"{key}={path} cannot be loaded: {why}. Check the name; a gated model needs `hf auth login`"
