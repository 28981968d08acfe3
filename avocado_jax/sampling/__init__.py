"""Captions from a policy: prefill a clip once, decode its G captions together."""
