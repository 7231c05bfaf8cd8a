"""Stage 1 as the engine reads it: pixels in, reconstruction and KL terms, one optimizer for the VAE.

Knows the mathematics of one step; refuses to know time and disk.
"""

from dataclasses import replace

import torch

from shared.config import say
from shared.data import sources, splits
from shared.recipe import Recipe
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.show.grids import pairs
from shared.training.ema import Ema
from shared.training.keyed import Rows, generator
from shared.training.losses import weighted_sum
from shared.training.optim import Optimizer
from stage1_vae import diagnostics, kl, losses
from stage1_vae.discriminator import PatchDiscriminator, adversarial_weight, hinge_loss
from stage1_vae.model import DeepVAE
from stage1_vae.similarity import load_lpips, psnr, ssim


class VAEStage:
    """The VAE in training. Pixels x are (B,C,H,W) in [-1, 1], latents (B,c,h,w)."""

    VALIDATION_IMAGES = 2048
    PREVIEW_IMAGES = 32
    best_by = "val/total"

    def __init__(self, recipe: Recipe, accelerator):
        self.recipe, self.accelerator, stage = recipe, accelerator, recipe.stage1
        self.data, self.held_out = splits.split(sources.open_source(recipe.data), recipe.data)
        self.transform = splits.fit_transform(self.data, recipe.data)
        self.max_steps = stage.steps(len(self.data))
        self.weights = vars(stage.loss_weights)
        self.lpips = load_lpips(stage.lpips.net, stage.lpips.weights, accelerator.device) if self.weights["lpips"] else None

        torch.manual_seed(recipe.seed)
        model = DeepVAE(recipe.data.channels, recipe.data.image_size, **vars(stage.model)).to(accelerator.device)
        self.models, self.emas = {"vae": model}, {"vae": Ema(model, stage.ema.decay)}
        if stage.compile:
            model.compile()
        self.vae = accelerator.prepare(model)
        self.optimizers = {"vae": Optimizer(self.vae, stage.optim, self.max_steps, accelerator)}
        if self.weights["adversarial"]:
            model = PatchDiscriminator(recipe.data.channels, stage.discriminator.channels).to(accelerator.device)
            self.models["discriminator"], self.discriminator = model, accelerator.prepare(model)
            optim = replace(stage.optim, lr=stage.discriminator.lr)
            self.optimizers["discriminator"] = Optimizer(self.discriminator, optim, self.max_steps, accelerator)

    def introduce(self) -> None:
        """Say what is about to be trained, and what its beta means."""
        data, model, weights = self.recipe.data, self.recipe.stage1.model, self.weights
        say(
            f"stage 1: {len(self.data):,} images of {data.channels}x{data.image_size}x{data.image_size}, {len(self.held_out):,} held out; "
            f"VAE of {self.models['vae'].num_parameters() / 1e6:.1f} M parameters, dz={model.dz}; "
            f"{self.max_steps:,} steps of {self.recipe.stage1.batch_size} on {self.accelerator.device.type}"
        )
        if weights["ms_ssim"]:
            say(f"ms_ssim with {losses.ms_ssim_scales(data.image_size)} scales of 5 (images of {data.image_size} px)")
        pixel_weight = sum(weights[name] for name in ("l1", "mse", "bce", "weighted_mse"))
        if weights["kl"] and pixel_weight:
            beta = kl.effective_beta(weights["kl"], data.channels * data.image_size**2, model.dz, pixel_weight)
            say(f"beta {weights['kl']:g} between means is an effective beta of {beta:.3g} against an ELBO of sums")

    def train_step(self, batch: dict, rows: Rows) -> dict:
        stage, x = self.recipe.stage1, self.transform(batch["raw"])
        logits, mean, logvar = self.vae(x, rows.normal("posterior", *stage.model.latent_shape))
        weights = self.weights | {
            "kl": kl.kl_weight(self.weights["kl"], stage.kl_schedule, rows.step, self.max_steps),
            "adversarial": adversarial_weight(self.weights["adversarial"], stage.discriminator, rows.step),
        }
        x_hat = self.models["vae"].activate(logits)
        if judge := self.models.get("discriminator"):
            judge.requires_grad_(False)  # the VAE's loss passes through it and leaves nothing in it
        terms = self._terms(x, logits, x_hat, mean, logvar, weights, self._perceptual(rows))
        total = weighted_sum(terms, weights)
        update = self.optimizers["vae"].step(total)
        logs = {f"loss/{name}": term.detach() for name, term in terms.items()}
        logs |= {"kl/nats": kl.kl_per_dimension(mean, logvar).detach().mean(), "kl/weight": weights["kl"]} if self.weights["kl"] else {}
        logs |= {"loss/total": total.detach()} | {f"{name}/vae": value for name, value in update.items()}
        return logs | (self._train_discriminator(x, x_hat.detach()) if weights["adversarial"] else {})

    def _train_discriminator(self, x, x_hat) -> dict:
        """One pass over images and reconstructions together, so that every process sees the same number of passes."""
        self.models["discriminator"].requires_grad_(True)
        real, fake = self.discriminator(torch.cat([x, x_hat])).chunk(2)
        loss = hinge_loss(real, fake)
        update = self.optimizers["discriminator"].step(loss)
        return {"loss/discriminator": loss.detach()} | {f"{name}/discriminator": value for name, value in update.items()}

    def _perceptual(self, rows: Rows):
        """LPIPS as training takes it: of the whole image, or of a square that is another one at each step."""
        side = self.recipe.stage1.lpips.crop
        if not (self.lpips and side):
            return self.lpips
        places = self.recipe.data.image_size - side + 1
        top, left = torch.randint(places, (2,), generator=generator(rows.seed, rows.step, "lpips_crop")).tolist()
        return lambda *images: self.lpips(*(each[..., top : top + side, left : left + side] for each in images))

    def _terms(self, x, logits, x_hat, mean, logvar, weights, lpips) -> dict[str, torch.Tensor]:
        judge = self.models.get("discriminator")
        with self.accelerator.autocast():
            return losses.terms(x, logits, x_hat, mean, logvar, weights, self.recipe.stage1, lpips, judge)

    def _some(self, part, count: int, batch_size: int = 64):
        """Images of a split, evenly taken, as pixels (B,C,H,W), a batch at a time."""
        rows = splits.evenly(len(part), count)
        for start in range(0, len(rows), batch_size):
            raw = part.__getitems__(rows[start : start + batch_size])["raw"]
            yield self.transform(raw.to(self.accelerator.device))

    @torch.no_grad()
    def _measure(self, part, count: int, weights: dict[str, float], watch) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Scores of images of a split by their posterior means, and their moments (N,c,h,w)."""
        vae, sums, moments, spread = self.emas["vae"].module, {}, [], diagnostics.Spread()
        for x in watch(self._some(part, count)):
            with self.accelerator.autocast():
                mean, logvar = vae.moments(x)
                logits = vae.logits(mean).float()
            x_hat = vae.activate(logits)
            scores = self._terms(x, logits, x_hat, mean, logvar, weights, self.lpips)
            scores |= {"psnr": psnr(x_hat, x).mean(), "ssim": ssim(x_hat, x).mean()}
            for name, value in scores.items():
                sums[name] = sums.get(name, 0) + value.float() * len(x)
            moments.append((mean, logvar))
            spread.add(x, x_hat)
        means, logvars = (torch.cat(parts) for parts in zip(*moments, strict=True))
        return {name: value / spread.count for name, value in sums.items()} | spread.numbers(), means, logvars

    def validate(self, watch) -> dict:
        """Scores of held-out images and of as many training images, and what the latents are doing; warns of a collapse."""
        scores, mean, logvar = self._measure(self.held_out, self.VALIDATION_IMAGES, self.weights, watch)
        seen, _, _ = self._measure(self.data, len(mean), dict.fromkeys(self.weights, 0.0), watch)
        active, beta = diagnostics.active_units(mean), self.weights["kl"]
        spread = {name: scores[name].item() for name in ("mse", "mean_image_mse", "reconstruction_variance")}
        if len(mean) >= diagnostics.ENOUGH and (trouble := diagnostics.collapse(**spread, active=active, dz=mean[0].numel(), beta=beta)):
            say(f"\nwarning: {trouble}")
        judged = self.weights | {"adversarial": 0.0}
        total = weighted_sum({name: scores[name] for name, weight in judged.items() if weight}, judged)
        logs = {f"val/{name}": value for name, value in scores.items()} | {"val/total": total, "val/active_units": active}
        if not self.models["vae"].deterministic:
            centre, width = diagnostics.aggregate(mean, logvar)
            logs["val/kl_bits"] = diagnostics.kl_bits(mean, logvar).mean()
            logs |= {"val/latent_mean": centre.abs().mean(), "val/latent_std": width.mean()}
        return logs | {f"train/{name}": seen[name] for name in ("mse", "psnr", "ssim")}

    @torch.no_grad()
    def preview(self):
        """Held-out images over their reconstructions."""
        x = next(self._some(self.held_out, self.PREVIEW_IMAGES, self.PREVIEW_IMAGES))
        vae = self.emas["vae"].module
        with self.accelerator.autocast():
            return pairs(x, vae.decode(vae.encode(x).latent_dist.mode()).sample)

    def pipeline(self) -> LatentDiffusionPipeline:
        """The averaged VAE as a sampler of its prior, for a recipe with no stage 2."""
        return LatentDiffusionPipeline(self.emas["vae"].module, value_transform=self.transform.config)

    def exports(self) -> dict:
        return {"vae": self.emas["vae"].module, "value_transform": self.transform}
