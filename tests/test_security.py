"""Strangers' checkpoints, presets and names, and our own secrets: nothing of theirs runs, nothing of ours is written down.

Whatever must not run here would leave the file `ran` behind.
"""

import ast
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import causal, configured

from runner.checks import secrets
from runner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
HF_TOKEN, WANDB_KEY = "hf_" + "aB3dE6gH9j" * 3, "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def ran(tmp_path) -> Path:
    """The file that hostile code would make; checked when the test is over."""
    marker = tmp_path / "ran"
    yield marker
    assert not marker.exists()


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, tokenizer_folder) -> Path:
    """A model folder as we export it."""
    folder = tmp_path_factory.mktemp("healthy")
    causal("opt", vocab=300).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def model(healthy, tmp_path) -> Path:
    return shutil.copytree(healthy, tmp_path / "model")


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def loaded(folder: Path, tokenizer):
    import torch

    from runner.models.loading import load_causal

    return load_causal(str(folder), tokenizer, dtype=torch.float32, attention="auto", dropout=None)


def to_pickle(folder: Path, *, hostile: Path | None = None, name: str = "pytorch_model.bin", **how) -> None:
    """Put a .bin in the place of model.safetensors, with a payload that would make the file `hostile`."""
    import torch

    payload = {"payload": Hostile(hostile)} if hostile else {}
    torch.save(weights(folder) | payload, folder / name, **how)
    (folder / "model.safetensors").unlink()


# --- pickles ----------------------------------------------------------------------------------------------------------


def test_the_payload_would_run_without_our_care(tmp_path):
    """The tests below would prove nothing if it did not."""
    import torch

    torch.save(Hostile(tmp_path / "ran"), tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_model_that_has_only_pickles_is_loaded_when_they_hold_tensors(model, tokenizer):
    import torch

    expected = weights(model)["model.decoder.embed_tokens.weight"]
    to_pickle(model)
    assert torch.equal(loaded(model, tokenizer).get_input_embeddings().weight, expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_pickle_that_would_run_code_is_refused_by_its_name(model, ran, tokenizer, zipped):
    to_pickle(model, hostile=ran, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"model/pytorch_model.bin .*would run when it is loaded.*refused.*safetensors") as caught:
        loaded(model, tokenizer)
    assert ("posix.system" in str(caught.value)) == zipped


def test_the_hostile_shard_is_the_one_that_is_named(model, ran, tokenizer):
    import torch

    shards = {name: "bad.bin" if "layers.1" in name else "good.bin" for name in weights(model)}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    torch.save({n: t for n, t in weights(model).items() if shards[n] == "good.bin"}, model / "good.bin")
    to_pickle(model, hostile=ran, name="bad.bin")
    with pytest.raises(UserError, match=r"model/bad.bin holds code"):
        loaded(model, tokenizer)


def test_safetensors_go_before_pickles_and_other_pickles_are_not_read(model, ran, tokenizer):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (model / name).write_bytes(pickle.dumps(Hostile(ran)))
    loaded(model, tokenizer)


def test_an_adapter_that_is_a_pickle_does_not_run(model, ran, tokenizer):
    from peft import LoraConfig

    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(model)
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Hostile(ran)))
    with pytest.raises((UserError, OSError)):
        loaded(model, tokenizer)


def test_chat_refuses_such_a_model_in_words(model, ran):
    from runner import chat, exported

    to_pickle(model, hostile=ran)
    with pytest.raises(UserError, match=r"pytorch_model.bin holds code that would run"):
        exported.load_actor(str(model), chat.CHAT)


def test_everything_that_unpickles_says_weights_only():
    """Also in code that is written later."""
    for file in [*(ROOT / "runner").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in ("pickle.load", "pickle.loads", "yaml.load", "np.load", "numpy.load", "joblib.load", "eval", "exec"), file
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            assert name != "torch.load" or options.get("weights_only") == "True", file
            assert options.get("weights_only") != "False" and options.get("shell") != "True", file


BROKEN = {
    "config.json": (b'{"model_type":', "config.json cannot be read"),
    "tokenizer_config.json": (b"[1]", "tokenizer_config.json is not a JSON object"),
    "tokenizer.json": (b'{"version": "1.0", "trunc', "tokenizer.json cannot be read: it is broken or incomplete"),
    "model.safetensors": (b"\0" * 50, "model.safetensors is damaged .*: copy or download it again"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_of_a_model_are_found_before_anything_is_trained(name, model, tmp_path):
    from runner.plan import plan
    from runner.prepare import prepare

    content, says = BROKEN[name]
    (model / name).write_bytes(content)
    for words in (PLACES["actor"], PLACES["sft.use"]):
        cfg = configured(*[word.format(model=model) for word in words], f"store={tmp_path}/store", "dataset.toy_rows=100", *SHORT)
        with pytest.raises(UserError, match=says):
            prepare(cfg, plan(cfg))


def test_a_model_folder_without_weights_is_not_filled_with_random_ones(model, tmp_path):
    from runner.plan import plan
    from runner.prepare import prepare

    (model / "model.safetensors").unlink()
    for words in (PLACES["actor"], PLACES["sft.use"]):
        cfg = configured(*[word.format(model=model) for word in words], f"store={tmp_path}/store", "dataset.toy_rows=100", *SHORT)
        with pytest.raises(UserError, match="has no weights"):
            prepare(cfg, plan(cfg))


def test_no_service_on_the_internet_is_asked_to_convert_pickles():
    import runner.models.loading  # noqa: F401

    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"


# --- code of a repository ---------------------------------------------------------------------------------------------

AUTO_MAP = {
    "config": ("config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
    "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", None]}),
}


@pytest.fixture(params=AUTO_MAP)
def with_code(request, model, ran) -> Path:
    """A model folder that brings Python code."""
    name, classes = AUTO_MAP[request.param]
    settings = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(settings | {"auto_map": classes}))
    (model / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    return model


@pytest.fixture
def no_questions(monkeypatch):
    """Fails when anything asks at the keyboard."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))


SHORT = ["model.max_prompt_tokens=60", "model.max_response_tokens=60"]  # the tiny model's context
PLACES = {
    "actor": ["stage=sft", "model.actor.path={model}"],
    "reward": ["stage=reward", "model.reward.path={model}"],
    "sft.use": ["sft.use={model}"],
    "reward.use": ["reward.use={model}"],
}


@pytest.mark.parametrize("where", PLACES)
def test_code_of_a_model_is_refused_before_anything_is_trained(where, with_code, no_questions, tmp_path):
    from runner.plan import plan
    from runner.prepare import prepare

    if where == "reward.use":
        settings = json.loads((with_code / "config.json").read_text())
        (with_code / "config.json").write_text(
            json.dumps(settings | {"architectures": ["OPTForSequenceClassification"], "id2label": {"0": "score"}})
        )
    cfg = configured(*[word.format(model=with_code) for word in PLACES[where]], f"store={tmp_path}/store", "dataset.toy_rows=100")
    with pytest.raises(UserError, match=r"brings Python code of its own \(auto_map in .*type model.trust_remote_code=true"):
        prepare(cfg, plan(cfg))


def test_chat_and_workers_refuse_it_too(with_code, no_questions, tokenizer):
    from runner import chat, exported
    from runner.models.tokenizer import load_tokenizer

    for load in (lambda path: exported.load_actor(path, chat.CHAT), load_tokenizer, lambda path: loaded(Path(path), tokenizer)):
        with pytest.raises(UserError, match="brings Python code of its own"):
            load(str(with_code))


def test_code_runs_only_where_it_is_asked_for(model, tmp_path, no_questions):
    """The other side of the switch: otherwise the refusals might come from something else."""
    from runner.models.tokenizer import load_tokenizer

    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["code.Own", None]}}))
    code = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    own = True\n"
    (model / "code.py").write_text(code)
    assert load_tokenizer(str(model), trust_remote_code=True).own
    assert configured().model.trust_remote_code is False


def test_an_attention_kernel_of_the_hub_is_code_too(model):
    from runner.checks.trust import refuse_code

    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"attn_implementation": "stranger/kernel"}))
    with pytest.raises(UserError, match="the attention kernel stranger/kernel"):
        refuse_code(str(model), None)


def test_a_chat_template_cannot_reach_python(tokenizer):
    from jinja2.exceptions import SecurityError

    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=hostile, tokenize=False)


def test_chat_says_so_before_the_first_message(model):
    from runner import chat, exported

    (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match=r"the chat template of .* is refused by the template engine: access to attribute"):
        exported.load_actor(str(model), chat.CHAT)


# --- presets and overrides --------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """A copy of run.py and conf/ in an empty working folder, to add presets to."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that it comes back as it was
        monkeypatch.delenv(name)
    shutil.copytree(ROOT / "conf", tmp_path / "house" / "conf")
    return Path(shutil.copy(ROOT / "run.py", tmp_path / "house" / "run.py"))


@pytest.fixture
def refused(house, monkeypatch, capfd):
    """Runs the copy and returns its one message, after checking that nothing has been written."""

    def run(*overrides: str) -> str:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr("sys.argv", [str(house), *overrides])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(house), run_name="__main__")
        said = capfd.readouterr()
        message = said.err if caught.value.code == 1 else str(caught.value.code)
        assert message.count("error: ") == 1 and "Traceback" not in message and "Traceback" not in said.err
        assert not list(Path.cwd().glob("runs/*")), "something was written"
        return message

    return run


def preset(house: Path, text: str) -> None:
    (house.parent / "conf" / "experiment" / "theirs.yaml").write_text("# @package _global_\n" + text)


TAGS = ["!!python/object/apply:os.system ['touch {ran}']", "!!python/object/new:os.system ['touch {ran}']", "!!python/name:os.system"]


@pytest.mark.parametrize("tag", TAGS)
def test_a_preset_cannot_make_python_objects(tag, house, refused, ran):
    preset(house, "name: " + tag.format(ran=ran))
    message = refused("experiment=theirs")
    assert "experiment/theirs.yaml:2: the tag " in message and "is refused: it would run Python code" in message
    # One that Hydra itself reads
    shutil.copy(house.parent / "conf" / "experiment" / "theirs.yaml", house.parent / "conf" / "dataset" / "theirs.yaml")
    assert "dataset/theirs.yaml:2: the tag " in refused("dataset=theirs")


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_an_override_cannot_make_python_objects(quote, refused, ran):
    assert "name" in refused(f"name={quote}{TAGS[0].format(ran=ran)}{quote}")


def test_a_config_of_a_step_cannot_make_python_objects(tmp_path, ran):
    from runner.config.loading import load

    (tmp_path / "config.yaml").write_text("name: " + TAGS[0].format(ran=ran))
    with pytest.raises(UserError, match=r"config.yaml:1: the tag .* is refused"):
        load(tmp_path / "config.yaml")


@pytest.mark.parametrize("text, why", [("a: [1", "not valid YAML"), ("- 1", "no mapping"), (b"\xff\xfe\x00", "cannot be read|not valid")])
def test_a_broken_config_is_said_in_one_message(text, why, tmp_path):
    from runner.config.loading import load

    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=why):
        load(tmp_path / "config.yaml")


# --- names that become paths ------------------------------------------------------------------------------------------

ESCAPES = ["../out", "..", ".hidden", "/tmp/out", "a/b", "a\\b", "a:b", "-rf", "a" * 101, "a\tb", "~", "$HOME", "a;b", ""]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_stays_in_its_folder(name, refused):
    assert "name=" in refused(f'name="{name}"')


def test_a_name_stays_in_its_folder_wherever_it_comes_from(house, refused, monkeypatch):
    assert "name='../out'" in refused("-m", "name=fine,../out")
    preset(house, "name: ../out")
    assert "name='../out'" in refused("experiment=theirs")
    assert "name='../out'" in refused("-m", "experiment=theirs", "seed=1,2")
    monkeypatch.setenv("WHERE", "../out")
    assert "name='../out'" in refused("name=${oc.env:WHERE}")


@pytest.mark.parametrize("name", ["demo", "Größe 2", "opt-1.3b_lr=1e-5", "a.b,c", "7b"])
def test_ordinary_names_pass(name):
    from runner.config.limits import check_name

    check_name(name)


def test_the_name_of_a_source_is_no_path(tmp_path, tokenizer):
    from runner.data import cache

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"Q {i}?", "chosen": f"A {i}."}) for i in range(60)))
    split = "dataset.split.reward=0", "dataset.split.ppo=0", "dataset.holdout=0.3"
    cfg = configured("stage=sft", "dataset=jsonl", f"dataset.path={tmp_path}/rows.jsonl", *split)
    cfg.dataset.sources["../../out"] = cfg.dataset.sources.pop("jsonl")
    folder = cache.build(tmp_path / "deep" / "store", cfg.dataset, "sft", tokenizer, cfg.model)
    assert folder.parent == tmp_path / "deep" / "store" / "data"
    assert cache.load(folder)[0][0]["source"] == "../../out"
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "deep"}


def test_a_lock_is_not_written_through_a_link(tmp_path):
    """In a store that several people write to, a link could lead to a file of ours."""
    from runner.durable.lock import lock

    (tmp_path / "mine").write_text("precious")
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "step").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a symlink: refusing to write through it"), lock(tmp_path / "locks" / "step", "the step"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


# --- secrets ----------------------------------------------------------------------------------------------------------

SECRETS = {
    "Hugging Face": HF_TOKEN,
    "OpenAI": "sk-proj-" + "aB3" * 12,
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "W&B": f"WANDB_API_KEY={WANDB_KEY} torchrun",
    "password": "PGPASSWORD=hunter2 torchrun",
    "container": "docker run -e HF_TOKEN=abc image",
    "URL": "https://ann:hunter2@example.org/data",
    "key of ours": "api_key=abcdefgh",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_refused_on_the_command_line_and_not_repeated(secret, refused):
    message = refused(f'hardware.launch="{secret}"')
    assert "hardware.launch on the command line holds" in message and "export HF_TOKEN=" in message
    assert secret not in message and "hunter2" not in message


def test_a_secret_is_refused_in_a_preset_and_in_what_it_resolves_to(house, refused, monkeypatch):
    preset(house, f"wandb:\n  entity: {HF_TOKEN}\n")
    message = refused("experiment=theirs")
    assert "wandb.entity in the configuration holds a Hugging Face token" in message and HF_TOKEN not in message
    preset(house, f"hydra:\n  job:\n    env_set: {{WANDB_API_KEY: {WANDB_KEY}}}\n")
    assert "WANDB_API_KEY in the configuration holds" in refused("experiment=theirs")
    monkeypatch.setenv("SOME_TOKEN", "as-plain-as-can-be")
    assert "holds the value of SOME_TOKEN" in refused("name=${oc.env:SOME_TOKEN}")
    with pytest.raises(UserError, match=r"wandb\.entity in the configuration holds the value of SOME_TOKEN"):
        configured.__wrapped__("wandb.entity=${oc.env:SOME_TOKEN}")  # what would go to the step's config.yaml and to W&B


@pytest.mark.parametrize("text", [f"wandb: {{group: {HF_TOKEN}}}", f"hydra: {{job: {{env_set: {{WANDB_API_KEY: {WANDB_KEY}}}}}}}"])
def test_a_secret_in_one_preset_of_a_sweep_is_refused_before_it_is_saved(text, house, refused):
    preset(house, text)
    message = refused("-m", "experiment=debug,theirs")
    assert "1 of the 2 jobs" in message and "in the configuration holds" in message and "(job 1)" in message
    assert HF_TOKEN not in message and WANDB_KEY not in message


def test_a_job_that_cannot_be_composed_does_not_hide_a_secret_of_another(house, refused):
    preset(house, f"wandb: {{group: {HF_TOKEN}}}")
    shutil.copy(house.parent / "conf" / "experiment" / "theirs.yaml", house.parent / "conf" / "experiment" / "mine.yaml")
    preset(house, "defaults: [/nowhere, _self_]\n")
    message = refused("-m", "experiment=theirs,mine", "hydra.sweeper.max_batch_size=1")
    assert "in the configuration holds a Hugging Face token" in message


def test_what_hydra_knows_only_once_a_job_starts_is_no_reason_to_refuse_it(house, capfd, monkeypatch):
    preset(house, "store: ${hydra:job.num}_${oc.env:FOO}\nhydra: {job: {env_set: {FOO: there}}}\n")
    monkeypatch.setattr("sys.argv", [str(house), "-m", "seed=1,2", "experiment=theirs", "dry_run=true"])
    runpy.run_path(str(house), run_name="__main__")
    said = capfd.readouterr().out
    assert "0_there/sft-" in said and "1_there/sft-" in said


HARMLESS = [
    "model.end_token=</s>",
    "model.end_token=<|im_end|>",
    f"model.actor.revision={WANDB_KEY}",  # a commit looks like an old W&B key
    "model.actor.path=facebook/opt-1.3b",
    "runs/store/ppo-0123456789/model",
    "/data/sk-learn-experiments-2024-of-mine/hf_rows.jsonl",
    "env TOKENIZERS_PARALLELISM=false MAX_TOKENS=512 torchrun",
    'WANDB_API_KEY=$WANDB_API_KEY HF_TOKEN="$HF_TOKEN" srun',
    "model.tokenizer_vocab=4096",
    "http://proxy.example.org:3128/a@b",
    "git@github.com:a/b.git",
    "s3://bucket/key=1/rows.parquet",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_passes(text):
    assert secrets.kind_of_secret(text) is None
    assert secrets.redact(text) == text


def test_a_plain_word_of_the_environment_passes(monkeypatch):
    monkeypatch.setenv("KEYRING_MODE", "disabled")
    assert secrets.kind_of_secret("wandb.mode=disabled") is None


def test_every_preset_passes():
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert secrets.kind_of_secret(file.read_text()) is None, file


def test_redact_strikes_out_the_environments_secrets_and_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "id_rsa").write_text("")
    values = {"MY_API_KEY": "correct horse", "db_password": "battery-staple", "SHORT_KEY": "abc", "KEY_FILE": str(tmp_path / "id_rsa")}
    for name, value in {**values, "MONKEY_COUNT": "12345678", "HTTPS_PROXY": "http://ann:hunter2@proxy:3128"}.items():
        monkeypatch.setenv(name, value)
    text = f"correct horse, battery-staple, abc, {tmp_path}/id_rsa, 12345678, http://ann:hunter2@proxy:3128/x {HF_TOKEN}"
    assert secrets.redact(text) == f"***, ***, abc, {tmp_path}/id_rsa, 12345678, http://***@proxy:3128/x ***"


def test_what_the_hub_says_is_redacted(monkeypatch, model):
    from runner.plan import plan
    from runner.prepare import prepare

    def fail(*_, **__):
        raise OSError("cannot reach http://ann:hunter2@proxy:3128")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    cfg = configured("stage=sft", f"model.actor.path={model}", f"store={model}/store", *SHORT)
    with pytest.raises(UserError, match=r"http://\*\*\*@proxy:3128"):
        prepare(cfg, plan(cfg))


def test_wandb_gets_a_config_without_secrets_and_no_remote_url(monkeypatch, tmp_path):
    """Git's remote may be https://user:token@host."""
    from unittest.mock import MagicMock

    import torch

    from runner import metrics

    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(metrics.ranks, "rank", lambda: 0)
    metrics.RunLog(configured("wandb.mode=offline"), "sft", tmp_path, {}, torch.device("cpu"))
    assert wandb.Settings.call_args.kwargs["disable_git"] is True
    assert secrets.kind_of_secret(json.dumps(wandb.init.call_args.kwargs["config"])) is None


# --- network ----------------------------------------------------------------------------------------------------------

PROBE = """
import os
import psutil
import torch.distributed as dist
from runner import ranks
ranks.start("cpu")
assert ranks.all_gather(ranks.rank()) == [0, 1]
if ranks.rank() == 0:
    launcher = psutil.Process().parent()
    family = [launcher, *launcher.children(recursive=True)]
    print(*(c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == "LISTEN"), flush=True)
dist.barrier()
os._exit(0)  # as the worker does
"""


@pytest.mark.slow
def test_the_ranks_of_one_machine_listen_at_localhost_only(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    launch = configured("hardware=cpu2").hardware.launch.replace("-m runner.worker {folder}", "{folder}")
    command = launch.format(python=sys.executable, gpus=2, folder=tmp_path / "probe.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", f"exec {command}"], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"127.0.0.1"}


def test_one_process_alone_listens_at_localhost_only(alone):
    import psutil
    import torch.distributed as dist

    dist.barrier()
    assert {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"} <= {"127.0.0.1"}


def test_no_preset_of_one_machine_opens_a_port_to_the_network():
    for file in (ROOT / "conf" / "hardware").rglob("*.yaml"):
        launch = " ".join(file.read_text().partition("\nlaunch:")[2].split())
        if "torch.distributed.run" in launch and "--nnodes" not in launch:
            assert "store_type=file" in launch and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in launch, file
