"""Work of real model shapes against numbers worked out by hand. Nothing is allocated: the models lie on the meta device."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from runner import flops
from runner.config.schema import Lora
from runner.flops import MatrixSizes

H = 2048
SHAPES = {
    "opt": {
        "vocab_size": 50272,
        "hidden_size": H,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": H,
    },
    "opt350m": {
        "vocab_size": 50272,
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "gpt_neox": {"vocab_size": 50304, "hidden_size": H, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16},
    "bloom": {"vocab_size": 250880, "hidden_size": H, "n_layer": 24, "n_head": 16},
}
# body, head, attention, cache
BY_HAND = {
    # 4 matrices H x H and 2 of H x 4H make 12 H^2 in each of 24 layers
    "opt": (24 * 12 * H**2, 50272 * H, 24 * H, 2 * 24 * H),
    # besides, one matrix from 512 to 1024 and one back; the head reads 512
    "opt350m": (24 * 12 * 1024**2 + 2 * 512 * 1024, 50272 * 512, 24 * 1024, 2 * 24 * 1024),
    # q and o are whole, k and v a quarter; gate, up and down
    "llama": (32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 11008), 32000 * 4096, 32 * 4096, 2 * 32 * 1024),
    "gpt_neox": (24 * 12 * H**2, 50304 * H, 24 * H, 2 * 24 * H),
    "bloom": (24 * 12 * H**2, 250880 * H, 24 * H, 2 * 24 * H),
}


def model(name: str, auto=AutoModelForCausalLM, **more):
    config = AutoConfig.for_model("opt" if name == "opt350m" else name, **SHAPES[name], **more)
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("name", SHAPES)
def test_the_work_of_every_family_is_that_of_its_shape(name):
    body, head, attention, cache = BY_HAND[name]
    assert flops.matrix_sizes(model(name)) == MatrixSizes(body, body, head, head, attention, cache)


def test_a_reward_model_has_no_matrix_for_logits():
    found = flops.matrix_sizes(model("opt350m", AutoModelForSequenceClassification, num_labels=1, pad_token_id=1))
    assert (found.body, found.head, found.head_trained) == (BY_HAND["opt350m"][0], 0, 0)


def test_below_adapters_nothing_trains():
    from runner.models.lora import add_lora

    lora = Lora(dim=8, alpha=16, dropout=0.0, targets=[], train_rest=False)
    found = flops.matrix_sizes(add_lora(model("gpt_neox"), lora).get_base_model())
    adapters = 24 * 8 * ((H + 3 * H) + (H + H) + 2 * (H + 4 * H))
    assert (found.body_trained, found.body) == (adapters, BY_HAND["gpt_neox"][0] + adapters)
    assert (found.head_trained, found.head) == (0, BY_HAND["gpt_neox"][1])


def test_flops_are_counted_as_the_definition_says():
    """3 and 2 tokens have 6 and 3 pairs of query and key; 4 tokens have logits."""
    sizes = MatrixSizes(body=100, body_trained=100, head=10, head_trained=10, attention=7, cache=0)
    once = 2 * 100 * 5 + 4 * 7 * 9 + 2 * 10 * 4
    assert flops.forward(sizes, [3, 2], 4) == once
    assert flops.training(sizes, [3, 2], 4) == 3 * once


def test_weights_that_do_not_train_save_a_third_but_attention_does_not():
    sizes = MatrixSizes(body=100, body_trained=1, head=10, head_trained=0, attention=7, cache=0)
    assert flops.training(sizes, [3, 2], 4) == 2 * (2 * 100 * 5 + 2 * 10 * 4) + 2 * 1 * 5 + 3 * 4 * 7 * 9


def test_opt_1_3b_reads_a_sequence_of_512_with_1_29_tflop():
    """The issue's sequence: 256 prompt and 256 response tokens. 6N per token, the usual estimate, would say 3.9 in training."""
    sizes = flops.matrix_sizes(model("opt"))
    assert flops.forward(sizes, [512], 256) == 1_236_950_581_248 + 25_820_135_424 + 52_714_012_672
    assert flops.training(sizes, [512], 256) == 3 * flops.forward(sizes, [512], 256)


def test_decoding_reads_the_matrices_once_a_step_and_the_cache_once_a_row():
    """At the issue's 64 x (256 + 256), per step, bf16: 2.62 GB of weights and 64 x 384 tokens of 197 kB."""
    read = flops.decode_bytes(flops.matrix_sizes(model("opt")), steps=1, cached=64 * 384, itemsize=2)
    assert read == 2 * (24 * 12 * H**2 + 50272 * H) + 2 * 98304 * 64 * 384
    assert flops.mbu(read, seconds=0.0031, gb_s=4800) == pytest.approx(0.50, abs=0.01)


def test_utilisation_is_a_share_of_all_devices():
    assert flops.mfu(1e15, seconds=2, tflops=500, devices=2) == 0.5
