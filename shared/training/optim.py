"""One optimizer step: the sum of the loss terms, backward, gradients averaged over processes, finite check,
clipping, update, schedule.

Knows the optimizer's recipe and the step. Does not depend on what the terms are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from shared.training.config import OptimConfig
from shared.training.processes import bf16_pays

HIDDEN_WIDTH = 16  # channels on both sides of a matrix that Muon takes
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # a, b, c of a step p(x) = a x + b x^3 + c x^5 (Jordan et al. 2024)
NEWTON_SCHULZ_STEPS = 5


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


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate at a step: a linear warm-up over w steps, then constant, or a decay to 0 at max_steps.

    With p = (step - w) / (max_steps - w): lr, lr (1 + cos pi p) / 2 (Loshchilov & Hutter 2017) or lr (1 - p).
    A pure function of the step, so that nothing needs to be stored for a resume.

    Arguments:
        config: lr, schedule and warmup_steps are read.
        step: the update, counted from 0.
        max_steps: the length of the training in updates.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    decay = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}
    return config.lr * decay[config.schedule]


def hidden_matrices(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of inner linear layers and convolutions as matrices (outputs, rest) in the model's memory.

    Layers with fewer than 16 channels on a side are the first and the last ones: Muon is not meant for them,
    nor for embeddings. Of latents with 16 channels or more the layers next to them are taken all the same.
    """
    tables = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)
    }
    return {
        name: torch.nn.Parameter(p.detach().view(len(p), -1))
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim >= 2 and min(p.shape[:2]) >= HIDDEN_WIDTH and name not in tables
    }


def orthogonal(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A matrix with its singular values brought to between 0.5 and 1.5, by Newton-Schulz steps.

    Arguments:
        matrix: (m,n).
        dtype: to compute in; the result has it, too.

    References:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = NEWTON_SCHULZ
    tall = len(matrix) > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=1e-7))
    if dtype == torch.float32 and x.shape[1] >= 2 * len(x):
        x = _steps_of_gram(x @ x.T) @ x
    else:
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _steps_of_gram(gram: torch.Tensor) -> torch.Tensor:
    """Q such that Q x is what the Newton-Schulz steps make of x (m,n), from gram = x x^T (m,m) alone.

    A step is x <- P x with P = a + b gram + c gram^2, and the next gram is P gram P. Of ten products of m m n
    multiplications two are left, this gram and Q x. Needs the precision of float32.

    References:
        Zhang et al. 2026, "Gram Newton-Schulz", https://dao-lab.ai/blog/2026/gram-newton-schulz.
    """
    a, b, c = NEWTON_SCHULZ

    def polynomial(gram: torch.Tensor) -> torch.Tensor:
        found = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        found.diagonal().add_(a)
        return found

    factor = product = polynomial(gram)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        product = factor @ product
    return product


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal and scaled as AdamW's.

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", to the bit where bfloat16 pays. That one computes
    in bfloat16 everywhere, forty times slower than float32 on a CPU without units for it.

    References:
        Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982, section 2.2 (the scale).
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = torch.bfloat16 if bf16_pays(matrices[0].device) else torch.float32
        self.found_inf: torch.Tensor | None = None  # 1 where this step is to change nothing, on the device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group["lr"], group["weight_decay"])

    def _update(self, p: torch.nn.Parameter, gradient: torch.Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average: torch.Tensor = state["momentum_buffer"]
        skip = None if self.found_inf is None else self.found_inf > 0
        if skip is not None:
            gradient = torch.where(skip, average, gradient)
        average.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(average, MOMENTUM)  # Nesterov
        update = orthogonal(ahead, self.dtype)
        kept: torch.Tensor | float = 1 - lr * weight_decay
        if skip is not None:
            update, kept = torch.where(skip, 0.0, update), torch.where(skip, 1.0, kept)
        p.mul_(kept)
        p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


class Optimizer:
    """Adam, AdamW or Muon for one model. `step(loss)` is all that a stage calls.

    Muon takes the hidden matrices, AdamW the rest; one rate serves for all.

    A step whose gradient norm is not finite is skipped: gradients are averaged over all processes first, so
    the norm, and with it the decision, is the same on every one of them.
    """

    def __init__(self, model: torch.nn.Module, config: OptimConfig, max_steps: int, accelerator: Accelerator):
        self.model: Any = model
        self.config = config
        self.max_steps = max_steps
        self.accelerator = accelerator
        self.raw = accelerator.unwrap_model(model)
        self.matrices = hidden_matrices(self.raw) if config.name == "muon" else {}
        self.parameters = dict(self.raw.named_parameters()) | self.matrices  # as the optimizers see them
        # The fused kernels of these devices honour found_inf.
        device = next(self.raw.parameters()).device.type
        self.fused = device in ("cpu", "cuda")
        self.waits = device != "cuda"  # a GPU decides by itself, so that the host can run ahead
        rest = [p for name, p in self.parameters.items() if name not in self.matrices]
        decay: dict[str, Any] = {} if config.name == "adam" else {"weight_decay": config.weight_decay}
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        betas = (config.betas[0], config.betas[1])
        self.torch: list[torch.optim.Optimizer] = [
            kind(rest, lr=config.lr, betas=betas, fused=self.fused, **decay)
        ]
        if self.matrices:
            self.torch.append(Muon(list(self.matrices.values()), config.lr, config.weight_decay))
        self._step = 0
        self._parts = 1
        self._last = True
        self.rehearsing = False  # gradients are exchanged, and thrown away

    def begin(self, step: int, part: int, parts: int) -> None:
        """Before train_step of micro-batch `part` of `parts`.

        Only the last one exchanges gradients and updates.
        """
        self._step = step
        self._parts = parts
        self._last = part == parts - 1
        if hasattr(
            self.model, "require_backward_grad_sync"
        ):  # DistributedDataParallel's own switch, as in no_sync()
            self.model.require_backward_grad_sync = self._last

    def step(self, loss: torch.Tensor) -> dict[str, torch.Tensor | float]:
        """Backward; on the last micro-batch the update. Returns gradient norm, rate and skip flag to log."""
        self.accelerator.backward(loss / self._parts)
        if self.rehearsing:
            self.raw.zero_grad(set_to_none=True)
        if self.rehearsing or not self._last:
            return {}
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), self.config.clip_grad_norm)
        lr = learning_rate(self.config, self._step, self.max_steps)
        skipped = 1.0 - norm.isfinite().float()
        if not self.waits:
            for optimizer in self.torch:
                optimizer.found_inf = skipped  # type: ignore[attr-defined]
        if not self.waits or not skipped:
            self._update(lr)
        self.raw.zero_grad(set_to_none=True)
        return {"grad_norm": norm.detach(), "lr": lr, "skipped": skipped}

    def _update(self, lr: float) -> None:
        for name, matrix in self.matrices.items():
            matrix.grad = self.raw.get_parameter(name).grad.flatten(1)
        for optimizer in self.torch:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for matrix in self.matrices.values():
            matrix.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as named tensors: '<parameter>/<moment>'."""
        state = {p: moments for optimizer in self.torch for p, moments in optimizer.state.items()}
        found: dict[str, torch.Tensor] = {}
        for name, p in self.parameters.items():
            found |= {f"{name}/{key}": value for key, value in state.get(p, {}).items()}
        return found

    def state_bytes(self) -> int:
        """What `tensors` takes after the first step: two moments of Adam, one of Muon."""
        moments = {name: 1 if name in self.matrices else 2 for name in self.parameters}
        return sum(moments[name] * p.nbytes for name, p in self.parameters.items())

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            name, moment = key.rsplit("/", 1)
            moments.setdefault(name, {})[moment] = value
        for name, p in self.parameters.items():
            owner = self.torch[1 if name in self.matrices else 0]
            # Adam counts its steps in a tensor of one number that lives on the parameter's device only when
            # fused: else it would be waited for at every step.
            owner.state[p] = {
                key: value.to(p.device if self.fused or key != "step" else "cpu").clone()
                for key, value in moments.get(name, {}).items()
            }
