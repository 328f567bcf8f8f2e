"""Checks all cells, the loss and trainings on a GPU, at realistic sizes.

    python scripts/check_cuda.py

Cells and loss are compared with a float64 reference. Inputs are random and uninitialized memory is
filled with NaN. An error is the norm of the difference divided by the norm of the reference, the
largest over hidden states, last state and all gradients. Trainings run in deterministic mode: with
CUDA graphs, resumed, and without CUDA graphs they must end with the same weights bit for bit; the
captured graphs are counted. Exits with 1 if an error exceeds its limit: 1e-5 in fp32, 1e-2 in bf16.
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain import checkpoint, config, device
from lmtrain.cells import Cell, create
from lmtrain.kernels import operator, reference
from lmtrain.kernels.cross_entropy import cross_entropy, sampled_cross_entropy
from lmtrain.kernels.engines import kernels_for
from lmtrain.training.run import run_training

CELLS = [
    ("rnn", {"activation": "tanh"}), ("rnn", {"activation": "relu"}), ("simple-gru", {}),
    ("gru", {}), ("lstm", {}), ("lstm", {"cell_output": "linear"}),
    ("peephole-lstm", {"peephole": "diagonal"}), ("peephole-lstm", {"peephole": "full"}),
]  # fmt: skip
# H, B, T
SIZES = [
    (256, 64, 64), (512, 16, 128), (650, 20, 35), (1000, 33, 40), (1024, 64, 64), (1150, 40, 70),
    (2048, 128, 16),
]  # fmt: skip
# Beside those of every cell: several graphs in one memory, other updates, other softmaxes.
TRAININGS = [
    {"train.random_seq_len": True},
    {"optimizer.name": "adamw", "optimizer.learning_rate": 0.002},
    {"model.softmax": "full"},
    {"model.softmax": "adaptive", "model.tied_embeddings": False},
]  # fmt: skip
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SCHEDULES = ("persistent", "alternating")


def chance(*shape: int, seed: int) -> Tensor:
    """Random numbers, the same on every machine."""
    return torch.randn(shape, generator=device.generator(seed)).cuda()


def results(run, cell: Cell, inputs: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Outputs, last state, and every gradient with upstream gradients into all of them."""
    inputs = inputs.clone().requires_grad_()
    state = [part.clone().requires_grad_() for part in state]
    hidden, last = run(cell, inputs, tuple(state))
    outputs = [hidden, *last]
    upstream = [chance(*out.shape, seed=20 + i).to(out.dtype) for i, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [inputs, *state, *cell.parameters()], upstream)
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


def by_kernel(cell, inputs, state):
    """The scan that is checked."""
    if kernels_for(inputs, cell.bias) is None:
        raise SystemExit("no kernel runs here")
    return operator.scan(cell, inputs, state, None, reverse=False)


def by_reference(cell, inputs, state):
    """The truth."""
    return reference.scan(cell, inputs, state, None, reverse=False)


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error."""
    errors = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    # Python's own would lose NaN.
    return float(torch.stack(errors).max())


def scans() -> Iterator[tuple[str, float, float]]:
    """What was run, its error and its limit."""
    for (name, options), (units, rows, steps) in itertools.product(CELLS, SIZES):
        cell = create(name, 64, units, options)
        cell.initialize(device.generator(3), 0.5 / units**0.5, 0.5)
        cell.cuda()
        inputs = chance(steps, rows, 64, seed=1).bfloat16()
        state = [chance(rows, units, seed=2 + part) for part in range(len(cell.state_names))]
        truth = results(
            by_reference, cell.double(), inputs.double(), [part.double() for part in state]
        )
        cell.float()
        for schedule, (kind, limit) in itertools.product(SCHEDULES, LIMITS.items()):
            # The persistent schedule is chosen by size, where it fits.
            if schedule == "alternating":
                os.environ["LMTRAIN_SCHEDULE"] = schedule
            else:
                os.environ.pop("LMTRAIN_SCHEDULE", None)
            found = results(by_kernel, cell, inputs.to(kind), state)
            again = results(by_kernel, cell, inputs.to(kind), state)
            if not all(map(torch.equal, found, again)):
                yield f"{name} {options} {units} {rows} {steps} {kind}: twice the same", 1.0, 0.0
            if kind == torch.bfloat16 and options.get("activation") == "relu":
                # The slope of relu jumps at 0, and rounding takes some sums across.
                found = found[:2]
            chosen = schedule if schedule == "alternating" else "by size"
            label = f"{name} {options} H {units} B {rows} T {steps} {kind} {chosen}"
            yield label, worst(found, truth[: len(found)]), limit


def losses() -> Iterator[tuple[str, float, float]]:
    """The same of the loss."""
    for vocab, (kind, limit) in itertools.product((65, 10_000, 250_000), LIMITS.items()):
        hidden = chance(35, 20, 256, seed=1).to(kind).requires_grad_()
        weight, bias = (
            (chance(*shape, seed=2) * 0.05).requires_grad_() for shape in ((vocab, 256), (vocab,))
        )
        targets = torch.randint(vocab, (35, 20), generator=device.generator(5)).cuda()
        loss = cross_entropy(hidden, weight, bias, targets, 1 / 20)
        found = [loss, *torch.autograd.grad(loss, [hidden, weight, bias])]
        logits = hidden.double() @ weight.to(kind).double().T + bias.double()
        truth = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ) / 20  # fmt: skip
        expected = [truth, *torch.autograd.grad(truth, [hidden, weight, bias])]
        pairs = [tensor.detach().double() for tensor in (*found, *expected)]
        yield f"cross-entropy V {vocab} {kind}", worst(pairs[:4], pairs[4:]), limit


def sampled_losses() -> Iterator[tuple[str, float, float]]:
    """The same of the loss of the sampled softmax."""
    shapes = [(700, 256), (1_000, 256), (1_000,), (700, 256), (700,)]
    is_target = torch.rand(700, 1_000, generator=device.generator(6)).cuda() < 0.01
    for kind, limit in LIMITS.items():
        operands = [
            (chance(*shape, seed=seed) * 0.2).to(kind if len(shape) == 2 else torch.float32)
            for seed, shape in enumerate(shapes)
        ]
        operands = [operand.requires_grad_() for operand in operands]
        loss = sampled_cross_entropy(*operands, is_target, 1 / 20)
        found = [loss, *torch.autograd.grad(loss, operands)]
        hidden, weight, bias, target_weight, target_bias = (each.double() for each in operands)
        score = (hidden * target_weight).sum(1) + target_bias
        others = (hidden @ weight.T + bias).masked_fill(is_target, -torch.inf).logsumexp(1)
        truth = (torch.logaddexp(score, others) - score).sum() / 20
        expected = [truth, *torch.autograd.grad(truth, operands)]
        pairs = [tensor.detach().double() for tensor in (*found, *expected)]
        yield f"sampled cross-entropy {kind}", worst(pairs[:6], pairs[6:]), limit


def trainings() -> Iterator[tuple[str, float, float]]:
    """Compares trainings of every cell and others: uninterrupted, resumed, without CUDA graphs."""
    os.environ.pop("LMTRAIN_SCHEDULE", None)
    capture_graph, graphs = device.capture_graph, []

    def count_captures(*arguments: Any, **options: Any) -> Any:
        graphs.append(capture_graph(*arguments, **options))
        return graphs[-1]

    device.capture_graph = count_captures
    cells = [
        {"model.cell": name} | {f"model.{key}": value for key, value in options.items()}
        for name, options in CELLS
    ]
    for special in (*cells, *TRAININGS):
        changes = {
            "model.hidden_size": 256, "model.num_layers": 2,
            "model.dropout": 0.3, "model.weight_dropout": 0.2, "optimizer.average": "ema",
            "optimizer.schedule": "constant",
            "train.device": "cuda", "train.deterministic": True, "train.eval_every": 20,
            "train.random_seq_len": False,
            # The first steps compile kernels, so that max_seconds would shorten the training.
            "train.max_seconds": "none",
        } | special  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            weights, counts = [], []
            for stops, use_graphs in (((40,), True), ((20, 40), True), ((40,), False)):
                run = Path(folder) / f"{stops} {use_graphs}"
                graphs.clear()
                device.supports_graphs = lambda device, answer=use_graphs: answer
                for stop in stops:
                    chosen = {"train.max_steps": stop}
                    if stop == stops[0]:
                        settings = config.load("python-docs", changes | chosen)
                        run_training(settings, run, is_quiet=True)
                    else:
                        run_training(out=run, resume=True, overrides=chosen, is_quiet=True)
                counts.append(len(graphs))
                weights.append((checkpoint.folder(run, 40) / "model.safetensors").read_bytes())
        yield f"{special} resumed", float(weights[0] != weights[1]), 0.0
        yield f"{special} eager", float(weights[0] != weights[2]), 0.0
        # The adaptive softmax reads values from the GPU, which a capture does not allow.
        has_graphs = special.get("model.softmax") != "adaptive"
        yield f"{special} graphs {counts}", float(any(counts[:2]) != has_graphs or counts[2]), 0.0


def main() -> int:
    """Prints a line for each check and returns the number of failures."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device on this machine")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    failed = 0
    for label, error, limit in itertools.chain(scans(), losses(), sampled_losses(), trainings()):
        is_bad = not error <= limit
        failed += is_bad
        print(f"{'FAILED' if is_bad else 'ok':6}  {error:.2e}  {label}", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main() > 0)
