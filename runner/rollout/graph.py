"""The decode engine: a preallocated cache of keys and values, one captured CUDA graph per batch size, and no row that waits.

Weights are the training engine's own, read in place: the next rollout sees an update without a copy. A row that has ended rests
at once (its attention costs nothing), its place goes to the next prompt of the queue, and when the queue is empty the batch
shrinks. Prompts are read without padding. On a CPU the same code runs without graphs.
"""

import time
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from runner import attention
from runner.data.batches import pad as padded
from runner.engine import free_memory
from runner.losses import warp_logits, without_token
from runner.packing import lay_out
from runner.rollout import kernels
from runner.rollout.forms import network_of
from runner.rollout.lanes import Lanes, Responses
from runner.rollout.network import Network
from runner.rollout.record import Rollout
from runner.sampling_sizes import PREFILL_TOKENS
from runner.triton_support import why_no_triton

# Steps between two looks at which rows have ended: a look waits for the GPU, and costs a CPU nothing
STRIDE = {"cuda": 8, "cpu": 1}
# New prompts are read when at least this share of the batch rests: one at a time, they would not fill the device
REFILL = 1 / 8
# A batch shrinks to the smallest of these that holds it. They are few, since recording a graph takes 20 ms and a lane that rests costs its
# share of the products alone. Without graphs a batch is as small as it can be
GRAPHS = (16, 64, 128, 256, 512)


@dataclass
class Stats:
    """What sampling cost. steps: those of decoding in which a row was awake; the idle end of a stride costs seconds only. rows and cached
    are sums over the steps: of awake rows, and of cached tokens that they read."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    cached: int = 0

    def add(self, other: "Stats") -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def why_not(hf, device: torch.device) -> str | None:
    """What keeps this engine from sampling with a transformers model, in words; None if nothing does."""
    if network_of(hf) is None:
        return f"this form of {hf.config.model_type} is unknown to it"
    return why_no_triton() if device.type == "cuda" else None


def folded(network: Network) -> Network:
    """With adapters folded into copies of their matrices, if there is memory for these; a copy per rollout is quicker than two more
    products per matrix and token."""
    return network.folded() if 2 * network.adapter_bytes() < free_memory(network.device) else network


class Decoder:
    """Samples one response to each of many prompts. Its buffers, 2 * layers * slots * length vectors of keys and values, go with it."""

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
        least: int = 0,
        limits: list[int] | None = None,
    ):
        """
        Args:
            sampling: temperature, top_k, top_p.
            uniform (N, R): a random number for each response and token (see sampling.py); R tokens at most, EOS included.
            slots: responses that are sampled at the same time.
            least: tokens before which EOS is impossible.
            limits: fewer tokens for some responses.
        """
        self.network, self.sampling, self.prompts = network, sampling, prompts
        self.pad, self.eos, self.least = pad, eos, least
        self.device, self.stats, self.graphs = network.device, Stats(), {}
        (count, most), self.size = uniform.shape, min(slots, len(prompts))
        new = partial(torch.zeros, device=self.device)
        length = max(map(len, prompts)) + most
        cache = (len(network.blocks), self.size, network.kv_heads, length, network.head_dim)
        self.keys, self.values = (new(cache, dtype=network.dtype) for _ in range(2))
        self.rotary = network.rotary(torch.arange(length, device=self.device)) if network.rotary else None
        self.responses = Responses.empty(count, most, limits, self.device)
        self.uniform = F.pad(uniform, (0, 0, 0, 1)).to(self.device)
        self.lanes = Lanes.resting(self.size, count, self.device)
        self.taken, self.begun = 0, torch.zeros(count, dtype=torch.long)  # steps so far; how many were when each response began

    @torch.no_grad()
    def run(self) -> Rollout:
        """Sample all responses."""
        queue, batch = list(enumerate(self.prompts))[::-1], self.size
        resting, stride = list(range(batch)), STRIDE[self.device.type]
        while True:
            if queue and len(resting) >= max(1, REFILL * batch):
                self._admit(queue, resting)
            start = time.monotonic()
            for _ in range(stride):
                self._replay(batch)
            awake = (self.lanes.positions[:batch] >= 0).tolist()
            self.taken += stride
            self.stats.decode_seconds += time.monotonic() - start
            resting = [lane for lane in range(batch) if not awake[lane]]
            if queue:
                continue
            if not any(awake):
                return self._finish()
            smaller = next((size for size in GRAPHS if size >= sum(awake)), batch) if self.device.type == "cuda" else sum(awake)
            if smaller < batch:
                self.lanes.wake_first()
                batch = smaller

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _admit(self, queue: list[tuple[int, list[int]]], resting: list[int]) -> None:
        """Read the next prompts of the queue into lanes that rest."""
        start = time.monotonic()
        slots = self.lanes.slots.tolist()
        while queue and resting:
            group, lanes, tokens = [], [], 0
            while queue and resting and (not group or tokens + len(queue[-1][1]) <= PREFILL_TOKENS):
                group.append(queue.pop())
                lanes.append(resting.pop(0))
                tokens += len(group[-1][1])
            self._read([prompt[:-1] for _, prompt in group], [slots[lane] for lane in lanes])
            # The last token of a prompt is the first to be decoded: sampling stands in one place
            state = {
                "tokens": [prompt[-1] for _, prompt in group],
                "positions": [len(prompt) - 1 for _, prompt in group],
                "rows": [row for row, _ in group],
                "steps": [0] * len(group),
            }
            self.lanes.put(lanes, **state)
            self.begun[state["rows"]] = self.taken
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stats.prefill_seconds += time.monotonic() - start

    def _read(self, prompts: list[list[int]], slots: list[int]) -> None:
        """Keys and values of prompts into the cache."""
        some = [n for n, prompt in enumerate(prompts) if prompt]
        if not some:
            return
        ids, mask = padded([prompts[n] for n in some], self.pad)
        slot = torch.tensor([slots[n] for n in some]).repeat_interleave(mask.sum(1)).to(self.device)
        at, network = lay_out(ids, mask).to(self.device), self.network
        position, group = at.positions[0], network.heads // network.kv_heads
        bias = attention.alibi_bias(network.heads, at.longest, network.dtype, self.device) if network.alibi is not None else None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.rotary:
                cos, sin = (table[position] for table in self.rotary)
                q, k = kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
            self.keys[layer][slot, :, position] = k
            self.values[layer][slot, :, position] = v
            k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
            return attention.attend(q, k, v, at, 0.0, network.head_dim**-0.5, bias).flatten(1)

        network.hidden(at.ids[0], position, attend, last_layer=False)

    # --- decoding -----------------------------------------------------------------------------------------------------

    def _replay(self, batch: int) -> None:
        """One step of the first `batch` lanes."""
        if self.device.type != "cuda":
            return self._step(self.lanes.first(batch))
        if batch not in self.graphs:
            self.graphs[batch] = self._capture(batch)
        self.graphs[batch].replay()

    def _capture(self, batch: int) -> torch.cuda.CUDAGraph:
        """Record a step without running it."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        if not self.graphs:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        # Kernels are compiled when they first run at this size, which a capture does not allow. Lanes that rest change nothing
        self._step(Lanes.resting(batch, len(self.prompts), self.device))
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            # Not torch.cuda.graph(): it would empty the allocator's cache, which the update fills again. Other threads may go on
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self._step(self.lanes.first(batch))
            graph.capture_end()
        here.wait_stream(self.stream)
        return graph

    def _step(self, lanes: Lanes) -> None:
        """Decode one token in every lane: everything stays on the device."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = self.keys[layer], self.values[layer], lanes.slots, lanes.positions
            return kernels.attend(q, k, v, *cache, self.rotary, self.network.alibi)

        logits = self.network.head(self.network.hidden(lanes.tokens, lanes.positions.clamp(min=0), attend))
        if self.least > 1:
            logits = without_token(logits, self.eos, lanes.steps + 1 < self.least)
        if self.sampling != (1.0, 0, 1.0):
            logits = warp_logits(logits.float(), *self.sampling)
        token, logprob = kernels.sample(logits, self.uniform[lanes.rows, lanes.steps])
        kernels.advance(lanes, self.responses, token, logprob, self.eos)

    def _finish(self) -> Rollout:
        ids, mask = padded(self.prompts, self.pad, left=True)
        made, lengths = self.responses, self.responses.lengths[:-1]
        width = int(lengths.max())
        rollout = Rollout(ids.to(self.device), mask.sum(1).to(self.device), made.tokens[:-1, :width], lengths, made.ended[:-1])
        real = rollout.mask.bool()
        rollout.responses = rollout.responses.masked_fill(~real, self.pad)
        rollout.sampled_logprobs = made.logprobs[:-1, :width].masked_fill(~real, 0.0)
        begun, ended = (torch.bincount(at, minlength=self.taken + 1) for at in (self.begun, self.begun + lengths.to("cpu")))
        self.stats.steps = int(((begun - ended).cumsum(0) > 0).sum())
        self.stats.rows = int(lengths.sum())
        self.stats.cached = int((lengths * rollout.prompt_lengths + lengths * (lengths - 1) // 2).sum())
        return rollout
