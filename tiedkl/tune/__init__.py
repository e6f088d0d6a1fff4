"""Search for gamma, temperature, learning rate and dropout with Optuna.

    from tiedkl.tune import TuneSettings, tune
    result = tune(TuneSettings(data="corpus.txt", trials=20))

A trial trains one variant of `tiedkl compare` on a slice of the text and is judged by its validation perplexity. Needs
the packages of the extras group `tune`.
"""

from .search import Interrupted, tune
from .settings import TuneSettings

__all__ = ["Interrupted", "TuneSettings", "tune"]
