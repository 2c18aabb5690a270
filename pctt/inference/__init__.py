from pctt.inference.nudge import Nudge
from pctt.inference.settings import Inference

__all__ = ["Inference", "Nudge"]
