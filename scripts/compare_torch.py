"""Trains the network of a recipe with torch.nn's recurrent layers, on the same batches.

    python scripts/compare_torch.py snips-slots --seconds 300
    python scripts/compare_torch.py multi30k --seconds 1500 --set data.train=train.de

Differences from the recipe: recurrent layers of torch.nn (packed where rows have lengths), Adam at
a constant learning rate, gradient clipping of torch, no weight averaging, no weight dropout, no
word dropout. The test data are evaluated once, with the weights of the best validation. Run it on
an idle machine.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from lmtrain import config, device
from lmtrain.model.recurrent import Recurrent, State
from lmtrain.tasks.base import Shard
from lmtrain.tasks.registry import task_of

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
PLAIN = {
    "train.precision": "fp32", "model.weight_dropout": 0.0,
    "model.word_dropout": 0.0, "model.locked_dropout": False,
}  # fmt: skip


class TorchLayers(nn.Module):
    """Layers of torch.nn with the interface of `Recurrent`.

    Args:
        recurrent: the layers to replace.
        cell: lstm, gru or rnn.
    """

    def __init__(self, recurrent: Recurrent, cell: str) -> None:
        super().__init__()
        first = recurrent.cells[0]
        self.directions = recurrent.directions
        self.output_size = recurrent.output_size
        self.cells = nn.ModuleList()
        self.layers = LAYERS[cell](
            first.input_size,
            first.hidden_size,
            len(recurrent.cells) // recurrent.directions,
            dropout=recurrent.dropout.p if len(recurrent.cells) > recurrent.directions else 0.0,
            bidirectional=recurrent.directions == 2,
        )

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states of the last layer and the final state of all layers; see `Recurrent`."""
        parts = None
        if state is not None:
            parts = tuple(torch.stack(part) for part in zip(*state, strict=True))
            parts = parts if isinstance(self.layers, nn.LSTM) else parts[0]
        if lengths is None:
            hidden, last = self.layers(inputs, parts)
        else:
            packed = rnn.pack_padded_sequence(inputs, lengths, enforce_sorted=False)
            packed, last = self.layers(packed, parts)
            hidden, _ = rnn.pad_packed_sequence(packed, total_length=len(inputs))
        last = last if isinstance(last, tuple) else (last,)
        return hidden, State(list(zip(*(part.unbind(0) for part in last), strict=True)))


def replace_layers(model: Any, cell: str) -> None:
    """Replaces every `Recurrent` of a model by layers of torch.nn."""
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, Recurrent):
                setattr(module, name, TorchLayers(part, cell))


def main() -> None:
    """Trains and prints the metrics as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", help="name of a recipe, or a TOML file")
    parser.add_argument("--seconds", type=float, required=True, help="training time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    device.set_threads(options.threads)
    resolved = config.load(options.recipe, PLAIN | config.assignments(options.set))
    task_class = task_of(resolved)
    data = task_class.read(resolved)
    model = task_class.build(resolved, data)
    torch.manual_seed(resolved.train.seed)  # noqa: TID251  (torch.nn's layers draw from it)
    replace_layers(model, resolved.model.cell)
    task = task_class(resolved, data, model, Shard())
    optimizer = torch.optim.Adam(model.parameters(), lr=resolved.optimizer.learning_rate)
    max_grad_norm = resolved.optimizer.max_grad_norm or float("inf")
    eval_every = resolved.train.eval_every or task.steps_per_epoch
    best, weights, step = float("inf"), model.state_dict(), 0
    start = time.monotonic()
    while time.monotonic() - start < options.seconds:
        model.train()
        loss = task.loss(task.batch(step), None)
        optimizer.zero_grad(set_to_none=True)
        loss.objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        step += 1
        if step % eval_every == 0 or time.monotonic() - start >= options.seconds:
            metrics = task.evaluate("valid").values()
            print(f"step {step}: {metrics}", file=sys.stderr, flush=True)
            if (cost := task_class.metrics.cost(metrics)) < best:
                best, weights = cost, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    model.eval()
    trained = task_class.trained(Path(), resolved, data, model, {"step": step})
    splits = ("valid", "test")
    results = {split: trained.measure(data.splits[split], batch_size=64) for split in splits}
    metrics_by_split = {
        split: {**each.figures, "value": each.value} for split, each in results.items()
    }
    parameters = sum(weight.numel() for weight in model.parameters())
    json.dump({"steps": step, "parameters": parameters, **metrics_by_split}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
