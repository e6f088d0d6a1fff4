"""Settings that one variant has of its own: files, the run they belong to, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import CompareError, Settings, compare
from tiedkl.compare.markdown import markdown
from tiedkl.compare.per_variant import read_configs, settings_table

from .test_command import TOY, main
from .test_resume import numbers

OVERRIDES = {"baseline": {"lr": 0.5, "dropout": 0.1}, "real": {"lr": 2.0, "temperature": 9.0, "gamma": 0.7}}


def write(path: Path, settings: dict[str, Any], **more: Any) -> str:
    path.write_text(json.dumps({"settings": settings, **more}))
    return str(path)


def test_files_for_all_and_for_one(tmp_path: Path) -> None:
    both = write(tmp_path / "all.json", {"lr": 1.5, "bptt": 30, "hidden": 8})
    base = write(tmp_path / "base=.json", {"lr": 0.5, "dropout": 0.1, "hidden": 8}, tuned_for="baseline")
    real = write(tmp_path / "real.json", {"lr": 2.0, "hidden": 8}, tuned_for="real")
    plain = write(tmp_path / "plain.json", {"lr": None, "gamma": 0.7})
    found = read_configs([both, f"baseline={base}", f"+REAL={real}"], ())
    assert found == {
        "lr": 1.5, "bptt": 30, "hidden": 8, "overrides": {"baseline": {"lr": 0.5, "dropout": 0.1}, "real": {"lr": 2.0}}
    }  # fmt: skip
    assert read_configs([f"real={real}"], {"lr", "hidden"}) == {}  # options that are given come first
    alone = {"lr": 0.5, "dropout": 0.1, "hidden": 8, "tuned_for": "baseline"}
    assert read_configs([base], ()) == alone  # "=" in the name of a file
    assert read_configs([f"al={plain}"], ()) == {"overrides": {"al": {"gamma": 0.7}}}  # null is the usual value
    assert read_configs([], ()) == {}


def test_files_that_cannot_go_together(tmp_path: Path) -> None:
    base = write(tmp_path / "base.json", {"lr": 0.5, "hidden": 8, "lr_decay": 0.7})
    real = write(tmp_path / "real.json", {"lr": 2.0, "hidden": 16, "lr_decay": 0.7})
    both = [f"baseline={base}", f"real={real}"]
    with pytest.raises(CompareError, match=r"base\.json has hidden=8, .*real\.json has hidden=16: only lr, .*--hidden"):
        read_configs(both, ())
    assert read_configs(both, {"hidden"})["lr_decay"] == 0.7
    with pytest.raises(CompareError, match="variant real has a file already"):
        read_configs([f"real={real}", f"real={real}"], ())
    with pytest.raises(CompareError, match=r"ral=.*real\.json: No such file"):
        read_configs([f"ral={real}"], ())
    nested = write(tmp_path / "nested.json", {"overrides": OVERRIDES})
    with pytest.raises(CompareError, match="unknown settings overrides"):
        read_configs([nested], ())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"al": {"lr": 1.0}}, "settings for variant al, which is not one of baseline,real"),
        (
            {"real": {"hidden": 8}},
            "hidden: only lr, dropout, embedding_range, temperature, gamma, target_grad, label_smoothing may differ",
        ),
        ({"real": {"lr": -1.0}}, "variant real: lr=-1.0"),
        ({"real": {"lr": None, "gamma": 1.0}}, "variant real: lr: expected a value"),
        ({"real": {"gamma": True}}, "variant real: gamma=True: expected a number"),
        ({"real": {"target_grad": "yes"}}, "variant real: target_grad=yes: expected true or false"),
        ({"real": {"lr": "fast"}}, "variant real: a setting has the wrong type"),
        ({"real": 3}, "expected an object of settings for each variant"),
        ([], "expected an object of settings for each variant"),
    ],
)
def test_bad_overrides_are_named(toy: Any, overrides: Any, message: str) -> None:
    with pytest.raises(CompareError, match=message):
        toy(overrides=overrides)


def test_each_variant_is_trained_with_its_own(toy: Any, tmp_path: Path) -> None:
    """Bit for bit what it is alone with these settings; the report says what differs."""
    together = compare(toy(epochs=1, overrides=OVERRIDES))
    for name, own in OVERRIDES.items():
        alone = compare(toy(epochs=1, variants=(name,), out=str(tmp_path / name), **own))
        runs = numbers(together)[name]["runs"]
        assert runs == numbers(alone)[name]["runs"]
    assert together["config"]["overrides"] == OVERRIDES
    columns, rows = settings_table(together) or ((), [])
    assert columns == ("variant", "lr", "dropout", "temperature", "gamma")
    assert rows == [("baseline", "0.5", "0.1", "-", "-"), ("+REAL", "2", "0.3", "9", "0.7")]
    assert "| +REAL | 2 | 0.3 | 9 | 0.7 |" in markdown(together)
    assert "common to all variants" not in markdown(together)
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Settings that differ" in html
    assert "but for the settings that differ" in html
    assert "gamma=0.7" in together["checklist"][-1]["note"]


def test_own_settings_belong_to_the_run(toy: Any, tmp_path: Path) -> None:
    compare(toy(epochs=1, variants=("real",), overrides={"real": {"lr": 2.0}}))
    with pytest.raises(CompareError, match=r"overrides=.*now .*--fresh"):
        compare(toy(epochs=1, variants=("real",), overrides={"real": {"lr": 1.5}}))
    compare(toy(epochs=1, variants=("real",), overrides={"real": {"lr": 2.0}}))  # continues


def test_no_table_without_differences(toy: Any) -> None:
    report: dict[str, Any] = {"config": Settings().resolved(1000), "variants": {"baseline": {}, "real": {}}}
    assert settings_table(report) is None
    report["variants"] = {n: {"label": n, "augmented": n == "real"} for n in ("baseline", "real")}
    report["config"]["overrides"] = {"real": {"lr": 1.0}}  # the default
    assert settings_table(report) is None


def test_command(text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base.json", {"lr": 0.5, "hidden": 16, "dropout": 0.1}, tuned_for="baseline")
    tied = write(tmp_path / "re.json", {"lr": 1.5, "hidden": 16, "dropout": 0.2}, tuned_for="re")
    argv = ("--data", str(text_file), "--out", str(tmp_path / "o"), *TOY, "--epochs=1", "--quiet")
    configs = ("--config", f"baseline={base}", "--config", f"re={tied}")
    assert main(*argv, *configs, "--dropout=0.3") == 0
    config = json.loads((tmp_path / "o" / "report.json").read_text())["config"]
    assert config["overrides"] == {"baseline": {"lr": 0.5}, "re": {"lr": 1.5}}
    assert (config["hidden"], config["dropout"]) == (8, 0.3)
    assert main(*argv, "--config", f"real={tied}") == 2
    assert f"{tied} was searched for re, not for real" in capfd.readouterr().err
    tied = write(tmp_path / "real.json", {"lr": 1.5}, tuned_for="real")
    assert main(*argv, "--config", f"real={tied}") == 2
    assert "settings for variant real, which is not one of baseline,re" in capfd.readouterr().err


def test_a_table_says_which_settings_a_variant_does_nothing_with(toy: Any) -> None:
    own = {"real": {"gamma": 0.7, "target_grad": True}, "re-ls": {"label_smoothing": 0.3}}
    report = compare(toy(epochs=1, variants=("al", "real", "re-ls"), overrides=own))
    columns, rows = settings_table(report) or ((), [])
    assert columns == ("variant", "gamma", "target_grad", "label_smoothing")
    assert rows == [("+AL", "0.5", "no", "-"), ("+REAL", "0.7", "yes", "-"), ("+RE+LS", "-", "-", "0.3")]
