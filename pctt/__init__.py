"""pctt: neural networks trained by predictive coding, on Tenstorrent cards and, by the same program, on the
CPU.
"""

from pctt.backends import BackendUnavailable, DeviceLost
from pctt.control import (
    ControlModel,
    PIDAgent,
    Plan,
    Planning,
    PredictiveController,
    linear_weights,
    pid_agent,
)
from pctt.energies import Categorical, Gaussian
from pctt.engine import Engine, Status
from pctt.inference import Inference, Nudge
from pctt.initialisers import init
from pctt.layers import (
    Add,
    Affine,
    Attend,
    AvgPool2d,
    Bias,
    Block,
    Concat,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Embedding,
    Fill,
    Flatten,
    Linear,
    MaxPool2d,
    Multiply,
    Normalise,
    NormaliseBatch,
    Permute,
    Reshape,
    Scale,
    Shift,
    Slice,
    Standardise,
    Step,
)
from pctt.learning import SGD, Adam, AdamW, Constant, WarmupCosine
from pctt.memory import HierarchicalMemory, RecurrentMemory
from pctt.network import Network
from pctt.pcgraph import pc_graph
from pctt.queries import InferenceDiverged, InferenceResult, infer, recall, weight_gradients
from pctt.recurrent import GRUCell, LSTMCell, RNNCell, unroll
from pctt.run import FitResult, Trainer, load
from pctt.scaling import mupc
from pctt.sequences import Stream
from pctt.temporal import TemporalFilter
from pctt.translate import from_torch, to_torch
from pctt.variants import variant
from pctt.wiring import chain, graph

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Add",
    "Affine",
    "Attend",
    "AvgPool2d",
    "BackendUnavailable",
    "Bias",
    "Block",
    "Categorical",
    "Concat",
    "Constant",
    "ControlModel",
    "Conv2d",
    "ConvTranspose2d",
    "Dense",
    "DeviceLost",
    "Embedding",
    "Engine",
    "Fill",
    "FitResult",
    "Flatten",
    "GRUCell",
    "Gaussian",
    "HierarchicalMemory",
    "Inference",
    "InferenceDiverged",
    "InferenceResult",
    "LSTMCell",
    "Linear",
    "MaxPool2d",
    "Multiply",
    "Network",
    "Normalise",
    "NormaliseBatch",
    "Nudge",
    "PIDAgent",
    "Permute",
    "Plan",
    "Planning",
    "PredictiveController",
    "RNNCell",
    "RecurrentMemory",
    "Reshape",
    "Scale",
    "Shift",
    "Slice",
    "Standardise",
    "Status",
    "Step",
    "Stream",
    "TemporalFilter",
    "Trainer",
    "WarmupCosine",
    "chain",
    "from_torch",
    "graph",
    "infer",
    "init",
    "linear_weights",
    "load",
    "mupc",
    "pc_graph",
    "pid_agent",
    "recall",
    "to_torch",
    "unroll",
    "variant",
    "weight_gradients",
]
