"""The Triton kernels against their plain forms, and decoding in CUDA graphs against transformers. Skipped without a CUDA device."""

import pytest
import torch
from tiny import EOS, NAMES, PAD, VOCAB, actor, rows

from runner import losses
from runner.data.batches import pad
from runner.rollout import graph, hf, kernels
from runner.rollout.families import network_of
from runner.rollout.kernels import Norm
from runner.rollout.sampling import uniforms
from runner.rollout.stops import Stops, automaton, table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
each_dtype = pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items(), ids=str)


def both_forms(monkeypatch, run):
    """What the plain form returns, and what the kernel does."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "on_triton", lambda x: False)
        plain = run()
    return plain, run()


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Relative error in the norm."""
    assert found.isfinite().all()
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@each_dtype
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("deltas", [0, 1, 2])
def test_add_norm(dtype, tolerance, rms, deltas, monkeypatch):
    x, *more = (torch.randn(5, 80, dtype=dtype, device="cuda") for _ in range(1 + deltas))
    weights = torch.randn(2, 2, 80, dtype=dtype, device="cuda")
    norms = tuple(Norm(w, None if rms else b, 1e-5, rms) for w, b in weights)
    plain, found = both_forms(monkeypatch, lambda: kernels.add_norm(x, tuple(more), norms))
    for one, other in zip(found, plain, strict=True):
        assert_near(one, other, tolerance)


@pytest.mark.parametrize("rows", [1, 5, 128, 129])
@pytest.mark.parametrize(("width", "depth"), [(2048, 2048), (512, 4096), (4096, 1024), (80, 2048)])
def test_product_and_what_add_norm_makes_of_it(rows, width, depth, monkeypatch):
    x, y = (torch.randn(rows, n, dtype=torch.bfloat16, device="cuda") for n in (depth, width))
    weight, bias = torch.randn(width, depth, dtype=x.dtype, device="cuda") / depth**0.5, torch.randn(width, dtype=x.dtype, device="cuda")
    norm = Norm(torch.randn_like(bias), torch.randn_like(bias), 1e-5)

    def run():
        one, other = kernels.product(x, weight, bias), kernels.product(x, weight, None)
        return *kernels.add_norm(y, (one,), (norm,)), *kernels.add_norm(y, (other, one), (norm, norm))

    plain, found = both_forms(monkeypatch, run)
    for one, other in zip(found, plain, strict=True):
        assert_near(one, other, 1e-2)


@each_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "turned", "alibi"),
    [
        (4, 4, 64, 0, False),
        (100, 100, 64, 0, False),
        (500, 500, 64, 0, False),
        (500, 500, 128, 0, True),
        (4, 4, 80, 20, False),
        (8, 2, 32, 32, False),
        (4, 4, 16, 0, True),
        (32, 8, 128, 128, False),
        (600, 300, 64, 0, False),
    ],
)
def test_attention(dtype, tolerance, heads, kv_heads, dim, turned, alibi, monkeypatch):
    """Rows of any length, one that rests, heads of any width; the cache gets the new token and nothing else."""

    def new(*shape):
        return torch.randn(*shape, dtype=dtype, device="cuda")

    q, k, v = new(5, heads, 3, dim).unbind(2)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    caches, slots = new(2, 6, kv_heads, 150, dim), torch.tensor([3, 1, 0, 5, 2], device="cuda")
    positions = torch.tensor([0, 149, 64, -1, 17], device="cuda")
    rotary = tuple(torch.cat([half, half], 1) for half in new(2, 150, turned // 2)) if turned else None
    slopes = torch.rand(heads, device="cuda") if alibi else None
    written = []

    def run():
        written.append(caches.clone())
        return kernels.attend(q, k, v, *written[-1], slots, positions, rotary, slopes)

    plain, found = both_forms(monkeypatch, run)
    awake = positions >= 0
    assert_near(found[awake], plain[awake], tolerance)
    assert_near(written[1], written[0], tolerance)
    assert torch.equal((written[1] != caches).flatten(3).any(-1), (written[0] != caches).flatten(3).any(-1))


def test_silu_product(monkeypatch):
    gate, up = torch.randn(70, 2600, dtype=torch.bfloat16, device="cuda").split(1300, dim=1)
    plain, found = both_forms(monkeypatch, lambda: kernels.silu_product(gate, up))
    assert_near(found, plain, 1e-2)


@each_dtype
@pytest.mark.parametrize("vocabulary", [11, 5000, 250880])
@pytest.mark.parametrize("unused", [0, 5])
def test_chosen_logprobs(dtype, tolerance, vocabulary, unused, monkeypatch):
    """Values, entropies and gradients in one pass against those in blocks. unused: columns that are no token."""
    logits = (5 * torch.randn(70, vocabulary, device="cuda")).to(dtype).requires_grad_()
    tokens, weights = torch.randint(vocabulary - unused, (70,), device="cuda"), torch.randn(70, device="cuda")

    def run():
        logprobs, entropies = losses.chosen_logprobs(losses.bar_unused(logits * 1, vocabulary - unused), tokens, True)
        assert torch.isfinite(entropies).all()
        return logprobs, entropies, *torch.autograd.grad((logprobs * weights).sum(), logits)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "_in_one_pass", lambda logits: False)
        plain = run()
    for one, other in zip(run(), plain, strict=True):
        assert one.dtype == other.dtype
        assert_near(one, other, tolerance)


@pytest.mark.parametrize("vocabulary", [96, 5000, 50272, 250880])
def test_sampler(vocabulary, monkeypatch):
    logits = torch.randn(64, vocabulary, device="cuda") * 3
    logits[3, 10:] = -torch.inf
    logits[4, :-1] = -torch.inf
    uniform = torch.rand(64, dtype=torch.float64, device="cuda")
    uniform[0], uniform[1] = 0.0, 1 - 1e-16
    plain, found = both_forms(monkeypatch, lambda: kernels.sample(logits, uniform))
    # A point within rounding of a step may fall on either side
    assert (plain[0] == found[0]).float().mean() > 0.96
    same = plain[0] == found[0]
    torch.testing.assert_close(found[1][same], plain[1][same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [None, 60])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_in_graphs_is_transformers_generate(name, vocabulary, monkeypatch):
    """fp32: token for token, with rows that end, are replaced, and a batch that shrinks. Rows of the head that are no token are barred."""
    monkeypatch.setattr(graph, "GRAPHS", (1, 2, 4))
    torch.backends.cuda.matmul.allow_tf32 = False
    model, prompts = actor(name, vocabulary=vocabulary).eval().to("cuda"), rows([5, 1, 9, 3, 7, 12, 2], seed=1, vocab=60)
    uniform = uniforms(7, list(range(7)), 20)
    ids, mask = (x.to("cuda") for x in pad(prompts, PAD, left=True))
    expected = hf.generate(model, ids, mask.sum(1), uniform, pad=PAD, eos=EOS)
    options = {"slots": 4, "pad": PAD, "eos": EOS, "vocabulary": vocabulary}
    found = graph.Decoder(network_of(model.hf), model.sampling, prompts, uniform, **options).run()
    assert (int(found.responses.max()) < 60) == (vocabulary is not None)
    assert torch.equal(found.responses, expected.responses)
    torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_response_ends_at_a_stop_string_in_graphs_too(name, monkeypatch):
    """With the same token as on the host, while lanes are taken over and the batch shrinks."""
    monkeypatch.setattr(graph, "GRAPHS", (1, 2, 4))
    torch.backends.cuda.matmul.allow_tf32 = False
    model, prompts = actor(name).eval().to("cuda"), rows([5, 1, 9, 3, 7, 12, 2] * 3, seed=1)
    uniform = uniforms(7, list(range(21)), 40)
    ids, mask = (x.to("cuda") for x in pad(prompts, PAD, left=True))
    stops = Stops([], stop_table().to("cuda"))
    expected = hf.generate(model, ids, mask.sum(1), uniform, pad=PAD, eos=EOS, stops=stops)
    found = graph.Decoder(network_of(model.hf), model.sampling, prompts, uniform, slots=4, pad=PAD, eos=EOS, stops=stops).run()
    for field in ("lengths", "ended", "stopped"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    assert torch.equal(found.responses, expected.responses[:, : found.responses.size(1)])
    assert 3 < int(found.stopped.sum()) < 21


def stop_table() -> torch.Tensor:
    """For the stop strings "aa" and "b"; "a" is token 7, "b" 8 and 9, all others are x."""
    return torch.from_numpy(table(automaton([b"aa", b"b"]), [b"a" if n == 7 else b"b" if n in (8, 9) else b"x" for n in range(VOCAB)]))


@pytest.mark.parametrize("name", NAMES)
def test_new_prompts_take_over_lanes_without_a_wait_for_the_gpu(name, monkeypatch):
    """Only a look is waited for, a stride later, and the end. With stop strings, of which none is reached, too."""
    model, prompts = actor(name).eval().to("cuda", torch.bfloat16), rows([5, 1, 9, 3, 7, 12, 2] * 3, seed=1)
    limits = [1 + 5 * n % 20 for n in range(21)]
    stops = Stops([], torch.zeros(VOCAB, 2, dtype=torch.int32, device="cuda"))

    def decoder(**more) -> graph.Decoder:
        uniform = uniforms(7, list(range(21)), 20)
        return graph.Decoder(network_of(model.hf), model.sampling, prompts, uniform, slots=4, pad=PAD, eos=-1, limits=limits, **more)

    monkeypatch.setattr(graph.Decoder, "_replay", lambda self, batch: self._step(self.lanes.first(batch)))
    expected, work = decoder().run(), decoder(stops=stops)
    finish = work._finish
    monkeypatch.setattr(work, "_finish", lambda: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        work.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert expected.lengths.tolist() == limits
    assert torch.equal(finish().responses, expected.responses)
