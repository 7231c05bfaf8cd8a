"""The schema of `sampling:`, and the one list of samplers. No torch."""

from dataclasses import dataclass
from pathlib import Path

from shared import disk
from shared.config import Contradictions, choice, number

# A new sampler is an entry here; for flow, one that was not made for it needs a branch in
# schedulers.make_scheduler, as dpmpp has. A test draws with each from an exact network.
# objective of stage 2 -> sampler -> the diffusers scheduler that integrates it: flow is an ODE in t, epsilon
# and v live on a DDPM schedule
SAMPLERS = {
    "flow": {
        "euler": "FlowMatchEulerDiscreteScheduler",
        "heun": "FlowMatchHeunDiscreteScheduler",
        "dpmpp": "DPMSolverMultistepScheduler",
    },
    "epsilon": {"ddim": "DDIMScheduler", "dpmpp": "DPMSolverMultistepScheduler"},
    "v": {"ddim": "DDIMScheduler", "dpmpp": "DPMSolverMultistepScheduler"},
}
NAMES = tuple(dict.fromkeys(name for samplers in SAMPLERS.values() for name in samplers))


@dataclass
class SamplingConfig:
    """What `generate` does when its flags say nothing else."""

    sampler: str = choice(
        "dpmpp", *NAMES, help="objective flow takes euler, heun, dpmpp; epsilon and v ddim, dpmpp"
    )
    num_steps: int = number(10, low=1, high=1000, help="steps of the sampler; dpmpp needs the fewest")
    guidance_scale: float = number(
        2.0,
        low=0,
        high=100,
        help="1: none; above, samples keep closer to their class, or away from the guide",
    )
    guidance_interval: list[float] = number(
        [0.0, 1.0], low=0, high=1, help="times, 0 data and 1 noise, between which guidance acts"
    )
    num_images: int = number(64, low=1, help="images of a call of generate")

    def contradictions(self) -> Contradictions:
        interval = self.guidance_interval
        if len(interval) != 2 or interval != sorted(interval):
            yield "guidance_interval", f"must be [low, high] between 0 (data) and 1 (noise), not {interval}"


def of_export(folder: Path) -> SamplingConfig:
    """How an exported pipeline samples: as its recipe, or without guidance where it does not say."""
    index = disk.read_json(folder / "model_index.json", "restore it from a copy") or {}
    said = index.get("sampling") or {"num_inference_steps": 30, "guidance_scale": 1.0}
    return SamplingConfig(num_steps=said["num_inference_steps"], guidance_scale=said["guidance_scale"])
