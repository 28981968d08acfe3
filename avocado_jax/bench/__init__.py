"""Benchmarks of the hot paths and of the machine's peak rates. Imports jax, flax and numpy only."""
