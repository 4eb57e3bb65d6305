"""Resumable phases: one file a phase, written to a temporary name and renamed, with the random state inside."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


class Phase:
    """A loop of ``steps`` steps that can be stopped at any moment and goes on from its last save.

    ``parts`` are objects with state_dict/load_state_dict. Iterate over it: it yields step numbers, saves every
    ``every`` seconds and at the end, and appends one line to the log for each call of ``report``."""

    def __init__(self, folder: Path, name: str, steps: int, parts: dict, every: float = 60, seed: int = 0):
        self.file, self.log, self.name = folder / f"{name}.pt", folder / "log.txt", name
        self.steps, self.parts, self.every = steps, parts, every
        self.step, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            for key, part in parts.items():
                part.load_state_dict(saved["parts"][key])
            self.step, self.seconds = saved["step"], saved["seconds"]
            torch.set_rng_state(saved["rng"])

    def save(self) -> None:
        state = {
            "parts": {key: part.state_dict() for key, part in self.parts.items()},
            "step": self.step, "seconds": self.seconds, "rng": torch.get_rng_state(),
        }  # fmt: skip
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.file)

    def __iter__(self):
        saved = started = time.monotonic()
        while self.step < self.steps:
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.seconds, started = self.seconds + now - started, now
            if now - saved > self.every:
                self.save()
                saved = now
        self.save()

    def report(self, **values: float) -> None:
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        line = f"{self.name}  step {self.step}/{self.steps}  {numbers}  {self.seconds / 60:.1f} min"
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")


def schedule(step: int, steps: int, warmup: int = 100, cooldown: float = 0.4) -> float:
    """Warm up, hold, then fall to zero in a straight line over the last ``cooldown`` of the run."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (cooldown * steps))
