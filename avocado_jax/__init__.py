"""Audiovisual captioners of the AVoCaDO kind in JAX: one clip, its sound, and the words that hold both."""
