"""pctt: neural networks trained by predictive coding, on Tenstorrent cards and, by the same program, on the
CPU.
"""

from pctt.backends import BackendUnavailable, DeviceLost
from pctt.energies import Categorical, Gaussian
from pctt.engine import Engine, Status
from pctt.inference import Inference, Nudge
from pctt.layers import Dense
from pctt.learning import SGD, Adam, AdamW, Constant, WarmupCosine
from pctt.network import Network, chain, init
from pctt.queries import InferenceDiverged, InferenceResult, infer, weight_gradients
from pctt.run import FitResult, Trainer, load
from pctt.scaling import mupc
from pctt.variants import variant

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BackendUnavailable",
    "Categorical",
    "Constant",
    "Dense",
    "DeviceLost",
    "Engine",
    "FitResult",
    "Gaussian",
    "Inference",
    "InferenceDiverged",
    "InferenceResult",
    "Network",
    "Nudge",
    "Status",
    "Trainer",
    "WarmupCosine",
    "chain",
    "infer",
    "init",
    "load",
    "mupc",
    "variant",
    "weight_gradients",
]
