"""One way to add up loss terms: strict and named. Does not depend on any term."""

from collections.abc import Mapping
from typing import Any

import torch


def weighted_sum(terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """sum_k weights[k] * terms[k] over scalar terms.

    The terms and the non-zero weights must have the same names, both ways: a term without a weight would be
    computed for nothing, a weight without a term would be a promise not kept.

    Arguments:
        terms: unweighted scalar means.
        weights: one for each term; 0 means that the term was not computed.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: where the names do not match.
    """
    active = {name: weight for name, weight in weights.items() if weight}
    if terms.keys() != active.keys():
        raise ValueError(f"terms {sorted(terms)} do not match weights {sorted(active)}")
    total: Any = sum(weight * terms[name] for name, weight in active.items())
    return total
