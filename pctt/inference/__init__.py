from pctt.inference.settings import Inference

__all__ = ["Inference"]
