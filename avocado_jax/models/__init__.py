"""The Omni thinker in Flax Linen: pure functions of (params, batch)."""
