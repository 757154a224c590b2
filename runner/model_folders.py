"""Model folders: whether one that was given holds what its key asks for, and whether a result is still whole. Loads nothing."""

from pathlib import Path

from runner.checks.paths import no_checkpoint, no_folder
from runner.checks.trust import check_vocabulary, check_weights, refuse_code
from runner.config.limits import too_long
from runner.config.schema import Model
from runner.errors import UserError
from runner.families import check_family, check_same_family
from runner.files import read_json
from runner.formatting import short


def checked_files(model: Model, key: str, path: str) -> list[list]:
    """The files of a local checkpoint, given under `key`: name, size and time of each. Where the folder is does not matter.

    Raises UserError for a folder that is no checkpoint of a family that we know (under model.*.path: of the preset's family), for another
    kind of model, and for one without weights, tokenizer, or positions enough.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(no_folder(key, path))
    if not (folder / "config.json").exists():
        raise UserError(f"{key}={path} {no_checkpoint(folder, f'type {key}=')}")
    settings = read_json(folder / "config.json")
    check_family(f"{key}={path}", settings.get("model_type"))
    if not key.endswith(".use"):
        check_same_family(f"{key}={path}", settings["model_type"], model.name, model.family)
    _check_kind(key, path, settings)
    if not model.trust_remote_code:  # then its tokenizer may be of any kind
        refuse_code(path, None)
        check_vocabulary(folder)
    if message := too_long(model, path, positions_of(settings)):
        raise UserError(message)
    check_weights(folder)
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir()) if p.is_file()]


def positions_of(settings: dict) -> int | None:
    """Tokens that a model reads at most, from its config.json; None without a limit.

    LongRoPE takes other frequencies from a length on, for all rows of a batch in which one is as long: a row's log-probabilities would
    depend on the others. Up to that length it is as any other.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}  # a config.json may hold anything
    first = rope.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    return first if "longrope" in (rope.get("rope_type"), rope.get("type")) and first else settings.get("max_position_embeddings")


def _check_kind(key: str, path: str, settings: dict) -> None:
    """Raise UserError for a reward model in place of a language model, for the reverse, a classifier of several labels, and a critic.

    settings: config.json of the checkpoint that was given under `key`.
    """
    kind, stage = "".join(map(str, settings.get("architectures") or ())), key.removesuffix(".use")
    scores = kind.endswith("ForSequenceClassification")
    if key.endswith(".use") and kind and (stage == "reward") != scores:
        wanted = "a reward model (ForSequenceClassification)" if stage == "reward" else "a language model (ForCausalLM)"
        raise UserError(f"{key}={path} holds {kind}, but {stage} is {wanted}: give the folder of one")
    if key == "model.actor.path" and scores:
        raise UserError(f"{key}={path} holds {kind}, which scores texts and writes none: give the folder of a language model")
    if key in ("model.reward.path", "reward.use") and "value_mean" in settings:  # runner.stages.ppo.export_all writes it
        raise UserError(
            f"{key}={path} is PPO's critic, whose values are in other units than a reward model's scores: give the model/ of a reward step"
        )
    named = settings.get("id2label")
    labels = len(named) if isinstance(named, dict) else 2  # config.json names labels unless there are two
    if key in ("model.reward.path", "reward.use") and scores and labels > 1:
        raise UserError(f"{key}={path} sorts texts into {labels} labels; a reward model gives one score: give one that was trained as such")


def check_result(folder: Path) -> None:
    """Raise UserError for a finished step whose model someone has deleted or truncated since."""
    try:
        for name in ("result.json", "model/config.json"):
            read_json(folder / name)
        check_weights(folder / "model")
        check_vocabulary(folder / "model")
    except UserError as error:
        what = str(error).replace(f"{folder}/", "")
        raise UserError(f"{short(folder)} says DONE, but {what}. Delete the folder to train it again") from error
