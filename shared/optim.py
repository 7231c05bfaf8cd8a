"""One optimizer step: backward, gradients averaged over processes, finite check, clipping, update, schedule.

Knows the optimizer's recipe and the step; refuses to know what the loss is made of.
"""

import math

import torch

from shared.train_config import OptimConfig


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate at a step: linear warm-up, then constant, or cosine or linear decay to 0 at max_steps.

    A pure function of the step, so that nothing needs to be stored for a resume.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    decay = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}
    return config.lr * decay[config.schedule]


class Optimizer:
    """Adam or AdamW for one model. `step(loss)` is all that a stage calls.

    A step whose gradient norm is not finite is skipped: gradients are averaged over all processes first, so the
    norm, and with it the decision, is the same on every one of them.
    """

    def __init__(self, model: torch.nn.Module, config: OptimConfig, max_steps: int, accelerator):
        self.model, self.config, self.max_steps, self.accelerator = model, config, max_steps, accelerator
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
        decay = {"weight_decay": config.weight_decay} if config.name == "adamw" else {}
        self.raw = accelerator.unwrap_model(model)
        self.fused = next(self.raw.parameters()).device.type in ("cpu", "cuda")  # whose kernels honour found_inf
        self.torch = kind(self.raw.parameters(), lr=config.lr, betas=tuple(config.betas), fused=self.fused, **decay)
        self._step, self._parts, self._last = 0, 1, True

    def begin(self, step: int, part: int, parts: int) -> None:
        """Before the train_step of micro-batch `part` of `parts`: only the last one exchanges gradients and updates."""
        self._step, self._parts, self._last = step, parts, part == parts - 1
        if hasattr(self.model, "require_backward_grad_sync"):  # DistributedDataParallel's own switch, as in no_sync()
            self.model.require_backward_grad_sync = self._last

    def step(self, loss: torch.Tensor) -> dict[str, torch.Tensor | float]:
        """Backward and, on the last micro-batch, the update. Returns the gradient norm, rate and skip flag to log."""
        self.accelerator.backward(loss / self._parts)
        if not self._last:
            return {}
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), self.config.clip_grad_norm, foreach=True)
        lr = learning_rate(self.config, self._step, self.max_steps)
        for group in self.torch.param_groups:
            group["lr"] = lr
        skipped = 1.0 - norm.isfinite().float()
        if self.fused:  # the kernel skips the update on the device where found_inf is 1: no wait for the host
            self.torch.found_inf = skipped
        if self.fused or not skipped:
            self.torch.step()
        self.torch.zero_grad(set_to_none=True)
        return {"grad_norm": norm.detach(), "lr": lr, "skipped": skipped}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as named tensors: '<parameter>/<moment>'."""
        state = self.torch.state
        return {f"{name}/{key}": value for name, p in self.raw.named_parameters() for key, value in state[p].items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, p in self.raw.named_parameters():
            moments = {k.rsplit("/", 1)[1]: v for k, v in tensors.items() if k.rsplit("/", 1)[0] == name}
            # Adam counts its steps in a tensor of one number that lives on the parameter's device only when fused.
            self.torch.state[p] = {key: value.to(p.device).clone() for key, value in moments.items()}
