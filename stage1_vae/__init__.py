"""Stage 1: the VAE that turns pixels into latents."""
