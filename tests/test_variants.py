"""Runs as a user starts them, with other families, ranks, ZeRO stages and adapters; and on real dialogues.

None of them trains all three stages: each start of a worker costs ten seconds. test_gpu.py does.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_pipeline import SMALL_PPO, metrics, step_folder, succeed
from tiny import causal, classifier

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[2] / "shared" / "data"

ZERO3 = "hardware.zero={actor: 3, critic: 3, ref: 3, reward: 3}"
PRESETS = {"opt": "", "bloom": "_bloom", "gpt_neox": "_neox"}
LORA = ["model.actor.lora.dim=4", "model.reward.lora.dim=4"]
VARIANTS = {
    "bloom-2-ranks-zero2": ["hardware=cpu2", "hardware.zero.actor=2", "hardware.zero.critic=2", "ppo.stop=[a, b]"],
    "gpt_neox-zero3-lora-bf16": ["hardware.precision=bf16", ZERO3, *LORA],
    "opt-bf16-offload-checkpointing": [
        "hardware.precision=bf16",
        "hardware.zero={actor: 3, critic: 2, ref: 3, reward: 3}",
        "hardware.offload={optimizer: true, params: true, ref: true, reward: true}",
        "hardware.gradient_checkpointing={actor: true, critic: true}",
    ],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_ppo_of_families_ranks_zero_stages_and_adapters(name, tmp_path, tokenizer):
    family = name.partition("-")[0]
    sft, reward = checkpoints(tmp_path, family, tokenizer)
    words = [f"model=tiny{PRESETS[family]}", "model.max_prompt_tokens=96", f"sft.use={sft}", f"reward.use={reward}"]
    succeed(tmp_path, *SMALL_PPO, *words, *VARIANTS[name])
    folder = check_ppo(tmp_path, 0.1 if "bf16" in name else 1e-3)
    if "bloom" in name:
        rates = [row["rollout/truncated_rate"] for row in metrics(folder) if "rollout/truncated_rate" in row]
        assert max(rates) < 0.5  # nearly every random response has an a or a b in it
    if "lora" in name:
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert adapter and all(t.numel() for t in adapter.values())


def test_sft_and_ppo_of_llama_on_two_ranks_under_zero_3(tmp_path, tokenizer):
    base, reward = checkpoints(tmp_path, "llama", tokenizer)
    words = ["model=tiny_llama", "model.max_prompt_tokens=80", "model.max_response_tokens=48"]
    words += [f"model.actor.path={base}", f"reward.use={reward}"]
    succeed(tmp_path, *SMALL_PPO, *words, "hardware=cpu2", ZERO3, "ppo.ema_decay=0.9")
    check_ppo(tmp_path, 1e-3)


def checkpoints(folder: Path, family: str, tokenizer) -> list[Path]:
    """Folders of a language model and a reward model with random weights."""
    paths = [folder / "causal", folder / "classifier"]
    for make, path in zip((causal, classifier), paths, strict=True):
        make(family, scale=0.02).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def check_ppo(store: Path, rounding: float) -> Path:
    """The folder of PPO's step, whose first ratio was 1 and whose weights are numbers."""
    from transformers import AutoModelForCausalLM

    folder = step_folder(store, "ppo")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert all(p.isfinite().all() for p in model.parameters())
    first = next(row for row in metrics(folder) if "val/first_ratio_error" in row)
    assert first["val/first_ratio_error"] < rounding
    return folder


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_real_dialogues_with_demonstrations_beside_them(tmp_path):
    pairs, demonstrations = DATA / "hh_helpful_pairs.jsonl.gz", DATA / "dolly_sft.jsonl.gz"
    printed = succeed(
        tmp_path,
        "stage=dpo",
        "dataset=jsonl",
        f"dataset.path={pairs}",
        f"dataset.sft_only=[{demonstrations}]",
        "dataset.max_rows=700",
        "dataset.holdout=0.2",
        "model.max_response_tokens=96",
    )
    dpo = json.loads((step_folder(tmp_path, "dpo") / "result.json").read_text())
    assert 0 <= dpo["accuracy_low"] <= dpo["accuracy"] <= dpo["accuracy_high"] <= 1 and dpo["eval_pairs"] > 5
    sft = json.loads((step_folder(tmp_path, "sft") / "result.json").read_text())
    assert sft["data"]["truncated"] > 0 and sum(sft["data"]["dropped"].values()) > 0
    assert "longer is better" in printed
