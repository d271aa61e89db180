"""Muon in float32: torch's own iterates in bfloat16, which a CPU without such instructions emulates (4 s a step)."""

import math
from collections.abc import Callable, Iterable

import torch

# The quintic iteration of Keller Jordan's Muon: its slope at zero is as large as five rounds allow.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov's), then each matrix's singular values brought near one. For matrices [N, M] alone.

    A step is as large as AdamW's would be (0.2 · √max(N, M) times the orthogonal matrix), so both take one rate.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step by the gradients that are there."""
        for group in self.param_groups:
            rate, keep = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                average = state.setdefault("momentum_buffer", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - keep)
                weight.mul_(1 - rate * group["weight_decay"])
                direction = orthogonal(weight.grad.lerp(average, keep))
                weight.add_(direction, alpha=-0.2 * rate * math.sqrt(max(weight.shape)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a matrix [N, M] near one, by Newton and Schulz."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
