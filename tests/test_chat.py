"""Talking to an exported model: what it is given, what is shown, what is refused."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import SHAPES

from runner import chat, exported
from runner.errors import UserError
from runner.models.tokenizer import encode_prompts, render_prompt
from runner.rollout.stops import Stops

ROOT = Path(__file__).resolve().parents[1]
CONTEXT, ANSWER = SHAPES["opt"]["max_position_embeddings"], 12


@pytest.fixture(scope="session")
def step(tokenizer, tmp_path_factory) -> Path:
    """A step folder as PPO leaves it: model/ and critic/, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("store") / "ppo-0123456789"
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("opt", vocab_size=len(tokenizer), **SHAPES["opt"], **ids)
    actor = AutoModelForCausalLM.from_config(config)
    actor.generation_config = GenerationConfig(max_new_tokens=ANSWER, **ids)
    config.num_labels = 1
    for model, name in ((actor, "model"), (AutoModelForSequenceClassification.from_config(config), "critic")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def typed(monkeypatch, text: str, *arguments: str) -> None:
    """Run the program in this process with `text` on its standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr("sys.argv", ["chat", *map(str, arguments)])
    chat.main()


@pytest.fixture
def given(monkeypatch) -> list[list[int]]:
    """The token ids that each answer is generated from; the answers are 'Yes 1.', 'Yes 2.', ..."""
    seen: list[list[int]] = []

    def answer(ids, *_):
        seen.append(ids)
        return f"Yes {len(seen)}."

    monkeypatch.setattr(chat, "answer", answer)
    return seen


# --- which checkpoint -------------------------------------------------------------------------------------------------


def test_a_step_folder_and_a_run_folder_lead_to_their_actor(step, tmp_path, capsys):
    (tmp_path / "ppo").symlink_to(step)
    assert exported.find(str(step / "model"), chat.CHAT) == str(step / "model")
    assert exported.find(str(step), chat.CHAT) == str(step / "model")
    assert exported.find(str(tmp_path), chat.CHAT) == str(tmp_path / "ppo" / "model")
    (tmp_path / "ppo").unlink()
    (tmp_path / "sft").symlink_to(step)
    (tmp_path / "dpo").symlink_to(step)
    assert exported.find(str(tmp_path), chat.CHAT) == str(tmp_path / "dpo" / "model")
    assert capsys.readouterr().err.count("using") == 3  # it says so when it looks further
    assert exported.find("facebook/opt-125m", chat.CHAT) == "facebook/opt-125m"


def test_the_folder_of_a_run_means_the_newest_command_that_has_an_actor(step, tmp_path):
    for command, stage in {"2026-01-30_12-00-00": "ppo", "2026-01-31_12-00-00": "sft", "2026-02-01_12-00-00_sweep": "ppo"}.items():
        (tmp_path / command).mkdir()
        (tmp_path / command / stage).symlink_to(step)
    (tmp_path / "2026-02-01_12-00-00").mkdir()
    (tmp_path / "2026-02-01_12-00-00" / "ppo").symlink_to(tmp_path / "interrupted")
    assert exported.find(str(tmp_path), chat.CHAT) == str(tmp_path / "2026-01-31_12-00-00" / "sft" / "model")


def test_of_a_run_that_has_only_sweeps_the_actors_of_the_newest_are_named(step, tmp_path):
    for sweep, jobs in {
        "2026-01-30_12-00-00_sweep": ("0",),
        "2026-01-31_12-00-00_sweep": ("0", "2", "10"),
        "2026-02-01_12-00-00_sweep": (),
    }.items():
        for job in jobs:
            (tmp_path / sweep / job).mkdir(parents=True)
            (tmp_path / sweep / job / ("dpo" if job == "2" else "ppo")).symlink_to(step)
        (tmp_path / sweep / "1" / "ppo").mkdir(parents=True)  # a job that has not come so far
    newest = tmp_path / "2026-01-31_12-00-00_sweep"
    actors = [f"  python -m runner.chat {newest}/{actor}/model" for actor in ("0/ppo", "2/dpo", "10/ppo")]
    for path in (tmp_path, newest):
        with pytest.raises(UserError, match="holds a sweep") as raised:
            exported.find(str(path), chat.CHAT)
        assert str(raised.value).splitlines()[1:] == actors


def test_what_is_advised_is_what_a_chat_can_do(step, tmp_path, monkeypatch):
    import shutil

    import transformers

    shutil.copytree(step / "model", tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key != "eos_token"}))
    with pytest.raises(UserError, match=r"has no EOS: .* Name eos_token in the tokenizer_config.json") as raised:
        exported.load_actor(str(tmp_path / "model"), chat.CHAT)
    assert "model.end_token" not in str(raised.value)

    def unreachable(*_, **__):
        raise OSError("the hub cannot be reached. Try later.\nMore lines")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(UserError, match=r"Try later\. Type "):
        exported.load_actor(str(step / "model"), chat.CHAT)


@pytest.mark.parametrize("path, why", [("/nowhere/model", "does not exist"), (".", "no config.json")])
def test_what_is_no_checkpoint_is_named_with_what_to_type(path, why, step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{why}.* Type python -m runner.chat FOLDER"):
        exported.find(path, chat.CHAT)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "store").symlink_to(step.parent)
    with pytest.raises(UserError, match=r"Type python -m runner.chat runs/store/ppo-0123456789/model$"):
        exported.find(path, chat.CHAT)


def test_beside_adapters_the_merged_model_is_named(step, tmp_path):
    adapter = tmp_path / "step" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "step" / "model").symlink_to(step / "model")
    with pytest.raises(UserError, match=r"holds adapters, .*: type python -m runner.chat .*step/model$"):
        exported.find(str(adapter), chat.CHAT)


def test_a_reward_model_and_broken_weights_are_refused_in_one_line(step, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: cannot load .*critic: it is a reward model[^\n]*$"):
        typed(monkeypatch, "Hello\n", step / "critic")
    for file in (step / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100] if file.suffix == ".safetensors" else file.read_bytes())
    with pytest.raises(SystemExit, match=r"^error: cannot load .*: [^\n]*$"):
        typed(monkeypatch, "Hello\n", tmp_path)
    weights = load_file(step / "model" / "model.safetensors")
    lost = next(name for name in weights if "layers" in name)
    save_file({name: w for name, w in weights.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=rf"cannot load .*: .* lacks 1 of the weights [^\n]*{lost}[^\n]*$"):
        typed(monkeypatch, "Hello\n", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match=r"cannot load .*: model folder .* has no tokenizer: none of tokenizer.json, "):
        typed(monkeypatch, "Hello\n", tmp_path)


def test_a_folder_that_cannot_talk_is_not_recommended(step, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "store").symlink_to(step.parent)
    monkeypatch.chdir(tmp_path)
    assert exported.instead("elsewhere", chat.CHAT).endswith(" runs/store/ppo-0123456789/model")
    assert "FOLDER" in exported.instead(str(step / "model"), chat.CHAT)


def test_a_model_without_a_template_gets_ours_with_the_bos_that_its_tokenizer_adds(step, tmp_path):
    import shutil

    from tokenizers import processors
    from transformers import AutoTokenizer

    shutil.copytree(step / "model", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(step / "model")
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = None
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "base")
    loaded, _ = exported.load_actor(str(tmp_path / "base"), chat.CHAT)
    ids = encode_prompts(loaded, [[{"role": "user", "content": "Hello."}]])[0]
    assert ids[0] == bos[1] and ids.count(bos[1]) == 1


# --- the dialogue -----------------------------------------------------------------------------------------------------


def test_every_turn_sees_the_dialogue_in_the_training_format(step, tokenizer, given, monkeypatch, capsys):
    typed(monkeypatch, "Please describe the river.\n\nAnd now?\n/clear\n/help\nHello.\n/quit\nunread\n", step / "model")
    user, reply = ({"role": "user", "content": "Please describe the river."}, {"role": "assistant", "content": "Yes 1."})
    dialogues = [[user], [user, reply, {"role": "user", "content": "And now?"}], [{"role": "user", "content": "Hello."}]]
    assert given == encode_prompts(tokenizer, dialogues)
    assert render_prompt(tokenizer, dialogues[1]).startswith("\n\nHuman: Please describe the river.\n\nAssistant: Yes 1.\n\nHuman:")
    assert "(there are /clear and /quit)" in capsys.readouterr().out


def test_the_oldest_turns_make_room_and_it_says_so(step, tokenizer, given, monkeypatch, capsys):
    typed(monkeypatch, "".join(f"Please describe the river for Ann {n}.\n" for n in range(8)), step / "model")
    room = CONTEXT - ANSWER
    assert max(map(len, given)) <= room < sum(map(len, given))
    last = tokenizer.decode(given[-1])
    assert "Ann 7." in last and "Ann 0." not in last
    assert last.startswith("\n\nHuman:")  # no answer without its question
    assert "turns are forgotten)" in capsys.readouterr().out


def test_a_message_longer_than_the_context_is_refused_and_the_dialogue_goes_on(step, tokenizer, given, monkeypatch, capsys):
    typed(monkeypatch, f"Hello.\n{'word ' * 200}\nAnd now?\n", step / "model")
    assert f"more than {CONTEXT - ANSWER} leave no room for an answer: shorten it" in capsys.readouterr().out
    assert [tokenizer.decode(ids).count("Human:") for ids in given] == [1, 2]


def test_a_dialogue_longer_than_those_of_the_training_is_said(step, given, monkeypatch, capsys):
    config = step / "config.yaml"
    config.write_text("model: {max_prompt_tokens: 40}")
    typed(monkeypatch, f"Hello.\n{'river ' * 40}\n", step / "model")
    config.unlink()
    assert capsys.readouterr().out.count("in training the model saw at most 40)") == 1 and len(given) == 2


def test_answers_need_room(step, monkeypatch):
    with pytest.raises(SystemExit, match="lower --max-new-tokens"):
        typed(monkeypatch, "Hello.\n", step / "model", "--max-new-tokens", CONTEXT)
    for temperature in ("0", "nan", "inf"):
        with pytest.raises(SystemExit):
            typed(monkeypatch, "Hello.\n", step / "model", "--temperature", temperature)


# --- the answer -------------------------------------------------------------------------------------------------------


def test_answers_stream_and_are_what_the_model_says(step, capsys, monkeypatch):
    import torch

    tokenizer, model = exported.load_actor(str(step / "model"), chat.CHAT)
    ids = encode_prompts(tokenizer, [[{"role": "user", "content": "Please describe the river."}]])[0]
    expected, row = [], list(ids)
    with torch.no_grad():
        for _ in range(5):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
            expected.append(row[-1])
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: pieces.append("".join(words)))
    text = chat.answer(ids, tokenizer, model, 5, None)
    assert text == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert len(pieces) > 3  # "Assistant:", pieces of the answer, the line's end
    shown = "".join(pieces)
    assert shown.endswith("(cut off at 5 tokens; --max-new-tokens allows more)")
    assert all(c.isprintable() or c in "\n\t" for c in shown)


def test_an_answer_ends_at_a_stop_string_of_ppo(step, capsys):
    """It is shown, and no part of the dialogue."""
    tokenizer, model = exported.load_actor(str(step / "model"), chat.CHAT)
    ids = encode_prompts(tokenizer, [[{"role": "user", "content": "Please describe the river."}]])[0]
    whole = chat.answer(ids, tokenizer, model, 8, None)
    stop = whole[len(whole) // 2]
    capsys.readouterr()
    found = chat.answer(ids, tokenizer, model, 8, None, Stops.of(tokenizer, [stop], len(tokenizer)))
    assert found == whole[: whole.index(stop)].strip()
    shown = capsys.readouterr().out
    assert stop in shown and "cut off" not in shown


def test_what_a_step_says_of_its_training(tmp_path):
    assert exported.as_trained(str(tmp_path / "model")) == (math.inf, [])
    (tmp_path / "config.yaml").write_text("of: another program\n")
    assert exported.as_trained(str(tmp_path / "model")) == (math.inf, [])
    (tmp_path / "config.yaml").write_text("model: {max_prompt_tokens: 7}\nppo: null\n")
    assert exported.as_trained(str(tmp_path / "model")) == (7, [])
    (tmp_path / "config.yaml").write_text('model: {max_prompt_tokens: 7}\nppo: {stop: ["a\\n"]}\n')
    assert exported.as_trained(str(tmp_path / "model")) == (7, ["a\n"])


def test_an_answer_that_ends_is_not_said_to_be_cut_off(step, capsys, monkeypatch):
    import torch

    tokenizer, model = exported.load_actor(str(step / "model"), chat.CHAT)
    monkeypatch.setattr(model, "generate", lambda ids, **_: torch.cat([ids, torch.tensor([[5, tokenizer.eos_token_id]])], 1))
    chat.answer([5, 6, 7], tokenizer, model, 2, None)
    assert "cut off" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["calm", " calm", "\n\ncalm"])
def test_an_answer_stands_one_space_behind_its_name(text, step, capsys, monkeypatch):
    """Whatever the chat template puts before an answer, which the model has learnt to write."""
    import torch

    tokenizer, model = exported.load_actor(str(step / "model"), chat.CHAT)
    said = torch.tensor(tokenizer([text], add_special_tokens=False).input_ids)

    def generate(ids, streamer, **_):
        for piece in (ids[0], *said[0].split(1)):
            streamer.put(piece)
        streamer.end()
        return torch.cat([ids, said], 1)

    monkeypatch.setattr(model, "generate", generate)
    chat.answer([5, 6, 7], tokenizer, model, 50, None)
    assert capsys.readouterr().out == "Assistant: calm\n"


def test_answers_are_sampled_from_the_whole_vocabulary(step, monkeypatch):
    """generate would take the 50 likeliest tokens only, unless told otherwise."""
    import torch

    tokenizer, model = exported.load_actor(str(step / "model"), chat.CHAT)
    likeliest = set(model(torch.tensor([[5, 6, 7]])).logits[0, -1].topk(50).indices.tolist())
    drawn = []
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: drawn.extend(torch.as_tensor(ids).flatten().tolist()[-1:]) or "")
    torch.manual_seed(0)
    for _ in range(20):
        chat.answer([5, 6, 7], tokenizer, model, 1, 100.0)
    assert set(drawn) - likeliest


def test_it_works_through_a_pipe(step):
    """As `python -m runner.chat PATH < messages`: no terminal, and no UTF-8 to rely on."""
    done = subprocess.run(
        [sys.executable, "-m", "runner.chat", str(step), "--max-new-tokens", "4"],
        input=b"Please describe the river.\nAnd \xff now?\n",
        capture_output=True,
        cwd=ROOT,
        timeout=120,
        env={"PATH": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"\nAssistant:") == 2 and b"\nHuman: Please describe the river.\n" in done.stdout
    assert b"Traceback" not in done.stderr
