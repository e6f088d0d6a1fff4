"""The output directory: whose files are touched, who may work there, and which checkpoints a report takes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiedkl.compare import CompareError, compare
from tiedkl.compare.lock import locked
from tiedkl.compare.store import LOCK, Store

from .test_resume import killed_after, numbers


def test_fresh_removes_only_its_own_files(toy: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(toy(epochs=1, variants=("re",), seeds=2))
    foreign = [out / name for name in ("notes.txt", "weights.pt", "real-best.pt", "check-0-2.pt")]
    for file in foreign:
        file.write_text("keep")
    compare(toy(epochs=1, variants=("baseline",), fresh=True))
    assert {file.read_text() for file in foreign} == {"keep"}
    assert {file.name for file in out.glob("re*.pt")} == {"real-best.pt"}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", json.dumps({"model": "of another program"})),
        ("config.json", "[1]"),
        ("config.json", "{"),
        ("report.html", "<p>"),
        ("real.pt", "weights"),
    ],
)
def test_files_of_others_are_refused(toy: Any, tmp_path: Path, name: str, content: str, fresh: bool) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(CompareError, match=rf"{name} is not of a comparison.*another --out"):
        compare(toy(epochs=1, fresh=fresh))
    assert file.read_text() == content
    assert {f.name for f in file.parent.iterdir()} == {name, LOCK}


def test_a_comparison_of_an_earlier_version_goes_on(toy: Any, tmp_path: Path) -> None:
    """It had no settings for an embedding that starts unlike the rest, for label smoothing and for target_grad."""
    report = compare(toy(epochs=1))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("embedding_range") == config.pop("label_smoothing") == 0.1
    assert config.pop("target_grad") is False
    file.write_text(json.dumps(config))
    assert numbers(compare(toy(epochs=1))) == numbers(report)
    with pytest.raises(CompareError, match=r"embedding_range=0\.1, now 0\.3"):
        compare(toy(epochs=1, embedding_range=0.3))
    with pytest.raises(CompareError, match="target_grad=False, now True"):
        compare(toy(epochs=1, target_grad=True))


def test_a_budget_without_a_unit_was_in_seconds(tmp_path: Path) -> None:
    for budget, read in (("900", "900s"), ("1.5", "1.5s"), ("15m", "15m"), (None, None)):
        (tmp_path / "config.json").write_text(json.dumps({"corpus": "x", "budget": budget}))
        found = Store(str(tmp_path)).config()
        assert found is not None
        assert found["budget"] == read


def test_damaged_files_are_named(toy: Any, tmp_path: Path) -> None:
    compare(toy(epochs=1, variants=("re",)))
    (tmp_path / "out" / "re.pt").write_bytes(b"damaged")
    with pytest.raises(CompareError, match=r"re\.pt.*--fresh"):
        compare(toy(epochs=1, variants=("re",)))
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(CompareError, match=r"config\.json.*damaged"):
        compare(toy(epochs=1, variants=("re",)))


def test_other_settings_do_not_replace_a_report(toy: Any, tmp_path: Path) -> None:
    compare(toy(epochs=1))
    for file in (tmp_path / "out").glob("*.pt"):
        file.unlink()
    with pytest.raises(CompareError, match="hidden=16, now 8"):
        compare(toy(epochs=1, hidden=8))


def test_another_number_of_threads_says_how_to_go_on(toy: Any) -> None:
    compare(toy(epochs=1))
    with pytest.raises(CompareError, match=r"CPU threads: --threads 1 continues it; --fresh"):
        compare(toy(epochs=1, threads=2))
    with pytest.raises(CompareError, match=r"hidden=16, now 8; threads=1, now 2"):
        compare(toy(epochs=1, threads=2, hidden=8))


def test_one_command_at_a_time(toy: Any, tmp_path: Path) -> None:
    with (
        locked(tmp_path / "out", LOCK, "tiedkl compare"),
        pytest.raises(CompareError, match=rf"{tmp_path}/out: another tiedkl compare is at work there"),
    ):
        compare(toy(epochs=1))
    assert compare(toy(epochs=1))["status"] == "complete"


def test_fewer_seeds_and_variants_keep_the_fuller_report(toy: Any, tmp_path: Path) -> None:
    full = compare(toy(epochs=1, seeds=2))
    fewer = compare(toy(epochs=1, variants=("baseline",)))
    assert numbers(fewer) == numbers(full)
    assert fewer["status"] == "complete"
    assert fewer["config"]["seeds"] == [1, 2]
    assert set(fewer["inference"]) == {"baseline", "real"}
    more = compare(toy(epochs=1, variants=("re",)))  # one seed, as asked
    assert [v["seeds_done"] for v in more["variants"].values()] == [[1, 2], [1], [1, 2]]
    assert more["status"] == "complete"


def test_unfinished_runs_that_are_not_asked_for_stay_out(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(monkeypatch, toy(epochs=1, seeds=2, checkpoint_every=0.0), 50)  # an epoch is 19 steps
    assert (tmp_path / "out" / "baseline-2.pt").exists()
    one = compare(toy(epochs=1))
    assert one["status"] == "complete"
    assert one["config"]["seeds"] == [1]
