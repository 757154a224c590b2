"""The decode engine: continuous batching over a preallocated KV cache, with one captured CUDA graph per batch size.

It reads the training engine's weights in place, so an update needs no copy. A lane (a row of the batch) whose response has ended rests,
at no cost in attention, until it takes the next prompt of the queue; once the queue is empty the batch shrinks. Prompts are read without
padding. On a CPU the same code runs without graphs.
"""

from collections import deque
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.batch_sizes import PREFILL_TOKENS
from runner.data.batches import pad as padded
from runner.device import fetch, send
from runner.engine import free_memory
from runner.losses import bar_unused, warp_logits, without_token
from runner.models import attention
from runner.models.packing import lay_out
from runner.rollout import kernels
from runner.rollout.families import network_of
from runner.rollout.lanes import Lanes, Responses
from runner.rollout.network import Network
from runner.rollout.record import Rollout
from runner.rollout.stats import Stats, Stopwatch
from runner.rollout.stops import Stops
from runner.triton_support import why_no_triton

# Decode steps between two looks at which rows have ended
STRIDE = {"cuda": 6, "cpu": 1}
# Strides queued after a look before it is read, 0 or 1. With 1 the GPU never waits for the host: it decodes while the host learns which
# rows have ended and launches the prefill of the next prompts, which takes as long as 4 to 12 decode steps of a small model
LAG = {"cuda": 1, "cpu": 0}
# Read new prompts once this share of the batch rests: one at a time would not fill the GPU
REFILL = 1 / 8
# Sizes to which a batch shrinks. Only a few: capturing a graph takes 20 ms, and a resting lane costs only its share of the products.
# Without graphs a batch shrinks to any size
GRAPHS = (16, 64, 128, 256, 512)


def why_not(hf, device: torch.device) -> str | None:
    """Why this engine cannot sample with a transformers model, in words; None if it can."""
    if network_of(hf) is None:
        return f"it does not support this variant of {hf.config.model_type}"
    return why_no_triton() if device.type == "cuda" else None


def folded(network: Network) -> Network:
    """The network with adapters folded into copies of their matrices, if memory allows: one copy per rollout is faster than two more
    products per matrix and token."""
    return network.folded() if 2 * network.adapter_bytes() < free_memory(network.device) else network


class Decoder:
    """Samples one response to each of many prompts. Its cache (2 * layers * slots * length vectors) is freed with it."""

    @torch.no_grad()
    def __init__(
        self,
        network: Network,
        sampling: tuple[float, int, float],
        prompts: list[list[int]],
        uniform: Tensor,
        *,
        slots: int,
        pad: int,
        eos: int,
        min_tokens: int = 0,
        vocabulary: int | None = None,
        limits: list[int] | None = None,
        stops: Stops | None = None,
    ):
        """
        Args:
            sampling: temperature, top_k, top_p.
            uniform (N, R): a random number for each response and token (see sampling.py); R tokens at most, EOS included.
            slots: responses sampled at a time.
            min_tokens: tokens before which EOS is impossible.
            vocabulary: as of the Actor.
            limits: tokens of each response at most, where that is fewer than R.
            stops: strings at which a response ends.
        """
        self.network, self.sampling, self.prompts = network, sampling, prompts
        self.pad, self.eos, self.min_tokens, self.vocabulary, self.stops = pad, eos, min_tokens, vocabulary, stops
        self.device, self.stats, self.graphs = network.device, Stats(), {}
        self.watch = Stopwatch(self.device)
        (count, most), self.size = uniform.shape, min(slots, len(prompts))
        new = partial(torch.zeros, device=self.device)
        length = max(map(len, prompts)) + most
        cache = (len(network.blocks), self.size, network.kv_heads, length, network.head_dim)
        self.keys, self.values = (new(cache, dtype=network.dtype) for _ in range(2))
        self.rotary = network.rotary(torch.arange(length, device=self.device)) if network.rotary else None
        self.responses = Responses.empty(count, most, limits, self.device)
        self.uniform = F.pad(uniform, (0, 0, 0, 1)).to(self.device)
        self.lanes = Lanes.resting(self.size, count, self.device)
        self.taken, self.begun = 0, torch.zeros(count, dtype=torch.long)  # decode steps so far; and at the start of each response
        self.most, self.latest_end = most, 0  # the number of decode steps after which all responses that have begun must have ended

    @torch.no_grad()
    def run(self) -> Rollout:
        """Sample all responses."""
        queue, batch = list(enumerate(self.prompts))[::-1], self.size
        stride, lag = STRIDE[self.device.type], LAG[self.device.type]
        resting, looks = list(range(batch)), deque()  # looks that are not read yet
        while True:
            admitted = self._admit(queue, resting) if queue and len(resting) >= max(1, REFILL * batch) else []
            steps = min(stride, self.latest_end - self.taken)
            for _ in range(steps):
                self._replay(batch)
            self.taken += steps
            if not queue and self.taken == self.latest_end:
                return self._finish()
            looks.append(fetch(self.lanes.positions[:batch]))
            if len(looks) <= lag:
                resting = []
                continue
            positions = looks.popleft()()
            awake = {lane for lane, position in enumerate(positions.tolist()) if position >= 0}
            if lag:  # the look is older than these prompts
                awake |= set(admitted)
            resting = [lane for lane in range(batch) if lane not in awake]
            if queue:
                continue
            # From here on only the number of lanes matters: where they lie changes, and an older look does not know
            if not awake:
                return self._finish()
            smaller = next((size for size in GRAPHS if size >= len(awake)), batch) if self.device.type == "cuda" else len(awake)
            if smaller < batch:
                self.lanes.awake_first()
                batch = smaller

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _admit(self, queue: list[tuple[int, list[int]]], resting: list[int]) -> list[int]:
        """Prefill the next prompts of the queue into resting lanes. Returns the lanes."""
        admitted = []
        self.watch.lap("prefill")
        while queue and resting:
            group, lanes, tokens = [], [], 0
            while queue and resting and (not group or tokens + len(queue[-1][1]) <= PREFILL_TOKENS):
                group.append(queue.pop())
                lanes.append(resting.pop(0))
                tokens += len(group[-1][1])
            # While there is a queue no lane has moved: each has the slot of its own number
            self._read([prompt[:-1] for _, prompt in group], lanes)
            # The last token of a prompt is decoded, not prefilled, so that all sampling happens in `_step`
            state = {
                "tokens": [prompt[-1] for _, prompt in group],
                "positions": [len(prompt) - 1 for _, prompt in group],
                "rows": [row for row, _ in group],
                "steps": [0] * len(group),
            }
            self.lanes.put(lanes, **state)
            self.begun[state["rows"]] = self.taken
            admitted += lanes
        self.watch.lap("decode")
        self.latest_end = self.taken + self.most
        return admitted

    def _read(self, prompts: list[list[int]], slots: list[int]) -> None:
        """Write keys and values of prompts into the cache."""
        some = [n for n, prompt in enumerate(prompts) if prompt]
        if not some:
            return
        ids, mask = padded([prompts[n] for n in some], self.pad)
        slot = send(torch.tensor([slots[n] for n in some]).repeat_interleave(mask.sum(1)), self.device)
        at, network = lay_out(ids, mask).to(self.device), self.network
        position = at.positions[0]
        bias = attention.alibi_bias(network.heads, at.longest, network.dtype, self.device) if network.alibi is not None else None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.rotary:
                cos, sin = (table[position] for table in self.rotary)
                q, k = kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
            self.keys[layer][slot, :, position] = k
            self.values[layer][slot, :, position] = v
            return attention.attend(q, k, v, at, 0.0, network.head_dim**-0.5, bias).flatten(1)

        network.hidden(at.ids[0], position, attend, last_layer=False)

    # --- decoding -----------------------------------------------------------------------------------------------------

    def _replay(self, batch: int) -> None:
        """Run one decode step of the first `batch` lanes."""
        if self.device.type != "cuda":
            return self._step(self.lanes.first(batch))
        if batch not in self.graphs:
            self.graphs[batch] = self._capture(batch)
        self.graphs[batch].replay()

    def _capture(self, batch: int) -> torch.cuda.CUDAGraph:
        """Capture a decode step as a graph."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        if not self.graphs:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        # Run once before: Triton compiles a kernel on first use, which a capture does not allow. Resting lanes change nothing
        self._step(Lanes.resting(batch, len(self.prompts), self.device))
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            # Not torch.cuda.graph(): it empties the allocator's cache, which the update would have to refill. thread_local: other
            # threads may use CUDA meanwhile
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self._step(self.lanes.first(batch))
            graph.capture_end()
        here.wait_stream(self.stream)
        return graph

    def _step(self, lanes: Lanes) -> None:
        """Decode one token in every lane, entirely on the device."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = self.keys[layer], self.values[layer], lanes.slots, lanes.positions
            return kernels.attend(q, k, v, *cache, self.rotary, self.network.alibi)

        logits = self.network.head(self.network.hidden(lanes.tokens, lanes.positions.clamp(min=0), attend))
        bar_unused(logits, self.vocabulary)
        if self.min_tokens > 1:
            logits = without_token(logits, self.eos, lanes.steps + 1 < self.min_tokens)
        if self.sampling != (1.0, 0, 1.0):
            logits = warp_logits(logits.float(), *self.sampling)
        token, logprob = kernels.sample(logits, self.uniform[lanes.rows, lanes.steps])
        kernels.advance(lanes, self.responses, token, logprob, self.eos, self.stops)

    def _finish(self) -> Rollout:
        self.watch.lap("end")
        ids, mask = padded(self.prompts, self.pad, left=True)
        made, lengths = self.responses, self.responses.lengths[:-1]
        width = int(lengths.max())
        prompts = ids.to(self.device), mask.sum(1).to(self.device)
        stopped = made.stopped[:-1] if self.stops else None
        rollout = Rollout(*prompts, made.tokens[:-1, :width], lengths, made.ended[:-1], stopped)
        real = rollout.mask.bool()
        rollout.responses = rollout.responses.masked_fill(~real, self.pad)
        rollout.sampled_logprobs = made.logprobs[:-1, :width].masked_fill(~real, 0.0)
        begun, ended = (torch.bincount(at, minlength=self.taken + 1) for at in (self.begun, self.begun + lengths.to("cpu")))
        self.stats.prefill_seconds, self.stats.decode_seconds = map(self.watch.seconds, ("prefill", "decode"))
        self.stats.steps = int(((begun - ended).cumsum(0) > 0).sum())
        self.stats.rows = int(lengths.sum())
        self.stats.cached = int((lengths * rollout.prompt_lengths + lengths * (lengths - 1) // 2).sum())
        return rollout
