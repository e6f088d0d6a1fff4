"""tiedkl: the tied-embedding language-model loss (CE + KL) in one fused pass, without N x V matrices."""

import logging as _logging
import os as _os

from .head import TiedHead
from .loss import FusedTiedLoss, TiedLossOutput, explain, fused_tied_loss
from .plan import Plan

__version__ = "0.1.0.dev0"
__all__ = ["FusedTiedLoss", "Plan", "TiedHead", "TiedLossOutput", "__version__", "explain", "fused_tied_loss"]

_logging.getLogger("tiedkl").addHandler(_logging.NullHandler())
if _os.environ.get("TIEDKL_LOG"):
    _logging.getLogger("tiedkl").setLevel(_os.environ["TIEDKL_LOG"].upper())
