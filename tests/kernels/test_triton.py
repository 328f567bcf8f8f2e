"""The Triton scans, interpreted on the processor, against the float64 reference: every cell."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from every_cell import each_cell
from torch import Tensor

from lmtrain import device
from lmtrain.cells import Cell, create
from lmtrain.kernels import cross_entropy, operator, reference
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.scan import engine, scan
from lmtrain.kernels.triton import engine as triton
from lmtrain.kernels.triton import scan as scans
from lmtrain.kernels.variant import VARIANTS, Variant

if triton.absence():
    pytest.skip(f"no Triton kernels: {triton.absence()}", allow_module_level=True)


def variant(name: str) -> Variant:
    """By the names that compile_triton.py prints: that of a cell, or of peepholes."""
    return next(each for each in VARIANTS if name in (each.name, each.peephole))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    # conftest.py has set TRITON_INTERPRET before Triton was imported.
    monkeypatch.setenv("LMTRAIN_KERNELS", "triton")


def chance(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=device.generator(seed))


def results(
    run, cell: Cell, inputs: Tensor, state: list[Tensor], reverse: bool, lengths=None
) -> list[Tensor]:
    """Outputs, last state, and every gradient with upstream gradients into all of them."""
    inputs = inputs.clone().requires_grad_()
    state = [part.clone().requires_grad_() for part in state]
    hidden, last = run(cell, inputs, tuple(state), reverse, lengths)
    outputs = [hidden, *last]
    upstream = [chance(*out.shape, seed=20 + i).to(out.dtype) for i, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [inputs, *state, *cell.parameters()], upstream)
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


def by_triton(cell, inputs, state, reverse, lengths):
    assert kernels_for(inputs, cell.bias) == "triton"
    return operator.scan(cell, inputs, state, lengths, reverse=reverse)


def by_reference(cell, inputs, state, reverse, lengths):
    return reference.scan(cell, inputs, state, lengths, reverse=reverse)


def check(name, options, size, reverse, kind, tolerance, lengths=None) -> None:
    """Outputs and gradients of a size H, B, T."""
    hidden_size, rows, steps = size
    cell = create(name, 5, hidden_size, options)
    cell.initialize(device.generator(3), 0.5 / hidden_size**0.5, 0.5)
    inputs = chance(steps, rows, 5, seed=1).to(kind)
    state = [chance(rows, hidden_size, seed=2 + part) for part in range(len(cell.state_names))]

    found = results(by_triton, cell, inputs, state, reverse, lengths)
    expected = results(
        by_reference, cell.double(), inputs.double(), [s.double() for s in state], reverse, lengths
    )

    if kind != torch.float32 and options.get("activation") == "relu":
        # The slope of relu jumps at 0, and rounding takes some sums across: no gradients.
        found, expected = found[:2], expected[:2]
    largest = max(truth.norm() for truth in expected)
    for actual, truth in zip(found, expected, strict=True):
        # The gradients of a single unit are sums of a few numbers that may cancel each other.
        scale = largest if hidden_size == 1 else truth.norm()
        assert (actual - truth).norm() <= tolerance * scale


@each_cell
# H, B, T; 17 rows are several groups, 65 units several parts for each warp.
@pytest.mark.parametrize(
    ("size", "reverse"),
    [
        ((1, 1, 1), False),
        ((17, 2, 3), False),
        ((19, 17, 3), False),
        ((19, 17, 3), True),
        ((65, 2, 2), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["alternating", "persistent"])
def test_both_schedules_are_the_reference(name, options, size, reverse, schedule, monkeypatch):
    monkeypatch.setenv("LMTRAIN_SCHEDULE", schedule)
    check(name, options, size, reverse, torch.float32, 1e-5)


@each_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("schedule", ["alternating", "persistent"])
def test_rows_with_lengths_are_the_reference(name, options, reverse, schedule, monkeypatch):
    monkeypatch.setenv("LMTRAIN_SCHEDULE", schedule)
    lengths = 1 + torch.arange(17) % 4
    check(name, options, (9, 17, 4), reverse, torch.float32, 1e-5, lengths)


@each_cell
@pytest.mark.parametrize(
    ("schedule", "kind", "tolerance"),
    [
        # The interpreter cuts off what bf16 has no room for, where a GPU rounds: twice the error;
        # and it multiplies no bf16.
        ("alternating", torch.bfloat16, 2e-2),
        ("alternating", torch.float16, 1.5e-3),
        ("persistent", torch.float16, 1.5e-3),
    ],
    ids=str,
)
def test_halves_are_nearly_the_reference(name, options, schedule, kind, tolerance, monkeypatch):
    monkeypatch.setenv("LMTRAIN_SCHEDULE", schedule)
    check(name, options, (17, 2, 3), False, kind, tolerance)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu():
    script = Path(__file__).with_name("compile_triton.py")
    variables = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, script], env=variables, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 60
    for name, *schedule, _kind, shared, spilled in (line for line in lines if len(line) == 4):
        assert [schedule, int(shared), int(spilled)] == [[], 512, 0], name
    persistent = [line for line in lines if len(line) > 4]
    assert len(persistent) == 46
    for name, _, _, *numbers in persistent:
        units, rows, width, size, shared, spilled = map(int, numbers)
        kind = variant(name)
        assert shared <= scans._bytes(kind, rows, units, width, size), name
        # Where a program has few units and rows, its weights and states stay in registers.
        assert width > 256 or spilled <= (0 if size == 2 else 32), name


@pytest.mark.parametrize(
    ("name", "units", "rows", "kind", "layout"),
    [
        ("lstm", 650, 20, torch.bfloat16, (16, 16)),
        # Weights and states would take 256 KiB of the 227, or more programs than the chip runs.
        ("lstm", 650, 20, torch.float32, None),
        ("gru", 650, 20, torch.float32, (32, 8)),
        ("lstm", 256, 64, torch.float32, (16, 8)),
        ("lstm", 512, 64, torch.bfloat16, (16, 16)),
        ("lstm", 512, 256, torch.bfloat16, (32, 32)),
        ("lstm", 1024, 64, torch.bfloat16, (32, 16)),
        ("lstm", 2048, 16, torch.bfloat16, None),
    ],
)
def test_a_schedule_is_chosen_that_fits_an_h100(name, units, rows, kind, layout, monkeypatch):
    chip = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: chip)
    monkeypatch.setattr(triton, "shared_bytes", lambda place: 232_448)
    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    cell = variant(name)
    gates = torch.empty(5, rows, cell.gates * units, dtype=kind, device="meta")

    assert scans._layout(cell, gates, units) == layout


@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("most_bytes", [400, 1 << 25], ids=["slices", "rows"])
def test_the_loss_and_its_gradients_are_those_of_torch(kind, most_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_MOST_BYTES", most_bytes)
    monkeypatch.setattr(cross_entropy, "_SLICE_BYTES", 8000)
    hidden = chance(7, 3, 5, seed=1).to(kind).requires_grad_()
    weight, bias = (chance(*shape, seed=2).requires_grad_() for shape in ((1500, 5), (1500,)))
    targets = torch.arange(21).view(7, 3) * 71
    targets[2, 1] = -1
    weight.data[:, 0] += 5  # the logits of a row are all far from 0

    loss = cross_entropy.cross_entropy(hidden, weight, bias, targets, 0.25)
    found = [loss, *torch.autograd.grad(loss, [hidden, weight, bias])]
    logits = hidden.double() @ weight.to(kind).double().T + bias.double()
    truth = 0.25 * torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    expected = [truth, *torch.autograd.grad(truth, [hidden, weight, bias])]

    limit = 1e-5 if kind == torch.float32 else 4e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs.double()).norm() <= limit * theirs.double().norm()


def test_the_door_chooses_triton(monkeypatch):
    cell = create("lstm", 3, 7, {})
    cell.initialize(device.generator(3), 0.2, 0.5)
    inputs = torch.ones(4, 2, 3)
    assert engine(cell) == "triton"
    ours, _ = scan(cell, inputs)
    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")
    assert engine(cell) == "plain"
    theirs, _ = scan(cell, inputs)
    assert (ours - theirs).abs().max() < 1e-6
