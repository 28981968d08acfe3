"""Audiovisual video captioners in JAX: training, evaluation, rewards and serving of AVoCaDO."""
