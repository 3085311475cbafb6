"""Optimizers that fairseq lacks."""

from blspkd_fairseq.optim import adamw  # noqa: F401  (registers itself)
