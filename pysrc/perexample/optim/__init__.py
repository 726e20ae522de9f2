"""Optimizers whose learning rate and averaging times are values for batch size 1, whatever the batch size is."""

from .adam import Adam, AdamW
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]
