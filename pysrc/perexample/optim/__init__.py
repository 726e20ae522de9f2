"""Optimizers whose learning rate and averaging times are values for batch size 1, whatever the batch size is."""

from .adam import Adam

__all__ = ["Adam"]
