"""The native scan against the float64 reference: every cell, odd sizes, fp32 and bf16."""

import ctypes
import functools
import itertools
import shutil
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from every_cell import CELLS, each_cell
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import by_reference, make, randn, results
from torch import Tensor

from lmtrain import device
from lmtrain.cells import LSTM, RNN
from lmtrain.errors import ConfigError, MachineError
from lmtrain.kernels import operator, plain
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.native import library
from lmtrain.kernels.native import scan as native_scan
from lmtrain.kernels.scan import engine, scan
from lmtrain.kernels.variant import VARIANTS, Variant, index_of

if library.unavailable_reason():
    reason = f"no native kernels: {library.unavailable_reason()}"
    pytest.skip(reason, allow_module_level=True)

INSTRUCTION_SETS = library.INSTRUCTION_SETS[: library.instruction_set() + 1]
DTYPES = [torch.float32, torch.bfloat16] if library.has_bf16() else [torch.float32]


def with_threads(sizes: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], int]]:
    """Each size with one or two threads, in turn."""
    return list(zip(sizes, itertools.cycle([1, 2]), strict=False))


# H, B, T.
SIZES = with_threads(itertools.product((1, 7, 17, 200, 257), (1, 3, 20), (1, 2, 33)))
SIZES_WITH_LENGTHS = with_threads(itertools.product((7, 17, 200), (3, 20), (2, 33)))


def by_native(cell, inputs, state, reverse, lengths):
    assert kernels_for(inputs, cell.bias) == "native"
    return operator.scan(cell, inputs, state, lengths, reverse=reverse)


@functools.lru_cache(maxsize=1)
def float64_results(name, options, size, reverse, has_state, lengths) -> list[Tensor]:
    """The results of the reference, cached for the next dtype of the same case.

    The dtype is the topmost parameter of a test, which varies fastest.
    """
    cell, inputs, state, lengths = case(name, options, size, has_state, lengths)
    state = [part.double() for part in state]
    # A second thread would slow down the many small steps of the reference.
    torch.set_num_threads(1)
    return results(by_reference, cell.double(), inputs.double(), state, reverse, lengths)


def case(name, options, size, has_state, lengths):
    """A cell, inputs that bf16 represents exactly, a state, and lengths, for a size H, B, T."""
    hidden_size, rows, steps = size
    cell = make(name, dict(options), 5, hidden_size)
    inputs = randn(steps, rows, 5, seed=1).bfloat16()
    parts = range(len(cell.state_names))
    state = [randn(rows, hidden_size, seed=2 + part) * has_state for part in parts]
    return cell, inputs, state, lengths and torch.tensor(lengths)


def check(
    name, options, size, dtype=torch.float32, *, reverse=False, has_state=True, lengths=None
) -> None:
    """Compares the native results of a dtype with the reference, for a size H, B, T."""
    options = tuple(options.items())
    cell, inputs, state, tensor = case(name, options, size, has_state, lengths)
    actual = results(by_native, cell, inputs.to(dtype), state, reverse, tensor)
    expected = float64_results(name, options, size, reverse, has_state, lengths)
    if dtype == torch.bfloat16 and ("activation", "relu") in options:
        # Rounding moves some pre-activations across 0, where the slope of ReLU jumps.
        actual, expected = actual[:2], expected[:2]
    largest = max(tensor.norm() for tensor in expected)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for index, (tensor, reference_tensor) in enumerate(zip(actual, expected, strict=True)):
        is_gradient = index > len(cell.state_names)  # hidden states and the final state come first
        # In a gradient of few elements, the terms of every sum may cancel.
        is_small = is_gradient and tensor.numel() < 16
        scale = largest if is_small else reference_tensor.norm()
        error = (tensor - reference_tensor).norm()
        assert error <= limit * scale, f"result {index}: {error / scale}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_cell
@pytest.mark.parametrize(("size", "threads"), SIZES, ids=str)
def test_every_size_equals_the_reference(name, options, size, threads, dtype):
    torch.set_num_threads(threads)
    check(name, options, size, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_cell
@pytest.mark.parametrize(("size", "threads"), SIZES_WITH_LENGTHS, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_rows_with_lengths_equal_the_reference(name, options, size, threads, reverse, dtype):
    torch.set_num_threads(threads)
    hidden_size, rows, steps = size
    lengths = torch.randint(1, steps + 1, (rows,), generator=device.generator(hidden_size))
    check(name, options, size, dtype, reverse=reverse, lengths=tuple(lengths.tolist()))


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_has_zero_outputs_and_zero_gradients(reverse):
    cell, lengths = make("peephole-lstm", {}, 5, 8), torch.tensor([2, 4, 1])
    inputs, state = (
        randn(6, 3, 5, seed=1),
        [randn(3, 8, seed=2), randn(3, 8, seed=3)],
    )

    hidden, a, _, grad_inputs, *_ = results(by_native, cell, inputs, state, reverse, lengths)

    for row, length in enumerate(lengths.tolist()):
        assert not hidden[length:, row].any()
        assert not grad_inputs[length:, row].any()
        assert hidden[:length, row].all()
        assert torch.equal(a[row], hidden[0 if reverse else length - 1, row])


@pytest.mark.parametrize("lengths", [[0, 2, 1], [5, 1, 1], [-1, 2, 2]], ids=str)
def test_lengths_outside_the_steps_are_refused(lengths):
    with pytest.raises(ConfigError, match=r"lengths .* are not in 1 to 4"):
        scan(make("lstm", {}, 5, 8), torch.zeros(4, 3, 5), lengths=torch.tensor(lengths))


@each_cell
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("has_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("lengths", [None, (3, 1, 5, 2, 2, 4, 1)], ids=["whole", "lengths"])
def test_every_instruction_set_equals_the_reference(
    name, options, instruction_set, reverse, has_state, lengths, monkeypatch
):
    monkeypatch.setenv("LMTRAIN_INSTRUCTION_SET", instruction_set)
    check(name, options, (21, 7, 5), reverse=reverse, has_state=has_state, lengths=lengths)


# With 4 threads, groups have two threads in fp32 and one in bf16: the packed weights fit in the
# caches of two threads in fp32, and of each thread in bf16.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "size"), [("lstm", (400, 9, 3)), ("gru", (401, 14, 3))])
def test_groups_of_threads_equal_the_reference(name, size, dtype):
    torch.set_num_threads(4)
    check(name, {}, size, dtype)


@settings(max_examples=60, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    size=st.tuples(st.integers(1, 70), st.integers(1, 14), st.integers(1, 9)),
    reverse=st.booleans(),
    has_state=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_shape_equals_the_reference(cell, size, reverse, has_state, threads):
    name, options = cell
    torch.set_num_threads(threads)
    check(name, options, size, reverse=reverse, has_state=has_state)


@pytest.mark.parametrize(
    ("dtype", "instruction_set"),
    [
        (dtype, instruction_set)
        for dtype, instruction_set in itertools.product(DTYPES, INSTRUCTION_SETS)
        if dtype == torch.float32 or instruction_set.endswith("BF16")
    ],
    ids=str,
)
def test_tanh_and_sigmoid_are_accurate(dtype, instruction_set, monkeypatch):
    monkeypatch.setenv("LMTRAIN_INSTRUCTION_SET", instruction_set)
    small = torch.logspace(-6, 0, 500)
    z = torch.cat([-small, small, torch.linspace(-80, 80, 4001)]).to(dtype)
    gates = z.view(1, -1, 1).repeat(1, 1, 4)  # one unit: candidate, update, forget, output
    history = [torch.zeros(2, len(z), 1), torch.zeros(2, len(z), 1)]

    native_scan.scan(
        VARIANTS[index_of(LSTM(1, 1))],
        gates=gates,
        recurrent=torch.zeros(4, 1),
        peephole=None,
        bias=torch.zeros(4),
        history=history,
        reverse=False,
        hidden=torch.empty(1, len(z), 1, dtype=dtype),
    )

    # 2 units in the last place of bf16 are a relative error of 2^-7.
    limit = 1e-6 if dtype == torch.float32 else 2**-7
    for actual, function in ((gates[0, :, 0], torch.tanh), (gates[0, :, 2], torch.sigmoid)):
        exact = function(z.double())
        assert ((actual.double() - exact) / exact).abs().max() < limit


# Two threads divide the units of 7 rows, and the 12 rows.
@each_cell
@pytest.mark.parametrize("rows", [7, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bitwise_equal(name, options, rows, dtype):
    torch.set_num_threads(2)
    cell = make(name, options, 5, 33)
    state = [randn(rows, 33, seed=2 + i) for i in range(len(cell.state_names))]
    inputs = randn(6, rows, 5, seed=1).to(dtype)

    first, again = (results(by_native, cell, inputs, state, False) for _ in range(2))

    assert all(map(torch.equal, first, again))


def test_python_threads_can_scan_concurrently():
    torch.set_num_threads(2)
    cell, inputs = make("lstm", {}, 5, 40), randn(30, 6, 5, seed=1)
    state = [randn(6, 40, seed=2), randn(6, 40, seed=3)]
    expected = results(by_native, cell, inputs, state, False)
    actual: list[list[Tensor]] = []

    def work() -> None:
        actual.extend(results(by_native, cell, inputs, state, False) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert len(actual) == 60
    for tensors in actual:
        assert all(map(torch.equal, tensors, expected))


def test_non_contiguous_inputs_and_states_are_supported():
    cell = make("lstm", {}, 5, 8)
    inputs = randn(3, 6, 5, seed=1).transpose(0, 1)  # (6, 3, 5), not contiguous
    state = [randn(8, 3, seed=2).T, randn(1, 8, seed=3).expand(3, 8)]

    actual = results(by_native, cell, inputs, state, False)

    expected = results(
        by_native, cell, inputs.contiguous(), [part.contiguous() for part in state], False
    )
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    "wrong",
    [
        {"gates": torch.zeros(2, 3, 20)},
        {"gates": torch.zeros(2, 3, 32).double()},
        {"recurrent": torch.zeros(24, 8)},
        {"recurrent": torch.zeros(8, 32).T},
        {"peephole": torch.zeros(24)},
        {"bias": None},
        {"bias": torch.zeros(8)},
        {"history": [torch.zeros(3, 3, 8), torch.zeros(2, 3, 8)]},
        {"history": [torch.zeros(3, 3, 8), torch.zeros(3, 3, 8).half()]},
        {"hidden": torch.zeros(2, 3, 8).bfloat16()},
    ],
    ids=str,
)
def test_wrong_shapes_dtypes_and_strides_are_refused(wrong):
    valid = {
        "gates": torch.zeros(2, 3, 32),
        "recurrent": torch.zeros(32, 8),
        "peephole": None,
        "bias": torch.zeros(32),
        "history": [torch.zeros(3, 3, 8), torch.zeros(3, 3, 8)],
        "hidden": torch.zeros(2, 3, 8),
    }
    variant = VARIANTS[index_of(LSTM(1, 8))]
    native_scan.scan(variant, reverse=False, **valid)

    with pytest.raises(ConfigError):
        native_scan.scan(variant, reverse=False, **{**valid, **wrong})


def test_a_state_of_another_dtype_is_refused():
    state = (torch.zeros(3, 8).half(), torch.zeros(3, 8).half())

    with pytest.raises(ConfigError, match="contiguous; this is"):
        scan(make("lstm", {}, 5, 8), torch.zeros(2, 3, 5), state)


def test_denormals_give_finite_results_and_are_not_flushed_outside():
    cell = make("lstm", {}, 5, 8)
    tiny = [torch.full((3, 8), 1e-40), torch.full((3, 8), 1e-40)]

    actual = results(by_native, cell, randn(4, 3, 5, seed=1), tiny, False)

    assert all(tensor.isfinite().all() for tensor in actual)
    assert float(torch.tensor(1e-40) * 1) > 0


def test_large_inputs_saturate_the_gates():
    cell = make("lstm", {}, 5, 8)

    hidden, _ = scan(cell, torch.full((4, 3, 5), 1e30))

    assert hidden.isfinite().all()
    assert hidden.abs().max() <= 1


def test_other_dtypes_and_subclasses_use_the_plain_engine():
    class Subclass(LSTM):
        pass

    assert engine(LSTM(3, 7)) == "native"
    assert engine(LSTM(3, 7).double()) == "plain"
    assert engine(LSTM(3, 7), torch.zeros(4, 2, 3).half()) == "plain"
    assert engine(Subclass(3, 7)) == "plain"


def test_a_subclass_with_another_step_uses_the_reference_engine():
    class Doubled(RNN):
        def step(self, x, state):
            return tuple(2 * part for part in super().step(x, state))

    cell = Doubled(5, 8)
    cell.initialize(device.generator(3), 0.5, 0.0)
    inputs, state = randn(4, 3, 5, seed=1), (torch.zeros(3, 8),)

    assert engine(cell) == "reference"
    assert torch.equal(scan(cell, inputs, state)[0][0], 2 * RNN.step(cell, inputs[0], state)[0])


class ShorterArguments(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64), ("source", ctypes.c_void_p), ("destination", ctypes.c_void_p)
    )  # fmt: skip


@pytest.fixture
def reloaded():
    library._library.cache_clear()
    yield
    library._library.cache_clear()


def test_a_library_with_other_structures_is_not_used(monkeypatch, reloaded):
    monkeypatch.setitem(library._STRUCTURES, "TransposeArguments", ShorterArguments)

    assert "reinstall: pip install -e ." in library.unavailable_reason()
    assert engine(LSTM(3, 7)) == "plain"
    with pytest.raises(MachineError, match="reinstall"):
        library.cross_entropy(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, dtype=torch.int64))


def test_a_library_without_a_function_is_not_used(monkeypatch, reloaded):
    monkeypatch.setattr(library, "_FUNCTIONS", ("lmtrain_scan", "lmtrain_of_tomorrow"))

    assert "reinstall" in library.unavailable_reason()


def test_a_library_that_cannot_be_loaded_is_not_used(monkeypatch, reloaded, tmp_path):
    (tmp_path / "compiled.other-machine.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))

    assert library.unavailable_reason().startswith("the compiled library cannot be loaded (")
    assert engine(LSTM(3, 7)) == "plain"


@pytest.mark.parametrize("change", [{"num_gates": 5}, {"name": "unknown"}], ids=str)
def test_a_cell_that_was_not_compiled_is_refused(change):
    class Other(Variant):
        num_gates = change.get("num_gates", 4)

    other = Other(change.get("name", "lstm"), LSTM, ("tanh",))

    with pytest.raises(MachineError, match="reinstall"):
        native_scan._index(other)


def test_the_environment_can_select_the_plain_engine(monkeypatch):
    cell, inputs = make("lstm", {}, 5, 8), randn(4, 3, 5, seed=1)
    expected = plain.scan(cell, inputs, cell.zero_state(3), None, reverse=False)[0]

    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")

    assert engine(cell) == "plain"
    assert torch.equal(scan(cell, inputs)[0], expected)


@pytest.mark.parametrize("variable", ["LMTRAIN_KERNELS", "LMTRAIN_INSTRUCTION_SET"])
def test_an_unknown_value_of_an_environment_variable_is_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "fast")

    with pytest.raises(ConfigError, match=f"{variable}=fast"):
        scan(LSTM(3, 7), torch.zeros(2, 2, 3).bfloat16())


@pytest.mark.slow
def test_no_memory_is_accessed_out_of_bounds(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    program = tmp_path / "sanitized"
    source = Path(__file__).with_name("sanitized.cpp")
    flags = ["-std=c++17", "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-pthread", "-Wno-psabi", "-I", str(Path(library.__file__).parent)]
    command = [compiler, *flags, str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)

    process = subprocess.run([program], capture_output=True, text=True, timeout=120)

    assert process.returncode == 0, process.stderr[-3000:]
    assert "calls" in process.stdout
