"""Images, arrays and saved latents: from a source to batches."""
