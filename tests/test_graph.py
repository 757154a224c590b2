"""The decode engine against transformers' generate, and against the distributions that it says it samples from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS, NAMES, PAD, SHAPES, VOCAB, actor, causal, family, generate, no_dropout, rows, sharpen
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from runner import triton_support
from runner.config.schema import Lora
from runner.losses import warp_logits
from runner.models.lora import add_lora
from runner.models.wrappers import Actor
from runner.rollout import graph
from runner.rollout.collect import response_logprobs
from runner.rollout.families import network_of, side_by_side
from runner.rollout.graph import Decoder
from runner.rollout.sampling import uniforms

every_family = pytest.mark.parametrize("name", NAMES)
LENGTHS = [5, 1, 9, 3, 7, 12, 2]
PROMPTS = rows(LENGTHS, seed=1)
EPISODES = list(range(len(PROMPTS)))
FIELDS = ("prompts", "prompt_lengths", "responses", "lengths", "ended")


def decoder(model: Actor, prompts=PROMPTS, *, tokens: int = 20, slots: int = 4, seed: int = 7, eos: int = EOS, **options) -> Decoder:
    uniform = uniforms(seed, list(range(len(prompts))), tokens)
    return Decoder(network_of(model.hf), model.sampling, prompts, uniform, slots=slots, pad=PAD, eos=eos, **options)


def assert_same(found, expected) -> None:
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in FIELDS)
    torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs, rtol=1e-4, atol=1e-5)


# --- the same tokens as transformers ----------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("slots", [7, 3, 1])
def test_samples_what_generate_samples(name, slots):
    """Ragged prompts, one of a single token; more prompts than slots, so that rows end, are replaced, and the batch shrinks."""
    model = actor(name).eval()
    expected = generate(model, PROMPTS, EPISODES, length=20)
    assert len(set(expected.lengths.tolist())) > 1
    assert_same(decoder(model, slots=slots).run(), expected)


@every_family
def test_greedy_is_transformers_greedy(name):
    model = Actor(causal(name), family(name), 0, temperature=1e-5).eval()
    found = decoder(model).run()
    for n, prompt in enumerate(PROMPTS):
        config = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
        ids = torch.tensor([prompt])
        whole = model.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert found.responses[n, : found.lengths[n]].tolist() == whole[0, len(prompt) :].tolist()


@every_family
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}], ids=["plain", "warped"])
def test_log_probabilities_are_those_of_a_full_forward(name, sampling):
    model = actor(name, **sampling).eval()
    found = decoder(model).run()
    for n, prompt in enumerate(PROMPTS):
        answer = found.responses[n, : found.lengths[n]]
        logits = model.hf(input_ids=torch.tensor([prompt + answer.tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = warp_logits(logits, *model.sampling).log_softmax(-1).gather(1, answer.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(found.sampled_logprobs[n, : len(answer)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("llama", {"hidden_act": "relu"}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("bloom", {"n_head": 2, "hidden_size": 48}),
        ("opt", {"num_attention_heads": 2, "hidden_size": 48, "word_embed_proj_dim": 48}),
    ],
    ids=["linear rope", "llama3 rope", "gated relu", "sequential neox", "bloom of 24 dims", "opt of 24 dims"],
)
def test_forms_of_a_family(name, more):
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
    config = AutoConfig.for_model(family(name), vocab_size=VOCAB, **(SHAPES[name] | ids | no_dropout(name) | more))
    torch.manual_seed(0)
    model = Actor(sharpen(AutoModelForCausalLM.from_config(config)), family(name), 0).eval()
    assert_same(decoder(model).run(), generate(model, PROMPTS, EPISODES, length=20))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    slots=st.integers(1, 10),
    tokens=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_no_batching_changes_a_response(lengths, slots, tokens, seed):
    """Whatever the lengths, the slots and the order: each row is what it would be alone."""
    model = property_model()
    prompts = rows(lengths, seed=seed)
    found = decoder(model, prompts, tokens=tokens, slots=slots, seed=seed).run()
    assert_same(found, generate(model, prompts, list(range(len(prompts))), length=tokens, seed=seed))


def property_model(made=[]) -> Actor:  # noqa: B006
    if not made:
        made.append(actor("llama").eval())
    return made[0]


# --- the right distribution -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5}, {"top_k": 8}, {"top_p": 0.7}], ids=str)
def test_samples_follow_the_softmax(sampling):
    """Chi-square of 6,000 first tokens; one in 10,000 right samplers would fail, and this one is always the same."""
    model = actor("opt", **sampling).eval()
    prompt, draws = PROMPTS[0], 6000
    found = decoder(model, [prompt] * draws, tokens=1, slots=512, eos=-1).run().responses[:, 0]
    logits = model.hf(input_ids=torch.tensor([prompt])).logits[0, -1:]
    expected = warp_logits(logits, *model.sampling).softmax(-1)[0].double().detach() * draws
    counts = torch.bincount(found, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    # Rare tokens share a cell, or its count would not be nearly normal
    often = expected >= 5
    rare = torch.tensor([expected[~often].sum(), counts[~often].sum()], dtype=torch.float64)
    wanted, observed = (torch.cat([part[often], rare[n : n + 1]]) for n, part in ((0, expected), (1, counts)))
    statistic = ((observed - wanted).square() / wanted.clamp(min=1e-9)).sum()
    freedom = int((wanted > 0).sum()) - 1
    assert freedom >= 4
    assert torch.special.gammaincc(torch.tensor(freedom / 2.0, dtype=torch.float64), statistic / 2) > 1e-4


@pytest.mark.parametrize("sampling", [{}, {"top_k": 20}], ids=["plain", "top_k"])
def test_eos_is_impossible_before_the_least_length(sampling):
    """In both engines alike, and the trainer reads the same log-probabilities; without `min_tokens` some responses are shorter."""
    prompts = PROMPTS * 6
    free, model = actor("llama", **sampling).eval(), actor("llama", min_tokens=10, **sampling).eval()
    assert decoder(free, prompts, slots=16).run().lengths.min() < 10
    found = decoder(model, prompts, slots=16, min_tokens=10).run()
    assert_same(found, generate(model, prompts, list(range(len(prompts))), length=20))
    assert found.lengths.min() >= 10 and found.ended.any()
    with torch.no_grad():
        logprobs, entropies = response_logprobs(model, found, with_entropy=True)
    torch.testing.assert_close(logprobs, found.sampled_logprobs, rtol=1e-4, atol=1e-5)
    assert entropies.isfinite().all()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0}, {"top_k": 60}, {"top_p": 0.9}], ids=str)
def test_rows_of_the_embeddings_that_are_no_token_are_never_sampled(sampling):
    """In both engines alike, and the trainer gives the tokens the probabilities of a head without those rows."""
    prompts = rows(LENGTHS, seed=1, vocab=50) * 6
    free, model = actor("opt", **sampling).eval(), actor("opt", vocabulary=50, **sampling).eval()
    assert decoder(free, prompts, slots=16).run().responses.max() >= 50
    found = decoder(model, prompts, slots=16, vocabulary=50).run()
    assert found.responses.max() < 50
    assert_same(found, generate(model, prompts, list(range(len(prompts))), length=20))
    with torch.no_grad():
        logprobs, entropies = response_logprobs(model, found, with_entropy=True)
    torch.testing.assert_close(logprobs, found.sampled_logprobs, rtol=1e-4, atol=1e-5)
    first = [prompt + answer[:1] for prompt, answer in zip(prompts, found.responses.tolist(), strict=True)]
    for n, ids in enumerate(first):
        logits = warp_logits(model.hf(input_ids=torch.tensor([ids[:-1]])).logits[0, -1:, :50], *model.sampling).log_softmax(-1)
        assert float(logprobs[n, 0]) == pytest.approx(float(logits[0, ids[-1]]), abs=1e-4)
        likely = logits[logits > -torch.inf]
        assert float(entropies[n, 0]) == pytest.approx(float(-(likely.exp() * likely).sum()), abs=1e-4)


def test_limits_end_a_row_early():
    model = actor("opt").eval()
    limits = [3, 1, 20, 7, 2, 5, 9]
    free, found = decoder(model, eos=-1).run(), decoder(model, eos=-1, limits=limits).run()
    assert found.lengths.tolist() == limits and not found.ended.any()
    for n, limit in enumerate(limits):
        assert torch.equal(found.responses[n, :limit], free.responses[n, :limit])
        assert (found.responses[n, limit:] == PAD).all() and (found.sampled_logprobs[n, limit:] == 0).all()


# --- weights ----------------------------------------------------------------------------------------------------------


@every_family
def test_the_next_rollout_sees_an_update(name):
    """The network is read before the update and used after it: nothing was copied."""
    model = actor(name).eval()
    network, uniform = network_of(model.hf), uniforms(7, EPISODES, 20)

    def sampled():
        return Decoder(network, model.sampling, PROMPTS, uniform, slots=4, pad=PAD, eos=EOS).run()

    before = sampled()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)))
    after = sampled()
    assert not torch.equal(before.sampled_logprobs[:, :1], after.sampled_logprobs[:, :1])
    assert_same(after, generate(model, PROMPTS, EPISODES, length=20))


def adapted(name: str) -> Actor:
    torch.manual_seed(0)
    lora = Lora(dim=4, alpha=16.0, dropout=0.0, targets=[], train_rest=False)
    made = Actor(add_lora(causal(name), lora), family(name), 0).eval()
    for key, parameter in made.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@every_family
def test_adapters_are_sampled_with_folded_or_not_and_their_matrices_stay(name):
    model = adapted(name)
    expected = generate(model, PROMPTS, EPISODES, length=20)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network, uniform = network_of(model.hf), uniforms(7, EPISODES, 20)
    assert network.adapter_bytes() > 0 == network.folded().adapter_bytes()
    for one in (network, network.folded()):
        assert_same(Decoder(one, model.sampling, PROMPTS, uniform, slots=4, pad=PAD, eos=EOS).run(), expected)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with model.without_adapter() as plain:
        assert network_of(plain.hf).adapter_bytes() == 0


def test_adapters_are_not_folded_where_memory_is_short(monkeypatch):
    network = network_of(adapted("opt").hf)
    monkeypatch.setattr(graph, "free_memory", lambda device: 2 * network.adapter_bytes())
    assert graph.folded(network) is network
    monkeypatch.setattr(graph, "free_memory", lambda device: 2 * network.adapter_bytes() + 1)
    assert graph.folded(network).adapter_bytes() == 0


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_weights_side_by_side_are_one_product(name):
    model = actor(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = generate(model, PROMPTS, EPISODES, length=20)
    assert network_of(model.hf).blocks[0].qkv.whole is None
    side_by_side(model.hf)
    block = network_of(model.hf).blocks[0]
    assert block.qkv.whole is not None
    assert (block.up.whole is not None) == (name == "llama")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert_same(decoder(model).run(), expected)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_stats_count_rows_and_cached_tokens():
    work = decoder(actor("opt").eval(), slots=3)
    found = work.run()
    lengths, prompts = found.lengths.tolist(), found.prompt_lengths.tolist()
    assert work.stats.rows == sum(lengths)
    # The token at step t reads a cache of the prompt and of the t tokens before it
    assert work.stats.cached == sum(p + t for p, n in zip(prompts, lengths, strict=True) for t in range(n))
    assert work.stats.steps * 3 >= work.stats.rows and work.stats.decode_seconds > 0 < work.stats.prefill_seconds


@pytest.mark.parametrize("slots", [1, 3, 25])
def test_steps_in_which_all_rows_rest_are_not_counted(slots, monkeypatch):
    """On a GPU the engine does not look at every step, so that some follow the end of all rows; here the CPU is made to."""
    monkeypatch.setitem(graph.STRIDE, "cpu", 8)
    prompts, limits = rows([4] * 25, seed=3), [1 + n % 11 for n in range(25)]
    work, awake = decoder(actor("opt").eval(), prompts, tokens=17, slots=slots, eos=-1, limits=limits), []
    step = work._step
    monkeypatch.setattr(work, "_step", lambda lanes: (awake.append(bool((lanes.positions >= 0).any())), step(lanes)))
    assert work.run().lengths.tolist() == limits
    assert work.stats.steps == sum(awake) < len(awake)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_looking_a_stride_late_as_on_a_gpu_changes_no_response(slots, stride, monkeypatch):
    """A lane that took a new prompt since the look must not take another one."""
    prompts, limits = rows([5, 1, 9, 3, 7, 12, 2] * 3, seed=1), [1 + 5 * n % 16 for n in range(21)]
    model = actor("opt").eval()
    expected = decoder(model, prompts, tokens=16, slots=slots, eos=-1, limits=limits).run()
    monkeypatch.setitem(graph.LAG, "cpu", 1)
    monkeypatch.setitem(graph.STRIDE, "cpu", stride)
    found = decoder(model, prompts, tokens=16, slots=slots, eos=-1, limits=limits).run()
    assert_same(found, expected)
    assert found.lengths.tolist() == limits


def test_no_step_follows_the_end_of_the_longest_responses(monkeypatch):
    """Neither the rest of a stride nor a late look, where all responses are as long as they may be: two batches of 16 tokens."""
    monkeypatch.setitem(graph.LAG, "cpu", 1)
    monkeypatch.setitem(graph.STRIDE, "cpu", 6)
    work = decoder(actor("opt").eval(), rows([4] * 6), tokens=16, slots=3, eos=-1)
    assert work.run().lengths.tolist() == [16] * 6
    assert work.taken == work.stats.steps == 32


def test_a_row_that_ends_is_replaced_and_the_batch_shrinks(monkeypatch):
    """24 responses of 8 tokens and one of 96 through 8 slots: far fewer steps and rows than one batch after the other would take."""
    model, batches = actor("opt").eval(), []
    prompts, limits = rows([4] * 25, seed=3), [96] + [8] * 24
    work = decoder(model, prompts, tokens=96, slots=8, eos=-1, limits=limits)
    step = work._step
    monkeypatch.setattr(work, "_step", lambda lanes: (batches.append(len(lanes.tokens)), step(lanes)))
    assert work.run().lengths.tolist() == limits
    assert len(batches) == 96
    assert batches[0] == 8 and batches[-1] == 1 and sum(batches) < 8 * 96 / 2


# --- forms that it does not know --------------------------------------------------------------------------------------


def test_it_says_why_it_cannot_sample(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert graph.why_not(causal("llama"), cpu) is None
    assert "this variant of bloom" in graph.why_not(causal("bloom", apply_residual_connection_post_layernorm=True), cpu)
    assert "this variant of opt" in graph.why_not(causal("opt", layer_norm_elementwise_affine=False), cpu)
    lora = Lora(dim=4, alpha=16.0, dropout=0.0, targets=["embed_tokens"], train_rest=False)
    assert "this variant of llama" in graph.why_not(add_lora(causal("llama"), lora).get_base_model(), cpu)
    monkeypatch.setattr(graph, "why_no_triton", lambda: "Triton is missing")
    assert graph.why_not(causal("llama"), cpu) is None
    assert graph.why_not(causal("llama"), cuda) == "Triton is missing"


def test_what_triton_lacks(monkeypatch):
    asked = triton_support.why_no_triton.__wrapped__  # not the cached answer
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    assert "Triton is missing" in asked()
    monkeypatch.setattr(triton_support, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_support.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc" in asked()
    monkeypatch.setattr(triton_support.shutil, "which", lambda name: name if name == "/opt/cc" else None)
    assert "install gcc" in asked()
    monkeypatch.setenv("CC", "/opt/cc")
    assert asked() is None
