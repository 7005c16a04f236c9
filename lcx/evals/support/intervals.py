"""Statistics of results: confidence intervals of proportions, standard errors of means over tokens, AUROC."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927): (low, high) in [0, 1]; (0, 1) without trials.

    With p = successes / n and z the normal quantile: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    Unlike the interval p -+ z sqrt(p(1-p)/n), it does not have width 0 if none or all of the trials succeed.
    """
    if trials == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - spread) / scale  # exactly 0, without a rounding error
    high = 1.0 if successes == trials else (centre + spread) / scale
    return low, high


def mean_and_error(
    sums: Float[np.ndarray, " groups"], weights: Float[np.ndarray, " groups"]
) -> tuple[float | None, float | None]:
    """(mean, standard error) of sum(sums) / sum(weights), with groups as the independent samples.

    A group is a row or document; the tokens in it are not independent of each other. This is the linearised standard
    error of a ratio (Cochran 1977, Sampling Techniques, 6.8). The mean is None without any weight; the standard error
    is None with fewer than two groups.

    Args:
      sums: weighted sum of each group.
      weights: sum of the weights of each group; groups of weight 0 are ignored.
    """
    sums, weights = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
    used = weights > 0
    sums, weights, n = sums[used], weights[used], int(used.sum())
    if n == 0:
        return None, None
    mean = float(sums.sum() / weights.sum())
    if n == 1:
        return mean, None
    residual = np.square(sums - mean * weights).sum()
    return mean, float(math.sqrt(n / (n - 1) * residual) / weights.sum())


def paired_difference(
    a: Float[np.ndarray, " samples"],
    b: Float[np.ndarray, " samples"],
    *,
    weights: Float[np.ndarray, " samples"] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(b - a, low, high): the difference of two means over the same samples, with a 95% bootstrap interval.

    Samples are drawn with replacement, each with the results of both models, so that what makes a sample easy or hard
    for both does not widen the interval (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13).

    Args:
      a, b: sums of each sample; without weights, its scores.
      weights: what the sums of a sample are divided by, such as its tokens; None: 1.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    weights = np.ones(len(a)) if weights is None else np.asarray(weights, np.float64)
    gap = b - a
    chosen = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    means = gap[chosen].sum(1) / np.maximum(weights[chosen].sum(1), 1e-300)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gap.sum() / weights.sum()), float(low), float(high)


def auroc(labels: Sequence[int], scores: Sequence[float]) -> float | None:
    """Area under the ROC curve: the probability that a case of label 1 scores higher than one of label 0.

    A tie counts one half. None unless both labels occur.
    """
    from scipy import stats

    ones, zeros = (
        [s for label, s in zip(labels, scores, strict=True) if bool(label) == kind] for kind in (True, False)
    )
    if not ones or not zeros:
        return None
    return float(stats.mannwhitneyu(ones, zeros).statistic / (len(ones) * len(zeros)))
