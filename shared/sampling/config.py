"""The schema of `sampling:`, and which samplers there are."""

from dataclasses import dataclass

from shared.config import choice, number


@dataclass
class SamplingConfig:
    """What `generate` does when its flags say nothing else."""

    sampler: str = choice("euler", "euler", "heun", "ddim", "dpmpp")
    num_steps: int = number(30, low=1, high=1000)
    guidance_scale: float = number(1.0, low=0, high=100)
    guidance_interval: list[float] = number([0.0, 1.0], low=0, high=1)  # of t, 0 data and 1 noise; outside there is no guidance
    num_images: int = number(64, low=1)

    def contradictions(self):
        if len(self.guidance_interval) != 2 or self.guidance_interval != sorted(self.guidance_interval):
            yield "guidance_interval", f"must be [low, high] between 0 (data) and 1 (noise), not {self.guidance_interval}"
