"""The wrappers, LoRA, loading and saving, for tiny models of every family, in fp32 on the CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BOS, EOS, NAMES, PAD, actor, causal, classifier, config, configured, family, no_dropout, predictions, rows, scalar, sharpen
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from runner.config.schema import Lora
from runner.data.batches import pad
from runner.engine import parameter_groups
from runner.errors import UserError
from runner.families import FAMILIES
from runner.losses import entropy
from runner.models.loading import load_causal, load_scalar
from runner.models.lora import add_lora
from runner.models.packing import positions_from_mask
from runner.models.saving import full_state_dict, save_adapter, save_model
from runner.models.tokenizer import load_tokenizer
from runner.models.wrappers import Actor, Scalar
from runner.stages import build

every_family = pytest.mark.parametrize("name", NAMES)

# A masked-in PAD and an EOS stand in the middle of real text: masks must come from lengths
ROWS = rows([7, 3, 9, 5])
ROWS[0][3], ROWS[2][4] = EOS, PAD
WEIGHTS = torch.randn(sum(len(r) - 1 for r in ROWS), generator=torch.Generator().manual_seed(1))


def lora(**changes) -> Lora:
    return Lora(**({"dim": 4, "alpha": 8.0, "dropout": 0.0, "targets": [], "train_rest": False} | changes))


def options(**changes) -> dict:
    return {"dtype": torch.float32, "attention": "auto", "dropout": 0.0, "seed": 5} | changes


def largest(a: dict, b: dict) -> float:
    """Largest difference of two sets of gradients, as a share of the largest gradient."""
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max() for n in a) / max(g.abs().max() for g in a.values())


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


# --- padding ----------------------------------------------------------------------------------------------------------


def body_layers(model) -> torch.nn.ModuleList:
    return next(module for module in model.hf.base_model.modules() if isinstance(module, torch.nn.ModuleList))


def logprobs(model: Actor, rows: list[list[int]], left: bool) -> torch.Tensor:
    ids, mask = pad(rows, PAD, left)
    return model(ids, mask, *predictions(rows, ids.size(1), left))[0]


def test_positions_from_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions_from_mask(mask)[mask.bool()].tolist() == [0, 1, 2, 0, 1, 2]


def test_every_stage_reads_the_tokenizer_of_the_revision(monkeypatch):
    """PPO and DPO, too: the launcher has tokenised their data with it."""
    seen = []
    monkeypatch.setattr(build, "load_tokenizer", lambda path, **options: seen.append(options["revision"]))
    cfg = configured("model.actor.revision=v2")
    for path in (cfg.model.actor.path, "a/pinned"):
        build.tokenizer_for(cfg, cfg.model.actor, path)
    assert seen == ["v2", None]


def calls(module: torch.nn.Module) -> list[dict]:
    """The keyword arguments that a module is called with from now on."""
    seen = []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs | dict(enumerate(args))), with_kwargs=True)
    return seen


@every_family
def test_the_body_sees_real_tokens_only_and_explicit_positions(name):
    """One row of 24 tokens in place of four of 9. BLOOM takes no positions: its bias is made of them."""
    model = actor(name)
    embedded, layers = calls(model.hf.get_input_embeddings()), calls(body_layers(model)[0])
    ids, mask = pad(ROWS, PAD, left=True)
    assert model.hidden_states(ids, mask).shape[0] == 24
    assert embedded[0][0].tolist() == [[token for row in ROWS for token in row]]
    assert layers[0][0].shape == (1, 24, 32)
    if name != "bloom":
        assert layers[0]["position_ids"].tolist() == [[j for row in ROWS for j in range(len(row))]]


@every_family
def test_padded_attention_still_gets_mask_and_explicit_positions(name):
    model = Actor(causal(name, attention="eager"), family(name), 0)
    given = calls(model.hf.base_model)
    ids, mask = pad(ROWS, PAD, left=True)
    model.hidden_states(ids, mask)
    assert torch.equal(given[0]["attention_mask"], mask)
    if name == "bloom":
        assert "position_ids" not in given[0]
    else:
        assert given[0]["position_ids"][mask.bool()].tolist() == [j for row in ROWS for j in range(len(row))]


@every_family
def test_padding_changes_neither_logprobs_nor_gradients(name):
    model = actor(name)
    alone = torch.cat([logprobs(model, [row], left=False) for row in ROWS])
    expected = gradients(model, (alone * WEIGHTS).sum())
    assert alone.std() > 0.5  # the model does tell tokens apart
    for left in (False, True):
        padded = logprobs(model, ROWS, left)
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
        assert largest(expected, gradients(model, (padded * WEIGHTS).sum())) < 1e-5


@every_family
def test_logprobs_are_those_of_transformers(name):
    """Nothing but the unpadded model's own logits, shifted by one."""
    model = actor(name)
    for row in ROWS:
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([row])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(row[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(logprobs(model, [row], left=True), expected, rtol=1e-5, atol=1e-5)


def last(model: Scalar, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The value at the last real token of each sequence. (B, T) -> (B,)."""
    end = (mask * torch.arange(mask.size(1))).argmax(-1, keepdim=True)
    return model(ids, mask).gather(1, end).squeeze(1)


@every_family
def test_padding_changes_neither_scalars_nor_gradients(name):
    model = scalar(name)
    alone = torch.cat([last(model, *pad([row], PAD)) for row in ROWS])
    weights = WEIGHTS[: len(ROWS)]
    expected = gradients(model, (alone * weights).sum())
    assert alone.std() > 0.1
    for left in (False, True):
        padded = last(model, *pad(ROWS, PAD, left))
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
        assert largest(expected, gradients(model, (padded * weights).sum())) < 1e-5


@every_family
@pytest.mark.parametrize("left", [False, True])
def test_scalars_are_those_of_transformers(name, left):
    model = scalar(name)
    ids, mask = pad(ROWS, PAD, left)
    with torch.no_grad():
        expected = model.hf(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        torch.testing.assert_close(last(model, ids, mask), expected, rtol=1e-5, atol=1e-5)


@every_family
def test_scalars_are_read_at_every_position(name):
    """The value at a position is that of the text up to there: what comes later does not leak into it."""
    model, row = scalar(name), ROWS[0]
    with torch.no_grad():
        values = model(*pad([row], PAD))[0]
        expected = torch.cat([last(model, *pad([row[: n + 1]], PAD)) for n in range(len(row))])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_scalars_of_rows_that_are_padded_on_different_sides():
    model = scalar("llama")
    ids = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, PAD]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        found, alone = last(model, ids, mask), [last(model, *pad([row], PAD)) for row in ([5, 6], [7, 8, 9])]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)


# --- logits in chunks -------------------------------------------------------------------------------------------------


@every_family
def test_chunked_logits_equal_whole_ones_in_value_and_gradient(name):
    ids, mask = pad(ROWS, PAD)
    where = predictions(ROWS, ids.size(1), left=False)
    found = []
    for chunk in (0, 4, 1):
        model = actor(name, chunk=chunk, temperature=0.7, top_k=20)
        logp, entropies = model(ids, mask, *where, with_entropy=True)
        found.append((logp, entropies, gradients(model, (logp * WEIGHTS).sum())))
        with torch.no_grad():
            torch.testing.assert_close(model(ids, mask, *where)[0], logp, rtol=0, atol=1e-6)
    for logp, entropies, grads in found[1:]:
        torch.testing.assert_close(logp, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropies, found[0][1], rtol=1e-6, atol=1e-6)
        assert largest(found[0][2], grads) < 1e-5


def test_entropies_are_those_of_the_sampled_distribution_and_carry_no_gradient():
    model = actor("llama", temperature=0.5, top_k=3)
    ids, mask = pad(ROWS[:1], PAD)
    index, targets = predictions(ROWS[:1], ids.size(1), left=False)
    given = (ids, mask, index, targets)
    logp, entropies = model(*given, with_entropy=True, steps=torch.arange(len(index)))
    assert not entropies.requires_grad
    assert model(*given)[1].eq(0).all()
    logits = model.hf(input_ids=ids).logits[0, :-1] / 0.5
    for i, target in enumerate(targets.tolist()):
        kept = sorted({*logits[i].topk(3).indices.tolist(), target})
        torch.testing.assert_close(entropies[i], entropy(logits[i, kept]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logp[i], logits[i, kept].log_softmax(-1)[kept.index(target)], rtol=1e-5, atol=1e-5)


def test_no_predictions_give_an_empty_result_with_a_gradient():
    """A rank whose micro batch is empty still takes part in the backward pass."""
    model = actor("opt")
    ids, mask = pad([[]], PAD)
    none = torch.empty(0, dtype=torch.long)
    logp, _ = model(ids, mask, none, none)
    assert logp.shape == (0,)
    assert all(g.eq(0).all() for g in gradients(model, logp.sum()).values())


# --- parameters -------------------------------------------------------------------------------------------------------


@every_family
def test_parameter_groups_decay_matrices_only(name):
    model = actor(name)
    groups = parameter_groups(model, lr=0.1, lora_lr=0.2, weight_decay=0.3)
    name_of = {id(p): n for n, p in model.named_parameters()}
    decay = {name_of[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decay.keys() == {n for n, _ in model.named_parameters()}  # each once, tied ones included
    for parameter, value in decay.items():
        is_vector = parameter.endswith("bias") or "norm" in parameter or "ln_" in parameter
        assert value == (0.0 if is_vector else 0.3), parameter
    assert {(g["lr"], g["peak_lr"]) for g in groups} == {(0.1, 0.1)}


@every_family
def test_lora_groups_have_their_own_learning_rate(name):
    model = Scalar(add_lora(classifier(name), lora()), family(name))
    groups = parameter_groups(model, lr=0.1, lora_lr=0.2, weight_decay=0.3)
    name_of = {id(p): n for n, p in model.named_parameters()}
    rates = {name_of[id(p)]: g["peak_lr"] for g in groups for p in g["params"]}
    assert all(rate == (0.2 if "lora_" in n else 0.1) for n, rate in rates.items())
    assert sum("score" in n for n in rates) == 1


# --- LoRA -------------------------------------------------------------------------------------------------------------


def adapted(name: str, kind=Actor, **changes):
    """A wrapper whose adapters (and scalar head) have moved from where they began."""
    model = causal(name) if kind is Actor else scalar(name).model
    model = add_lora(model, lora(**changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and ("lora_" in n or "score" in n):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return Actor(model, family(name), 0) if kind is Actor else Scalar(model, family(name))


def outputs(model) -> torch.Tensor:
    """Logits of the actor, or values, at all real positions of ROWS."""
    ids, mask = pad(ROWS, PAD)
    with torch.no_grad():
        hidden = model.hidden_states(ids, mask)
        head = model.hf.get_output_embeddings() if isinstance(model, Actor) else model.hf.score
        return head(hidden)


def plain_outputs(hf) -> torch.Tensor:
    """The same of a Hugging Face model: of the last token only where it is a classifier."""
    ids, mask = pad(ROWS, PAD)
    with torch.no_grad():
        logits = hf(input_ids=ids, attention_mask=mask).logits
    return logits[mask.bool()] if logits.dim() == 3 else logits


def test_adapters_for_layers_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"lora.targets: nix is no layer of opt. Take some of embed_tokens, fc1, fc2, k_proj"):
        add_lora(causal("opt"), lora(targets=["nix"]))
    with pytest.raises(UserError, match=r"lora.targets: vproj is no layer of opt \(did you mean v_proj\?\)"):
        add_lora(causal("opt"), lora(targets=["q_proj", "vproj"]))  # peft is content if one of them fits


def test_the_table_of_families_names_all_layers_that_can_get_adapters():
    """So that the plan can refuse others."""
    for name, found in FAMILIES.items():
        modules = [pair for kind in NAMES if family(kind) == name for pair in causal(kind).named_modules()]
        layers = {path.rpartition(".")[2] for path, module in modules if isinstance(module, torch.nn.Linear | torch.nn.Embedding)}
        assert layers - {"embed_positions"} == {*found.lora_targets, *found.other_layers}


@every_family
@pytest.mark.parametrize("kind", [Actor, Scalar])
def test_lora_trains_adapters_and_scalar_head_only(name, kind):
    model = adapted(name, kind)
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {n for n in training if "lora_" not in n}
    assert heads == (set() if kind is Actor else {"model.base_model.model.score.modules_to_save.default.weight"})
    # Two matrices for each target of both layers
    assert len(training) - len(heads) == 2 * 2 * len(model.family.lora_targets)
    ids, mask = pad(ROWS, PAD)
    loss = logprobs(model, ROWS, False).sum() if kind is Actor else model(ids, mask).sum()
    assert all(g.abs().sum() > 0 for g in gradients(model, loss).values())


@every_family
def test_train_rest_trains_all_but_the_matrices_below_the_adapters(name):
    plain = {n for n, _ in causal(name).named_parameters()}
    model = adapted(name, train_rest=True)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    below = {n for n in plain if n.endswith("weight") and any(f".{t}.weight" in n for t in model.family.lora_targets)}
    assert len(below) == 2 * len(model.family.lora_targets)
    assert {n.removeprefix("model.base_model.model.").replace(".base_layer", "") for n in frozen} == below
    # Of a scalar head the trained copy moves, and the original that peft keeps beside it does not
    scalars = adapted(name, Scalar, train_rest=True)
    assert {n.split("score.")[1]: p.requires_grad for n, p in scalars.named_parameters() if "score." in n} == {
        "original_module.weight": False,
        "modules_to_save.default.weight": True,
    }


@every_family
@pytest.mark.parametrize("kind, base", [(Actor, actor), (Scalar, scalar)])
def test_without_adapter_is_the_base_model(name, kind, base):
    model, expected = adapted(name, kind), outputs(base(name))
    before = outputs(model)
    assert (before - expected).abs().max() > 0.1
    with model.without_adapter():
        assert torch.equal(outputs(model), expected)
    assert torch.equal(outputs(model), before)


@every_family
@pytest.mark.parametrize("train_rest", [False, True])
def test_merged_state_dict_gives_the_adapted_logits(name, train_rest):
    model = adapted(name, train_rest=train_rest)
    plain = causal(name, seed=9)
    state = full_state_dict(model, torch.float32)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain_outputs(plain), outputs(model), rtol=1e-4, atol=1e-4)


def test_merged_state_dict_with_other_targets():
    """Any linear layer may get adapters, the output matrix of an untied model included."""
    model = adapted("llama", targets=["q_proj", "lm_head"])
    assert sum("lora_" in n for n, p in model.named_parameters() if p.requires_grad) == 2 * (2 + 1)
    plain = causal("llama", seed=9)
    plain.load_state_dict(full_state_dict(model, torch.float32))
    torch.testing.assert_close(plain_outputs(plain), outputs(model), rtol=1e-4, atol=1e-4)


# --- activation checkpointing -----------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("with_lora", [False, True])
def test_activation_checkpointing_changes_no_gradient(name, with_lora):
    """The layers run again in the backward pass, with frozen embeddings too, and give the same gradients."""
    from runner.stages.build import _finish

    found, runs = [], []
    for checkpointing in (False, True):
        model = Actor(_finish(causal(name), lora() if with_lora else None, checkpointing), family(name), 0)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.fill_(0.05)
        layer = next(m for n, m in model.named_modules() if n.endswith((".layers.0", ".h.0")))
        first = next(m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear))
        calls = []
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.train()
        logp = logprobs(model, ROWS, left=False)
        found.append(gradients(model, (logp * WEIGHTS).sum()))
        runs.append(len(calls))
    assert runs == [1, 2]
    assert largest(found[0], found[1]) < 1e-5
    assert all(g.abs().sum() > 0 for g in found[1].values()) or not with_lora


@every_family
def test_a_layer_that_runs_again_knows_its_own_rows(name):
    """Two batches go forward before the first goes backward: each is recomputed with its own layout."""
    from runner.stages.build import _finish

    found = []
    for checkpointing in (False, True):
        model = Actor(_finish(causal(name), None, checkpointing), family(name), 0).train()
        parts = [logprobs(model, part, left=False).square().sum() for part in (ROWS[:2], ROWS[1:])]
        found.append(gradients(model, sum(parts)))
    assert largest(*found) < 1e-5


# --- saved folders ----------------------------------------------------------------------------------------------------


def check_tokenizer(folder, tokenizer, side: str) -> None:
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.padding_side == side and tokenizer.padding_side == "left"
    assert saved.chat_template == tokenizer.chat_template
    assert saved.pad_token_id == PAD != saved.eos_token_id == EOS
    turns = [{"role": "user", "content": "Hi"}]
    assert saved.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "\n\nHuman: Hi\n\nAssistant:"


@every_family
@pytest.mark.parametrize("with_lora", [False, True])
def test_exported_actor_is_a_plain_checkpoint(name, with_lora, tokenizer, tmp_path):
    model = adapted(name) if with_lora else actor(name)
    expected = outputs(model)
    save_model(model, tmp_path, tokenizer, dtype=torch.float32, max_new_tokens=7)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(plain_outputs(loaded), expected, rtol=1e-4, atol=1e-4)
    assert loaded.dtype == torch.float32
    settings = loaded.generation_config
    assert (settings.max_new_tokens, settings.pad_token_id, settings.eos_token_id, settings.bos_token_id) == (7, PAD, EOS, BOS)
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))
    check_tokenizer(tmp_path, tokenizer, "left")
    # Writing did not change the model that goes on training
    assert torch.equal(outputs(model), expected)


@every_family
@pytest.mark.parametrize("with_lora", [False, True])
def test_exported_reward_model_is_a_plain_classifier(name, with_lora, tokenizer, tmp_path):
    model = adapted(name, Scalar) if with_lora else scalar(name)
    save_model(model, tmp_path, tokenizer, dtype=torch.float32, max_new_tokens=7, extra={"score_mean": 1.5})
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.config.num_labels, loaded.config.score_mean) == (1, 1.5)
    with torch.no_grad():
        expected = last(model, *pad(ROWS, PAD))
    torch.testing.assert_close(plain_outputs(loaded).squeeze(-1), expected, rtol=1e-4, atol=1e-4)
    check_tokenizer(tmp_path, tokenizer, "right")
    # ... and the critic begins exactly there
    again = Scalar(load_scalar(str(tmp_path), tokenizer, fresh_head=False, **options()), family(name))
    with torch.no_grad():
        torch.testing.assert_close(last(again, *pad(ROWS, PAD)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_lora", [False, True])
def test_export_in_bf16(with_lora, tokenizer, tmp_path):
    model = (adapted("llama") if with_lora else actor("llama")).bfloat16()
    save_model(model, tmp_path, tokenizer, dtype=torch.bfloat16, max_new_tokens=7)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    # What is merged is the sum in fp32, rounded once
    target = model.hf.model.layers[0].self_attn.q_proj
    expected = target.base_layer.weight.float() + target.get_delta_weight("default").float() if with_lora else target.weight
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, expected.bfloat16())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_matrices_of_which_one_has_an_adapter_are_saved_as_two(target, tokenizer, tmp_path):
    model = Actor(add_lora(causal("opt"), lora(targets=[target, "q_proj"])), "opt", 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # which begin at 0
            parameter.data.normal_()
    save_model(model, tmp_path / "model", tokenizer, dtype=torch.float32, max_new_tokens=5)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(again.get_input_embeddings().weight, again.get_output_embeddings().weight)
    torch.testing.assert_close(plain_outputs(again), outputs(model.eval()), rtol=1e-4, atol=1e-4)


def test_saved_adapter_fits_on_the_base_model(tmp_path, tokenizer, monkeypatch):
    from peft import PeftModel

    model = adapted("llama")
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    model.model.peft_config["default"].base_model_name_or_path = "base"
    save_adapter(model, tmp_path / "adapter", tokenizer)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["task_type"]) == (str(tmp_path / "base"), "CAUSAL_LM")
    again = PeftModel.from_pretrained(causal("llama"), str(tmp_path / "adapter"))
    assert (plain_outputs(again) - plain_outputs(causal("llama"))).abs().max() > 0.1
    torch.testing.assert_close(plain_outputs(again), outputs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Actor, Scalar])
@pytest.mark.parametrize("spare", [0, 9], ids=["a row for PAD is lacking", "there are rows enough"])
def test_the_readme_of_an_adapter_loads_it(kind, spare, tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    base = causal("llama", vocab=known + spare)
    base.config.pad_token_id = None
    base.save_pretrained(tmp_path / "base")
    where, how = (str(tmp_path / "base"), tokenizer), options(attention="sdpa")
    model = load_causal(*where, **how) if kind is Actor else load_scalar(*where, fresh_head=True, **how)
    model = add_lora(model, lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_adapter(Actor(model, "llama", 0) if kind is Actor else Scalar(model, "llama"), tmp_path / "adapter", tokenizer)
    made = {}
    exec((tmp_path / "adapter" / "README.md").read_text().split("```")[1].removeprefix("python"), made)
    reader = made["tokenizer"]
    assert reader.padding_side == ("left" if kind is Actor else "right")
    batch = reader(["The river is calm, bright and fresh.", "calm"], padding=True, return_tensors="pt")
    assert batch.input_ids.max() == known == reader.pad_token_id
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for m in (made["model"], model))
    # Rows of tokens that the base lacks are random
    real = batch.attention_mask.bool() if kind is Actor else slice(None)
    torch.testing.assert_close(found[real][..., :known], expected[real][..., :known], rtol=1e-4, atol=1e-4)


def test_adapters_on_random_weights_have_nothing_to_be_loaded_onto(tokenizer, tmp_path):
    causal("llama").config.save_pretrained(tmp_path / "base")
    model = add_lora(load_causal(str(tmp_path / "base"), tokenizer, **options(attention="sdpa")), lora())
    save_adapter(Actor(model, "llama", 0), tmp_path / "adapter", tokenizer)
    told = (tmp_path / "adapter" / "README.md").read_text()
    assert "```" not in told and "only `../model`" in told


# --- loading ----------------------------------------------------------------------------------------------------------


def config_folder(name: str, folder, **changes) -> str:
    config(name, **changes).save_pretrained(folder)
    return str(folder)


@every_family
@pytest.mark.parametrize("load", [load_causal, lambda *a, **o: load_scalar(*a, fresh_head=True, **o)], ids=["causal", "scalar"])
def test_random_weights_depend_on_the_seed_alone(name, load, tokenizer, tmp_path):
    path = config_folder(name, tmp_path)
    torch.manual_seed(1)
    first = load(path, tokenizer, **options()).state_dict()
    torch.manual_seed(2)
    same, other = (load(path, tokenizer, **options(seed=seed)).state_dict() for seed in (5, 6))
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(first[n], same[n]) for n in first)
    changed = {n for n in first if not torch.equal(first[n], other[n])}
    assert {n for n in first if first[n].dim() > 1} <= changed  # every matrix; vectors begin at 0 or 1


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_k": 8}, {"top_p": 0.5}, {"vocabulary": 50}], ids=str)
def test_text_that_was_not_sampled_is_read_by_the_plain_softmax(sampling, chunk):
    """As the ptx mixture of PPO is: the language model's loss, whatever responses are sampled with."""
    ids, mask = pad(ROWS, PAD)
    index, targets = predictions(ROWS, ids.size(1), left=False)
    given = (ids, mask, index, targets, True)
    plain, model = actor("llama"), actor("llama", chunk=chunk, **sampling)
    for found, expected in zip(model(*given), plain(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(*given, torch.full_like(index, 9))[0], plain(*given)[0])


@pytest.mark.parametrize("chunk", [0, 3])
def test_rows_of_the_head_that_are_no_token_have_no_part_in_the_gradient(chunk):
    short = [[token % 47 + 3 for token in row] for row in ROWS]
    ids, mask = pad(short, PAD)
    index, targets = predictions(short, ids.size(1), left=False)
    model = actor("llama", chunk=chunk, vocabulary=50)
    model(ids, mask, index, targets, False, torch.full_like(index, 9))[0].sum().backward()
    cut = actor("llama")
    head = cut.hf.get_output_embeddings()
    hidden = cut.hidden_states(ids, mask)
    real = mask.flatten().nonzero().squeeze(1)
    logits = (hidden @ head.weight[:50].T)[torch.searchsorted(real, index)]
    logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).sum().backward()
    for (name, found), expected in zip(model.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert not model.hf.get_output_embeddings().weight.grad[50:].any()


def test_random_weights_leave_a_rank_its_own_dropout_masks(tokenizer, tmp_path):
    path, masks = config_folder("opt", tmp_path), []
    for rank in (0, 1):
        torch.manual_seed(7 + rank)  # as runner.worker does
        load_causal(path, tokenizer, **options(seed=7))
        masks.append(torch.rand(8))
    assert not torch.equal(*masks)


@every_family
def test_a_reward_model_that_is_trained_on_keeps_its_head(name, tokenizer, tmp_path):
    given = classifier(name)
    given.save_pretrained(tmp_path)
    model = load_scalar(str(tmp_path), tokenizer, fresh_head=True, **options())
    torch.testing.assert_close(model.score.weight, given.score.weight)


def test_a_reward_model_without_its_head_is_not_given_another(tokenizer, tmp_path):
    classifier("opt").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("score.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the weights .* such as score.weight"):
        load_scalar(str(tmp_path), tokenizer, fresh_head=True, **options())


@every_family
def test_a_fresh_head_is_small(name, tokenizer, tmp_path):
    causal(name).save_pretrained(tmp_path)
    model = load_scalar(str(tmp_path), tokenizer, fresh_head=True, **options())
    width = 16 if name == "opt350m" else 32
    draw = torch.randn(1, width, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(model.score.weight.detach(), draw / (width + 1) ** 0.5)
    # The body is the language model's
    ids, mask = pad(ROWS, PAD)
    with torch.no_grad():
        hidden = Scalar(model, family(name)).hidden_states(ids, mask)
        expected = Actor(causal(name), family(name), 0).hidden_states(ids, mask)
    torch.testing.assert_close(hidden[:, : expected.size(1)], expected, rtol=1e-5, atol=1e-5)


def test_values_are_fp32_where_the_model_is_bf16(tokenizer, tmp_path):
    causal("llama").save_pretrained(tmp_path)
    model = Scalar(load_scalar(str(tmp_path), tokenizer, fresh_head=True, **options(dtype=torch.bfloat16)), "llama")
    ids, mask = pad(ROWS, PAD)
    with torch.no_grad():
        hidden = model.hidden_states(ids, mask)
        values = model(ids, mask)
    assert hidden.dtype == torch.bfloat16 and values.dtype == torch.float32
    torch.testing.assert_close(values[mask.bool()], (hidden.float() @ model.hf.score.weight.float().T).squeeze(-1))
    with torch.no_grad():
        assert (
            logprobs(Actor(load_causal(str(tmp_path), tokenizer, **options(dtype=torch.bfloat16)), "llama", 0), ROWS, False).dtype
            == torch.float32
        )


@every_family
@pytest.mark.parametrize("load", [load_causal, lambda *a, **o: load_scalar(*a, fresh_head=True, **o)], ids=["causal", "scalar"])
def test_dropout_is_off_or_the_models_own(name, load, tokenizer, tmp_path):
    """dropout=0 silences every dropout that a family has; null leaves the checkpoint's."""
    path = config_folder(name, tmp_path, **dict.fromkeys(no_dropout(name), 0.5))
    ids, mask = pad(ROWS, PAD)

    def runs(dropout):
        model = sharpen(load(path, tokenizer, **options(dropout=dropout)))
        with torch.no_grad():
            return [
                getattr(model, mode)().base_model(input_ids=ids, attention_mask=mask)[0][mask.bool()] for mode in ("eval", "train", "train")
            ]

    quiet, training, again = runs(0.0)
    assert torch.equal(quiet, training) and torch.equal(training, again)
    quiet, training, again = runs(None)
    assert (quiet - training).abs().max() > 0.1 and (training - again).abs().max() > 0.1
    quiet, training, _ = runs(0.25)
    assert (quiet - training).abs().max() > 0.1


@pytest.mark.parametrize("dropout", [0.0, None])
def test_layerdrop_is_off(dropout, tokenizer, tmp_path):
    """Ranks that leave out different layers would wait for each other's gradients for ever."""
    path = config_folder("opt", tmp_path, layerdrop=0.9, dropout=0.0)
    model = sharpen(load_causal(path, tokenizer, **options(dropout=dropout))).train()
    ids, mask = pad(ROWS, PAD)
    with torch.no_grad():
        first, *others = (model(input_ids=ids, attention_mask=mask).logits for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_unknown_family_is_refused(tokenizer, tmp_path):
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a model of the family gpt2, which is not supported: families are opt, bloom, llama, gpt_neox"):
        load_causal(str(tmp_path), tokenizer, **options())


@every_family
def test_weights_that_are_missing_or_of_other_sizes_are_not_made_up(name, tokenizer, tmp_path):
    """As transformers does, whose models then train as if they had begun from the checkpoint."""
    causal(name).save_pretrained(tmp_path)
    load_scalar(str(tmp_path), tokenizer, fresh_head=True, **options())
    with pytest.raises(UserError, match=r"lacks 1 of the weights that its config.json asks for, such as score.weight: copy it again"):
        load_scalar(str(tmp_path), tokenizer, fresh_head=False, **options())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"module.{key}": weight for key, weight in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ of the weights that its config.json asks for"):
        load_causal(str(tmp_path), tokenizer, **options())
    halved = {key: weight[: len(weight) // 2].clone() for key, weight in weights.items()}
    save_file(halved, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"do not have the sizes that its config.json says"):
        load_causal(str(tmp_path), tokenizer, **options())


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_attention_that_a_family_lacks_is_refused(attention, tokenizer, tmp_path):
    path = config_folder("bloom", tmp_path)
    with pytest.raises(UserError, match=rf"model.attention={attention} does not exist for bloom: type one of packed, eager"):
        load_causal(path, tokenizer, **options(attention=attention))


@every_family
@pytest.mark.parametrize("kind", [Actor, Scalar])
def test_all_attention_implementations_agree_in_value_and_gradient(name, kind, tokenizer, tmp_path):
    """Without padding as with it, in any of the ways to compute attention."""
    (causal if kind is Actor else classifier)(name).save_pretrained(tmp_path)
    found, names = [], ["auto", *FAMILIES[family(name)].attention]
    for attention in [n for n in names if n != "flash_attention_2"]:
        if kind is Actor:
            model = Actor(load_causal(str(tmp_path), tokenizer, **options(attention=attention)), family(name), 0)
            out, weights = logprobs(model, ROWS, left=True), WEIGHTS
        else:
            model = Scalar(load_scalar(str(tmp_path), tokenizer, fresh_head=False, **options(attention=attention)), family(name))
            out, weights = model(*pad(ROWS, PAD, left=True)), torch.linspace(-1, 1, 36).view(4, 9)
        assert model.hf.config._attn_implementation == attention.replace("auto", "packed")
        found.append((out, gradients(model, (out * weights).sum())))
    for out, grads in found[:-1]:
        torch.testing.assert_close(out, found[-1][0], rtol=1e-5, atol=1e-5)
        assert largest(found[-1][1], grads) < 1e-5


@every_family
def test_the_name_of_our_attention_is_not_saved(name, tokenizer, tmp_path):
    save_model(actor(name), tmp_path, tokenizer, dtype=torch.float32, max_new_tokens=7)
    assert not [text for path in tmp_path.glob("*.json") if "packed" in (text := path.read_text())]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation in ("sdpa", "eager")


@every_family
def test_attention_dropout_acts_in_training_only(name):
    quiet = actor(name)
    noisy = Actor(causal(name, attention_dropout=0.5), family(name), 0)
    ids, mask = pad(ROWS, PAD)
    with torch.no_grad():
        expected = quiet.hidden_states(ids, mask)
        assert torch.equal(noisy.eval().hidden_states(ids, mask), expected)
        one, other = (noisy.train().hidden_states(ids, mask) for _ in range(2))
    assert (one - other).abs().max() > 0.1 and (one - expected).abs().max() > 0.1


@every_family
def test_embeddings_grow_with_the_tokenizer_and_old_tokens_stay(name, tokenizer, tmp_path):
    before = causal(name)
    before.save_pretrained(tmp_path)
    assert len(tokenizer) > 96
    model = load_causal(str(tmp_path), tokenizer, **options())
    assert model.get_input_embeddings().num_embeddings == 320 == model.get_output_embeddings().weight.size(0) == model.config.vocab_size
    ids, mask = pad(ROWS, PAD)
    with torch.no_grad():
        grown, old = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()][:, :96] for m in (model, before))
    torch.testing.assert_close(grown, old)
    # New rows are the mean of the old: the same in every process, and for actor and reference alike
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        torch.testing.assert_close(table[96:], table[:96].mean(0).expand(224, -1))
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (PAD, EOS, BOS)
    critic = load_scalar(str(tmp_path), tokenizer, fresh_head=True, **options())
    assert critic.get_input_embeddings().num_embeddings == 320


def test_a_large_enough_embedding_is_left_alone(tokenizer, tmp_path):
    causal("llama", vocab=500).save_pretrained(tmp_path)
    assert load_causal(str(tmp_path), tokenizer, **options()).get_input_embeddings().num_embeddings == 500


def test_a_checkpoints_own_sampling_settings_do_not_leak(tokenizer, tmp_path):
    model = causal("llama")
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=5, repetition_penalty=1.5)
    model.save_pretrained(tmp_path)
    loaded = load_causal(str(tmp_path), tokenizer, **options()).generation_config
    assert not {"do_sample", "temperature", "top_k", "repetition_penalty"} & loaded.to_diff_dict().keys()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (PAD, EOS)
