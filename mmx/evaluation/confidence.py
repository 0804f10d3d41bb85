"""Confidence intervals of proportions."""

from math import sqrt

Z_95 = 1.959964  # two-sided 95 % quantile of the standard normal distribution


def wilson_interval(proportion: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion of n trials.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference", equation 4.
    """
    square = Z_95 * Z_95
    center = proportion + square / (2 * n)
    half_width = Z_95 * sqrt(proportion * (1 - proportion) / n + square / (4 * n * n))
    scale = 1 + square / n
    return max(0.0, (center - half_width) / scale), min(1.0, (center + half_width) / scale)


def format_proportion(proportion: float, n: int) -> str:
    """A proportion with its 95 % confidence interval."""
    low, high = wilson_interval(proportion, n)
    return f"{proportion:.3f} ({low:.3f}-{high:.3f})"
