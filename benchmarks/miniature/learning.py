"""Training a module by Muon and AdamW, resumable at any time."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.miniature import muon, state
from benchmarks.miniature.curve import Curve

RATES = {"muon": 1.5e-2, "adamw": 6e-3}
AVERAGE = 0.998
SAVE_EVERY = 200
# None of these is a map from one hidden space to another.
NOT_MUON = ("embed", "shared", "norm", "relative_attention_bias", "proj_out", "position", "query")


@contextmanager
def autocast() -> Iterator[None]:
    """Bfloat16 for what gains by it."""
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        # The norms' weights stay in float32, at which torch wonders.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


class Average:
    """Exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(AVERAGE, (step + 1) / (step + 10))
        for kept, weight in zip(self.module.parameters(), module.parameters(), strict=True):
            kept.lerp_(weight, 1 - decay)


def run(
    stage: str,
    folder: Path,
    curve: Curve,
    steps: int,
    model: nn.Module,
    share: Callable[[int], float],
    loss_of: Callable[[int, Random], Tensor],
    after: Callable[[], None] = lambda: None,
) -> Average:
    """Train `model`, going on where an earlier run stopped; what requires no gradient stays.

    Args:
        stage: its name.
        folder: where its state is kept.
        curve: where the losses go.
        steps: how many.
        model: what is trained.
        share: of the rates, at a step.
        loss_of: a step's loss; with what chance there is in it.
        after: called after each change of the weights.
    """
    average = Average(model)
    trained = [one for one in model.named_parameters() if one[1].requires_grad]
    matrices, rest = muon.split(trained, NOT_MUON)
    optimizers: dict[str, Optimizer] = {
        "muon": muon.Muon(matrices, RATES["muon"], dtype=torch.bfloat16),
        "adamw": torch.optim.AdamW(rest, RATES["adamw"], betas=(0.9, 0.98), weight_decay=0.0),
    }
    partial = folder / f"{stage}.partial.safetensors"
    first = 0
    if partial.exists():
        tensors, notes = state.read(partial)
        state.into_module("model", model, tensors)
        state.into_module("average", average.module, tensors)
        for name, optimizer in optimizers.items():
            state.into_optimizer(name, optimizer, tensors)
        first = notes["step"]
    started, losses, count = time.perf_counter(), 0.0, 0
    for step in range(first, steps):
        torch.manual_seed(step)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = RATES[name] * share(step)
        loss = loss_of(step, Random(f"{stage} {step}"))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        after()
        average.update(model, step)
        losses += float(loss.detach())
        count += 1
        if (step + 1) % 20 == 0 or step + 1 == steps:
            seconds, started = time.perf_counter() - started, time.perf_counter()
            curve.add(stage, step + 1, seconds, loss=losses / count)
            losses, count = 0.0, 0
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            tensors = state.of_module("model", model) | state.of_module("average", average.module)
            for name, optimizer in optimizers.items():
                tensors |= state.of_optimizer(name, optimizer)
            state.save(partial, tensors, {"step": step + 1})
    return average
