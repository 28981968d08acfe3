"""Limits and capacities that test modules share, so that they also share compiled programs."""

from avocado_jax.rewards.text import Limits

ONE = Limits(1024, 192, 12, 64)  # single captions
CLIPS = 8
WORLD = Limits(2048, 512, 32, 64)  # captions of CLIPS clips of AVWorld
CAPACITY = {"keypoints": 32, "distinct": 256, "alphabet": 64}  # of their references
