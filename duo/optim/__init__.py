"""Optimisers with torch.optim's interface."""

from duo.optim import lr_scheduler
from duo.optim.optimizer import Optimizer
from duo.optim.optimizers import SGD, Adam, AdamW, RMSprop

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop", "lr_scheduler"]
