"""Several processes that train one model, as torchrun and `--devices` start them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from run_folders import metrics, weights

from lmtrain import checkpoint

pytestmark = pytest.mark.slow

# Words of a small model, everything that draws or carries numbers among its settings.
SETTINGS = {
    "model.embedding_size": 8, "model.hidden_size": 8, "model.num_layers": 2,
    "train.batch_size": 8, "train.seq_len": 6, "train.random_seq_len": "true",
    "train.max_steps": 30, "train.save_every": 5, "train.eval_every": 10, "train.log_every": 5,
    "train.threads": 1, "train.precision": "fp32", "optimizer.schedule": "constant",
    "optimizer.average": "ema", "optimizer.learning_rate": 0.01, "train.state_reset": 0.2,
}  # fmt: skip
CHANCE = {"model.dropout": 0.3, "model.weight_dropout": 0.2, "model.word_dropout": 0.1}
ENDLESS = {"train.max_steps": 10**7, "train.max_epochs": 10**6, "train.eval_every": 10**7,
           "train.save_every": 10**7}  # fmt: skip
TOGETHER = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lmtrain")


def arguments(settings):
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture
def text(tmp_path):
    words = ("the cat saw a dog", "a dog saw the cat", "the dog sat", "a cat ran to the dog")
    path = tmp_path / "text"
    path.write_text("".join(f"{words[i * i % 7 % 4]}\n" for i in range(300)))
    return path


def run(*command, **options):
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def tensors(folder):
    return safetensors.torch.load(weights(folder))


def losses(folder):
    return [(line["kind"], line["step"], line["loss"]) for line in metrics(folder)]


def workers(launcher: int) -> dict[int, int]:
    """The processes that a launcher started, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == launcher:
            names = dict(each.split(b"=", 1) for each in variables if b"=" in each)
            if b"RANK" in names:
                found[int(names[b"RANK"])] = int(entry.name)
    return found


def test_the_same_batch_gives_the_same_training(text, tmp_path):
    alone = run("lmtrain", "train", text, *arguments(SETTINGS),
                "--out", tmp_path / "alone")  # fmt: skip
    together = run(*TOGETHER, "train", text, *arguments(SETTINGS),
                   "--out", tmp_path / "together")  # fmt: skip
    assert (alone.returncode, together.returncode) == (0, 0), alone.stderr + together.stderr

    assert together.stdout.count("trained") == 1
    for ours, theirs in zip(losses(tmp_path / "together"), losses(tmp_path / "alone"), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-6)
    expected = tensors(tmp_path / "alone")
    for name, weight in tensors(tmp_path / "together").items():
        assert (weight - expected[name]).abs().max() < 1e-6, name


def test_a_run_of_several_processes_is_resumed_bit_for_bit(text, tmp_path):
    settings = arguments(SETTINGS | CHANCE)
    straight = run("lmtrain", "train", text, *settings, "--devices", "2", "--out", tmp_path / "a")
    assert straight.returncode == 0, straight.stderr
    assert "Warning" not in straight.stderr

    process = subprocess.Popen(
        [sys.executable, "-m", "lmtrain", "train", text, *settings, "--devices", "2",
         "--out", tmp_path / "b"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not checkpoint.steps(tmp_path / "b"):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.001)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 5

    resumed = run("lmtrain", "train", "--resume", tmp_path / "b", "--devices", "2")

    assert "trained     30 steps" in resumed.stdout, resumed.stderr
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    last = "checkpoints/step-00000030"
    for name in ("model.safetensors", "state.safetensors"):
        ours, theirs = (tmp_path / r / last / name for r in "ba")
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture
def endless(text, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "lmtrain", "train", text, *arguments(SETTINGS | CHANCE | ENDLESS),
         "--devices", "2", "--out", tmp_path / "run"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    yield process
    process.kill()


@pytest.mark.parametrize("rank", [0, 1, None], ids=["the first", "the second", "the launcher"])
def test_a_signal_to_one_stops_all_after_the_same_step(endless, tmp_path, rank):
    target = endless.pid if rank is None else workers(endless.pid)[rank]
    os.kill(target, signal.SIGTERM)
    _, stderr = endless.communicate(timeout=30)

    assert endless.returncode == 143, stderr
    (step,) = checkpoint.steps(tmp_path / "run")
    assert stderr.count("interrupted") == 1
    assert f"interrupted at step {step:,}" in stderr


def test_a_killed_process_ends_all(endless):
    ranks = workers(endless.pid)
    os.kill(ranks[1], signal.SIGKILL)
    # The launcher kills a process that does not end within 30 seconds.
    _, stderr = endless.communicate(timeout=60)

    assert endless.returncode == 5
    assert "rank 1 was killed by SIGKILL" in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_what_the_first_cannot_write_ends_all(text, tmp_path):
    settings = arguments(SETTINGS | {"model.hidden_size": 200})
    command = [sys.executable, "-m", "lmtrain", "train", text, *settings, "--devices", "2"]
    # Files of 200 kB at most: a checkpoint is larger.
    limited = f"ulimit -f 200; exec {' '.join(map(str, command))} --out {tmp_path / 'run'}"
    done = subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "could not write" in done.stderr


def test_what_every_process_finds_wrong_is_told_once(text, tmp_path):
    done = run("lmtrain", "train", text, *arguments(SETTINGS | {"train.batch_size": 5}),
               "--devices", "2", "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "batch_size 5 cannot be divided among 2 processes" in done.stderr
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"RANK": "0"}, "WORLD_SIZE is ''"), ({"WORLD_SIZE": "2"}, "RANK is ''"),
     ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero'")],
)  # fmt: skip
def test_half_an_environment_is_refused(text, tmp_path, variables, words):
    done = run("lmtrain", "train", text, "--out", tmp_path / "run", env=os.environ | variables)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_port_in_use_is_refused(text, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(server.getsockname()[1])}  # fmt: skip
        done = run("lmtrain", "train", text, "--out", tmp_path / "run", env=os.environ | meeting)
    assert done.returncode == 2
    assert "error: rank 0 of 2 could not connect to the other processes" in done.stderr


def test_a_thread_that_still_holds_a_tensor_ends_no_process():
    code = """if True:
        import sys, torch
        import torch.distributed as dist
        import lmtrain.cli.main as command_line

        def leave_a_tensor(standalone_mode):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            # From here on this thread lets no other have Python.
            sys.setswitchinterval(100)
            dist.all_gather([torch.zeros(1)], torch.zeros(1), async_op=True)
            for _ in range(300_000):
                pass

        command_line.app = leave_a_tensor
        command_line.main()
    """
    variables = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("option", [["--cells", "my.py"], ["--cells=my.py"]])
def test_cells_named_before_the_command_are_loaded_by_every_process(text, tmp_path, option):
    (tmp_path / "my.py").write_text(
        "from lmtrain.cells import register\nfrom lmtrain.cells.lstm import LSTM\n"
        "@register('mine')\nclass Mine(LSTM):\n    pass\n"
    )
    few = arguments(SETTINGS | {"train.max_steps": 2, "model.cell": "mine"})

    outcome = run("lmtrain", *option, "train", text, "--devices", "2", *few, cwd=tmp_path)

    assert outcome.returncode == 0, outcome.stderr
    assert len([*(tmp_path / "runs").iterdir()]) == 1


def test_texts_after_two_dashes_are_texts_in_every_process(text, tmp_path):
    (tmp_path / "-novel").write_bytes(text.read_bytes())
    few = arguments(SETTINGS | {"train.max_steps": 2})

    outcome = run("lmtrain", "train", "--devices", "2", *few, "--", "-novel", cwd=tmp_path)

    assert outcome.returncode == 0, outcome.stderr
    assert len([*(tmp_path / "runs").iterdir()]) == 1
