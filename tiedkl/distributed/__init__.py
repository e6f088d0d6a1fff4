"""The loss over a process group: the tied matrix sharded by rows of the vocabulary. See docs/distributed.md."""

from .cost import Collective, traffic
from .loss import VocabParallelTiedLoss

__all__ = ["Collective", "VocabParallelTiedLoss", "traffic"]
