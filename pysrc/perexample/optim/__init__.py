"""Optimizers whose learning rate and averaging times are values for batch size 1, whatever the batch size is."""

from .adam import Adam, AdamW
from .clip import clip_grad_norm_
from .rmsprop import RMSprop
from .sgd import SGD
from .translate import Translation, translate
from .unscale import unscale_

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "Translation", "clip_grad_norm_", "translate", "unscale_"]
