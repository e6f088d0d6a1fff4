"""What a search can be asked to do: ranges, options, one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from tiedkl.cli import tune as command
from tiedkl.compare.settings import OWN, CompareError
from tiedkl.tune import TuneSettings
from tiedkl.tune.settings import RANGES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": "momentum"}, "expected some of"),
        ({"search": ","}, "nothing to search"),
        ({"search": "lr=3:1"}, "LOW < HIGH"),
        ({"search": "lr=0:1"}, "0 < LOW"),
        ({"search": "dropout=0:1"}, "HIGH < 1"),
        ({"search": "lr=a:b"}, "two numbers"),
        ({"search": "lr=0.5:2"}, "leaves out the default 0.002"),
        ({"search": "gamma", "variant": "re"}, "has no augmented loss"),
        ({"search": "gamma", "variant": "re-ls"}, "has no augmented loss"),
        ({"search": "label_smoothing", "variant": "real"}, "variant real has no label smoothing"),
        ({"search": "label_smoothing=0.2:0.4", "variant": "ls"}, "default 0.1, .* with --label-smoothing"),
        ({"search": "label_smoothing=0.1:1", "variant": "ls"}, "HIGH < 1"),
        ({"trials": 0}, "trials=0"),
        ({"jobs": 0}, "jobs=0"),
        ({"timeout": "soon"}, "not a time"),
        ({"variant": "best"}, "unknown variant"),
        ({"pruner": "axe"}, "unknown pruner"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_input_is_named(toy: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        toy(**changes)


def test_variants_without_the_augmented_loss_search_the_rest() -> None:
    assert list(TuneSettings(variant="re").ranges()) == ["lr", "dropout"]
    assert list(TuneSettings().ranges()) == ["gamma", "temperature", "lr", "dropout"]
    assert list(TuneSettings(variant="re-ls").ranges()) == ["lr", "dropout", "label_smoothing"]
    assert TuneSettings(model="transformer").ranges()["lr"].high == 0.003


def test_options_have_the_defaults_of_the_settings() -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = vars(parser.parse_args(["tune"]))
    for field in dataclasses.fields(TuneSettings):
        assert args[field.name] == field.default, field.name


def test_a_variant_may_have_of_its_own_what_is_searched() -> None:
    assert set(RANGES) == set(OWN) - {"target_grad"}
