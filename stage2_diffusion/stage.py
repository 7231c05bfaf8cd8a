"""Stage 2 as the engine reads it: saved moments in, denoising error, one optimizer for the UNet.

Knows the mathematics of one step. Does not depend on images, nor on where latents come from.
Dimension key: B batch, c h w latents.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from shared.config import say
from shared.data.latents import Cache
from shared.data.splits import evenly
from shared.sampling.build import build_pipeline
from shared.sampling.config import SamplingConfig
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.transforms import LatentCodec
from shared.show.grids import grid, pictures
from shared.training.ema import Ema
from shared.training.engine import Watch
from shared.training.keyed import Rows, generator
from shared.training.optim import Optimizer, weighted_sum
from stage2_diffusion import diffusion
from stage2_diffusion.config import Stage2Config
from stage2_diffusion.unet import make_unet

VALIDATION_LATENTS = 512
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
PREVIEW_IMAGES = 36
PREVIEW_STEPS = 20

Judge = Callable[[LatentDiffusionPipeline], dict[str, float]]


class DiffusionStage:
    """The UNet in training on a cache of latents.

    Arguments:
        config: stage 2 of the recipe.
        sampling: how previews and the finished pipeline sample.
        seed: of the weights at the start, of validation and of previews.
        cache: the latents, their statistics and classes.
        decoder: a pipeline of the VAE alone, on the device, for previews and the finished pipeline.
        accelerator: the processes and the precision.
        judge: distances of samples of the pipeline as it stands, for validation; None: none.
    """

    best_by = "val/denoising"

    def __init__(
        self,
        config: Stage2Config,
        sampling: SamplingConfig,
        seed: int,
        cache: Cache,
        decoder: LatentDiffusionPipeline,
        accelerator: Accelerator,
        judge: Judge | None = None,
    ):
        self.config = config
        self.judge = judge
        self.sampling = sampling
        self.seed = seed
        self.accelerator = accelerator
        self.decoder = decoder
        self.data = cache.split("train")
        config.check_latents(self.data.shape)
        self.held_out = cache.split("val")
        self.classes = cache.classes
        self.codec = LatentCodec(**cache.manifest["codec"]).to(accelerator.device)
        self.path = diffusion.make_path(config.objective)
        self.max_steps = config.steps(len(self.data))

        torch.manual_seed(seed)
        model: Any = make_unet(config.unet, self.data.shape, len(self.classes)).to(accelerator.device)
        self.models: dict[str, torch.nn.Module] = {"unet": model}
        self.emas = {"unet": Ema(model, config.ema.decay)}
        if config.guide_at:
            until = max(1, round(config.guide_at * self.max_steps))
            self.emas["guide"] = Ema(model, config.ema.decay, until)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile()
        self.unet = accelerator.prepare(model)
        self.optimizers = {"unet": Optimizer(self.unet, config.optim, self.max_steps, accelerator)}

    def introduce(self) -> None:
        """Say what is about to be trained."""
        parameters = self.emas["unet"].module.num_parameters()
        say(
            f"stage 2: {len(self.data):,} latents of {'x'.join(map(str, self.data.shape))}, "
            f"{len(self.held_out):,} held out, {len(self.classes) or 'no'} classes; "
            f"UNet of {parameters / 1e6:.1f} M parameters; "
            f"{self.max_steps:,} steps of {self.config.batch_size} on {self.accelerator.device.type}"
        )
        if self.classes and self.data.labels is not None:
            seen = self.data.labels.bincount(minlength=len(self.classes)).tolist()
            without = [name for name, count in zip(self.classes, seen, strict=True) if not count]
            if without:
                reason = "their few images are held out, or beyond data.limit"
                say(f"note: nothing to learn of {len(without)} classes, such as {without[0]}: {reason}")

    def train_step(self, batch: dict[str, torch.Tensor], rows: Rows) -> dict[str, Any]:
        """One micro-batch of moments (B,2c,h,w) and, with classes, labels (B,)."""
        z = self.codec.sample(batch["moments"], rows.normal("posterior", *self.data.shape))  # (B,c,h,w)
        t = diffusion.draw_times(self.config.times, rows.normal("t"))
        labels = batch.get("label")
        if labels is not None:
            uniform = rows.uniform("label_dropout")
            labels = diffusion.drop_labels(labels, uniform, self.config.label_dropout, len(self.classes))
        z_t, target, timesteps = self.path.noised(z, rows.normal("noise", *self.data.shape), t)
        prediction = self.unet(z_t, timesteps, class_labels=labels, return_dict=False)[0]
        terms = {"denoising": diffusion.denoising_error(prediction, target).mean()}
        loss = weighted_sum(terms, {"denoising": 1.0})
        update = self.optimizers["unet"].step(loss)
        return {"loss/denoising": loss.detach()} | {f"{name}/unet": value for name, value in update.items()}

    @property
    def _at_once(self) -> int:
        return self.config.at_once(self.accelerator.num_processes)

    @torch.no_grad()
    def validate(self, watch: Watch) -> dict[str, Any]:
        """The denoising error of held-out latents at fixed noise levels, always with the same noise.

        Latents are shared out over the processes; what comes out is the same on all of them.
        """
        unet, device = self.emas["unet"].module, self.accelerator.device
        rows = evenly(len(self.held_out), VALIDATION_LATENTS)
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        share = rows[mine] or rows[:1]  # with more processes than latents some have none: they count nothing
        batch = {name: part.to(device) for name, part in self.held_out.__getitems__(share).items()}
        key = generator(self.seed, "validation")
        noise = torch.randn(2, len(rows), *self.data.shape, generator=key)
        noise = (noise[:, mine] if rows[mine] else noise[:, :1]).to(device)
        z = self.codec.sample(batch["moments"], noise[0])
        labels = batch.get("label")
        sums = torch.zeros(len(VALIDATION_TIMES), device=device)
        for number, level in enumerate(watch(VALIDATION_TIMES)):
            for part in torch.arange(len(z), device=device).split(self._at_once):
                t = torch.full((len(part),), level, device=device)
                z_t, target, timesteps = self.path.noised(z[part], noise[1, part], t)
                seen = None if labels is None else labels[part]
                with self.accelerator.autocast():
                    prediction = unet(z_t, timesteps, class_labels=seen, return_dict=False)[0]
                if rows[mine]:
                    sums[number] += diffusion.denoising_error(prediction, target).sum()
        means: Any = self.accelerator.reduce(sums, "sum") / len(rows)
        scores: dict[str, Any] = {
            f"val/t{level}": mean for level, mean in zip(VALIDATION_TIMES, means, strict=True)
        }
        scores["val/denoising"] = sum(scores.values()) / len(scores)
        if self.judge:
            found = self.judge(self.pipeline())
            scores |= {f"val/{name}": found[name] for name in ("kid", "kid_deviation")}
        return scores

    def pipeline(self) -> LatentDiffusionPipeline:
        """The averaged UNet with everything that turns its latents into images."""
        networks = {name: ema.module for name, ema in self.emas.items()}  # unet, and guide where there is one
        return build_pipeline(
            self.decoder, networks, self.codec, self.classes, self.config.objective, self.sampling
        )

    def preview(self) -> Image.Image:
        """Samples from seeds that are always the same, in float32 as every sample; a class each, if any."""
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        noise = pipe.noises(self.seed, PREVIEW_IMAGES).to(self.accelerator.device)
        pixels = []
        for part in torch.arange(PREVIEW_IMAGES).split(self._at_once):
            labels = part % len(self.classes) if self.classes else None
            z = pipe.sample(noise[part], labels, self.sampling.guidance_scale, PREVIEW_STEPS)
            pixels.append(pipe.decode_latents(z))
        return grid(pictures(torch.cat(pixels), pipe.config.value_transform["integer"]))

    def exports(self) -> dict[str, Any]:
        """What a checkpoint holds for sampling."""
        return {name: ema.module for name, ema in self.emas.items()} | {"codec": self.codec}
