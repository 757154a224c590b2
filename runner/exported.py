"""Exported models, for `runner.chat` and `runner.compare`: which one a path means, and loading it without a configuration.

`command` is what was typed before the path, such as `python -m runner.chat`: errors say what to type after it instead.
"""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.checks.paths import no_checkpoint
from runner.checks.secrets import redact
from runner.errors import UserError

TEMPLATE = Path(__file__).parent.parent / "conf" / "model" / "family" / "base.yaml"
# Stages that leave an actor, best first; and a reward model
ACTORS, REWARD = ("ppo", "dpo", "sft"), ("reward",)


# --- which one --------------------------------------------------------------------------------------------------------


def find(path: str, command: str, stages: Sequence[str] = ACTORS) -> str:
    """The checkpoint that `path` means: itself, the model/ of a step folder, the newest of a run's folder, or a hub id.

    stages: of a run, the first of these that it has trained.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and path.count("/") < 2 and not path.startswith((".", "/", "~", "runs")):
        return path
    commands = sorted(folder.glob("????-??-??_??-??-??"), reverse=True)  # of runs/NAME; a sweep has many models, so it is left out
    models = [place / stage / "model" for place in (folder, *commands) for stage in stages]
    inside = [place for place in (folder, folder / "model", *models) if (place / "config.json").is_file()]
    if not inside:
        if folder.is_dir() and (jobs := of_sweep(folder, stages)):
            some = "".join(f"\n  {command} {model}" for model in jobs)
            raise UserError(f"{path} holds a sweep, whose jobs have a model each. Type one of:{some}")
        why = no_checkpoint(folder, f"type {command} ") if folder.exists() else "does not exist"
        raise UserError(f"{path} {why}" + ("" if command in why else f". {instead(path, command, stages)}"))
    if inside[0] != folder:
        print(f"using {inside[0]}", file=sys.stderr)
    return str(inside[0])


def of_sweep(folder: Path, stages: Sequence[str]) -> list[Path]:
    """The model of each job of a sweep: of this one, or of the newest in a run's folder that has any."""
    for sweep in (folder, *sorted(folder.glob("*_sweep"), reverse=True)):
        jobs = sorted((job for job in sweep.glob("*") if job.name.isdigit()), key=lambda job: int(job.name))
        models = [[job / stage / "model" for stage in stages] for job in jobs]
        found = [next((model for model in of_job if (model / "config.json").is_file()), None) for of_job in models]
        if any(found):
            return list(filter(None, found))
    return []


def instead(path: str, command: str, stages: Sequence[str] = ACTORS) -> str:
    """What to type instead of `path`: the most recently trained model under runs/store, if there is another one."""
    found = [p.parent for stage in stages for p in Path("runs/store").glob(f"{stage}-*/model/config.json")]
    others = [model for model in found if model.resolve() != Path(path).resolve()]
    what = f"FOLDER (the model/ of {'a reward' if stages == REWARD else 'an SFT, DPO or PPO'} step)"
    return f"Type {command} {max(others, key=lambda p: p.stat().st_mtime, default=what)}"


def as_trained(path: str) -> tuple[float, list[str]]:
    """Tokens of the longest prompt in training, and PPO's stop strings, from the config.yaml of the model's step.

    Infinite and none for a model that was not trained here.
    """
    import yaml

    file = Path(path).resolve().parent / "config.yaml"
    config = yaml.safe_load(file.read_text()) if file.exists() else None
    model, ppo = ((config.get(name) if isinstance(config, dict) else None) or {} for name in ("model", "ppo"))
    if "max_prompt_tokens" not in model:  # another program's
        return math.inf, []
    return model["max_prompt_tokens"], ppo.get("stop") or []


# --- loading ----------------------------------------------------------------------------------------------------------


def load_actor(path: str, command: str):
    """Tokenizer and model, on the GPU if there is one. Raises UserError for anything that writes no answers."""
    prepare(path)
    import transformers
    import yaml

    from runner.models.loading import load_weights
    from runner.models.tokenizer import NoEos, check_template, load_tokenizer, set_template

    try:
        if _scores(_config(path, command)):
            raise UserError("it is a reward model or critic, which scores dialogues and writes none")
        try:
            tokenizer = load_tokenizer(path)
        except NoEos as error:  # it advises a key of the configuration, which there is none of
            raise UserError(
                "its tokenizer has no EOS: no answer would ever end. Name eos_token in the tokenizer_config.json of a local copy"
            ) from error
        model = load_weights(transformers.AutoModelForCausalLM, path, dtype=dtype(), trust_remote_code=False).to(device()).eval()
    except Exception as error:  # whatever transformers, safetensors and the hub raise
        raise _cannot_load(path, error, instead(path, command)) from error
    # A model that was not trained here may have no template: use ours
    if not tokenizer.chat_template:
        set_template(tokenizer, yaml.safe_load(TEMPLATE.read_text())["chat_template"])
    check_template(tokenizer, f"the chat template of {path}")
    return tokenizer, model


def load_reward(path: str, command: str):
    """Tokenizer and reward model, a Scalar that no longer trains. Raises UserError for anything else."""
    prepare(path)
    from runner.models.loading import load_scalar
    from runner.models.tokenizer import load_tokenizer
    from runner.models.wrappers import Scalar

    try:
        config = _config(path, command)
        if not _scores(config):
            raise UserError("it is no reward model")
        if hasattr(config, "value_mean"):  # runner.stages.ppo.export_all writes it
            raise UserError("it is PPO's critic, whose values are in other units than scores")
        tokenizer = load_tokenizer(path)
        model = load_scalar(path, tokenizer, fresh_head=False, seed=0, dtype=dtype(), attention="auto", dropout=0.0)
    except Exception as error:
        raise _cannot_load(path, error, instead(path, command, REWARD)) from error
    return tokenizer, Scalar(model.to(device()).eval().requires_grad_(False), model.config.model_type)


def prepare(path: str) -> None:
    """What must be set before transformers and torch are imported."""
    from runner.preflight import hub_answers
    from runner.watch.machine import share_cores

    share_cores(os.environ)
    # Without network the hub's client would retry for half a minute

    if not Path(path).exists() and "HF_HUB_OFFLINE" not in os.environ and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"
    if device() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, when it is imported, says that it found no GPU
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype():
    """The checkpoint's own on a GPU; half precision is slow on most CPUs."""
    import torch

    return "auto" if torch.cuda.is_available() else torch.float32


def context_of(path: str, command: str) -> int | None:
    """Tokens that a model reads at most; None without a limit, as with ALiBi. Also for what cannot be loaded: loading it says why."""
    from runner.model_folders import positions_of

    try:
        return positions_of(_config(path, command).to_dict())
    except Exception:  # the hub's, or of a broken file
        return None


def _config(path: str, command: str):
    import transformers

    from runner.checks.trust import refuse_code

    refuse_code(path, None, remedy=f"load it with transformers yourself; {command} runs no code but its own")
    return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)


def _scores(config) -> bool:
    """Whether the checkpoint was saved from a classifier."""
    return (config.architectures or [""])[0].endswith("ForSequenceClassification")


def _cannot_load(path: str, error: Exception, otherwise: str) -> UserError:
    why = redact((str(error) or repr(error)).splitlines()[0]).rstrip(".")
    return UserError(f"cannot load {path}: {why}. {otherwise}")
