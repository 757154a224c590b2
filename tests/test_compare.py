"""`python -m runner.compare`: models on the same prompts, by a reward model's scores."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import SHAPES, sharpen
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from runner import compare, exported
from runner.data import cache
from runner.errors import UserError
from runner.models.tokenizer import encode_prompts, encode_responses

TURNS = [[{"role": "user", "content": f"Please describe the {thing}."}] for thing in ("river", "castle", "town", "garden", "lake")]
KNOWN = ["It is calm.", "It is old.", "It is loud and new.", "It is green.", "It is deep."]
ANSWER = 12


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory) -> Path:
    """Steps of random weights: two actors, and a reward model with its held-out pairs."""
    store = tmp_path_factory.mktemp("store")
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("opt", vocab_size=len(tokenizer), **SHAPES["opt"], **ids)

    def save(model, folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    for step, seed in (("sft-0123456789", 1), ("ppo-0123456789", 2)):
        actor = sharpen(AutoModelForCausalLM.from_config(config), seed, scale=0.1)
        actor.generation_config = GenerationConfig(max_new_tokens=ANSWER, **ids)
        save(actor, store / step / "model")
    config.num_labels = 1
    save(sharpen(AutoModelForSequenceClassification.from_config(config), 3, scale=0.1), store / "reward-0123456789" / "model")
    data = store / "data" / "reward-x"
    data.mkdir(parents=True)
    prompts, answers = encode_prompts(tokenizer, TURNS), encode_responses(tokenizer, KNOWN)
    with cache._Writer(data / "train.arrow") as train, cache._Writer(data / "eval.arrow") as held:
        for prompt, answer in zip(prompts, answers, strict=True):
            row = {"chosen_ids": prompt + answer, "rejected_ids": prompt + answer[1:], "prompt_length": len(prompt), "source": "x"}
            train.add(row), held.add(row)
    (data / "counts.json").write_text("{}")
    (store / "reward-0123456789" / "step.json").write_text(json.dumps({"data": str(data)}))
    return store


def typed(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, words)])
    compare.main()


def reward_of(store: Path, ids: list[int]) -> float:
    """transformers' own score of one sequence."""
    model = AutoModelForSequenceClassification.from_pretrained(store / "reward-0123456789" / "model").eval()
    return model(torch.tensor([ids])).logits[0, 0].item()


def test_scores_are_those_of_the_reward_model_on_prompt_and_answer(store, tokenizer, tmp_path, monkeypatch, capsys):
    sft, ppo, out = store / "sft-0123456789", store / "ppo-0123456789", tmp_path / "new" / "answers.jsonl"
    typed(monkeypatch, sft, ppo, "--reward", store / "reward-0123456789", "--greedy", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [tokenizer.decode(ids).strip() for ids in encode_prompts(tokenizer, TURNS)]
    model = AutoModelForCausalLM.from_pretrained(sft / "model").eval()
    for row, turns, answer in zip(rows, TURNS, KNOWN, strict=True):
        prompt = encode_prompts(tokenizer, [turns])[0]
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False)[0].tolist()
        assert row["answers"]["sft-0123456789"]["answer"] == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
        assert row["answers"]["sft-0123456789"]["score"] == pytest.approx(reward_of(store, ids), abs=1e-4)
        given = row["answers"]["known answers"]
        assert given["answer"] == answer and not given["truncated"]
        assert given["score"] == pytest.approx(reward_of(store, prompt + encode_responses(tokenizer, [answer])[0]), abs=1e-4)
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "5 prompts of the held-out pairs of reward-0123456789: likeliest tokens, at most 12 tokens" in shown
    assert "known answers" in shown and "Sample 3" in shown and "Please describe the river." in shown


def test_numbers_of_the_table_by_hand():
    """Scores 1, 3 and 2, 2: mean 2 and deviation sqrt(2) of the first; the second wins one, loses one."""
    flags = torch.tensor([False, True])
    first, second = (
        compare.Answers(n, ["", ""], torch.tensor(s), torch.tensor([4.0, 6.0]), flags) for n, s in (("a", [1.0, 3.0]), ("b", [2.0, 2.0]))
    )
    rows = compare.table("title", compare.in_units([first, second])).rows
    assert rows[0] == ["a", "0.00 ± 0.71", "-", "-", "5.00", "50.0 %"]
    assert rows[1] == ["b", "0.00", "+0.00 ± 0.71", "50 % (9 to 91)", "5.00", "50.0 %"]
    third = compare.Answers(
        "c", ["", ""], torch.tensor([1.0, 3.0 + 2 * 2**0.5]), torch.tensor([4.0, 6.0]), flags
    )  # a tie, and a better one
    assert compare.table("title", compare.in_units([first, third])).rows[1][2:4] == ["+1.00 ± 1.00", "75 % (20 to 97)"]


def test_equal_models_give_equal_answers_whatever_the_batch(store, tmp_path, monkeypatch):
    """The random numbers are the prompt's: a copy of a model differs in nothing."""
    shutil.copytree(store / "sft-0123456789" / "model", tmp_path / "copy")
    typed(monkeypatch, store / "sft-0123456789", tmp_path / "copy", "--reward", store / "reward-0123456789", "--out", tmp_path / "two")
    typed(monkeypatch, tmp_path / "copy", "--reward", store / "reward-0123456789", "--batch", 2, "--out", tmp_path / "one")
    two, one = ([json.loads(line)["answers"] for line in (tmp_path / name).read_text().splitlines()] for name in ("two", "one"))
    assert [row["sft-0123456789"] for row in two] == [row["copy"] for row in two]
    assert [row["copy"]["answer"] for row in two] == [row["copy"]["answer"] for row in one]
    assert len({row["copy"]["answer"] for row in one}) > 1


def test_prompts_of_a_file_with_and_without_answers(store, tokenizer, tmp_path, monkeypatch, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "What is a lake?"}\n{"prompt": " "}\n{"prompt": "What is a hill?", "response": "High."}\n')
    questions, name = compare.asked_in(str(file), tokenizer)
    asked = [[{"role": "user", "content": text}] for text in ("What is a lake?", "What is a hill?")]
    assert [q.prompt for q in questions] == encode_prompts(tokenizer, asked) and name == str(file)
    assert [q.answer for q in questions] == [None, *encode_responses(tokenizer, ["High."])]
    typed(monkeypatch, store / "sft-0123456789", "--reward", store / "reward-0123456789", "--prompts", file)
    shown = capsys.readouterr().out
    assert f"2promptsof{file}:temperature1" in "".join(shown.split()) and "known answers" not in shown  # one has none
    file.write_text('{"prompt": "What is a lake?"}\n{"prompt": 3}\n')
    with pytest.raises(SystemExit, match=r"^error: .*prompts.jsonl:2: "):
        typed(monkeypatch, store / "sft-0123456789", "--reward", store / "reward-0123456789", "--prompts", file)
    file.write_text('{"prompt": "What is a lake?"}\n' + json.dumps({"prompt": "What is a lake? " * 40}) + "\n")
    typed(monkeypatch, store / "sft-0123456789", "--reward", store / "reward-0123456789", "--prompts", file)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "1 prompts of" in shown and "Left out: 1 prompts that sft-0123456789 cannot read with an answer, as it reads 128 tokens." in shown
    )
    file.write_text('{"prompt": " "}\n')
    with pytest.raises(UserError, match="holds no prompts"):
        compare.asked_in(str(file), tokenizer)


def test_what_cannot_be_compared_is_refused_in_words(store, tokenizer_folder, tmp_path, monkeypatch):
    sft, reward = store / "sft-0123456789", store / "reward-0123456789"
    monkeypatch.chdir(tmp_path)  # a store there would be recommended

    def refused(why: str, *words) -> None:
        with pytest.raises(SystemExit, match=rf"^error: {why}"):
            typed(monkeypatch, *words)

    refused(r".* is given twice", sft, sft / "model", "--reward", reward)
    refused(
        r"cannot load .*: it is no reward model. Type python -m runner.compare --reward FOLDER \(the model/ of a reward step\)",
        sft,
        "--reward",
        sft,
    )
    refused(r"cannot load .*: it is a reward model or critic", reward, "--reward", reward, "--max-new-tokens", 12)
    refused(
        r"sft-0123456789 reads 128 tokens, and no prompt leaves room for an answer of 128: lower --max-new-tokens",
        sft,
        "--reward",
        reward,
        "--max-new-tokens",
        128,
    )
    shutil.copytree(reward / "model", tmp_path / "elsewhere")
    refused(
        r".*elsewhere has no held-out prompts, as it was not trained here: type --prompts FILE", sft, "--reward", tmp_path / "elsewhere"
    )
    config = tmp_path / "elsewhere" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"value_mean": 0.0}))
    refused(r"cannot load .*: it is PPO's critic", sft, "--reward", tmp_path / "elsewhere")
    shutil.copytree(sft / "model", tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    refused("other and the reward model do not have the same tokenizer and chat template", tmp_path / "other", "--reward", reward)
    for words in (["--count", 0], ["--temperature", 0], ["--max-new-tokens", 0], ["--batch", 0]):
        with pytest.raises(SystemExit) as raised:
            typed(monkeypatch, sft, "--reward", reward, *words)
        assert raised.value.code == 2


def test_a_full_gpu_is_told_in_words(store, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compare, "answered", full)
    with pytest.raises(SystemExit, match="the GPU's memory is full: lower --batch"):
        typed(monkeypatch, store / "sft-0123456789", "--reward", store / "reward-0123456789")


def test_models_are_called_by_their_steps(tmp_path):
    for place in ("a/sft-1/model", "b/sft-1/model", "c/ppo-2/model", "plain"):
        (tmp_path / place).mkdir(parents=True)
    one, two, three, plain = (str(tmp_path / place) for place in ("a/sft-1/model", "b/sft-1/model", "c/ppo-2/model", "plain"))
    assert compare.named([one, three, plain, "facebook/opt-125m"]) == {
        "sft-1": one,
        "ppo-2": three,
        "plain": plain,
        "facebook/opt-125m": "facebook/opt-125m",
    }
    assert compare.named([one, two]) == {one: one, two: two}


def test_a_run_means_its_reward_model_too(store, tmp_path):
    command = tmp_path / "2026-01-31_12-00-00"
    command.mkdir()
    (command / "reward").symlink_to(store / "reward-0123456789")
    assert exported.find(str(tmp_path), compare.COMPARE, exported.REWARD) == str(command / "reward" / "model")
