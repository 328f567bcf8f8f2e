"""Training steps as CUDA graphs, which a recorder of torch operators simulates on the CPU."""

import pytest
import torch
from run_folders import load_settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmtrain import checkpoint, device
from lmtrain.kernels import dropout
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import State
from lmtrain.tasks.base import Batch
from lmtrain.training.cuda_graphs import GraphedStep
from lmtrain.training.run import run_training

COMMON = {
    "data.level": "char", "model.hidden_size": 12, "model.num_layers": 2, "model.dropout": 0.2,
    "train.batch_size": 4, "train.seq_len": 8, "train.max_steps": 24, "train.eval_every": 8,
    "train.threads": 1, "train.state_reset": 0.2,
}  # fmt: skip


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class SimulatedGraph(TorchDispatchMode):
    """Records operators and replays them with the same tensors and scalars."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.changed = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.is_mutable:
            self.changed += [(tensor, tensor.clone()) for tensor in tensors_of(args)]
        results = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def undo(self):
        for tensor, before in reversed(self.changed):
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, results in self.calls:
            again = tensors_of(operator(*args, **kwargs))
            for static, result in zip(tensors_of(results), again, strict=True):
                if static.data_ptr() != result.data_ptr():
                    static.copy_(result)


@pytest.fixture
def graphs(monkeypatch):
    """Simulates a GPU with CUDA graphs; the captured graphs."""
    captured = []

    def capture_graph(function, generator, pool_of=None):
        # On a GPU, a capture does not run the work.
        state = generator.get_state()
        captured.append(SimulatedGraph())
        with captured[-1]:
            results = function()
        captured[-1].undo()
        generator.set_state(state)
        return captured[-1], results

    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")
    monkeypatch.setattr(dropout, "_is_seeded", lambda inputs: False)
    monkeypatch.setattr(device, "is_asynchronous", lambda device: True)
    monkeypatch.setattr(device, "supports_graphs", lambda device: True)
    monkeypatch.setattr(device, "capture_graph", capture_graph)
    return captured


def settings(text, **changes):
    return load_settings({**COMMON, "data.train": [str(text)]}, **changes)


def saved_tensors(run):
    """The tensors of the last checkpoint."""
    saved = checkpoint.read(checkpoint.folder(run, 24))
    return [saved.tensors(f"{name}.safetensors") for name in ("model", "state")]


def assert_same_tensors(actual, expected):
    for actual_file, expected_file in zip(actual, expected, strict=True):
        assert actual_file.keys() == expected_file.keys()
        for name, tensor in actual_file.items():
            assert torch.equal(tensor, expected_file[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "sgd", "optimizer__learning_rate": 0.5},
        {"optimizer__name": "adamw", "optimizer__average": "ema"},
        {"train__random_seq_len": True, "model__locked_dropout": True},
        {"model__word_dropout": 0.2, "model__weight_dropout": 0.2},
        {"model__softmax": "sampled", "model__samples": 5, "optimizer__max_grad_norm": 0.5},
        {"model__activation_regularization": 1.0, "optimizer__max_embedding_grad_norm": 0.1},
        {"model__cell": "gru", "model__tied_embeddings": True, "optimizer__clip": "l1"},
    ],
)
def test_graphed_steps_train_the_same_model(text, tmp_path, monkeypatch, graphs, changes):
    chosen = settings(text, **changes)
    run_training(chosen, tmp_path / "graphed", is_quiet=True)
    monkeypatch.setattr(device, "supports_graphs", lambda device: False)

    run_training(chosen, tmp_path / "eager", is_quiet=True)

    assert graphs
    assert_same_tensors(saved_tensors(tmp_path / "graphed"), saved_tensors(tmp_path / "eager"))


@pytest.mark.usefixtures("graphs")
def test_the_second_batch_of_each_shape_is_captured():
    calls = []

    def run_step(batch, state):
        calls.append(len(batch.tensors[0]))
        return state.map(lambda part: part + 1), sum(batch.tensors).sum()

    step, generator = GraphedStep(run_step, ModelGenerator(1), print), device.generator(1)
    state = State([(torch.zeros(2, 4),)])
    for count, steps in enumerate((3, 5, 3, 3, 5, 5, 3), start=1):
        inputs, targets = torch.randint(9, (2, steps, 2), generator=generator)
        state, total = step(Batch((inputs, targets), rows=2), state)

        assert total == (inputs + targets).sum()
        assert torch.equal(state[0][0], torch.full((2, 4), float(count)))
    assert calls == [3, 5, 3, 5]


def test_a_graphed_run_is_resumed_bit_for_bit(text, tmp_path, graphs):
    chosen = settings(text, optimizer__schedule="constant")
    run_training(chosen, tmp_path / "whole", is_quiet=True)
    halfway = settings(text, optimizer__schedule="constant", train__max_steps=13)
    run_training(halfway, tmp_path / "stopped", is_quiet=True)

    changed = {"train.max_steps": 24}
    run_training(out=tmp_path / "stopped", resume=True, overrides=changed, is_quiet=True)

    assert len(graphs) >= 3
    assert_same_tensors(saved_tensors(tmp_path / "stopped"), saved_tensors(tmp_path / "whole"))


def test_the_adaptive_softmax_is_not_captured(tmp_path, graphs):
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{number * number % 211}" for number in range(2000)))
    chosen = settings(text, data__level="word", model__softmax="adaptive", model__hidden_size=16)

    run_training(chosen, tmp_path / "run", is_quiet=True)

    assert not graphs


def test_a_step_that_cannot_be_captured_runs_eagerly(text, tmp_path, monkeypatch, graphs, capsys):
    def fail(function, generator, pool_of=None):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    run_training(settings(text), tmp_path / "graphed", is_quiet=True)
    monkeypatch.setattr(device, "capture_graph", fail)

    run_training(settings(text), tmp_path / "failed")

    stderr = capsys.readouterr().err
    assert stderr.count("training steps run without CUDA graphs: operation not permitted") == 1
    assert_same_tensors(saved_tensors(tmp_path / "failed"), saved_tensors(tmp_path / "graphed"))
