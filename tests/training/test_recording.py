"""Steps that are recorded and repeated, as CUDA does it, by a recorder of torch's operators."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corpora import TINY
from lmtrain import checkpoint, config, device
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import State
from lmtrain.tasks.base import Batch
from lmtrain.training.recording import Recorder
from lmtrain.training.run import run_training

COMMON = {
    "data.level": "char", "model.hidden_size": 12, "model.num_layers": 2, "model.dropout": 0.2,
    "train.batch_size": 4, "train.seq_len": 8, "train.max_steps": 24, "train.eval_every": 8,
    "train.threads": 1, "train.state_reset": 0.2,
}  # fmt: skip


def tensors_of(tree):
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Repeats operators with the very tensors and numbers they had when they were recorded."""

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
            for place, result in zip(tensors_of(results), again, strict=True):
                if place.data_ptr() != result.data_ptr():
                    place.copy_(result)


@pytest.fixture
def recordings(monkeypatch):
    """A GPU that repeats recorded work, and what was recorded."""
    tapes = []

    def record(work, generator, beside=None):
        # On a GPU, what is recorded is not done.
        state = generator.get_state()
        tapes.append(Tape())
        with tapes[-1]:
            results = work()
        tapes[-1].undo()
        generator.set_state(state)
        return tapes[-1], results

    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")
    monkeypatch.setattr(device, "runs_ahead", lambda place: True)
    monkeypatch.setattr(device, "can_record", lambda place: True)
    monkeypatch.setattr(device, "record", record)
    return tapes


def settings(tmp_path, **changes):
    path = tmp_path / "text.txt"
    path.write_text(TINY)
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return config.load(overrides={**COMMON, "data.train": [str(path)], **changed})


def trained(run):
    """The weights at the end, and what the update rule and chance would go on from."""
    saved = checkpoint.read(checkpoint.folder(run, 24))
    return [saved.tensors(f"{name}.safetensors") for name in ("model", "state")]


def assert_same_tensors(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "sgd", "optimizer__learning_rate": 0.5},
        {"optimizer__name": "adamw", "optimizer__average": "ema"},
        {"train__random_seq_len": True, "model__locked_dropout": True},
        {"model__word_dropout": 0.2, "model__weight_dropout": 0.2},
        {"model__softmax": "sampled", "model__samples": 5, "optimizer__max_grad_norm": 0.5},
        {"model__activation_regularization": 1.0},
        {"model__cell": "gru", "model__tied_embeddings": True, "optimizer__clip": "l1"},
    ],
)
def test_recorded_steps_train_the_same_model(tmp_path, monkeypatch, recordings, changes):
    chosen = settings(tmp_path, **changes)
    run_training(chosen, tmp_path / "recorded", is_quiet=True)
    monkeypatch.setattr(device, "can_record", lambda place: False)

    run_training(chosen, tmp_path / "computed", is_quiet=True)

    assert recordings
    assert_same_tensors(trained(tmp_path / "recorded"), trained(tmp_path / "computed"))


@pytest.mark.usefixtures("recordings")
def test_the_second_window_of_each_length_is_recorded():
    worked = []

    def work(batch, before):
        worked.append(len(batch.tensors[0]))
        return before.map(lambda part: part + 1), sum(batch.tensors).sum()

    recorder, generator = Recorder(work, ModelGenerator(1), print), device.generator(1)
    state = State([(torch.zeros(2, 4),)])
    for count, steps in enumerate((3, 5, 3, 3, 5, 5, 3), start=1):
        inputs, targets = torch.randint(9, (2, steps, 2), generator=generator)
        state, found = recorder(Batch((inputs, targets), rows=2), state)

        assert found == (inputs + targets).sum()
        assert torch.equal(state[0][0], torch.full((2, 4), float(count)))
    assert worked == [3, 5, 3, 5]


def test_a_recorded_run_is_resumed_bit_for_bit(tmp_path, recordings):
    chosen = settings(tmp_path, optimizer__schedule="constant")
    run_training(chosen, tmp_path / "straight", is_quiet=True)
    halfway = settings(tmp_path, optimizer__schedule="constant", train__max_steps=13)
    run_training(halfway, tmp_path / "stopped", is_quiet=True)

    changed = {"train.max_steps": 24}
    run_training(out=tmp_path / "stopped", resume=True, overrides=changed, is_quiet=True)

    assert len(recordings) >= 3
    assert_same_tensors(trained(tmp_path / "stopped"), trained(tmp_path / "straight"))


def test_what_cannot_be_recorded_is_computed_as_ever(tmp_path, monkeypatch, recordings, capsys):
    def refuse(work, chance, beside=None):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    run_training(settings(tmp_path), tmp_path / "recorded", is_quiet=True)
    monkeypatch.setattr(device, "record", refuse)

    run_training(settings(tmp_path), tmp_path / "refused")

    told = capsys.readouterr().err
    assert told.count("no CUDA graph of this model's steps: operation not permitted") == 1
    assert_same_tensors(trained(tmp_path / "refused"), trained(tmp_path / "recorded"))
