"""`--reuse`: runs of another comparison are taken over where they would be the same, and nowhere else."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiedkl.cli import compare as command
from tiedkl.compare import CompareError, Interrupted, Settings, compare, runner
from tiedkl.compare.markdown import markdown
from tiedkl.compare.store import Store

from .conftest import sentences
from .made import built, run
from .test_budget import fixed_speed
from .test_resume import Killed, numbers

FOUR = ("baseline", "al", "re", "real")
UNLIKE = dict.fromkeys(("estimated_seconds", "of", "text"))  # of a plan that was taken over


def without_places(report: dict[str, Any]) -> Any:
    """`numbers` of a report, without where its runs were trained."""
    found = numbers(report)
    for variant in found.values():
        for one in variant["runs"]:
            del one["taken_from"]
    return found


def taken(report: dict[str, Any]) -> set[tuple[str, int]]:
    """Variant and seed of the runs that were taken over."""
    return {(name, one["seed"]) for name, v in report["variants"].items() for one in v["runs"] if one["taken_from"]}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of runs that made a training step, in order."""
    labels: list[str] = []
    step = runner.Progress.step

    def note(self: Any, label: str, *args: Any) -> None:
        if label not in labels[-1:]:
            labels.append(label)
        step(self, label, *args)

    monkeypatch.setattr(runner.Progress, "step", note)
    return labels


@pytest.mark.parametrize("changes", [{"gamma": 4.0}, {"target_grad": True}], ids=lambda changes: next(iter(changes)))
def test_another_loss_trains_only_what_uses_it(
    changes: dict[str, Any], toy: Any, tmp_path: Path, trained: list[str]
) -> None:
    first = toy(epochs=1, seeds=2, variants=FOUR)
    compare(first)
    alone = compare(toy(epochs=1, seeds=2, variants=FOUR, out=str(tmp_path / "alone"), **changes))
    trained.clear()
    second = toy(epochs=1, seeds=2, variants=FOUR, out=str(tmp_path / "other"), reuse=first.out, **changes)
    report = compare(second)
    assert trained == ["+AL seed 1", "+REAL seed 1", "+AL seed 2", "+REAL seed 2"]
    assert without_places(report) == without_places(alone)
    assert taken(report) == {("baseline", 1), ("re", 1), ("baseline", 2), ("re", 2)}
    assert {one["taken_from"] for one in report["variants"]["re"]["runs"]} == {first.out}
    trained.clear()
    assert numbers(compare(second)) == numbers(report)
    assert not trained


def test_a_seed_more_and_a_variant_more(toy: Any, tmp_path: Path, trained: list[str]) -> None:
    """What the other comparison has not is trained here; what it has beyond the request stays there."""
    first = toy(epochs=1, variants=("baseline", "al", "real"))
    compare(first)
    trained.clear()
    report = compare(
        toy(epochs=1, seeds=2, variants=("baseline", "re", "real"), out=str(tmp_path / "b"), reuse=first.out)
    )
    assert trained == ["+RE seed 1", "baseline seed 2", "+RE seed 2", "+REAL seed 2"]
    assert taken(report) == {("baseline", 1), ("real", 1)}
    assert "al" not in report["variants"]


def test_settings_of_single_variants(toy: Any, tmp_path: Path, trained: list[str]) -> None:
    first = toy(epochs=1, overrides={"real": {"lr": 0.5, "gamma": 2.0}, "baseline": {"gamma": 3.0}})
    compare(first)
    trained.clear()
    compare(toy(epochs=1, overrides={"real": {"lr": 0.5}}, gamma=2.0, out=str(tmp_path / "b"), reuse=first.out))
    assert not trained  # the baseline has no gamma, and that of +REAL is the same
    compare(toy(epochs=1, lr=0.5, out=str(tmp_path / "c"), overrides={"real": {"gamma": 2.0}}, reuse=first.out))
    assert trained == ["baseline"]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and comparisons of one epoch of it: baseline and +REAL in `out`, +RE in `old`."""
    folder = tmp_path_factory.mktemp("before")
    (folder / "text.txt").write_text("\n".join(sentences(250)), encoding="utf-8")
    settings = Settings(
        data=str(folder / "text.txt"), out=str(folder / "out"), variants=("baseline", "real"), epochs=1, hidden=16,
        batch=4, bptt=20, impl="reference", threads=1, quiet=True,
    )  # fmt: skip
    compare(settings)
    compare(replace(settings, variants=("re",), out=str(folder / "old")))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 20}, r"--reuse out: its runs have other settings \(hidden=16, now 20\)"),
        ({"epochs": 3}, r"epochs=1, now 3"),
        ({"seed": 2}, r"seed=1, now 2"),
        ({"budget": "15m"}, r"budget=None, now 15m"),
        ({"threads": 2}, r"threads=1, now 2"),
        ({"lr": 0.5}, r"none of these runs \(baseline: lr=1.0, now 0.5; \+REAL: lr=1.0, now 0.5\)"),
        ({"variants": ("re", "ls")}, r"none of these runs \(\+RE seed 1: not there; \+LS seed 1: not there\)"),
        ({"variants": ("real",), "gamma": 1.0}, r"\(\+REAL: gamma=0.5, now 1.0\)"),
        ({"data": "another"}, r"other settings \(the text\)"),
        ({"reuse": "nowhere"}, r"--reuse nowhere: no comparison is there"),
        ({"out": "out"}, r"--out of its own"),
        ({"reuse": "../{}/out", "out": "out"}, r"--out of its own"),
        ({"reuse": "circle"}, r"--reuse circle: cannot be read"),
        ({"reuse": "damaged"}, r"--reuse damaged: its baseline.pt is damaged"),
        ({"reuse": "foreign"}, r"--reuse foreign: what is there is not a comparison"),
        ({"reuse": "elsewhere"}, r"trained elsewhere \(torch=1.0, now "),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_cannot_be_used_is_refused_before_anything_is_lost(
    toy: Any, tmp_path: Path, before: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out", "old"):
        shutil.copytree(before / name, name)
    Path("text.txt").write_bytes((before / "text.txt").read_bytes())
    for name in ("damaged", "foreign", "elsewhere"):
        shutil.copytree("out", name)
    torch.save({"test_losses": torch.zeros(3)}, "damaged/baseline.pt")
    Path("foreign", "config.json").write_text("{}")
    report = json.loads(Path("elsewhere", "report.json").read_text("utf-8"))
    report["environment"]["torch"] = "1.0"
    Path("elsewhere", "report.json").write_text(json.dumps(report))
    Path("circle").symlink_to("circle")
    if "reuse" in changes:
        changes = changes | {"reuse": changes["reuse"].format(tmp_path.name)}
    Path("another").write_text("\n".join(sentences(250, seed=1)), encoding="utf-8")
    config, checkpoint = (Path("old", name).read_bytes() for name in ("config.json", "re.pt"))
    with pytest.raises(CompareError, match=message):
        compare(toy(**{"epochs": 1, "out": "old", "fresh": True, "reuse": "out", **changes}))
    assert (Path("old", "config.json").read_bytes(), Path("old", "re.pt").read_bytes()) == (config, checkpoint)
    assert sorted(file.name for file in Path("out").glob("*.pt")) == ["baseline.pt", "real.pt"]


def test_killed_while_runs_are_taken_over(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy(epochs=1)
    expected = compare(first)
    second = toy(epochs=1, out=str(tmp_path / "b"), reuse=first.out)
    save = Store.save

    def save_once(self: Store, name: str, state: dict[str, Any]) -> None:
        if self.has("baseline"):
            raise Killed
        save(self, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", save_once)
        with pytest.raises(Killed):
            compare(second)
    report = compare(second)
    assert taken(report) == {("baseline", 1), ("real", 1)}
    assert without_places(report) == without_places(expected)


def test_a_run_under_way_is_not_taken_but_replaced_by_one_that_ended(
    toy: Any, tmp_path: Path, trained: list[str]
) -> None:
    def stop_after(n: int) -> Any:
        calls = iter(range(10**6))
        return lambda: next(calls) >= n

    whole, parts = toy(epochs=1), toy(epochs=1, out=str(tmp_path / "parts"))
    compare(whole)
    with pytest.raises(Interrupted):
        compare(parts, should_stop=stop_after(5))
    with pytest.raises(CompareError, match="baseline seed 1: not trained to its end"):
        compare(toy(epochs=1, out=str(tmp_path / "c"), variants=("baseline",), reuse=parts.out))
    trained.clear()
    report = compare(toy(epochs=1, out=parts.out, reuse=whole.out))
    assert not trained
    assert taken(report) == {("baseline", 1), ("real", 1)}


def test_the_plan_of_a_budget_is_taken_over(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    fixed_speed(monkeypatch, 2.0, 1e-4)
    values = {"epochs": None, "batch": 4}
    first = toy(budget="30s", **values)
    planned = compare(first)
    assert planned["plan"]["max_tokens"] < 1000
    fixed_speed(monkeypatch, 1e9, 1.0)  # a second plan would fail
    trained.clear()
    for out, budget in (("b", None), ("c", "30s")):
        report = compare(toy(out=str(tmp_path / out), gamma=4.0, budget=budget, reuse=first.out, **values))
        assert {**report["plan"], **UNLIKE} == {**planned["plan"], **UNLIKE}
        assert report["plan"]["text"].startswith(f"planned for a budget of 30s in {first.out}: 1 seed, ")
        assert " s of training" not in report["plan"]["text"]
        assert (
            report["variants"]["baseline"]["runs"][0]["test_ppl"]
            == planned["variants"]["baseline"]["runs"][0]["test_ppl"]
        )
        assert {name for name, _ in taken(report)} == {"baseline"}
    assert "baseline" not in " ".join(trained)
    again = compare(toy(out=str(tmp_path / "b"), gamma=4.0, **values))  # without --budget and --reuse
    assert again["plan"] == report["plan"]
    for changes, message in (
        ({"budget": "90s"}, "it has budget=30s, now 90s"),
        ({"epochs": 7}, f"epochs={planned['plan']['epochs']} was planned there, now 7"),
        ({"decay_after": 4}, "decay_after=1 was planned there, now 4"),
        ({"batch": 5}, "batch=4 was planned there, now 5"),
    ):
        with pytest.raises(CompareError, match=message):
            compare(toy(**{"out": str(tmp_path / "d"), "reuse": first.out, **values, **changes}))
    two = compare(toy(out=str(tmp_path / "e"), seeds=2, reuse=first.out, **values))
    assert two["config"]["seeds"] == [1, 2]
    assert taken(two) == {("baseline", 1), ("real", 1)}


def test_two_plans_for_one_budget(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_speed(monkeypatch, 0.1, 1e-4)
    first = toy(budget="22s", epochs=None)
    compare(first)
    fixed_speed(monkeypatch, 0.2, 1e-4)
    second = toy(budget="22s", epochs=None, out=str(tmp_path / "b"))
    compare(second)
    with pytest.raises(CompareError, match=r"other settings \(decay_after=3, now 1; epochs=5, now 2\)"):
        compare(toy(budget="22s", epochs=None, out=second.out, seeds=9, reuse=first.out))


def test_a_comparison_of_an_earlier_version(toy: Any, tmp_path: Path) -> None:
    first = toy(epochs=1)
    compare(first)
    file = Path(first.out) / "config.json"
    config = json.loads(file.read_text("utf-8"))
    del config["label_smoothing"], config["embedding_range"], config["target_grad"]
    file.write_text(json.dumps(config))
    assert len(taken(compare(toy(epochs=1, out=str(tmp_path / "b"), reuse=first.out)))) == 2


def test_the_report_says_so() -> None:
    ours, theirs = run(100.0, 100.0), run(100.0, 101.0, seed=2)
    theirs.result["taken_from"] = "my<first>"
    other = run(90.0, 90.0, parameters=500)
    other.result["taken_from"] = "my<first>"
    report = built(2, baseline=[ours, theirs], real=other)
    said = "Taken over from the comparison in my<first>: baseline (seed 2) and +REAL. Their training"
    assert f"{said} speed was measured then." in report["verdict"]
    assert "my\\<first\\>: baseline (seed 2) and +REAL" in markdown(report)
    assert not any("aken over" in text for text in built(baseline=run(100.0, 100.0))["verdict"])


def test_taken_runs_are_whole_checkpoints(toy: Any, tmp_path: Path) -> None:
    first = toy(epochs=1)
    compare(first)
    compare(toy(epochs=1, out=str(tmp_path / "b"), reuse=first.out))
    mine, other = (Store(str(tmp_path / name)).load("real", torch.device("cpu")) for name in ("out", "b"))
    assert mine is not None
    assert other is not None
    assert mine.keys() == other.keys()
    for name, value in mine["model"].items():
        assert torch.equal(value, other["model"][name])


def test_what_was_trained_here_stays(toy: Any, tmp_path: Path) -> None:
    first, second = toy(epochs=1), toy(epochs=1, out=str(tmp_path / "b"))
    compare(first)
    compare(second)
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").glob("*.pt")}
    report = compare(replace(second, reuse=first.out))
    assert not taken(report)
    assert {file.name: file.read_bytes() for file in (tmp_path / "b").glob("*.pt")} == before


def test_the_other_comparison_is_not_needed_once_its_runs_are_here(toy: Any, tmp_path: Path) -> None:
    first = toy(epochs=1)
    compare(first)
    second = toy(epochs=1, out=str(tmp_path / "b"), reuse=first.out)
    report = compare(second)
    shutil.rmtree(first.out)
    assert numbers(compare(second)) == numbers(report)
    with pytest.raises(CompareError, match="no comparison is there"):
        compare(replace(second, seeds=2))


def test_three_comparisons_in_a_row(toy: Any, tmp_path: Path) -> None:
    first, second, third = (toy(epochs=1, out=str(tmp_path / name)) for name in ("a", "b", "c"))
    compare(first)
    compare(replace(second, reuse=first.out))
    report = compare(replace(third, reuse=second.out))
    assert {one["taken_from"] for v in report["variants"].values() for one in v["runs"]} == {first.out}
    back = compare(replace(first, variants=("baseline", "real"), fresh=True, gamma=2.0, reuse=third.out))
    assert not taken(back)  # the baseline was trained there


def test_begun_anew_while_its_runs_are_taken_over(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy(epochs=1)
    compare(first)
    begin = Store.begin

    def begin_there_too(self: Store, config: dict[str, Any]) -> None:
        begin(self, config)
        monkeypatch.setattr(Store, "begin", begin)
        compare(replace(first, lr=0.5, fresh=True))

    monkeypatch.setattr(Store, "begin", begin_there_too)
    with pytest.raises(CompareError, match="begun anew while its runs were taken over"):
        compare(toy(epochs=1, out=str(tmp_path / "b"), reuse=first.out))
    assert not list((tmp_path / "b").glob("*.pt"))


def test_runs_that_diverged_and_checkpoints_of_an_earlier_version(toy: Any, tmp_path: Path, trained: list[str]) -> None:
    first = toy(epochs=1)
    expected = compare(first)
    store = Store(first.out)
    for name, changes in (("baseline", {"diverged": True, "test_losses": None}), ("real", {})):
        state = store.load(name, torch.device("cpu"))
        assert state is not None
        state |= changes
        if name == "real":
            del state["test_losses"]
        del state["taken_from"]
        store.save(name, state)
    trained.clear()
    report = compare(toy(epochs=1, out=str(tmp_path / "b"), reuse=first.out))
    assert not trained
    assert report["variants"]["baseline"]["status"] == "diverged"
    assert report["variants"]["real"]["test_ppl"] == expected["variants"]["real"]["test_ppl"]


def test_command(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    common = (
        f"compare --data {tmp_path / 'text.txt'} --variants baseline,re,real --epochs 1 --hidden 16 --batch 4 "
        "--bptt 20 --impl reference --threads 1"
    )
    (tmp_path / "text.txt").write_text("\n".join(sentences(250)), encoding="utf-8")
    first, second = (str(tmp_path / name) for name in ("a", "b"))
    assert command.run(parser.parse_args([*common.split(), "--out", first])) == 0
    capsys.readouterr()
    args = [*common.split(), "--out", second, "--gamma", "4", "--reuse", first]
    assert command.run(parser.parse_args(args)) == 0
    shown = capsys.readouterr()
    assert f"taken over from {first}: baseline, +RE\n" in shown.err
    assert "continuing" not in shown.err
    assert f"Taken over from the comparison in {first}: baseline and +RE." in shown.out
