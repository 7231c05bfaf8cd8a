import pytest
import torch

from shared.training.optim import weighted_sum


def test_the_sum_is_named_and_strict():
    terms = {"l1": torch.tensor(2.0), "kl": torch.tensor(3.0)}
    assert weighted_sum(terms, {"l1": 1.0, "kl": 0.5, "mse": 0.0}) == 3.5
    with pytest.raises(ValueError, match="mse"):
        weighted_sum(terms, {"l1": 1.0, "kl": 0.5, "mse": 1.0})
    with pytest.raises(ValueError, match="kl"):
        weighted_sum(terms, {"l1": 1.0, "kl": 0.0})
