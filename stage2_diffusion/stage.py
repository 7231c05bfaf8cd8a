"""Stage 2 as the engine reads it: saved moments in, denoising error, one optimizer for the UNet.

Knows the mathematics of one step; refuses to know images, and where latents come from.
Dimension key: B batch, c h w latents.
"""

import torch

from shared.config import say
from shared.data.latents import Cache
from shared.recipe import Recipe
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.schedulers import make_scheduler
from shared.sampling.transforms import LatentCodec
from shared.show.grids import grid
from shared.training.ema import Ema
from shared.training.keyed import Rows, generator
from shared.training.losses import weighted_sum
from shared.training.optim import Optimizer
from stage2_diffusion import diffusion
from stage2_diffusion.unet import make_unet


class DiffusionStage:
    """The UNet in training on a cache of latents. `export` makes the finished pipeline."""

    VALIDATION_LATENTS = 512
    VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
    PREVIEW_IMAGES = 36
    PREVIEW_STEPS = 20
    best_by = "val/denoising"

    def __init__(self, recipe: Recipe, cache: Cache, decoder: LatentDiffusionPipeline, accelerator):
        self.recipe, self.accelerator, stage = recipe, accelerator, recipe.stage2
        self.data, self.held_out = cache.split("train"), cache.split("val")
        self.classes, self.decoder = cache.classes, decoder
        self.codec = LatentCodec(**cache.manifest["codec"]).to(accelerator.device)
        self.path = diffusion.make_path(stage.objective)
        self.max_steps = stage.steps(len(self.data))

        torch.manual_seed(recipe.seed)
        model = make_unet(stage.unet, self.data.shape, len(self.classes)).to(accelerator.device)
        self.models, self.emas = {"unet": model}, {"unet": Ema(model, stage.ema.decay)}
        if stage.guide_at:
            self.emas["guide"] = Ema(model, stage.ema.decay, until=max(1, round(stage.guide_at * self.max_steps)))
        if stage.compile:
            model.compile()
        self.unet = accelerator.prepare(model)
        self.optimizers = {"unet": Optimizer(self.unet, stage.optim, self.max_steps, accelerator)}

    def introduce(self) -> None:
        say(
            f"stage 2: {len(self.data):,} latents of {'x'.join(map(str, self.data.shape))}, {len(self.held_out):,} held out, "
            f"{len(self.classes) or 'no'} classes; UNet of {self.models['unet'].num_parameters() / 1e6:.1f} M parameters; "
            f"{self.max_steps:,} steps of {self.recipe.stage2.batch_size} on {self.accelerator.device.type}"
        )

    def train_step(self, batch: dict, rows: Rows) -> dict:
        stage = self.recipe.stage2
        z = self.codec.sample(batch["moments"], rows.normal("posterior", *self.data.shape))  # (B,c,h,w)
        t = diffusion.draw_times(stage.time, rows.normal("t"))
        labels = batch.get("label")
        if labels is not None:
            labels = diffusion.drop_labels(labels, rows.uniform("label_dropout"), stage.label_dropout, len(self.classes))
        z_t, target, timesteps = self.path.noised(z, rows.normal("noise", *self.data.shape), t)
        prediction = self.unet(z_t, timesteps, class_labels=labels, return_dict=False)[0]
        loss = weighted_sum({"denoising": diffusion.denoising_error(prediction, target).mean()}, {"denoising": 1.0})
        update = self.optimizers["unet"].step(loss)
        return {"loss/denoising": loss.detach()} | {f"{name}/unet": value for name, value in update.items()}

    @torch.no_grad()
    def validate(self, watch) -> dict:
        """The denoising error of held-out latents at fixed noise levels, with noise that is always the same."""
        unet, device = self.emas["unet"].module, self.accelerator.device
        batch = self.held_out.__getitems__(range(min(self.VALIDATION_LATENTS, len(self.held_out))))
        batch = {key: value.to(device) for key, value in batch.items()}
        key = generator(self.recipe.seed, "validation")
        noise = torch.randn(2, len(batch["moments"]), *self.data.shape, generator=key).to(device)
        z = self.codec.sample(batch["moments"], noise[0])
        scores = {}
        for level in watch(self.VALIDATION_TIMES):
            t = torch.full((len(z),), level, device=device)
            z_t, target, timesteps = self.path.noised(z, noise[1], t)
            with self.accelerator.autocast():
                prediction = unet(z_t, timesteps, class_labels=batch.get("label"), return_dict=False)[0]
            scores[f"val/t{level}"] = diffusion.denoising_error(prediction, target).mean()
        return scores | {"val/denoising": sum(scores.values()) / len(scores)}

    def pipeline(self) -> LatentDiffusionPipeline:
        """The averaged UNet with everything that turns its latents into images."""
        sampling = self.recipe.sampling
        networks = {name: ema.module for name, ema in self.emas.items()}  # unet, and guide where there is one
        return LatentDiffusionPipeline(
            self.decoder.vae, **networks, scheduler=make_scheduler(self.recipe.stage2.objective, sampling.sampler), codec=self.codec.config,
            value_transform=self.decoder.config.value_transform, classes=self.classes, guidance_interval=sampling.guidance_interval,
        )  # fmt: skip

    def preview(self):
        """Samples from seeds that are always the same; a class each, where there are classes."""
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        labels = torch.arange(self.PREVIEW_IMAGES) % len(self.classes) if self.classes else None
        noise = pipe.noises(self.recipe.seed, self.PREVIEW_IMAGES)
        with self.accelerator.autocast():
            return grid(pipe(noise, labels, self.recipe.sampling.guidance_scale, self.PREVIEW_STEPS).pixels)

    def exports(self) -> dict:
        return {name: ema.module for name, ema in self.emas.items()} | {"codec": self.codec}
