"""What run.py says: the plan, and one clear message for whatever is wrong with the input.

Most commands run in this process, as `python run.py ...` would; those that depend on what is imported, or on the environment
at the start, are processes of their own.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import configured

from runner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RUN = str(ROOT / "run.py")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, with an environment in which nothing has been decided yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it comes back as it was
        monkeypatch.delenv(name)
    return tmp_path


def process(*overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """run.py as a process of its own."""
    unset = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "HF_HUB_OFFLINE")}
    command = [sys.executable, RUN, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=unset | environment)


@pytest.fixture
def refused(here, monkeypatch, capfd):
    """Runs run.py in this process and returns its one message, after checking that it is one."""

    def run(*overrides: str) -> str:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # run.py sets it
        monkeypatch.setattr("sys.argv", [RUN, *overrides])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(RUN, run_name="__main__")
        said = capfd.readouterr()
        # sys.exit("...") prints its argument as the interpreter ends, and exits with 1
        return one_message(said.err if caught.value.code == 1 else str(caught.value.code))

    return run


def one_message(text: str) -> str:
    """The message at the end of what went to stderr; progress may come before it."""
    assert text.count("error: ") == 1, text
    for leak in ("Traceback", "Error executing job", "full_key", "object_type", "HYDRA_FULL_ERROR", "use +"):
        assert leak not in text, text
    return text.strip().partition("error: ")[2]


# --- the plan ---------------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "transformers", "datasets", "deepspeed", "numpy"):
            raise AssertionError("imports " + name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory) -> str:
    """A PYTHONPATH under which importing torch, transformers, datasets, deepspeed or numpy fails."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WITHOUT_TORCH)
    return str(folder)


@pytest.mark.parametrize("option, shows", [(["--help"], "Powered by Hydra"), (["--cfg", "job"], "kl_coef: 0.05")])
def test_help_and_configuration_come_without_torch(option, shows, without_torch):
    done = process(*option, PYTHONPATH=without_torch)
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout


def test_the_plan_comes_without_torch_and_shows_everything(here, without_torch):
    done = process("model=opt13b", "hardware=dgx8", "dry_run=true", PYTHONPATH=without_torch, HYDRA_FULL_ERROR="1")
    assert done.returncode == 0, done.stderr
    plan = done.stdout
    assert "hardware=dgx8 (8 GPU, bf16)" in plan
    for stage, algebra in (("sft", "128 = 4 x 8 x 4"), ("reward", "64 = 4 x 8 x 2"), ("ppo", "64 = 2 x 8 x 4")):
        assert any(line.split()[:2] == [stage, "run"] and algebra in line for line in plan.splitlines())
        assert f"{stage}: launch command, 8 ranks\n" in plan
    assert plan.count("--nproc-per-node=8 -m runner.worker") == 3
    shown = engines(plan)
    assert list(shown) == ["sft actor", "reward reward", "ppo actor", "ppo critic", "ppo ref"]  # its reward model is replicated
    assert all(config["zero_optimization"]["stage"] == 3 for config in shown.values())
    assert shown["sft actor"]["train_micro_batch_size_per_gpu"] == shown["sft actor"]["gradient_accumulation_steps"] == 4
    assert not (here / "runs" / "store").exists()


def engines(plan: str) -> dict[str, dict]:
    """'<stage> <engine>' -> DeepSpeed config, from the text of a plan."""
    found = {}
    for part in plan.split("\n--- ")[1:]:
        title, _, body = part.partition("\n")
        if "DeepSpeed config" in title:
            stage, _, rest = title.partition(":")
            found[f"{stage} {rest.split()[-2]}"] = json.loads(body)
    return found


def test_a_reader_who_has_seen_enough_is_no_error(here):
    command = f"{sys.executable} {RUN} dry_run=true | head -n 3; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "error" not in done.stderr.lower(), done.stderr


def test_free_mappings_take_new_keys(here, monkeypatch, capsys):
    """Hydra itself would refuse them, and ask for a +."""
    overrides = [
        "hardware=a6000",
        "hardware.deepspeed={zero_optimization: {overlap_comm: false}}",
        "hardware.deepspeed.wall_clock_breakdown=true",
    ]
    monkeypatch.setattr("sys.argv", [RUN, "dry_run=true", *overrides])
    runpy.run_path(RUN, run_name="__main__")
    for config in engines(capsys.readouterr().out).values():
        assert config["zero_optimization"] == {"stage": 0, "overlap_comm": False}
        assert config["wall_clock_breakdown"] is True


# --- what is wrong before anything is looked up -----------------------------------------------------------------------

WRONG = {
    "mistyped key": ("ppo.kl_coeff=1", "unknown key ppo.kl_coeff (did you mean ppo.kl_coef?)"),
    "key without its block": ("cliprange=0.1", "did you mean ppo.cliprange?"),
    "added key": ("+ppo.foo=1", "unknown key ppo.foo"),
    "mistyped option": ("model=opt13", "model=opt13 does not exist (did you mean opt13b?). There are: bloom176b, "),
    "mistyped experiment": ("experiment=debog", "did you mean debug?"),
    "no group option": ("stage=null", "stage=null does not exist"),
    "no override": ("ppo.kl_coef", "'ppo.kl_coef' is no override: type key=value"),
    "no key": ("=3", "'=3' is no override: type key=value"),
    "broken value": ("ppo.kl_coef=[1", "cannot read ppo.kl_coef=[1 "),
    "sweep without -m": ("ppo.kl_coef=0.1,0.2", "names several values: type -m for a sweep"),
    "wrong type": ("ppo.kl_coef=abc", "ppo.kl_coef=abc must be a number"),
    "out of range": ("ppo.kl_coef=-1", "ppo.kl_coef=-1.0 must be 0 or more"),
    "no choice": ("ppo.kl_estimator=k4", "is not one of k1, k2, k3"),
    "key of another stage": ("stage=sft ppo.kl_coef=1", "stage=sft does not use the ppo block. Leave it out, or type stage=ppo"),
    "deleted block": ("~ppo", "leave out ~ppo"),
    "impossible batch": ("hardware.micro_batch.sft=5", "Type sft.global_batch=35, or hardware.micro_batch.sft=4"),
    "impossible minibatch": ("ppo.minibatches=3", "does not divide into ppo.minibatches=3"),
    "too long": ("model.max_prompt_tokens=2000", "is longer than the 1024 positions of tiny: lower one of them"),
    "no file": ("dataset=jsonl dataset.path=pears.jsonl", "data file pears.jsonl does not exist (looked from "),
    "no path": ("dataset=jsonl", "dataset.path has no value: type dataset.path=..."),
    "no hub path": ("dataset=hub", "dataset.path has no value: type dataset.path=..."),
    "path without its group": ("dataset.path=pairs.jsonl", "Type dataset=jsonl (a file) or dataset=hub beside it"),
    "unknown format": (f"dataset=jsonl dataset.path={RUN}", "unknown format; use one of .json, .jsonl"),
    "empty split": ("dataset.split.reward=0", "dataset.split.reward=0: give it a share"),
    "demonstrations only": ("dataset=chinese", "type stage=sft, give it a share"),
    "no checkpoint": ("sft.use=/nowhere", "sft.use=/nowhere is no Hugging Face checkpoint: there is no /nowhere/config.json"),
    "mistyped DeepSpeed key": ("hardware.deepspeed={zero_optimisation:{}}", "did you mean zero_optimization?"),
    "our DeepSpeed key": ("hardware.deepspeed.optimizer.type=Adam", "is decided by the runner: set the stage's lr"),
    "path beside random weights": ("model.actor.path=/models/opt", "type model.actor.init=pretrained"),
    "unknown interpolation": ("name=${nix}", "Interpolation key 'nix' not found"),
    "launch command": ("hardware.launch='{pyton}'", "hardware.launch holds 'pyton': it knows {python}, "),
    "broken template": ("model.chat_template='{%' stage=sft", "model.chat_template is refused by the template engine: "),
    "fp16 on a CPU": ("hardware.precision=fp16", "use fp32 or bf16"),
}


@pytest.mark.parametrize("words, says", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_message(words, says, refused):
    assert says in refused(*words.split())


def test_a_launcher_that_is_not_installed_is_named(refused, monkeypatch):
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: iter(()))
    assert "pip install -c constraints.txt -e '.[sweep]'" in refused("-m", "hydra/launcher=submitit_local", "seed=1,2")


def test_near_checkpoints_are_named(refused, here):
    (here / "step" / "model").mkdir(parents=True)
    (here / "step" / "model" / "config.json").write_text('{"architectures": ["OPTForSequenceClassification"]}')
    assert "Type sft.use=step/model" in refused("sft.use=./step")
    assert "is a language model (ForCausalLM)" in refused("sft.use=./step/model")


def test_an_experiment_may_fill_blocks_that_the_stage_does_not_read():
    cfg = configured("stage=sft", "experiment=debug")
    assert cfg.sft.max_steps == 2
    assert cfg.ppo is None


# --- what is wrong with data, models and machines: found before the first step is trained ------------------------------


def test_broken_rows_are_named_or_counted(here, refused):
    from runner.plan import plan
    from runner.prepare import prepare

    rows = [json.dumps({"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": f"No {i}."}) for i in range(300)]
    Path("broken.jsonl").write_text("\n".join([*rows[:6], '{"prompt": "a", ', *rows[6:]]))
    Path("lacks.jsonl").write_text("\n".join([*rows[:3], '{"prompt": "a", "rejected": "b"}', *rows[3:]]))
    file = "dataset=jsonl", "stage=sft", "dataset.path=broken.jsonl"
    assert "broken.jsonl:7: not valid JSON" in refused(*file)
    message = refused("dataset=jsonl", "stage=sft", "dataset.path=lacks.jsonl")
    assert "lacks.jsonl:4: no response among the fields prompt, rejected" in message
    assert "dataset.on_bad_row=skip" in message
    assert "field question is missing" in refused("dataset=jsonl", "dataset.path=lacks.jsonl", "dataset.fields={prompt: question}")
    assert "did you mean prompt?" in refused("dataset=jsonl", "dataset.path=lacks.jsonl", "dataset.fields.promt=prompt")

    cfg = configured(*file, "dataset.on_bad_row=skip", f"store={here}")
    inputs = prepare(cfg, plan(cfg))
    counts = json.loads((Path(inputs["sft"]["data"]) / "counts.json").read_text())
    assert counts["dropped"] == {"broken row": 1}


def test_too_few_prompts_and_rows_are_said(here, refused):
    rows = [json.dumps({"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": f"No {i}."}) for i in range(60)]
    Path("few.jsonl").write_text("\n".join(rows))
    assert "fewer than ppo.rollout_batch=64: lower it" in refused("dataset=jsonl", "dataset.path=few.jsonl", "dataset.holdout=0.2")
    Path("none.jsonl").write_text("")
    assert "has no rows to train on" in refused("dataset=jsonl", "dataset.path=none.jsonl")


def test_too_few_gpus_are_said_before_data_is_read(here, refused):
    import torch

    if torch.cuda.device_count() >= 8:
        pytest.skip("this machine has eight GPUs")
    message = refused("hardware=dgx8")
    assert "hardware=dgx8 wants 8 GPUs, this machine shows" in message and "dry_run=true" in message
    assert not (here / "runs" / "store").exists()


def test_a_store_that_cannot_be_made_is_said(refused, here):
    (here / "file").write_text("")
    assert "store=file/store cannot be made (Not a directory): type store=" in refused("store=file/store")


def test_actor_and_reward_model_must_share_their_tokens(here, refused, tokenizer):
    from transformers import AutoConfig

    from runner.tokenizer import train_tokenizer

    other = train_tokenizer(["entirely different words " * 9], 280)
    shape = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "word_embed_proj_dim": 8}
    for name, kind in (("actor", tokenizer), ("reward", other)):
        AutoConfig.for_model("opt", vocab_size=512, max_position_embeddings=256, **shape).save_pretrained(here / name)
        kind.save_pretrained(here / name)
    folders = [f"model.{part}.{key}" for part in ("actor", "reward") for key in (f"path=./{part}", "init=pretrained")]
    assert "have different tokenizers" in refused(*folders)
    assert "longer than the 256 positions of ./actor" in refused(*folders, "model.reward.path=./actor", "model.max_prompt_tokens=250")
    assert "type model.family=opt" in refused(*folders, "model.family=llama", "stage=sft")
    assert "cannot be loaded" in refused(*folders, "model.actor.path=./runs", "stage=sft")


@pytest.mark.parametrize(
    "words, says",
    [
        ("model=opt125m hardware=cpu", "model facebook/opt-125m is not in the local Hugging Face cache, and the hub cannot be reached"),
        ("dataset=hub dataset.path=Dahoas/rm-static", "data set Dahoas/rm-static cannot be loaded"),
    ],
)
def test_without_network_the_hub_is_given_up_soon(words, says, here):
    """An endpoint where nobody listens: a machine that has a network shall see the same."""
    seconds = []
    while not seconds or (seconds[-1] >= 15 and len(seconds) < 2):  # once more, in case the machine was busy: the hub's retries take 23 s
        start = time.monotonic()
        done = process(*words.split(), HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(here), HTTPS_PROXY="", https_proxy="")
        seconds.append(time.monotonic() - start)
    assert seconds[-1] < 15, seconds
    assert done.returncode == 1
    assert "looking for" in done.stderr
    assert says in one_message(done.stderr)


# --- tracebacks, for those who ask ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, environment",
    [
        ("ppo.gamma=2", {"HYDRA_FULL_ERROR": "1"}),
        ("ppo.gamma=2 debug=true", {}),
        ("ppo.gamma=2 experiment=debug", {}),
        ("ppo.gama=2 debug=true", {}),
    ],
)
def test_tracebacks_come_when_asked_for(words, environment, here):
    done = process(*words.split(), **environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "UserError" in done.stderr


def test_a_sweep_goes_on_after_a_job_that_cannot_run(here):
    done = process("-m", "ppo.kl_coef=-1,0.1", "dry_run=true")
    assert done.returncode == 1
    assert "error: ppo.kl_coef=-1.0 must be 0 or more" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("ppo: launch command") == 1


def test_a_worker_with_a_broken_config_says_why(tmp_path):
    """The workers go through the same door as the launcher."""
    from runner.config import load

    (tmp_path / "config.yaml").write_text("name: x\nnonsense: 1\n")
    with pytest.raises(UserError, match="unknown key nonsense"):
        load(tmp_path / "config.yaml")


# --- the README -------------------------------------------------------------------------------------------------------


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_every_command_of_the_readme_makes_a_plan(tmp_path, monkeypatch):
    """With the presets that the README writes, and without the data that it only names."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    import runner.plan
    from runner.config import load
    from runner.suggest import check_overrides

    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    for preset in code_blocks("yaml"):
        (tmp_path / preset.splitlines()[0].removeprefix("# ")).write_text(preset)
    monkeypatch.setattr(runner.plan, "data_key", lambda dataset: {})
    monkeypatch.setattr(runner.plan, "_pinned_facts", lambda stage, path: {})
    lines = [line for block in code_blocks("bash") for line in block.splitlines() if line.startswith("python run.py")]
    assert len(lines) > 25
    for line in lines:
        words = shlex.split(line, comments=True)[2:]
        # The launchers are an extra, which need not be installed
        overrides = check_overrides([w for w in words if not w.startswith(("hydra/launcher", "hydra.launcher"))], conf)
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o != "-m"])
        with initialize_config_dir(str(conf), version_base="1.3"):
            first, *_ = BasicSweeper.split_arguments(parsed, None)[0]  # of a sweep, its first job
            cfg = load(compose("config", first))
        assert runner.plan.plan(cfg), line
        assert cfg.model.name != "mine" or cfg.model.max_prompt_tokens == 512


def test_the_readme_names_every_preset_and_every_metric():
    text = (ROOT / "README.md").read_text()
    for group in ("model", "hardware", "dataset"):
        for preset in sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")):
            assert f"`{preset}`" in text or f"={preset}`" in text, f"{group}={preset} is not in the README"
    sources = "".join(path.read_text() for path in (ROOT / "runner" / "stages").glob("*.py"))
    names = set(re.findall(r'"((?:objective|policy|loss|val|rollout|train|eval|reward|lr|grad_norm)/\w+)"', sources))
    assert len(names) > 25
    for name in names - {"eval/scores", "rollout/scores"}:  # histograms of W&B
        assert f"`{name}`" in text, f"the metric {name} is not in the README"
