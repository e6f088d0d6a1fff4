"""tiedkl.distributed: the checks of ranks.py in groups of 2 and 4 processes, a rank that dies, and the example."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tiedkl
from tiedkl.distributed import VocabParallelTiedLoss, traffic

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch.distributed without gloo", allow_module_level=True)

RANKS = Path(__file__).with_name("ranks.py")
EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
CHECKS = re.findall(r"^def (check_\w+)", RANKS.read_text(), re.MULTILINE)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SECONDS = 150  # a hang is a failure


def launch(world: int, folder: Path, *arguments: str, script: Path = RANKS, seconds: float = SECONDS) -> list[str]:
    """What each rank of `script` prints. Ends all of them after `seconds`."""
    outputs = [folder / f"rank{rank}.txt" for rank in range(world)]
    files = [path.open("w") for path in outputs]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error:::tiedkl", str(script), str(rank), str(world), str(folder), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
        for rank, file in enumerate(files)
    ]
    try:
        for process in processes:
            process.wait(seconds)
    finally:
        for process, file in zip(processes, files, strict=True):
            process.kill()
            process.wait()
            file.close()
    return [path.read_text() for path in outputs]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """check -> how it ended, of every rank."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    printed = launch(request.param, folder)
    files = [folder / f"rank{rank}.json" for rank in range(request.param)]
    assert all(file.exists() for file in files), "\n".join(printed)
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("check", CHECKS)
def test_every_rank(results: list[dict[str, str]], check: str) -> None:
    for rank, ended in enumerate(results):
        assert check in ended, f"rank {rank} did not get there"
        assert not ended[check], f"rank {rank}: {ended[check]}"


DYING = """
import datetime, sys, torch, torch.distributed as dist
from tiedkl.distributed import VocabParallelTiedLoss
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.FileStore(folder + "/store", world)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=10))
h, w, y = torch.ones(3, 4), torch.ones(5, 4), torch.arange(3)
VocabParallelTiedLoss()(h, w, y)
if rank == 1:
    sys.exit(0)
try:
    VocabParallelTiedLoss()(h, w, y)
except RuntimeError as error:
    print("an error, no hang:", type(error).__name__)
"""


def test_a_rank_that_is_gone_is_an_error_on_the_others(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    assert "an error, no hang" in launch(2, tmp_path, script=script, seconds=60)[0]


def test_without_a_process_group() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        VocabParallelTiedLoss()(x, x, torch.arange(2))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"impl": "cpp"}, RuntimeError, "impl='cpp' cannot run on a sharded vocabulary"),
        ({"check": 1}, TypeError, "check must be a bool, got int"),
        ({"sequence_parallel": True, "reduce_input_grad": False}, ValueError, "reduce_input_grad=False"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 is outside"),
    ],
)
def test_options(options: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        VocabParallelTiedLoss(**options)


def test_an_environment_variable_chooses_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIEDKL_IMPL", "cpp")
    assert VocabParallelTiedLoss().settings.impl == "torch"


def test_traffic_does_not_grow_with_the_vocabulary_nor_much_with_ranks() -> None:
    def sent(ranks: int) -> int:
        return sum(c.sent for c in traffic(8192, 4096, 1900, ranks, dtype=torch.bfloat16))

    assert sent(1) == 0
    assert sent(2) < sent(8) < sent(64) < 2 * sent(2) + 1
    assert {c.op for c in traffic(8, 4, 2, 2)} == {"all_gather", "all_reduce"}


def test_the_library_does_not_import_it() -> None:
    code = "import tiedkl, sys; sys.exit('tiedkl.distributed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=60)
    assert tiedkl.__version__


def test_the_example_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(EXAMPLE), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(x) for x in re.findall(r"loss (\S+)  CE \S+  KL \S+", done.stdout)]
    assert len(losses) >= 2, done.stdout
    assert losses[-1] < losses[0]
