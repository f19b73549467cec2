"""The training step, and what stands around it: each piece is usable from a user's own script."""

from lars_keras.training.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule
from lars_keras.training.trainer import Trainer, split_batch

__all__ = ["OPTIMIZERS", "SCHEDULES", "Trainer", "make_optimizer", "make_schedule", "split_batch"]
