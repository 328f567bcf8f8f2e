"""The same network with torch.nn's own layers, trained for the same time on the same batches.

    python scripts/compare_torch.py snips-slots --seconds 300
    python scripts/compare_torch.py multi30k --seconds 1500 --set data.train=train.de

Of a recipe everything is the same but: the recurrent layers are torch.nn's (LSTM or GRU, packed
where rows have lengths), and so are the optimizer (Adam at the recipe's learning rate, which stays
what it is) and the clipping; weights are not averaged, no weights or words are dropped. The best
validation is kept, and the test data measured once with its weights. Nothing else may run
meanwhile.
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
    """Layers of torch.nn that stand for lmtrain's.

    Args:
        recurrent: the layers that they stand for.
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
        """Hidden states of the last layer and the state of all, as `Recurrent` gives them."""
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


def replaced(model: Any, cell: str) -> None:
    """Puts torch.nn's layers in the place of lmtrain's."""
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, Recurrent):
                setattr(module, name, TorchLayers(part, cell))


def main() -> None:
    """Trains and prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", help="a recipe, or a TOML file")
    parser.add_argument("--seconds", type=float, required=True, help="of training, as max_seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    device.set_threads(options.threads)
    chosen = config.load(options.recipe, PLAIN | config.assignments(options.set))
    kind = task_of(chosen)
    data = kind.read(chosen)
    model = kind.build(chosen, data)
    torch.manual_seed(chosen.train.seed)  # noqa: TID251  (torch.nn's layers draw from it)
    replaced(model, chosen.model.cell)
    task = kind(chosen, data, model, Shard())
    rule = torch.optim.Adam(model.parameters(), lr=chosen.optimizer.learning_rate)
    limit = chosen.optimizer.max_grad_norm or float("inf")
    every = chosen.train.eval_every or task.steps_per_epoch
    best, weights, step = float("inf"), model.state_dict(), 0
    began = time.monotonic()
    while time.monotonic() - began < options.seconds:
        model.train()
        loss = task.loss(task.batch(step), None)
        rule.zero_grad(set_to_none=True)
        loss.objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        rule.step()
        step += 1
        if step % every == 0 or time.monotonic() - began >= options.seconds:
            figures = task.evaluate("valid").values()
            print(f"step {step}: {figures}", file=sys.stderr, flush=True)
            if (cost := kind.metrics.cost(figures)) < best:
                best, weights = cost, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    model.eval()
    trained = kind.trained(Path(), chosen, data, model, {"step": step})
    splits = ("valid", "test")
    found = {split: trained.measure(data.splits[split], batch_size=64) for split in splits}
    entries = {split: {**each.figures, "value": each.value} for split, each in found.items()}
    parameters = sum(weight.numel() for weight in model.parameters())
    json.dump({"steps": step, "parameters": parameters, **entries}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
