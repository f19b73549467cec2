"""The training step for large global batches."""

from lars_keras.training.trainer import Trainer, split_batch

__all__ = ["Trainer", "split_batch"]
