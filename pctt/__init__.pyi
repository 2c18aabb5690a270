from pctt import (
    dashboard as dashboard,
    data as data,
    parallel as parallel,
    placement as placement,
    profile as profile,
    theory as theory,
)
from pctt.backends import BackendUnavailable as BackendUnavailable, DeviceLost as DeviceLost
from pctt.control import (
    ControlModel as ControlModel,
    PIDAgent as PIDAgent,
    Plan as Plan,
    Planning as Planning,
    PredictiveController as PredictiveController,
    linear_weights as linear_weights,
    pid_agent as pid_agent,
)
from pctt.energies import Categorical as Categorical, Gaussian as Gaussian
from pctt.engine import Engine as Engine, Status as Status
from pctt.inference import Inference as Inference, Nudge as Nudge
from pctt.initialisers import init as init
from pctt.layers import (
    Add as Add,
    Affine as Affine,
    Attend as Attend,
    AvgPool2d as AvgPool2d,
    Bias as Bias,
    Block as Block,
    Concat as Concat,
    Conv2d as Conv2d,
    ConvTranspose2d as ConvTranspose2d,
    Dense as Dense,
    Embedding as Embedding,
    Fill as Fill,
    Flatten as Flatten,
    Linear as Linear,
    MaxPool2d as MaxPool2d,
    Multiply as Multiply,
    Normalise as Normalise,
    NormaliseBatch as NormaliseBatch,
    Permute as Permute,
    Reshape as Reshape,
    Scale as Scale,
    Shift as Shift,
    Slice as Slice,
    Standardise as Standardise,
    Step as Step,
)
from pctt.learning import (
    SGD as SGD,
    Adam as Adam,
    AdamW as AdamW,
    Constant as Constant,
    WarmupCosine as WarmupCosine,
)
from pctt.memory import HierarchicalMemory as HierarchicalMemory, RecurrentMemory as RecurrentMemory
from pctt.network import Network as Network
from pctt.pcgraph import pc_graph as pc_graph
from pctt.queries import (
    InferenceDiverged as InferenceDiverged,
    InferenceResult as InferenceResult,
    infer as infer,
    recall as recall,
    weight_gradients as weight_gradients,
)
from pctt.recurrent import GRUCell as GRUCell, LSTMCell as LSTMCell, RNNCell as RNNCell, unroll as unroll
from pctt.run import FitResult as FitResult, Trainer as Trainer, load as load
from pctt.scaling import mupc as mupc
from pctt.sequences import Stream as Stream
from pctt.temporal import TemporalFilter as TemporalFilter
from pctt.translate import from_torch as from_torch, to_torch as to_torch
from pctt.variants import variant as variant
from pctt.wiring import chain as chain, graph as graph

__version__: str
