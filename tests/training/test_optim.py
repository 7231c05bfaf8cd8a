"""One step of the optimizer against torch's own; the schedule; non-finite gradients; averaged weights."""

import math

import pytest
import torch
from accelerate import Accelerator

from shared.training import optim
from shared.training.config import OptimConfig, TrainConfig
from shared.training.ema import Ema
from shared.training.optim import Optimizer, learning_rate

CONSTANT = {"schedule": "constant", "warmup_steps": 0}


def make(clip=1.0, **config):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    return model, Optimizer(
        model, OptimConfig(clip_grad_norm=clip, **CONSTANT | config), 100, Accelerator(cpu=True)
    )


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_step_is_torch_s_step(name):
    betas = (0.8, 0.95)
    model, optimizer = make(clip=0.1, name=name, lr=0.01, betas=list(betas))
    twin = torch.nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    decay = {"weight_decay": 0.01} if name == "adamw" else {}
    oracle = kind(twin.parameters(), lr=0.01, betas=betas, **decay)
    for step in range(5):
        x = torch.randn(4, 5)
        optimizer.begin(step, 0, 1)
        logs = optimizer.step(model(x).square().sum())
        twin(x).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        oracle.step()
        oracle.zero_grad()
        torch.testing.assert_close(logs["grad_norm"], norm)
    torch.testing.assert_close(model.weight, twin.weight)


@pytest.mark.parametrize(("epochs", "steps"), [(3, 4), (4, 5)])
def test_epochs_are_as_many_steps_as_show_each_image_so_often(epochs, steps):
    assert TrainConfig(max_epochs=epochs, batch_size=8).steps(10) == steps


def test_accumulated_micro_batches_are_one_batch():
    x = torch.randn(8, 5)
    results = []
    for parts in (1, 4):
        model, optimizer = make()
        for part, piece in enumerate(x.chunk(parts)):
            optimizer.begin(0, part, parts)
            logs = optimizer.step(model(piece).square().mean())
        results.append((model.weight.detach().clone(), logs["grad_norm"]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("waits", [True, False])  # as on a CPU, as on a GPU
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_is_skipped_and_flagged(bad, waits):
    model, optimizer = make()
    optimizer.waits = waits
    optimizer.begin(0, 0, 1)
    optimizer.step(model(torch.randn(4, 5)).square().mean())
    before = {k: v.clone() for k, v in (model.state_dict() | optimizer.tensors()).items()}
    logs = optimizer.step(model(torch.full((4, 5), bad)).square().mean())
    assert logs["skipped"] == 1
    after = model.state_dict() | optimizer.tensors()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert optimizer.step(model(torch.randn(4, 5)).square().mean())["skipped"] == 0


def test_state_survives_its_names():
    model, optimizer = make()
    optimizer.step(model(torch.randn(4, 5)).square().mean())
    other_model, other = make()
    other_model.load_state_dict(model.state_dict())
    other.load({k: v.clone() for k, v in optimizer.tensors().items()})
    x = torch.randn(4, 5)
    for m, o in ((model, optimizer), (other_model, other)):
        o.step(m(x).square().mean())
    assert torch.equal(model.weight, other_model.weight)


def test_learning_rates():
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="cosine")
    assert learning_rate(config, 0, 110) == 0.1 and learning_rate(config, 9, 110) == 1.0
    assert learning_rate(config, 60, 110) == pytest.approx(0.5) and learning_rate(
        config, 110, 110
    ) == pytest.approx(0)
    assert learning_rate(OptimConfig(lr=1.0, schedule="linear", warmup_steps=0), 25, 100) == 0.75
    assert learning_rate(OptimConfig(lr=1.0, **CONSTANT), 99, 100) == 1.0


def test_ema_follows_its_recursion():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = Ema(model, decay=0.5)
    expected = model[0].weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model[0].weight += torch.randn(2, 2)
            model[1].running_mean += 1
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        ema.update(step)
    torch.testing.assert_close(ema.module[0].weight, expected)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


def make_muon(lr=0.02):
    """Two inner layers, a first and a last one, and an embedding as large as a matrix."""
    torch.manual_seed(0)
    inner = [torch.nn.Conv2d(16, 32, 3), torch.nn.Flatten(), torch.nn.Linear(32, 16)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), *inner, torch.nn.Linear(16, 2))
    model.add_module("table", torch.nn.Sequential(torch.nn.Embedding(20, 16), torch.nn.Identity()))
    config = OptimConfig(name="muon", lr=lr, weight_decay=0.1, **CONSTANT)

    def loss(x, scale=1.0):
        return (model[:5](x) * scale).square().mean() + model.table(torch.arange(3)).square().mean()

    return model, Optimizer(model, config, 100, Accelerator(cpu=True)), loss


def test_muon_takes_inner_matrices_as_torch_s_does_and_adamw_the_rest(monkeypatch):
    """Where bfloat16 pays; elsewhere it computes in float32, see the next test."""
    monkeypatch.setattr(optim, "bf16_pays", lambda device: True)
    model, optimizer, loss = make_muon()
    assert list(optimizer.matrices) == ["1.weight", "3.weight"]
    twins = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    flat = {name: torch.nn.Parameter(twins[name].detach().flatten(1)) for name in optimizer.matrices}
    muon = torch.optim.Muon(flat.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for name, p in twins.items() if name not in flat], lr=0.02, weight_decay=0.1)
    for step in range(3):
        x = torch.randn(4, 3, 5, 5)
        gradients = torch.autograd.grad(loss(x), list(model.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        scale = min(1.0, 1.0 / (norm + 1e-6))
        for (name, p), gradient in zip(twins.items(), gradients, strict=True):
            flat.get(name, p).grad = (gradient * scale).flatten(1) if name in flat else gradient * scale
        muon.step()
        adamw.step()
        optimizer.begin(step, 0, 1)
        optimizer.step(loss(x))
    for name, p in model.named_parameters():
        expected = flat.get(name, twins[name]).view_as(p)
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 100), (100, 24)])
def test_an_update_of_muon_is_nearly_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, rounded = (optim.orthogonal(matrix, dtype).float() for dtype in (torch.float32, torch.bfloat16))
    values = torch.linalg.svdvals(exact)
    assert values.min() > 0.5 and values.max() < 1.5
    assert (exact - rounded).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("shape", [(24, 400), (24, 40), (24, 24), (400, 24)])
@pytest.mark.parametrize("rank", [24, 5])
def test_the_steps_act_on_singular_values_alone(shape, rank):
    """U p(p(p(p(p(s))))) V^T of the decomposition in double precision, by whichever products it comes."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, rank, generator=draw, dtype=torch.double) for side in shape)
    matrix = left * torch.logspace(0, -3, rank, dtype=torch.double) @ right.T
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    a, b, c = optim.NEWTON_SCHULZ
    for _ in range(optim.NEWTON_SCHULZ_STEPS):
        s = a * s + b * s**3 + c * s**5
    found = optim.orthogonal(matrix.float(), torch.float32).double()
    torch.testing.assert_close(found, u * s @ v, atol=2e-4, rtol=0)


@pytest.mark.parametrize("waits", [True, False])
def test_muon_skips_a_bad_step_and_survives_its_names(waits):
    model, optimizer, loss = make_muon()
    optimizer.waits = waits
    x = torch.randn(4, 3, 5, 5)
    optimizer.step(loss(x))
    other_model, other, other_loss = make_muon()
    other_model.load_state_dict(model.state_dict())
    other.load({k: v.clone() for k, v in optimizer.tensors().items()})
    before = {k: v.clone() for k, v in (model.state_dict() | optimizer.tensors()).items()}
    assert optimizer.step(loss(x, math.nan))["skipped"] == 1
    after = model.state_dict() | optimizer.tensors()
    assert all(torch.equal(before[k], after[k]) for k in before)
    optimizer.step(loss(x))
    other.step(other_loss(x))
    assert all(
        torch.equal(value, other_model.state_dict()[name]) for name, value in model.state_dict().items()
    )
