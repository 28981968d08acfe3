"""Measurements of the hot paths and of the machine's ceilings. Imports jax, flax and numpy only."""
