"""What both stages stand on: data, latents, engine, checkpoints, pictures, and the commands around them."""
