"""Training of one network: `train`, `evaluate`, and the settings, `TrainConfig`. Masks are found by `METHODS`."""

from nas.training.config import TrainConfig
from nas.training.methods import METHODS, SparsityMethod, make_method
from nas.training.trainer import Evaluation, TrainResult, evaluate, train

__all__ = ["METHODS", "Evaluation", "SparsityMethod", "TrainConfig", "TrainResult", "evaluate", "make_method", "train"]
