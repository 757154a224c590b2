"""The whole pipeline, as a user starts it, with other families, ranks, ZeRO stages and adapters; and on real dialogues."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_pipeline import SMALL_PPO, metrics, step_folder, succeed

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[2] / "shared" / "data"

ZERO3 = ["hardware=cpu2", "hardware.zero={actor: 3, critic: 3, ref: 3, reward: 3}"]
LORA = ["model.actor.lora.dim=4", "model.reward.lora.dim=4"]
VARIANTS = {
    "bloom-2-ranks-zero2": ["model=tiny_bloom", "hardware=cpu2", "hardware.zero.actor=2", "hardware.zero.critic=2"],
    "llama-2-ranks-zero3": ["model=tiny_llama", *ZERO3, "ppo.ema_decay=0.9"],
    "neox-2-ranks-zero3-lora-bf16": ["model=tiny_neox", "hardware.precision=bf16", *ZERO3, *LORA],
    "opt-bf16-offload-checkpointing": [
        "hardware.precision=bf16",
        "hardware.zero={actor: 3, critic: 2, ref: 3, reward: 3}",
        "hardware.offload={optimizer: true, params: true, ref: true, reward: true}",
        "hardware.gradient_checkpointing={actor: true, critic: true}",
    ],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_families_ranks_zero_stages_and_adapters(name, tmp_path):
    from transformers import AutoModelForCausalLM

    succeed(tmp_path, *SMALL_PPO, *VARIANTS[name])
    folder = step_folder(tmp_path, "ppo")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert all(p.isfinite().all() for p in model.parameters())
    first = next(row for row in metrics(folder) if "val/first_ratio_error" in row)
    assert first["val/first_ratio_error"] < (0.1 if "bf16" in name else 1e-3)
    if "lora" in name:
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert adapter and all(t.numel() for t in adapter.values())


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_real_dialogues_with_demonstrations_beside_them(tmp_path):
    pairs, demonstrations = DATA / "hh_helpful_pairs.jsonl.gz", DATA / "dolly_sft.jsonl.gz"
    printed = succeed(
        tmp_path,
        "dataset=jsonl",
        f"dataset.path={pairs}",
        f"dataset.sft_only=[{demonstrations}]",
        "dataset.max_rows=1500",
        "model.max_response_tokens=96",
        *SMALL_PPO,
    )
    reward = json.loads((step_folder(tmp_path, "reward") / "result.json").read_text())
    assert 0 < reward["accuracy_low"] <= reward["accuracy"] <= reward["accuracy_high"] < 1
    sft = json.loads((step_folder(tmp_path, "sft") / "result.json").read_text())
    assert sft["data"]["truncated"] > 0 and sum(sft["data"]["dropped"].values()) > 0
    assert "longer is better" in printed
