"""One way to add up loss terms: strict and named. Knows no term."""

import torch


def weighted_sum(terms: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """sum_k weights[k] * terms[k] over scalar terms.

    The terms and the non-zero weights must have the same names, both ways: a term without a weight would be
    computed for nothing, a weight without a term would be a promise not kept. Raises ValueError.
    """
    active = {name: weight for name, weight in weights.items() if weight}
    if terms.keys() != active.keys():
        raise ValueError(f"terms {sorted(terms)} do not match weights {sorted(active)}")
    return sum(weight * terms[name] for name, weight in active.items())
