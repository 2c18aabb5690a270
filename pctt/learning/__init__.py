from pctt.learning.rules import SGD, Adam, AdamW, Learning
from pctt.learning.schedules import Constant, Schedule, WarmupCosine

__all__ = ["SGD", "Adam", "AdamW", "Constant", "Learning", "Schedule", "WarmupCosine"]
