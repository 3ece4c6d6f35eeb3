"""Optimisers with torch.optim's interface."""

from duo.optim import lr_scheduler
from duo.optim.optimizer import Optimizer
from duo.optim.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Optimizer", "RMSprop", "lr_scheduler"]
