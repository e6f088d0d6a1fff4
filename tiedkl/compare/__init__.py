"""The A/B test of the method on a user's text: baseline, +AL, +RE and +REAL of one small language model.

    from tiedkl.compare import Settings, compare
    report = compare(Settings(data="corpus.txt", out="my-comparison"))

Needs the packages of the extras group `compare` (tqdm, matplotlib, jinja2).
"""

from .runner import Interrupted, compare
from .settings import VARIANTS, CompareError, Settings, Variant
from .tables import table

__all__ = ["VARIANTS", "CompareError", "Interrupted", "Settings", "Variant", "compare", "table"]
