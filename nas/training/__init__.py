"""Training of one network: `train`, `evaluate`, and the settings, `TrainConfig`. Masks are found by `METHODS`.

`Training` is the same in parts: it can be left after any epoch and gone on with.
"""

from nas.training.config import TrainConfig
from nas.training.evaluation import Evaluation, evaluate
from nas.training.methods import METHODS, SparsityMethod, make_method
from nas.training.resume import TrainingState
from nas.training.session import Training
from nas.training.trainer import TrainResult, check_training, train

__all__ = [
    "METHODS",
    "Evaluation",
    "SparsityMethod",
    "TrainConfig",
    "TrainResult",
    "Training",
    "TrainingState",
    "check_training",
    "evaluate",
    "make_method",
    "train",
]
