"""Evaluation of checkpoints: captions of clips, and their metrics."""
