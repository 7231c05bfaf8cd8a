"""Stage 2: the diffusion model that draws new latents."""
