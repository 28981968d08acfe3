"""The hot paths measured beside what the machine can do at most. Imports jax, flax and numpy only."""
