"""Checkpoints: Hugging Face folders and Orbax runs, streamed one tensor or layer at a time."""
