"""Stage 1 as the engine reads it: pixels in, reconstruction and KL terms, one optimizer for the VAE.

Knows the mathematics of one step. Does not depend on time and disk, nor on what comes after it.
Dimension key: B batch, N images, C H W pixels in [-1, 1], c h w latents.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from shared.config import InputError, say
from shared.data import sources, splits
from shared.data.augment import augment
from shared.data.config import DataConfig
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.show.grids import pairs, pictures
from shared.training.ema import Ema
from shared.training.engine import Watch
from shared.training.keyed import Rows, generator
from shared.training.optim import Optimizer, weighted_sum
from shared.training.processes import over_processes
from shared.training.similarity import load_lpips, psnr, ssim
from stage1_vae import diagnostics, losses
from stage1_vae.config import Stage1Config
from stage1_vae.discriminator import PatchDiscriminator, adversarial_weight, hinge_loss
from stage1_vae.losses import Perceptual, Reconstruction
from stage1_vae.pretrained import make_vae

VALIDATION_IMAGES = 512  # held-out ones, and half as many of training
THRESHOLD_IMAGES = 512  # held-out images that the threshold of a hurdle is learned from
PREVIEW_IMAGES = 32


class VAEStage:
    """The VAE in training.

    Arguments:
        config: stage 1 of the recipe.
        data: what the images are made of; its value transform is measured here.
        seed: of the weights at the start.
        accelerator: the processes and the precision.
    """

    best_by = "val/total"

    def __init__(self, config: Stage1Config, data: DataConfig, seed: int, accelerator: Accelerator):
        self.config = config
        self.data_config = data
        self.accelerator = accelerator
        self.data, self.held_out = splits.split(sources.open_source(data), data)
        self.transform = splits.fit_transform(self.data, data)
        if not self.transform.integer:  # a NaN among those it is measured on would look like a collapse
            for _ in splits.finite(self.held_out, splits.evenly(len(self.held_out), VALIDATION_IMAGES)):
                pass
        hurdle = config.model.output_activation == "hurdle"
        if hurdle and (self.transform(torch.zeros(1, data.channels, 1, 1)) > -1).any():
            reason = "hurdle is for values of which 0 is the least: set data.value_transform.low: 0"
            raise InputError(f"stage1.model.output_activation: {reason}")
        self.max_steps = config.steps(len(self.data)) if config.trains else 0
        self.weights: dict[str, float] = dict(vars(config.loss_weights))
        if not config.trains:
            self.weights["adversarial"] = 0.0  # its network would have to be trained
        self.lpips: Perceptual | None = None
        if self.weights["lpips"]:
            if data.channels == 4 and not self.transform.integer and config.lpips.channels == "repeat":
                reason = "repeat takes four channels for colours and alpha; of a field say each"
                raise InputError(f"stage1.lpips.channels: {reason}")
            self.lpips = load_lpips(config.lpips.net, config.lpips.weights, accelerator.device)

        torch.manual_seed(seed)
        self.raw_vae: Any = make_vae(config.model, data).to(accelerator.device)
        self.latent_shape: tuple[int, int, int] = tuple(self.raw_vae.config.latent_shape)
        if self.raw_vae.deterministic and self.weights["kl"]:
            raise InputError(f"stage1.loss_weights.kl: {config.model.pretrained} has no KL: set it to 0")
        self.models: dict[str, torch.nn.Module] = {"vae": self.raw_vae}
        self.emas = {"vae": Ema(self.raw_vae, config.ema.decay)}
        self.optimizers: dict[str, Optimizer] = {}
        self.raw_discriminator: PatchDiscriminator | None = None
        if self.max_steps:
            self._prepare()

    def _prepare(self) -> None:
        """What only a training needs: optimizers, the discriminator, the VAE as all processes see it."""
        if self.config.gradient_checkpointing:
            self.raw_vae.enable_gradient_checkpointing()
        if self.config.compile:
            self.raw_vae.compile()
        self.vae = self.accelerator.prepare(self.raw_vae)
        self.optimizers["vae"] = Optimizer(self.vae, self.config.optim, self.max_steps, self.accelerator)
        if self.weights["adversarial"]:
            self._add_discriminator()

    def _add_discriminator(self) -> None:
        config = self.config.discriminator
        self.raw_discriminator = PatchDiscriminator(self.data_config.channels, config.channels)
        self.raw_discriminator.to(self.accelerator.device)
        self.models["discriminator"] = self.raw_discriminator
        self.discriminator = self.accelerator.prepare(self.raw_discriminator)
        optim = replace(self.config.optim, lr=config.lr)
        self.optimizers["discriminator"] = Optimizer(
            self.discriminator, optim, self.max_steps, self.accelerator
        )

    def introduce(self) -> None:
        """Say what is about to be trained, and what its beta means."""
        weights, dz = self.weights, math.prod(self.latent_shape)
        channels = self.data_config.channels
        height, width = self.data_config.size
        say(
            f"stage 1: {len(self.data):,} images of {channels}x{height}x{width}, "
            f"{len(self.held_out):,} held out; "
            f"VAE of {self.raw_vae.num_parameters() / 1e6:.1f} M parameters, dz={dz}; "
            f"{self.max_steps:,} steps of {self.config.batch_size} on {self.accelerator.device.type}"
        )
        begins = self.config.discriminator.start_step
        if weights["adversarial"] and begins >= self.max_steps:
            say(f"note: without the adversarial term: stage1.discriminator.start_step is {begins:,}")
        if weights["ms_ssim"]:
            say(f"ms_ssim with {losses.ms_ssim_scales(min(height, width))} scales of 5")
        pixel_weight = sum(weights[name] for name in ("l1", "mse", "bce", "weighted_mse", "hurdle"))
        if weights["kl"] and pixel_weight:
            beta = losses.effective_beta(weights["kl"], channels * height * width, dz, pixel_weight)
            say(
                f"beta {weights['kl']:g} between means is an effective beta of {beta:.3g} "
                "against an ELBO of sums"
            )

    # ------------------------------------------------------------ training

    def train_step(self, batch: dict[str, torch.Tensor], rows: Rows) -> dict[str, Any]:
        """One micro-batch of raw pixels: the VAE's update, then the discriminator's where there is one."""
        raw = batch["raw"]
        if self.data_config.augment.active:
            raw = augment(raw, self.data_config.augment, rows.uniform("augment", 3))
        x = self.transform(raw)
        logits, mean, logvar = self.vae(x, noise=rows.normal("posterior", *self.latent_shape))
        weights = self._weights_at(rows.step)
        seen = Reconstruction(x, logits, self.raw_vae.activate(logits), mean, logvar)
        if self.raw_discriminator is not None:
            # The VAE's loss passes through it and leaves nothing in it.
            self.raw_discriminator.requires_grad_(False)
        whole = functools.partial(over_processes, accelerator=self.accelerator)
        terms = self._terms(seen, weights, self._perceptual(rows), whole)
        total = weighted_sum(terms, weights)
        update = self.optimizers["vae"].step(total)
        logs: dict[str, Any] = {f"loss/{name}": term.detach() for name, term in terms.items()}
        if self.weights["kl"]:
            logs["kl/nats"] = losses.kl_per_dimension(mean.detach(), logvar.detach()).mean()
            logs["kl/weight"] = weights["kl"]
        logs["loss/total"] = total.detach()
        logs |= {f"{name}/vae": value for name, value in update.items()}
        if weights["adversarial"]:
            logs |= self._train_discriminator(x, seen.x_hat.detach())
        return logs

    def _weights_at(self, step: int) -> dict[str, float]:
        """The weights of the terms at a step."""
        config = self.config
        return self.weights | {
            "kl": losses.kl_weight(self.weights["kl"], config.kl_schedule, step, self.max_steps),
            "adversarial": adversarial_weight(self.weights["adversarial"], config.discriminator, step),
        }

    def _train_discriminator(self, x: torch.Tensor, x_hat: torch.Tensor) -> dict[str, Any]:
        """One pass over images and reconstructions together: the same number of passes on every process."""
        self.models["discriminator"].requires_grad_(True)
        real, fake = self.discriminator(torch.cat([x, x_hat])).chunk(2)
        loss = hinge_loss(real, fake)
        update = self.optimizers["discriminator"].step(loss)
        logs = {f"{name}/discriminator": value for name, value in update.items()}
        return {"loss/discriminator": loss.detach()} | logs

    def _perceptual(self, rows: Rows) -> Perceptual | None:
        """LPIPS as training takes it: of the whole image, or of a square that is another one at each step."""
        network = self.lpips
        side = self.config.lpips.crop
        if network is None or side is None:
            return network
        key = generator(rows.seed, rows.step, "lpips_crop")
        places = [length - side + 1 for length in self.data_config.size]
        top, left = (int(torch.randint(count, (1,), generator=key)) for count in places)

        def of_a_square(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            window = (..., slice(top, top + side), slice(left, left + side))
            return network(x_hat[window], x[window])

        return of_a_square

    def _terms(
        self,
        seen: Reconstruction,
        weights: dict[str, float],
        lpips: Perceptual | None,
        whole: losses.Reduce | None = None,
    ) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            return losses.terms(seen, weights, self.config, lpips, self.raw_discriminator, whole)

    # ------------------------------------------------------------ measuring and showing

    def validate(self, watch: Watch) -> dict[str, Any]:
        """Scores of held-out and of training images, and what the latents do; warns of a collapse."""
        if self.weights["hurdle"]:
            self._learn_threshold()
        by_batch = self.weights | {"kl": 0.0}
        scores, mean, logvar = self._measure(self.held_out, VALIDATION_IMAGES, by_batch, watch)
        if self.weights["kl"]:  # a floor or a target is of all images, not of each batch
            control = self.config.kl_schedule
            scores["kl"] = losses.kl_term(mean, logvar, control.free_bits, control.target).cpu()
        nothing = dict.fromkeys(self.weights, 0.0)
        of_training, _, _ = self._measure(self.data, max(1, len(mean) // 2), nothing, watch)
        active = diagnostics.active_units(mean)
        self._warn_of_a_collapse(scores, mean, active)
        weights = self.weights | {"adversarial": 0.0}  # a score that only a discriminator of the moment gives
        total = weighted_sum({name: scores[name] for name, weight in weights.items() if weight}, weights)
        logs: dict[str, Any] = {f"val/{name}": value for name, value in scores.items()}
        logs |= {"val/total": total, "val/active_units": active}
        if not self.raw_vae.deterministic:
            centre, width = diagnostics.aggregate(mean, logvar)
            logs["val/kl_bits"] = diagnostics.kl_bits(mean, logvar).mean()
            logs["val/latent_mean"] = centre.abs().mean()
            logs["val/latent_std"] = width.mean()
        return logs | {f"train/{name}": of_training[name] for name in ("mse", "psnr", "ssim")}

    @property
    def _at_once(self) -> int:
        return self.config.at_once(self.accelerator.num_processes)

    @torch.no_grad()
    def _measure(
        self, part: splits.Pixels, count: int, weights: dict[str, float], watch: Watch
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Scores of images of a split by their posterior means, and their moments, each (N,c,h,w).

        Batches are shared out over the processes; what comes out is the same on all of them.
        """
        rows = splits.evenly(len(part), count)
        batches = [rows[first : first + self._at_once] for first in range(0, len(rows), self._at_once)]
        processes, device = self.accelerator.num_processes, self.accelerator.device
        variance = diagnostics.PixelVariance()
        measured = []
        for turn in watch(range(0, len(batches), processes)):  # as many on each, for a stop is an exchange
            number = turn + self.accelerator.process_index
            if number < len(batches):
                x = self._pixels(part, batches[number])
                measured.append((number, self._scores(x, weights, variance)))
        parts = [scored for _, scored in sorted(gather_object(measured), key=lambda entry: entry[0])]
        whole = diagnostics.PixelVariance()
        for seen in gather_object([variance]):
            whole.join(seen)
        moments = torch.cat([moments for _, moments in parts]).to(device)
        sums = {name: sum(scores[name] for scores, _ in parts) for name in parts[0][0]}
        averages = {name: value / whole.count for name, value in sums.items()}
        mean, logvar = moments.chunk(2, dim=1)
        return averages | whole.numbers(), mean, logvar

    def _scores(
        self, x: torch.Tensor, weights: dict[str, float], variance: diagnostics.PixelVariance
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Scores of a batch, each summed over its images, and its moments (B,2c,h,w), on the CPU."""
        vae = self.emas["vae"].module
        with self.accelerator.autocast():
            mean, logvar = vae.moments(x)
            logits = vae.logits(mean).float()
        x_hat = vae.activate(logits)
        scores = self._terms(Reconstruction(x, logits, x_hat, mean, logvar), weights, self.lpips)
        scores |= {"psnr": psnr(x_hat, x).mean(), "ssim": ssim(x_hat, x).mean()}
        variance.add(x, x_hat)
        moments = torch.cat([mean, logvar], dim=1).float().cpu()
        return {name: value.float().cpu() * len(x) for name, value in scores.items()}, moments

    @torch.no_grad()
    def _learn_threshold(self) -> None:
        """Let the gates of a hurdle open as often as held-out cells are not empty."""
        vae = self.emas["vae"].module
        x = self._pixels(self.held_out, splits.evenly(len(self.held_out), THRESHOLD_IMAGES))
        parts = x.split(self._at_once)
        with self.accelerator.autocast():
            gates = [vae.logits(vae.moments(part)[0]).float().chunk(2, dim=1)[0] for part in parts]
        for each in (vae, self.raw_vae):  # the averaged weights take their buffers from the others
            each.set_threshold(torch.cat(gates), x)

    def _warn_of_a_collapse(self, scores: dict[str, torch.Tensor], mean: torch.Tensor, active: int) -> None:
        if len(mean) < diagnostics.ENOUGH:
            return
        numbers = {name: scores[name].item() for name in ("mse", "mean_image_mse", "reconstruction_variance")}
        trouble = diagnostics.collapse(**numbers, active=active, dz=mean[0].numel(), beta=self.weights["kl"])
        if trouble:
            say(f"\nwarning: {trouble}")

    def _pixels(self, part: splits.Pixels, rows: Sequence[int]) -> torch.Tensor:
        """Some images of a split as pixels (B,C,H,W)."""
        return self.transform(part.__getitems__(rows)["raw"].to(self.accelerator.device))

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Held-out images over their reconstructions."""
        x = self._pixels(self.held_out, splits.evenly(len(self.held_out), PREVIEW_IMAGES))
        vae = self.emas["vae"].module
        with self.accelerator.autocast():
            x_hat = vae.decode(vae.encode(x).latent_dist.mode()).sample
        return pairs(*(pictures(part, self.transform.integer) for part in (x, x_hat)))

    # ------------------------------------------------------------ what it leaves

    def pipeline(self) -> LatentDiffusionPipeline:
        """The averaged VAE as a sampler of its prior, for a recipe with no stage 2."""
        return LatentDiffusionPipeline(self.emas["vae"].module, value_transform=self.transform.config)

    def exports(self) -> dict[str, Any]:
        """What a checkpoint holds for later stages and other people."""
        return {"vae": self.emas["vae"].module, "value_transform": self.transform}
