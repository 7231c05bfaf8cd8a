"""How good a run is: reconstructions, samples, latents."""
