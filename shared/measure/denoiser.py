"""What stage 2 does with the latents, and what is wrong with its samples.

Drawn latents are held against saved ones, the errors of held-out latents against those of training latents.
Dimension key: N latents, c h w.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shared.data import latents, splits
from shared.data.latents import Latents
from shared.measure import fields
from shared.measure.images import decode
from shared.recipe import Recipe
from shared.run import RunFolder
from shared.sampling import tasks
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.transforms import LatentCodec
from shared.show import page
from shared.show.grids import on_white
from stage2_diffusion.diffusion import DDPM, TIMESTEPS, denoising_error, make_path
from stage2_diffusion.stage import VALIDATION_TIMES

DRAWN = 128  # latents of each way of sampling
BATCH = 64
MORE_STEPS = 4  # times the recipe's, which are held against them

# From which on a number is a verdict.
STILL_LEARNING = 0.02  # of the held-out error, for twice the steps
BY_HEART = 1.1  # held-out error over that of training latents, where it falls no longer
FAR_APART = 1.3  # the same, whether it falls or not: at the end a decaying rate lets any error fall
COLOUR = 0.04  # of the pixels' range of 2
SURE = 3.0  # standard errors of a mean
# Of unguided samples, beside that of more steps; of guided ones, beside saved latents. Guided samples of
# photos that have 0.76 or 0.88 have a lower KID than those of more steps.
LOST_VARIANCE = 0.75
GAINED_VARIANCE = 1.11  # likewise; a single step gives 1.22 of the latents of twelve digits
GUIDED_VARIANCE = 1.25  # of guided samples, beside that of unguided ones and of saved latents
WHITE = 0.5  # power of the finest waves of latents over that of the coarsest
TOLD = 0.15  # the share of the target that the denoiser explains in the middle
OF_THE_VAE = 0.6  # rFID over FID


@torch.no_grad()
def examine(run: RunFolder, recipe: Recipe, pipe: LatentDiffusionPipeline, device: Any) -> dict[str, Any]:
    """The numbers of a stage 2: what stands in doctor.json under `stage2`.

    Arguments:
        pipe: with its denoiser.
        device: where it computes.
    """
    cache = latents.open_cache(run.latents_of(recipe))
    pipe.to(device).set_progress_bar_config(disable=True)
    codec = LatentCodec(**pipe.config.codec).to(device)
    training, held_out = cache.split("train"), cache.split("val")
    assert recipe.stage2 is not None  # it has trained
    path = make_path(recipe.stage2.objective)
    errors = {
        name: _errors(pipe, path, *_normalised(part, codec, device))
        for name, part in (("held_out", held_out), ("training", training))
    }
    found: dict[str, Any] = {
        "error": {
            name: {str(t): one.mean().item() for t, one in by_time.items()}
            for name, by_time in errors.items()
        },
        "error_chance": math.hypot(*(_chance(by_time) for by_time in errors.values())),
        "error_of_white_noise": {str(t): unexplained(recipe.stage2.objective, t) for t in VALIDATION_TIMES},
    }
    real, _ = _normalised(training, codec, device)
    found["latents"] = _moments(real)
    count = min(DRAWN, max(16, len(training)))
    labels = tasks.labels_like(training.labels, cache.classes, count)
    scale, steps = recipe.sampling.guidance_scale, recipe.sampling.num_steps
    noise = pipe.noises(0, count)
    drawn = _draw(pipe, noise, labels, scale, steps, device)
    found["drawn"] = _moments(codec_of(drawn, codec))
    plain = drawn if scale == 1 else _draw(pipe, noise, labels, 1.0, steps, device)
    found["unguided"] = _moments(codec_of(plain, codec))
    found["more_steps"] = _moments(
        codec_of(_draw(pipe, noise, labels, 1.0, MORE_STEPS * steps, device), codec)
    )
    known = codec.decode(real[splits.evenly(len(real), count)])  # of all classes
    (ours, our_error), (theirs, their_error) = (_colour(pipe, z, device) for z in (drawn, known))
    found["colour_drift"] = (ours - theirs).tolist()
    found["colour_error"] = torch.hypot(our_error, their_error).tolist()
    return found | {"still_learning": still_learning(run)}


def unexplained(objective: str, t: float) -> float:
    """The least error at a time if latents were white noise: what a denoiser that knows nothing reaches.

    With z and noise independent N(0, 1): the variance of the target given z_t. Flow: 1 / ((1-t)^2 + t^2);
    v: 1; epsilon: alpha_t^2.

    Arguments:
        objective: flow, epsilon or v.
        t: the time, 0 data and 1 noise.
    """
    if objective == "flow":
        return 1 / ((1 - t) ** 2 + t**2)
    if objective == "v":
        return 1.0
    return float(DDPM(objective).scheduler.alphas_cumprod[min(int(t * TIMESTEPS), TIMESTEPS - 1)])


def codec_of(z: torch.Tensor, codec: LatentCodec) -> torch.Tensor:
    """Latents as the decoder takes them, (N,c,h,w), back to what the denoiser made."""
    return (z - codec.mean) / codec.std


def _normalised(part: Latents, codec: LatentCodec, device: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalised latents of a split (N,c,h,w), at even distances, with their labels."""
    batch = part.__getitems__(splits.evenly(len(part), 4 * DRAWN))
    moments = batch["moments"]
    key = torch.Generator().manual_seed(0)
    shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
    noise = torch.randn(shape, generator=key)
    labels = batch.get("label")
    z = codec.sample(moments.to(device), noise.to(device))
    return z, None if labels is None else labels.to(device)


def _errors(
    pipe: LatentDiffusionPipeline, path: Any, z: torch.Tensor, labels: torch.Tensor | None
) -> dict[float, torch.Tensor]:
    """The squared errors (N,) of the denoiser's target, by time, always with the same noise."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.device)
    errors = {}
    for level in VALIDATION_TIMES:
        parts = []
        for rows in torch.arange(len(z)).split(BATCH):
            t = torch.full((len(rows),), level, device=z.device)
            z_t, target, timesteps = path.noised(z[rows], noise[rows], t)
            seen = None if labels is None else labels[rows]
            parts.append(denoising_error(pipe.unet(z_t, timesteps, class_labels=seen).sample, target))
        errors[level] = torch.cat(parts)
    return errors


def _chance(errors: dict[float, torch.Tensor]) -> float:
    """The standard error of the mean over latents of their error in the middle times; of one all of it."""
    each = torch.stack([errors[t] for t in VALIDATION_TIMES[1:-1]]).mean(0)
    return each.std().item() / len(each) ** 0.5 if len(each) > 1 else each.item()


def _draw(
    pipe: LatentDiffusionPipeline,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    scale: float,
    steps: int,
    device: Any,
) -> torch.Tensor:
    parts = []
    for rows in torch.arange(len(noise)).split(BATCH):
        seen = None if labels is None else labels[rows]
        parts.append(pipe.sample(noise[rows].to(device), seen, scale, steps))
    return torch.cat(parts)


def _colour(pipe: LatentDiffusionPipeline, z: torch.Tensor, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each channel of decoded latents (N,c,h,w), and its standard error; of colours on white."""
    x = decode(pipe.vae, z.cpu(), device)
    each = (on_white(x) if pipe.config.value_transform["integer"] else x).mean((2, 3))  # (N,C)
    return each.mean(0), each.std(0) / len(each) ** 0.5


def _moments(z: torch.Tensor) -> dict[str, Any]:
    """Of normalised latents (N,c,h,w): mean and deviation of channels; spectrum, where they have places."""
    across = (0, 2, 3)
    found: dict[str, Any] = {
        "mean": z.mean(across).tolist(),
        "deviation": z.std(across, correction=0).tolist(),
        "variance": z.var(0, correction=0).mean().item(),
    }
    if min(z.shape[-2:]) >= 4:
        found["spectrum"] = fields.power_spectrum(z.cpu().double().numpy()).mean((0, 1)).tolist()
    return found


def still_learning(run: RunFolder) -> float | None:
    """The share by which the held-out error fell for twice the steps, of the last validations."""
    log = page.read_log(run.stage("stage2").metrics)
    points = list(zip(*log.get("val/denoising", ((), ())), strict=True))
    if len(points) < 2 or points[-2][0] >= points[-1][0]:
        return None
    (before, error_before), (last, error) = points[-2:]
    return (error_before - error) / error / math.log2(last / before)


# ---------------------------------------------------------------- what it means


def verdicts(found: dict[str, Any], measured: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with samples, and the keys that cure it; a line each, none where nothing is found.

    Arguments:
        found: from `examine`.
        measured: what `python -m shared.evaluate` found of the samples, if it has.
    """
    told = (rule(found) for rule in RULES)
    lines = [line for line in told if line]
    measured = measured or {}
    fid, rfid = measured.get("samples", {}).get("fid"), measured.get("rfid")
    if fid and rfid and rfid > OF_THE_VAE * fid:
        lines.append(
            f"the VAE is the limit: rFID {rfid:.3g} of FID {fid:.3g} is lost in stage 1 already: in a new "
            "run (name=ANOTHER) more stage1.max_steps, or a larger stage1.model.latent_shape"
        )
    return lines


def _tinted(found: dict[str, Any]) -> str | None:
    drift = found["colour_drift"]
    chance = [max(COLOUR, SURE * error) for error in found["colour_error"]]
    if all(abs(one) < most for one, most in zip(drift, chance, strict=True)):
        return None
    return (
        f"tinted: the channels of samples are off by {', '.join(f'{one:+.2f}' for one in drift)} (of a range "
        "of 2): sampling.guidance_scale lower, or sampling.guidance_interval=[0.0,0.7]; else more "
        "stage2.max_steps"
    )


def _undertrained(found: dict[str, Any]) -> str | None:
    if not _learning(found) or _by_heart(found):
        return None
    gain = f"{found['still_learning']:.1%} for twice the steps"
    return f"undertrained: the held-out error still falls ({gain}): stage2.max_steps"


def _by_heart(found: dict[str, Any]) -> str | None:
    held_out, training = (_middle(found["error"][name]) for name in ("held_out", "training"))
    if held_out < (FAR_APART if _learning(found) else BY_HEART) * training:
        return None
    if held_out - training < SURE * found["error_chance"]:  # few are held out
        return None
    return (
        f"overfitted: held-out latents have {held_out / training:.2f} times the error of training latents: "
        "python -m shared.generate --checkpoint best; in a new run (name=ANOTHER) data.augment (shift and "
        "copies), fewer stage2.max_steps, stage2.unet.dropout=0.2, or more images"
    )


def _too_few_steps(found: dict[str, Any]) -> str | None:
    share = _variances(found, "unguided", "more_steps")
    if any(LOST_VARIANCE < one < GAINED_VARIANCE for one in (share, _variances(found, "drawn", "latents"))):
        return None  # guidance may give it back
    return (
        f"too few steps: samples have {share:.2f} times the variance that {MORE_STEPS} times the steps give: "
        "sampling.num_steps higher, or sampling.sampler=dpmpp"
    )


def _too_much_guidance(found: dict[str, Any]) -> str | None:
    share, of_real = (_variances(found, "drawn", beside) for beside in ("unguided", "latents"))
    if any(1 / GUIDED_VARIANCE < one < GUIDED_VARIANCE for one in (share, of_real)):
        return None  # it may give back what few steps or a short training have lost
    return (
        f"guidance too strong: it changes the variance of samples {share:.2f} times: sampling.guidance_scale "
        "lower, or sampling.guidance_interval=[0.0,0.7]"
    )


def _too_rich(found: dict[str, Any]) -> str | None:
    spectrum = found["latents"].get("spectrum")
    if not spectrum:
        return None
    coarse, fine = spectrum[1], spectrum[-1]
    told = 1 - _middle(found["error"]["training"]) / _middle(found["error_of_white_noise"])
    if fine < WHITE * coarse or told > TOLD:
        return None
    return (
        f"latents too rich: their finest waves have {fine / coarse:.2f} times the power of the coarsest, and "
        f"the denoiser tells {max(told, 0):.0%} of them from noise: in a new run (name=ANOTHER) "
        "stage1.loss_weights.kl higher, or a smaller stage1.model.latent_shape"
    )


def _learning(found: dict[str, Any]) -> bool:
    """Whether the held-out error still falls."""
    gain = found["still_learning"]
    return gain is not None and gain >= STILL_LEARNING


def _variances(found: dict[str, Any], ours: str, beside: str) -> float:
    """The variance of some latents over that of others."""
    return found[ours]["variance"] / found[beside]["variance"]


def _middle(errors: dict[str, float]) -> float:
    """The mean over the middle times, where a denoiser has most to say."""
    return sum(errors[str(t)] for t in VALIDATION_TIMES[1:-1]) / len(VALIDATION_TIMES[1:-1])


RULES: Sequence[Callable[[dict[str, Any]], str | None]] = (
    _undertrained,
    _by_heart,
    _tinted,
    _too_few_steps,
    _too_much_guidance,
    _too_rich,
)
