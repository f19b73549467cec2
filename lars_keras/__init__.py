"""Large-batch training for Keras 3: layer-wise adaptive optimizers, schedules and a training step.

Importing this package imports Keras only, on any Keras backend. Import `lars_keras.data` and `lars_keras.training` on
demand.
"""

from lars_keras import metrics, schedules
from lars_keras.exclude import DEFAULT_EXCLUDE, VariableRole
from lars_keras.lamb import LAMB
from lars_keras.lars import LARS
from lars_keras.sgd import SGD

__all__ = ["DEFAULT_EXCLUDE", "LAMB", "LARS", "SGD", "VariableRole", "metrics", "schedules"]
__version__ = "0.1.0"
