"""The minimax schedule of Polar Express (arXiv 2505.16932): polynomials whose composition is the sign function."""

import math
from functools import lru_cache

import torch

__all__ = ["Coefficients", "minimax_schedule"]

Coefficients = tuple[float, float, float]
_CUSHION = 0.02407327424182761  # smallest ratio of interval ends a single polynomial is designed for (arXiv 2505.16932)


@lru_cache
def minimax_schedule(lower: float, safety: float, polish: int) -> tuple[Coefficients, ...]:
    """Coefficients (a, b, c) of the steps for singular values in [lower, 1].

    Every step but the last is made for arguments up to 1 + safety times the interval's end, since rounding pushes some
    beyond it, where the next polynomials would blow them up.
    """
    steps = _steps(lower) + _steps(1.0)[:1] * polish
    margins = [1 + safety] * (len(steps) - 1) + [1.0]
    return tuple((a / e, b / e**3, c / e**5) for (a, b, c), e in zip(steps, margins, strict=True))


def _steps(lower: float) -> list[Coefficients]:
    """Odd degree-5 polynomials whose composition maps [lower, 1] to 1 within 1e-6 (arXiv 2505.16932, Algorithm 1)."""
    upper = 1.0
    steps: list[Coefficients] = []
    while not steps or lower < 1 - 1e-6:
        a, b, c = _minimax_quintic(max(lower, _CUSHION * upper), upper)
        # The cushion leaves the true lower end outside: centre what both ends are mapped to on 1.
        ends = [a * x + b * x**3 + c * x**5 for x in (lower, upper)]
        gain = 2 / sum(ends)
        steps.append((gain * a, gain * b, gain * c))
        lower, upper = gain * ends[0], gain * ends[1]
    return steps


def _minimax_quintic(lower: float, upper: float) -> Coefficients:
    """The (a, b, c) that minimise max |1 - (ax + bx³ + cx⁵)| over [lower, upper], by Remez exchange."""
    if lower > (1 - 1e-4) * upper:  # where the exchange is ill-conditioned, its limit is exact to 1e-12
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    inner = [lower + (upper - lower) * part for part in (0.25, 0.75)]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64, device="cpu")
    previous, error = math.inf, 1.0
    while abs(previous - error) > 1e-14:
        x = torch.tensor([lower, *inner, upper], dtype=torch.float64, device="cpu")
        system = torch.stack((x, x**3, x**5, signs), 1)
        previous = error
        a, b, c, error = torch.linalg.solve(system, torch.ones_like(x)).tolist()
        # The extrema inside are the roots of a + 3bx² + 5cx⁴.
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
    return a, b, c
