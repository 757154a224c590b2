"""What sampling cost: steps, tokens and seconds."""

import time
from dataclasses import dataclass, fields

import torch


@dataclass
class Stats:
    """steps: decode steps with a row awake; idle ones count in the seconds alone. rows, cached: awake rows, and cached tokens
    that they read, summed over the steps."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    cached: int = 0

    def add(self, other: "Stats") -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class Stopwatch:
    """Seconds of the device by phase, without waiting for it."""

    def __init__(self, device: torch.device):
        self.device, self.laps = device, []

    def lap(self, phase: str) -> None:
        """From here on, time belongs to this phase."""
        self.laps.append((phase, self._now()))

    def seconds(self, phase: str) -> float:
        """Of all laps of a phase but one that has not ended. Waits for the GPU."""
        laps = zip(self.laps, self.laps[1:], strict=False)
        return sum(self._between(begun, ended) for (name, begun), (_, ended) in laps if name == phase)

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.monotonic()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def _between(self, begun, ended) -> float:
        if self.device.type != "cuda":
            return ended - begun
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3
