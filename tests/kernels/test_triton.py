"""The Triton scan, interpreted on the CPU, against the float64 reference: every cell."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from every_cell import each_cell
from scans import by_reference, make, randn, results

from lmtrain import device
from lmtrain.cells import create
from lmtrain.kernels import cross_entropy, operator
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.scan import engine, scan
from lmtrain.kernels.triton import cross_entropy as kernels
from lmtrain.kernels.triton import engine as triton
from lmtrain.kernels.triton import scan as scans
from lmtrain.kernels.variant import VARIANTS, Variant

if triton.unavailable_reason():
    reason = f"no Triton kernels: {triton.unavailable_reason()}"
    pytest.skip(reason, allow_module_level=True)


def variant(name: str) -> Variant:
    """The variant of a cell, or of a peephole form, as compile_triton.py prints them."""
    return next(each for each in VARIANTS if name in (each.name, each.peephole))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    # conftest.py has set TRITON_INTERPRET before Triton was imported.
    monkeypatch.setenv("LMTRAIN_KERNELS", "triton")


def by_triton(cell, inputs, state, reverse, lengths):
    assert kernels_for(inputs, cell.bias) == "triton"
    return operator.scan(cell, inputs, state, lengths, reverse=reverse)


def check(name, options, size, reverse, dtype, tolerance, lengths=None) -> None:
    """Compares the results of a dtype with the reference, for a size H, B, T."""
    hidden_size, rows, steps = size
    cell = make(name, options, 5, hidden_size)
    inputs = randn(steps, rows, 5, seed=1).to(dtype)
    state = [randn(rows, hidden_size, seed=2 + part) for part in range(len(cell.state_names))]

    actual = results(by_triton, cell, inputs, state, reverse, lengths)
    expected = results(
        by_reference, cell.double(), inputs.double(), [s.double() for s in state], reverse, lengths
    )

    if dtype != torch.float32 and options.get("activation") == "relu":
        # Rounding moves some pre-activations across 0, where the slope of ReLU jumps.
        actual, expected = actual[:2], expected[:2]
    largest = max(tensor.norm() for tensor in expected)
    for index, (tensor, reference_tensor) in enumerate(zip(actual, expected, strict=True)):
        # The gradients of a single unit are sums of few terms, which may cancel.
        scale = largest if hidden_size == 1 else reference_tensor.norm()
        assert (tensor - reference_tensor).norm() <= tolerance * scale, f"result {index}"


@each_cell
# H, B, T; 17 rows need two groups of programs, 65 units several parts of K.
@pytest.mark.parametrize(
    ("size", "reverse"),
    [
        pytest.param((1, 1, 1), False, marks=pytest.mark.slow),
        ((5, 2, 3), False),
        pytest.param((17, 2, 3), False, marks=pytest.mark.slow),
        pytest.param((19, 17, 3), False, marks=pytest.mark.slow),
        pytest.param((19, 17, 3), True, marks=pytest.mark.slow),
        pytest.param((65, 2, 2), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["alternating", "persistent"])
def test_both_schedules_equal_the_reference(name, options, size, reverse, schedule, monkeypatch):
    monkeypatch.setenv("LMTRAIN_SCHEDULE", schedule)
    check(name, options, size, reverse, torch.float32, 1e-5)


@pytest.mark.slow
@each_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("schedule", ["alternating", "persistent"])
def test_rows_with_lengths_equal_the_reference(name, options, reverse, schedule, monkeypatch):
    monkeypatch.setenv("LMTRAIN_SCHEDULE", schedule)
    lengths = 1 + torch.arange(17) % 4
    check(name, options, (9, 17, 4), reverse, torch.float32, 1e-5, lengths)


@pytest.mark.slow
@each_cell
@pytest.mark.parametrize(
    ("schedule", "dtype", "tolerance"),
    [
        # The interpreter truncates to bf16, where a GPU rounds: twice the error. It has no bf16
        # products.
        ("alternating", torch.bfloat16, 2e-2),
        ("alternating", torch.float16, 1.5e-3),
        ("persistent", torch.float16, 1.5e-3),
    ],
    ids=str,
)
def test_half_precision_is_near_the_reference(
    name, options, schedule, dtype, tolerance, monkeypatch
):
    monkeypatch.setenv("LMTRAIN_SCHEDULE", schedule)
    check(name, options, (17, 2, 3), False, dtype, tolerance)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu():
    script = Path(__file__).with_name("compile_triton.py")
    variables = {**os.environ, "TRITON_INTERPRET": "0"}
    process = subprocess.run(
        [sys.executable, script], env=variables, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines()]
    assert len(lines) == 60
    for name, *schedule, _kind, shared, spilled in (line for line in lines if len(line) == 4):
        assert [schedule, int(shared), int(spilled)] == [[], 512, 0], name
    persistent = [line for line in lines if len(line) > 4]
    assert len(persistent) == 46
    for name, _, _, *sizes in persistent:
        units, rows, width, size, shared, spilled = map(int, sizes)
        limit = scans._shared_memory_bytes(variant(name), rows, units, width, size)
        assert shared <= limit, name
        # Small programs fit in registers.
        assert width > 256 or spilled <= (0 if size == 2 else 32), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it forks after torch has been imported")
def test_persistent_programs_that_run_at_the_same_time_equal_the_reference():
    script = Path(__file__).with_name("persistent_triton.py")
    variables = {**os.environ, "LMTRAIN_KERNELS": "triton", "PYTHONPATH": str(script.parents[1])}
    process = subprocess.run(
        [sys.executable, script], env=variables, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 6
    assert [line for line in lines if not float(line.split()[0]) <= 1e-5] == []


@pytest.mark.parametrize(
    ("name", "units", "rows", "dtype", "program_shape"),
    [
        ("lstm", 650, 20, torch.bfloat16, (16, 16)),
        # Needs 256 KiB of shared memory, of 227, or more programs than multiprocessors.
        ("lstm", 650, 20, torch.float32, None),
        ("gru", 650, 20, torch.float32, (32, 8)),
        ("lstm", 256, 64, torch.float32, (16, 8)),
        ("lstm", 512, 64, torch.bfloat16, (16, 16)),
        ("lstm", 512, 256, torch.bfloat16, (32, 32)),
        ("lstm", 1024, 64, torch.bfloat16, (32, 16)),
        ("lstm", 2048, 16, torch.bfloat16, None),
    ],
)
def test_the_selected_program_shape_fits_an_h100(
    name, units, rows, dtype, program_shape, monkeypatch
):
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton, "shared_memory_bytes", lambda device: 232_448)
    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    cell = variant(name)
    gates = torch.empty(5, rows, cell.num_gates * units, dtype=dtype, device="meta")

    assert scans.program_shape(cell, gates, units) == program_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("max_bytes", [400, 1 << 25], ids=["slices", "rows"])
def test_the_loss_and_its_gradients_equal_torch(dtype, max_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_MAX_CHUNK_BYTES", max_bytes)
    monkeypatch.setattr(cross_entropy, "_MAX_SLICE_BYTES", 8000)
    hidden = randn(7, 3, 5, seed=1).to(dtype).requires_grad_()
    weight, bias = (randn(*shape, seed=2).requires_grad_() for shape in ((1500, 5), (1500,)))
    targets = torch.arange(21).view(7, 3) * 71
    targets[2, 1] = -1
    weight.data[:, 0] += 5  # moves all logits of a row away from 0

    loss = cross_entropy.cross_entropy(hidden, weight, bias, targets, 0.25)
    actual = [loss, *torch.autograd.grad(loss, [hidden, weight, bias])]
    logits = hidden.double() @ weight.to(dtype).double().T + bias.double()
    reference_loss = 0.25 * torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    expected = [reference_loss, *torch.autograd.grad(reference_loss, [hidden, weight, bias])]

    limit = 1e-5 if dtype == torch.float32 else 4e-3
    for tensor, reference_tensor in zip(actual, expected, strict=True):
        error = (tensor.double() - reference_tensor.double()).norm()
        assert error <= limit * reference_tensor.double().norm()


def test_the_sampled_loss_equals_torch_if_the_first_words_are_the_target():
    hidden, target_weight = randn(3, 5, seed=1), randn(3, 5, seed=2)
    weight, bias, target_bias = randn(1500, 5, seed=3), randn(1500, seed=4), randn(3, seed=5)
    is_target = torch.arange(1500).expand(3, -1) < 1100
    operands = [
        tensor.requires_grad_() for tensor in (hidden, weight, bias, target_weight, target_bias)
    ]

    loss = cross_entropy.sampled_cross_entropy(*operands, is_target, 0.25)
    actual = [loss, *torch.autograd.grad(loss, operands)]
    score = (hidden * target_weight).sum(1) + target_bias
    others = (hidden @ weight.T + bias).masked_fill(is_target, -torch.inf).logsumexp(1)
    reference_loss = 0.25 * (torch.logaddexp(score, others) - score).sum()
    expected = [reference_loss, *torch.autograd.grad(reference_loss, operands)]

    for tensor, reference_tensor in zip(actual, expected, strict=True):
        assert (tensor - reference_tensor).norm() <= 1e-5 * reference_tensor.norm()


def test_a_target_of_another_slice_is_not_read_as_a_logit():
    logits, bias = randn(2, 8, seed=1), torch.zeros(8)
    expected = 0.5 * logits.softmax(1)
    expected[0, 3] -= 0.5
    log_sums, grad_bias = logits.logsumexp(1), torch.zeros(8)

    kernels.cross_entropy(
        logits, bias, torch.tensor([3, 10**12]), log_sums=log_sums, grad_bias=grad_bias, scale=0.5
    )

    torch.testing.assert_close(logits, expected)


def test_scan_selects_the_triton_engine(monkeypatch):
    cell = create("lstm", 3, 7, {})
    cell.initialize(device.generator(3), 0.2, 0.5)
    inputs = torch.ones(4, 2, 3)
    assert engine(cell) == "triton"
    actual, _ = scan(cell, inputs)
    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")
    assert engine(cell) == "plain"
    expected, _ = scan(cell, inputs)
    assert (actual - expected).abs().max() < 1e-6
