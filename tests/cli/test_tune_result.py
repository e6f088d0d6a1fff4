"""What `tiedkl tune` concludes: pruning, divergence, the check with other seeds, the time limit, best.json."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("optuna")

import tiedkl
from tiedkl import cli
from tiedkl.cli import compare as cli_compare
from tiedkl.cli import tune as cli_tune
from tiedkl.compare import Settings, corpus
from tiedkl.compare.settings import CompareError, load_config, load_loss_options
from tiedkl.compare.training import Diverged
from tiedkl.tune import search, tune, worker

from .conftest import TOY

Trainings = list[tuple[dict[str, float], int]]


def diverging(monkeypatch: pytest.MonkeyPatch, when: Any) -> None:
    """Trainings diverge where `when(params, seed)` says so."""
    train = worker.Task.train

    def diverge(self: Any, params: Any, seed: int, *args: Any, **options: Any) -> Any:
        if when(params, seed):
            raise Diverged("+REAL: training diverged in epoch 1 (the loss is not a number)")
        return train(self, params, seed, *args, **options)

    monkeypatch.setattr(worker.Task, "train", diverge)


def is_default(params: dict[str, float]) -> bool:
    return params["lr"] == TOY["lr"]


@pytest.mark.parametrize(
    ("variant", "loss"),
    [
        ("re", {"alpha": 0.0}),
        ("al", {"temperature": 20.0, "gamma": 0.5}),
        ("re-ls", {"alpha": 0.0, "label_smoothing": 0.1}),
    ],
    ids=["re", "al", "re-ls"],
)
def test_best_serves_the_loss_of_its_variant(
    toy: Any, trainings: Trainings, tmp_path: Path, variant: str, loss: dict[str, float]
) -> None:
    tune(toy(trials=1, variant=variant, vocab_size=20))
    best = tmp_path / "out" / "best.json"
    assert json.loads(best.read_text())["tuned_for"] == variant
    assert load_loss_options(best) == loss
    options = tiedkl.FusedTiedLoss(**load_loss_options(best)).settings.scalars.options
    assert options.alpha == loss.get("gamma", 0.0) * loss.get("temperature", 0.0)
    assert options.label_smoothing == loss.get("label_smoothing", 0.0)
    settings = Settings(**load_config(best))
    assert (settings.lr, settings.hidden, settings.vocab_size) == (0.002, 8, 20)


def test_best_has_the_gradient_through_the_target(toy: Any, trainings: Trainings, tmp_path: Path) -> None:
    tune(toy(trials=1, variant="real", target_grad=True))
    best = tmp_path / "out" / "best.json"
    assert load_loss_options(best) == {"temperature": 20.0, "gamma": 0.5, "target_grad": True}
    assert tiedkl.FusedTiedLoss(**load_loss_options(best)).settings.scalars.options.target_grad
    assert Settings(**load_config(best)).target_grad
    assert "Variant real, the gradient through its similarity target too," in (best.parent / "tune.md").read_text()
    use, baseline, _ = json.loads(best.read_text())["commands"]
    assert "--variant baseline" in baseline
    assert "--target-grad" not in use + baseline


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_defaults_are_never_pruned(
    toy: Any, trainings: Trainings, monkeypatch: pytest.MonkeyPatch, pruner: str
) -> None:
    import optuna

    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda self: True)
    found = tune(toy(trials=3, pruner=pruner))
    assert [(t["state"], t["epochs"]) for t in found["trials"]] == [("complete", 2), ("pruned", 1), ("pruned", 1)]


def test_nothing_better_than_the_defaults_is_said(toy: Any, trainings: Trainings) -> None:
    found = tune(toy(trials=1))
    assert found["verdict"] == [f"Nothing beats the defaults (validation perplexity {found['valid_ppl']['best']:.2f}) "
                                "in this search."]  # fmt: skip


def test_diverged_trial_counts_and_is_not_repeated(
    toy: Any, trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(9))
    diverging(monkeypatch, lambda *_: next(calls) == 1)
    lines: list[str] = []
    found = tune(toy(trials=3, pruner="none"), say=lines.append)
    assert [t["state"] for t in found["trials"]] == ["complete", "diverged", "complete"]
    note = "+REAL: training diverged in epoch 1 (the loss is not a number)"
    assert [t["note"] for t in found["trials"]] == [None, note, None]
    assert lines[1].endswith(note)
    assert (found["trials"][1]["valid_ppl"], found["trials"][1]["epochs"]) == (None, 0)
    assert f"- Trial 1: {note}" in (tmp_path / "out" / "tune.md").read_text()


def test_the_sampler_keeps_away_from_where_training_diverges(
    toy: Any, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better and better up to a learning rate of 1, beyond which it diverges; a random search goes there too."""
    diverging(monkeypatch, lambda params, seed: params["lr"] > 1)
    found = tune(toy(trials=40, pruner="none", search="lr=0.001:100"))
    late = [t["state"] == "diverged" for t in found["trials"][20:]]
    assert sum(late) <= 10, "with trials that the sampler overlooks it is 18"


def test_the_embedding_is_searched_on_request(toy: Any, trainings: Trainings, tmp_path: Path) -> None:
    found = tune(toy(trials=3, search="lr=0.001:4,embedding_range"))
    assert found["search"]["embedding_range"] == [0.05, 2.0]
    first, *others = [t["params"]["embedding_range"] for t in found["trials"]]
    assert first == 0.1
    assert all(0.05 <= value <= 2.0 for value in others)
    best = found["trials"][found["trial"]]["params"]["embedding_range"]
    assert Settings(**load_config(tmp_path / "out" / "best.json")).embedding_range == best
    assert "embedding_range" not in tune(toy(trials=1, search=None, lr=1.0, out=str(tmp_path / "b")))["search"]
    with pytest.raises(CompareError, match="search embedding_range: expected some of gamma, temperature, lr, dropout,"):
        toy(model="transformer", search="embedding_range")


def test_commands_are_of_the_same_text_and_search(toy: Any, trainings: Trainings, tmp_path: Path) -> None:
    settings = toy(trials=2, search="lr=0.001:4,gamma", out=str(tmp_path / "an out"))
    found = tune(settings)
    use, search_again, fair = found["commands"]
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for module in (cli_compare, cli_tune):
        module.add_parser(commands)
    for command in found["commands"]:
        assert f" --data {settings.data} " in command
        assert command in (tmp_path / "an out" / "tune.md").read_text()
        assert parser.parse_args(shlex.split(command)[1:]).impl == "reference"
    assert use.endswith(f" --config '{tmp_path}/an out/best.json'")
    assert " --variant baseline --trials 2 " in search_again
    assert " --hidden 8 " in search_again
    assert " --search lr=0.001:4 " in search_again, "a baseline has no gamma"
    assert fair.endswith(f" --config baseline=tune-baseline/best.json --config 'real={tmp_path}/an out/best.json'")
    control = tune(toy(trials=1, variant="re-ls", out=str(tmp_path / "ls")))["commands"]
    parsed = [parser.parse_args(shlex.split(command)[1:]) for command in control]
    assert parsed[0].variants == "baseline,al,re,real,re-ls", "it trains what was searched for"
    assert parsed[2].variants == "baseline,re-ls"
    of_gamma = tune(toy(trials=1, search="gamma", out=str(tmp_path / "gamma")))["commands"][1]
    search = parser.parse_args(shlex.split(of_gamma)[1:]).search
    assert search == "lr=0.002:2.0,dropout", "the range holds where the search begins"


def test_diverged_defaults_are_said(toy: Any, trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging(monkeypatch, lambda params, seed: is_default(params))
    assert tune(toy(trials=1, check=3))["verdict"] == [
        "Training with the defaults diverged, and no other trial is complete: try a smaller --lr."
    ]
    found = tune(toy(trials=2, check=3))
    assert found["verdict"] == [
        f"Training with the defaults diverged; the best is trial 1, validation perplexity "
        f"{found['valid_ppl']['best']:.2f}."
    ]
    assert len(trainings) == 1  # a check has nothing to compare with


def test_gain_that_holds_is_said(toy: Any, trainings: Trainings) -> None:
    found = tune(toy(trials=2, check=3))
    assert found["verdict"][0].startswith("Better than the defaults in the search")
    assert found["verdict"][1].startswith("It holds with 3 other seeds")
    assert [seed for _, seed in trainings] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert found["unchecked"] is None
    assert tune(toy(trials=2, check=3)) == found
    assert len(trainings) == 8


def test_gain_that_other_seeds_do_not_show_is_said(
    toy: Any, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A winner that is the defaults but for 1e-9 in the learning rate, and a hair better in the search."""
    train, seen = worker.Task.train, 0

    def lucky(self: Any, params: Any, seed: int, epoch_done: Any, *args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        bonus = 0.1 if seen == 2 else 0.0
        trained = train(self, params, seed, lambda k, ce: epoch_done(k, ce - bonus), *args, **options)
        generator = torch.Generator().manual_seed(2 * seed + is_default(params))
        trained.test_losses = trained.test_losses + 0.1 * torch.randn(400, generator=generator)
        return trained

    monkeypatch.setattr(worker.Task, "train", lucky)
    found = tune(toy(trials=2, check=3, search="lr=0.002:0.0020000001", pruner="none"))
    assert found["valid_ppl"]["defaults"] > found["trials"][1]["valid_ppl"]
    assert not any(text.startswith("It holds") for text in found["verdict"])


def unlucky(monkeypatch: pytest.MonkeyPatch, is_bad: Any) -> None:
    """With other seeds than that of the search, the settings for which `is_bad(params)` are worse than the defaults."""
    train = worker.Task.train

    def bad(self: Any, params: Any, seed: int, *args: Any, **options: Any) -> Any:
        trained = train(self, params, seed, *args, **options)
        if seed > 1 and is_bad(params):
            trained.best["valid_ppl"] *= 3
            trained.test_losses = trained.test_losses + math.log(3)
        return trained

    monkeypatch.setattr(worker.Task, "train", bad)


def ranking(found: dict[str, Any]) -> list[int]:
    """Trials that are better than the defaults, the best first."""
    done = [t for t in found["trials"] if t["state"] == "complete"]
    better = [t for t in done if t["valid_ppl"] < found["valid_ppl"]["defaults"]]
    return [t["number"] for t in sorted(better, key=lambda t: t["valid_ppl"])]


def test_the_next_best_wins_where_the_best_does_not_hold(
    toy: Any, trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By validation with the seeds of the check; its settings are what best.json has."""
    search_alone = tune(toy(trials=4, pruner="none", out=str(tmp_path / "alone")))
    first, second, *_ = ranking(search_alone)
    bad = search_alone["trials"][first]["params"]
    unlucky(monkeypatch, lambda params: params == bad)
    trainings.clear()
    found = tune(toy(trials=4, pruner="none", check=2))
    assert (found["trial"], found["check"]["trial"]) == (second, second)
    assert found["valid_ppl"]["best"] == found["trials"][second]["valid_ppl"]
    (rejected,) = found["check"]["rejected"]
    assert rejected["trial"] == first
    assert not rejected["held"]
    assert found["check"]["held"]
    assert all(row["best"] > row["defaults"] for row in rejected["valid_ppl"])
    assert [seed for _, seed in trainings] == [1] * 4 + [2, 2, 3, 3] + [2, 3], "the defaults are trained once"
    assert f"trial {second}." in found["verdict"][0]
    assert found["verdict"][1].startswith("It holds with 2 other seeds")
    change = 100 * (rejected["valid_ppl"][0]["best"] / rejected["valid_ppl"][0]["defaults"] - 1)  # the same each time
    assert found["verdict"][2] == (
        f"Better in the search, but with 2 other seeds not: trial {first} ({change:+.1f}% of validation perplexity). "
        "As these seeds also decided that, the gain looks a little better than it is."
    )
    params = found["trials"][second]["params"]
    settings = load_config(tmp_path / "out" / "best.json")
    assert {name: settings[name] for name in params} == params
    assert f"{second} (winner)" in (tmp_path / "out" / "tune.md").read_text()
    assert tune(toy(trials=4, pruner="none", check=2)) == found


def test_the_defaults_stay_where_none_holds(
    toy: Any, trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlucky(monkeypatch, lambda params: not is_default(params))
    found = tune(toy(trials=6, pruner="none", check=2))
    first, *others = ranking(found)[:3]
    assert len(others) == 2
    assert found["check"]["trial"] == first
    assert [entry["trial"] for entry in found["check"]["rejected"]] == others
    (said,) = found["verdict"]
    start = f"Nothing beats the defaults: better in the search, but with 2 other seeds not: trial {first} (+"
    assert said.startswith(start)
    assert all(f"trial {k} (+" in said for k in others)
    assert found["trials"][found["trial"]]["defaults"]
    assert load_config(tmp_path / "out" / "best.json")["lr"] == TOY["lr"]
    assert tune(toy(trials=6, pruner="none", check=2)) == found


def test_a_check_goes_on_with_the_next_best(toy: Any, trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is up when the best has failed and the next is not checked yet."""
    unlucky(monkeypatch, lambda params: not is_default(params))
    clocked(monkeypatch)
    found = tune(toy(trials=4, pruner="none", check=2, timeout="85s"))  # four trials, four of the check
    first, second, *_ = ranking(found)
    assert (found["trial"], found["check"]["trial"], found["check"]["unfinished"]) == (first, first, second)
    assert found["verdict"][1].startswith(f"It does not hold with 2 other seeds: trial {first} (+")
    end = f"The next best, trial {second}, is not checked to the end yet: the same command, without --fresh, goes on."
    assert found["verdict"][1].endswith(end)
    done = len(trainings)
    assert tune(toy(trials=4, pruner="none", check=2))["verdict"][0].startswith("Nothing beats the defaults")
    more = len(ranking(found)[:3]) - 2
    assert [seed for _, seed in trainings[done:]] == [3, *[2, 3] * more], "the training of seed 2 is kept"


def test_one_that_diverges_with_another_seed_is_passed_over(
    toy: Any, trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_alone = tune(toy(trials=4, pruner="none", out=str(tmp_path / "alone")))
    first, second, *_ = ranking(search_alone)
    diverging(monkeypatch, lambda params, seed: seed == 3 and params == search_alone["trials"][first]["params"])
    found = tune(toy(trials=4, pruner="none", check=2))
    assert found["trial"] == second
    assert found["check"]["diverged"] == []
    assert found["check"]["rejected"][0]["valid_ppl"][1]["best"] is None
    assert f": trial {first} (diverged). As" in found["verdict"][2]


@pytest.mark.parametrize("which", ["best", "defaults"])
def test_check_that_diverges_does_not_hold(
    toy: Any, trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    diverging(monkeypatch, lambda params, seed: seed == 3 and is_default(params) == (which == "defaults"))
    found = tune(toy(trials=2, check=3))
    assert (
        found["verdict"]
        == {
            "best": [
                "Nothing beats the defaults: better in the search, but with 3 other seeds not: trial 1 (diverged)."
            ],
            "defaults": [
                found["verdict"][0],
                "It does not hold with 3 other seeds: training diverged with the defaults settings and seed 3.",
            ],
        }[which]
    )
    assert [(d["seed"], d["settings"]) for d in found["check"]["diverged"]] == [(3, which)]
    assert found["check"]["valid_ppl"][1][which] is None
    assert found["check"]["test"]["seeds"] == [2, 4]
    assert json.loads((tmp_path / "out" / "best.json").read_text())["verdict"] == found["verdict"]
    n_trained = len(trainings)
    assert tune(toy(trials=2, check=3)) == found  # nor is it tried again
    assert len(trainings) == n_trained


def test_command_ends_normally_when_the_check_diverges(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is not a number in a real training."""
    evaluate = worker.Trainer.evaluate

    def bad(self: Any, split: Any) -> float:
        return math.nan if self.settings["seed"] == 2 else evaluate(self, split)

    monkeypatch.setattr(worker.Trainer, "evaluate", bad)
    argv = [f"--{n.replace('_', '-')}={getattr(toy(), n)}" for n in ("data", "out", *TOY)]
    assert cli.main(["tune", *argv, "--trials=2", "--check=1"]) == 0
    out, err = capsys.readouterr()
    assert "It does not hold with 1 other seed: training diverged with the defaults settings and seed 2, with" in out
    assert "--fresh" not in out + err
    found = json.loads((tmp_path / "out" / "best.json").read_text())
    assert found["check"]["valid_ppl"] == [{"seed": 2, "defaults": None, "best": None}]
    assert found["check"]["test"] is None


def clocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training takes ten seconds."""
    train, now = worker.Task.train, 0.0

    def slow(*args: Any, **options: Any) -> Any:
        nonlocal now
        trained = train(*args, **options)
        now += 10
        return trained

    monkeypatch.setattr(worker.Task, "train", slow)
    clock = SimpleNamespace(time=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(search, "time", clock)


def test_check_ends_with_the_time(toy: Any, trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch)
    found = tune(toy(trials=2, check=2, timeout="25s"))
    assert [seed for _, seed in trainings] == [1, 1, 2]
    assert found["check"] is None
    assert found["verdict"][1] == (
        "The best of many trials looks better than it is. The time was up before the check with other seeds was done: "
        "the same command with a longer --timeout, or without, does it."
    )
    found = tune(toy(trials=2, check=2))
    assert found["verdict"][1].startswith("It holds with 2 other seeds")
    assert [seed for _, seed in trainings] == [1, 1, 2, 2, 3, 3]  # what was trained is kept
    again = tune(toy(trials=2, check=2, timeout="0.0001s"))
    assert again | {"commands": found["commands"]} == found  # nor is a check lost that was done


def test_check_of_a_search_that_time_ended(toy: Any, trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch)
    found = tune(toy(trials=9, check=2, timeout="15s"))
    assert found["verdict"][1].endswith("does it; --trials 2 without --timeout checks at once.")
    assert tune(toy(trials=2, check=2))["verdict"][1].startswith("It holds with 2 other seeds")
    assert [seed for _, seed in trainings] == [1, 1, 2, 2, 3, 3]


def test_a_check_of_another_study_is_not_taken(toy: Any, trainings: Trainings, tmp_path: Path) -> None:
    """Its files are called the same, and stay where only a database was removed."""
    tune(toy(trials=2, check=1))
    assert [seed for _, seed in trainings] == [1, 1, 2, 2]
    for name, hidden, checks in (("same", TOY["hidden"], []), ("other", 2 * TOY["hidden"], [2, 2])):
        trainings.clear()
        (tmp_path / name).mkdir()
        for file in (tmp_path / "out").glob("check-*.pt"):
            shutil.copy(file, tmp_path / name)
        tune(toy(trials=2, check=1, hidden=hidden, out=str(tmp_path / name)))
        assert [seed for _, seed in trainings] == [1, 1, *checks]


def test_no_check_is_said(toy: Any, trainings: Trainings) -> None:
    assert tune(toy(trials=2))["verdict"][1].endswith("Other seeds were not tried: --check 3 does it.")


def test_vocabulary_is_that_of_the_whole_text_which_is_read_once(
    toy: Any, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy(max_tokens=80, trials=1)
    load, n_read = corpus.load, 0

    def count(*args: Any, **options: Any) -> Any:
        nonlocal n_read
        n_read += 1
        return load(*args, **options)

    monkeypatch.setattr(corpus, "load", count)
    found = tune(settings)
    assert n_read == 1
    whole = load(settings.data)
    assert found["text"]["vocabulary"] == len(whole.words) > len(set(whole.train[:80].tolist())) + 2
    assert found["text"]["tokens"]["train"] == 80
