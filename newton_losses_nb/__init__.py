"Second-order gradients for losses that contain an algorithm: Newton losses in PyTorch"
__version__ = "0.2.0"

from .core.directions import (
    Clip, DiagonalFisher, DiagonalHessian, Direction, Fisher, Hessian, Normalize, PerSample, Scalar,
    Whiten)
from .core.newton import (
    ClippedLoss, NewtonLoss, NormalizedLoss, OutputLoss, ScalarStepLoss, inject_fisher,
    newton_direction, newton_target)
from .core.more import Krylov, MovingAverage, Remembering, Window
from .core.check import check_loss
from .sorting.relaxations import neural_sort, soft_sort, true_permutation
from .sorting.fast_networks import sorting_network
from .sorting.losses import SortingLoss
from .paths.exact import shortest_path
from .paths.relaxed import relaxed_bellman_ford
from .paths.fenchel_young import FenchelYoungLoss, Noise
from .paths.smoothing import SmoothedAlgorithmLoss, SmoothedLoss

__all__ = [name for name in dir() if name[0] != "_" and name not in ("core", "paths", "sorting")]
