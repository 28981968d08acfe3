"""Rewards as array programs: token ids in, scores out, beside the model. README.md describes each term."""
