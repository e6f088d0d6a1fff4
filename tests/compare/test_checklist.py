"""The checklist: the numbers of the run, and commands that repeat its settings."""

from __future__ import annotations

import argparse
import importlib
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import Settings, compare
from tiedkl.compare.command import compare_command, options, tune_command, tuned_compare_command
from tiedkl.compare.settings import parse_variants
from tiedkl.compare.tables import number
from tiedkl.tune import TuneSettings

from .made import built, run, three
from .test_budget import fixed_speed

OTHER: dict[str, Any] = {
    "data": "my texts/it's.txt", "out": "-odd out", "model": "transformer", "variants": ("real", "baseline"),
    "epochs": 3, "hidden": 64, "layers": 1, "batch": 5, "bptt": 20, "lr": 0.002, "lr_decay": 0.7, "decay_after": 2,
    "clip": 0.25, "dropout": 0.1, "embedding_range": 0.4, "temperature": 12.5, "gamma": 0.3, "label_smoothing": 0.2,
    "target_grad": True, "tied_bias": False,
    "impl": "reference", "threads": 2, "device": "cuda:0", "seed": -7, "seeds": 2, "budget": "15m",
    "price_per_hour": 2.5,
    "tokenizer": "my tokenizer.json", "tuned_for": "real", "vocab_size": 500, "min_count": 3, "max_tokens": 9000,
    "checkpoint_every": 5.0, "quiet": True, "fresh": True, "reuse": "my other/out",
    "overrides": {"real": {"lr": 0.001, "gamma": 0.2}},
}  # fmt: skip
EACH = [{name: value} for name, value in OTHER.items()]
# all at once, but that a Transformer has no such range
MOST = [{name: value for name, value in OTHER.items() if name != without} for without in ("model", "embedding_range")]


def parsed(line: str) -> argparse.Namespace:
    """A line of the checklist, read by the command line."""
    program, name, *rest = shlex.split(line)
    assert program == "tiedkl"
    parser = argparse.ArgumentParser()
    importlib.import_module(f"tiedkl.cli.{name}").add_parser(parser.add_subparsers())
    return parser.parse_args([name, *rest])


def compared(line: str) -> Settings:
    """The settings of a line of `tiedkl compare`, as the command builds them."""
    values = vars(parsed(line))
    values = {field.name: values[field.name] for field in fields(Settings)}
    return Settings(**values | {"variants": parse_variants(values["variants"])})


def tuned(line: str) -> TuneSettings:
    """The settings of a line of `tiedkl tune`, as the command builds them."""
    values = vars(parsed(line))
    return TuneSettings(**{field.name: values[field.name] for field in fields(TuneSettings)})


def test_other_values_cover_every_setting() -> None:
    assert set(OTHER) == {field.name for field in fields(Settings)}
    assert all(OTHER[field.name] != field.default for field in fields(Settings))


@pytest.mark.parametrize("values", [{}, *MOST, *EACH], ids=lambda v: "-".join(v) if len(v) < 2 else "all")
def test_commands_have_the_settings_of_the_run(values: dict[str, Any]) -> None:
    """Each setting alone and all at once, through the parsers of the commands."""
    settings = Settings(**values)
    assert compared(compare_command(settings)) == replace(settings, fresh=False, reuse=None)
    assert compared(compare_command(settings, seeds=3)) == replace(settings, fresh=False, reuse=None, seeds=3)

    line = tuned_compare_command(settings, hidden=650)
    searched = {
        "lr": None, "dropout": 0.3, "embedding_range": 0.1, "temperature": 20.0, "gamma": 0.5, "label_smoothing": 0.1,
        "target_grad": False, "tuned_for": None, "overrides": None,
    }  # fmt: skip
    assert parsed(line).config == [f"{v}=tune-{v}/best.json" for v in settings.variants]
    assert not set(searched) & set(getattr(parsed(line), "given", ()))  # they come from --config
    assert compared(line) == replace(settings, fresh=False, reuse=None, hidden=650, **searched)

    search, default = tuned(tune_command(settings, "re")), TuneSettings()
    assert search.variant == "re"
    assert (search.out, search.fresh) == ("tune-re", default.fresh)
    assert not search.target_grad, "it has no augmented loss"
    assert tuned(tune_command(settings, "al")).target_grad == settings.target_grad
    for name in {field.name for field in fields(TuneSettings)} - {"variant", "out", "fresh", "search", "target_grad"}:
        assert getattr(search, name) == values.get(name, getattr(default, name)), name


def test_settings_at_their_defaults_need_no_options() -> None:
    assert options(Settings()) == options(TuneSettings()) == ""
    assert (
        compare_command(Settings(data="a b.txt", tied_bias=False)) == "tiedkl compare --data 'a b.txt' --no-tied-bias"
    )


@pytest.mark.parametrize(
    ("values", "variant", "search"),
    [
        ({"lr": 3.0}, "real", "gamma,temperature,lr=0.5:3.0,dropout"),
        ({"lr": 0.1, "dropout": 0.7}, "re", "lr=0.1:2.0,dropout=0.0:0.7"),
        ({"gamma": 0.0}, "real", "temperature,lr,dropout"),
        ({"gamma": 0.0}, "baseline", None),
        ({"model": "transformer", "lr": 0.01}, "al", "gamma,temperature,lr=0.0003:0.01,dropout"),
    ],
)
def test_search_begins_at_the_settings_of_the_run(values: dict[str, Any], variant: str, search: str | None) -> None:
    """A range that left them out would be refused."""
    found = tuned(tune_command(Settings(**values), variant))
    assert found.search == search
    assert {name: getattr(found, name) for name in values} == values


def test_search_begins_at_what_the_variant_has_of_its_own() -> None:
    settings = Settings(lr=1.5, overrides={"real": {"lr": 0.7}})
    assert [tuned(tune_command(settings, variant)).lr for variant in ("baseline", "real")] == [1.5, 0.7]


def test_numbers_and_commands_of_a_run(toy: Any, tmp_path: Path) -> None:
    settings = toy(
        variants=("baseline", "al", "re", "real"), model="transformer", lr=0.01, epochs=1, seeds=2, fresh=True
    )
    data = compare(settings)
    small, real, production = data["checklist"]
    name, best = min(
        ((n, v) for n, v in data["variants"].items() if v["evidence"]), key=lambda p: p[1]["evidence"]["percent"]
    )
    assert number(best["evidence"]["percent"], "+.1f", "%") in small["seen"][0]
    assert "2 seeds" in small["seen"][0]
    (more,) = small["commands"]
    assert compared(more) == replace(settings, seeds=3, fresh=False)
    *searches, larger = real["commands"]
    found = [(tuned(line).variant, tuned(line).model, tuned(line).lr, tuned(line).hidden) for line in searches]
    arms = ("baseline", name, *({"al": ["ls"], "real": ["re-ls"]}.get(name, [])))
    assert found == [(arm, "transformer", 0.01, 650) for arm in arms]
    expected = replace(settings, variants=arms, hidden=650, seeds=3, out="tiedkl-compare-650")
    assert compared(larger) == replace(expected, lr=None, fresh=False)
    assert f"{data['corpus']['vocabulary']},16" in production["commands"][2]
    eager = {True: 7, False: 3}[best["augmented"]] * 8192 * data["corpus"]["vocabulary"] * 4 / 2**20
    assert f"{eager:,.0f} MiB" in production["memory"]
    for stage in data["checklist"]:
        for line in stage["commands"]:
            parsed(line)

    before = (tmp_path / "out" / "real.pt").stat().st_mtime_ns
    continued = compare(compared(more))  # the command is accepted, and trains only the third seed
    assert (tmp_path / "out" / "real.pt").stat().st_mtime_ns == before
    assert continued["variants"]["real"]["seeds_done"] == [1, 2, 3]
    assert continued["checklist"][0]["commands"] == []


@pytest.mark.parametrize(
    ("name", "control", "keywords"),
    [
        ("al", "ls", "temperature=20, gamma=0.5, return_terms=True), with the embedding as its target_weight{bias}"),
        ("re", None, "alpha=0, return_terms=True), with the embedding as its weight{bias}"),
        ("real", "re-ls", "temperature=20, gamma=0.5, return_terms=True), with the embedding as its weight{bias}"),
        ("ls", None, "alpha=0, label_smoothing=0.1, return_terms=True){bias}"),
        ("re-ls", None, "alpha=0, label_smoothing=0.1, return_terms=True), with the embedding as its weight{bias}"),
    ],
)
def test_a_larger_test_has_the_control_and_production_the_loss(name: str, control: str | None, keywords: str) -> None:
    _, real, production = built(3, **{"baseline": three(100.0), name: three(90.0)})["checklist"]
    arms = ("baseline", name, *([control] if control else []))
    assert compared(real["commands"][-1]).variants == arms
    assert [tuned(line).variant for line in real["commands"][:-1]] == list(arms)
    keywords = keywords.format(bias=", and an output bias, which the models here had.")
    assert production["note"] == f"In the training code: tiedkl.FusedTiedLoss({keywords}"
    assert ("its control" in real["go_on_if"]) == (control is not None)
    assert ("once label_smoothing is 0" in production["monitor"][0]) == (name in ("ls", "re-ls"))
    assert any("Training cross-entropy against" in text for text in real["monitor"]) == (name == "re")


def test_production_has_the_gradient_through_the_target() -> None:
    own = {"real": {"gamma": 4.0, "target_grad": True}}
    note = built(3, overrides=own, baseline=three(100.0), real=three(90.0))["checklist"][-1]["note"]
    assert "FusedTiedLoss(temperature=20, gamma=4, target_grad=True, return_terms=True)" in note


def test_without_an_output_bias_none_is_spoken_of() -> None:
    runs = {"baseline": three(100.0), "real": three(90.0)}
    notes = [built(3, tied_bias=bias, **runs)["checklist"][2]["note"] for bias in (True, False)]
    assert ["output bias" in note for note in notes] == [True, False]


def test_memory_a_parameter_is_without_the_scratch() -> None:
    """5 MiB in training, 2 of them scratch, for 1,000 parameters."""
    memory = built(3, baseline=three(100.0), re=three(90.0))["checklist"][1]["memory"]
    assert memory.startswith(f"About {3 * 2**20 / 1000:.0f} bytes a parameter")
    assert "2 MiB here and within 64 MiB" in memory


def test_seeds_are_added_to_a_budget(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan had one seed; the command of the checklist trains the others with the epochs of the plan."""
    settings = toy(budget="30s", epochs=None)
    fixed_speed(monkeypatch, 0.7, 1e-4)  # an epoch is 19 steps; 22 s * 0.7 buy 22
    planned = compare(settings)
    assert (planned["config"]["seeds"], planned["config"]["epochs"]) == ([1], 1)
    (more,) = planned["checklist"][0]["commands"]
    continued = compare(compared(more))
    assert continued["config"]["seeds"] == [1, 2, 3]
    assert continued["config"]["epochs"] == 1
    assert continued["checklist"][1]["note"] == "On all of the text, without the --budget of this run."
    assert compared(continued["checklist"][1]["commands"][-1]).budget is None


def test_seeds_that_are_planned_stay_planned() -> None:
    """Five seeds, one finished: the command asks for five."""
    data = built(5, Settings(seeds=5), baseline=three(100.0)[:1], re=three(90.0)[:1])
    assert data["checklist"][0]["commands"] == ["tiedkl compare --seeds 5"]
    assert data["checklist"][0]["note"]


@pytest.mark.parametrize("who", ["re", "baseline"])
def test_a_seed_that_diverged_is_not_asked_for_again(who: str) -> None:
    runs = {"baseline": three(100.0), "re": three(90.0)}
    runs[who][1] = run(120.0, None, seed=2, status="diverged")
    small = built(3, **runs)["checklist"][0]
    assert small["commands"] == []
    assert small["note"].startswith("A training diverged, and is not tried again")


@pytest.mark.parametrize(
    ("test", "text"),
    [
        (
            90.0,
            "With 3 seeds the answer is Yes at this width too, the gain is at least half of the 10.0% seen here, and",
        ),
        (105.0, "With 3 seeds the answer is Yes at this width, which it was not here (+5.0%), and"),
        (99.999, "With 3 seeds the answer is Yes at this width, which it was not here (0.0%), and"),
    ],
)
def test_a_harm_is_not_called_a_gain(test: float, text: str) -> None:
    data = built(3, baseline=three(100.0), re=three(test))
    assert data["checklist"][1]["go_on_if"].startswith(text)
    assert data["checklist"][0]["commands"] == []
