"""The native scans against the float64 reference: every cell, odd sizes, both precisions."""

import ctypes
import itertools
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from every_cell import CELLS, each_cell
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain import device
from lmtrain.cells import LSTM, RNN, Cell, create
from lmtrain.errors import ConfigError, MachineError
from lmtrain.kernels import operator, plain, reference
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.native import library
from lmtrain.kernels.scan import engine, scan
from lmtrain.kernels.variant import VARIANTS, Variant, index_of

if library.absence():
    pytest.skip(f"no native kernels: {library.absence()}", allow_module_level=True)

LEVELS = library.LEVELS[: library.level() + 1]
KINDS = [torch.float32, torch.bfloat16] if library.has_bf16() else [torch.float32]
SIZES = list(itertools.product((1, 7, 17, 200, 257), (1, 3, 20), (1, 2, 33)))


def make(name: str, options: dict[str, str], input_size: int, hidden_size: int) -> Cell:
    cell = create(name, input_size, hidden_size, options)
    # The state of 33 steps stays of the order of 1 at any width.
    cell.initialize(device.generator(3), 0.5 / hidden_size**0.5, 0.5)
    return cell


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


def by_reference(cell, inputs, state, reverse, lengths):
    return reference.scan(cell, inputs, state, lengths, reverse=reverse)


def by_native(cell, inputs, state, reverse, lengths):
    assert kernels_for(inputs, cell.bias) == "native"
    return operator.scan(cell, inputs, state, lengths, reverse=reverse)


def check(
    name, options, size, kinds=(torch.float32,), reverse=False, has_state=True, lengths=None
) -> None:
    """The results of each kind, a precision, for a size H, B, T: the reference runs once."""
    hidden_size, rows, steps = size
    cell = make(name, options, 5, hidden_size)
    inputs = chance(steps, rows, 5, seed=1).bfloat16()  # numbers that both precisions have
    parts = range(len(cell.state_names))
    state = [chance(rows, hidden_size, seed=2 + part) * has_state for part in parts]
    found = {
        kind: results(by_native, cell, inputs.to(kind), state, reverse, lengths) for kind in kinds
    }
    # A second thread would slow the many small steps of the reference down.
    torch.set_num_threads(1)
    expected = results(
        by_reference, cell.double(), inputs.double(), [s.double() for s in state], reverse, lengths
    )
    largest = max(truth.norm() for truth in expected)
    for kind, actual in found.items():
        compared = list(enumerate(zip(actual, expected, strict=True)))
        if kind == torch.bfloat16 and options.get("activation") == "relu":
            # The slope of relu jumps at 0, and rounding takes some sums across: no gradients.
            compared = compared[:2]
        for index, (ours, truth) in compared:
            # The gradients of a single unit are sums of a few numbers that may cancel each other.
            scale = largest if hidden_size == 1 else truth.norm()
            error = (ours - truth).norm()
            limit = 1e-5 if kind == torch.float32 else 1e-2
            assert error <= limit * scale, (
                f"{name} {options} {size} {kind} {index}: {error / scale}"
            )


@pytest.mark.slow
@each_cell
def test_every_size_equals_the_reference(name, options):
    for size, threads in zip(SIZES, itertools.cycle([1, 2])):
        torch.set_num_threads(threads)
        check(name, options, size, KINDS)


@each_cell
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_with_lengths_equal_the_reference(name, options, reverse):
    sizes = itertools.product((7, 17, 200), (3, 20), (2, 33))
    for (hidden_size, rows, steps), threads in zip(sizes, itertools.cycle([1, 2])):
        torch.set_num_threads(threads)
        drawn = device.generator(hidden_size)
        lengths = torch.randint(1, steps + 1, (rows,), generator=drawn)
        check(name, options, (hidden_size, rows, steps), KINDS, reverse, lengths=lengths)


@pytest.mark.parametrize("reverse", [False, True])
def test_beyond_its_length_a_row_has_no_output_and_no_gradient(reverse):
    cell, lengths = make("peephole-lstm", {}, 5, 8), torch.tensor([2, 4, 1])
    inputs, state = chance(6, 3, 5, seed=1), [chance(3, 8, seed=2), chance(3, 8, seed=3)]

    hidden, a, _, grad_inputs, *_ = results(by_native, cell, inputs, state, reverse, lengths)

    for row, length in enumerate(lengths.tolist()):
        assert not hidden[length:, row].any()
        assert not grad_inputs[length:, row].any()
        assert hidden[:length, row].all()
        assert torch.equal(a[row], hidden[0 if reverse else length - 1, row])


@pytest.mark.parametrize("lengths", [[0, 2, 1], [5, 1, 1], [-1, 2, 2]], ids=str)
def test_a_length_outside_of_the_steps_is_refused(lengths):
    with pytest.raises(ConfigError, match=r"lengths .* are not in 1 to 4"):
        scan(make("lstm", {}, 5, 8), torch.zeros(4, 3, 5), lengths=torch.tensor(lengths))


@each_cell
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_computes_the_same(name, options, level, monkeypatch):
    monkeypatch.setenv("LMTRAIN_LEVEL", level)
    lengths = torch.tensor([3, 1, 5, 2, 2, 4, 1])
    for reverse, has_state in itertools.product((False, True), repeat=2):
        check(name, options, (21, 7, 5), reverse=reverse, has_state=has_state)
        check(name, options, (21, 7, 5), reverse=reverse, has_state=has_state, lengths=lengths)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_groups_of_threads_share_the_rows_and_the_units(kind):
    torch.set_num_threads(4)
    # With this many units the weights of two threads, and not of one, are near a core in fp32;
    # in bf16 those of each are.
    check("lstm", {}, (400, 9, 3), [kind])
    check("gru", {}, (401, 14, 3), [kind])


@settings(max_examples=60, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    size=st.tuples(st.integers(1, 70), st.integers(1, 14), st.integers(1, 9)),
    reverse=st.booleans(),
    has_state=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_shape_equals_the_reference(cell, size, reverse, has_state, threads):
    torch.set_num_threads(threads)
    check(*cell, size, reverse=reverse, has_state=has_state)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_the_functions_of_the_gates_are_accurate(kind, level, monkeypatch):
    if kind == torch.bfloat16 and not level.endswith("BF16"):
        pytest.skip("no bf16 at this level")
    monkeypatch.setenv("LMTRAIN_LEVEL", level)
    small = torch.logspace(-6, 0, 500)
    z = torch.cat([-small, small, torch.linspace(-80, 80, 4001)]).to(kind)
    gates = z.view(1, -1, 1).repeat(1, 1, 4)  # one unit: candidate, update, forget, output
    history = [torch.zeros(2, len(z), 1), torch.zeros(2, len(z), 1)]

    library.scan(
        VARIANTS[index_of(LSTM(1, 1))],
        gates=gates,
        recurrent=torch.zeros(4, 1),
        peephole=None,
        bias=torch.zeros(4),
        history=history,
        reverse=False,
        hidden=torch.empty(1, len(z), 1, dtype=kind),
    )

    # Within 2 units in the last place of bf16 is within 2^-7 of the number.
    limit = 1e-6 if kind == torch.float32 else 2**-7
    for found, function in ((gates[0, :, 0], torch.tanh), (gates[0, :, 2], torch.sigmoid)):
        exact = function(z.double())
        assert ((found.double() - exact) / exact).abs().max() < limit


@each_cell
def test_two_runs_are_equal_to_the_bit(name, options):
    torch.set_num_threads(2)
    cell = make(name, options, 5, 33)
    for rows, kind in itertools.product((7, 12), KINDS):  # threads divide units, or rows
        state = [chance(rows, 33, seed=2 + i) for i in range(len(cell.state_names))]
        inputs = chance(6, rows, 5, seed=1).to(kind)

        first, again = (results(by_native, cell, inputs, state, False) for _ in range(2))

        assert all(map(torch.equal, first, again))


def test_threads_of_python_may_scan_at_once():
    torch.set_num_threads(2)
    cell, inputs = make("lstm", {}, 5, 40), chance(30, 6, 5, seed=1)
    state = [chance(6, 40, seed=2), chance(6, 40, seed=3)]
    expected = results(by_native, cell, inputs, state, False)
    found: list[list[Tensor]] = []

    def work() -> None:
        found.extend(results(by_native, cell, inputs, state, False) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert len(found) == 60
    for each in found:
        assert all(map(torch.equal, each, expected))


def test_views_are_taken_for_what_they_hold():
    cell = make("lstm", {}, 5, 8)
    inputs = chance(3, 6, 5, seed=1).transpose(0, 1)  # (6, 3, 5), not contiguous
    state = [chance(8, 3, seed=2).T, chance(1, 8, seed=3).expand(3, 8)]

    actual = results(by_native, cell, inputs, state, False)

    same = results(by_native, cell, inputs.contiguous(), [s.contiguous() for s in state], False)
    assert all(map(torch.equal, actual, same))


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
def test_what_a_kernel_cannot_take_never_reaches_it(wrong):
    right = {
        "gates": torch.zeros(2, 3, 32),
        "recurrent": torch.zeros(32, 8),
        "peephole": None,
        "bias": torch.zeros(32),
        "history": [torch.zeros(3, 3, 8), torch.zeros(3, 3, 8)],
        "hidden": torch.zeros(2, 3, 8),
    }
    variant = VARIANTS[index_of(LSTM(1, 8))]
    library.scan(variant, reverse=False, **right)

    with pytest.raises(ConfigError):
        library.scan(variant, reverse=False, **{**right, **wrong})


def test_a_state_of_another_type_is_refused_before_it_is_read():
    state = (torch.zeros(3, 8).half(), torch.zeros(3, 8).half())

    with pytest.raises(ConfigError, match="contiguous; this is"):
        scan(make("lstm", {}, 5, 8), torch.zeros(2, 3, 5), state)


def test_denormal_numbers_are_harmless():
    cell = make("lstm", {}, 5, 8)
    tiny = [torch.full((3, 8), 1e-40), torch.full((3, 8), 1e-40)]

    found = results(by_native, cell, chance(4, 3, 5, seed=1), tiny, False)

    assert all(result.isfinite().all() for result in found)
    assert float(torch.tensor(1e-40) * 1) > 0  # and remain what they were outside


def test_extreme_inputs_saturate_the_gates():
    cell = make("lstm", {}, 5, 8)

    hidden, _ = scan(cell, torch.full((4, 3, 5), 1e30))

    assert hidden.isfinite().all()
    assert hidden.abs().max() <= 1


def test_other_types_and_subclasses_take_another_engine():
    class Own(LSTM):
        pass

    assert engine(LSTM(3, 7)) == "native"
    assert engine(LSTM(3, 7).double()) == "plain"
    assert engine(LSTM(3, 7), torch.zeros(4, 2, 3).half()) == "plain"
    assert engine(Own(3, 7)) == "plain"


def test_a_subclass_that_changes_its_equation_is_not_run_as_its_parent():
    class Doubled(RNN):
        def step(self, x, state):
            return tuple(2 * part for part in super().step(x, state))

    cell = Doubled(5, 8)
    cell.initialize(device.generator(3), 0.5, 0.0)
    inputs, state = chance(4, 3, 5, seed=1), (torch.zeros(3, 8),)

    assert engine(cell) == "reference"
    assert torch.equal(scan(cell, inputs, state)[0][0], 2 * RNN.step(cell, inputs[0], state)[0])


class ShorterMatrix(ctypes.Structure):
    _fields_ = (("rows", ctypes.c_int64), ("from", ctypes.c_void_p), ("to", ctypes.c_void_p))


@pytest.fixture
def reloaded():
    library._library.cache_clear()
    yield
    library._library.cache_clear()


def test_a_library_with_other_structures_is_not_called(monkeypatch, reloaded):
    monkeypatch.setitem(library._STRUCTURES, "Matrix", ShorterMatrix)

    assert "reinstall: pip install -e ." in library.absence()
    assert engine(LSTM(3, 7)) == "plain"


@pytest.mark.parametrize("change", [{"gates": 5}, {"name": "lost"}], ids=str)
def test_a_library_with_another_table_of_cells_is_not_called(change, monkeypatch, reloaded):
    class Other(Variant):
        gates = change.get("gates", 4)

    other = Other(change.get("name", "lstm"), LSTM, ("tanh",))
    monkeypatch.setattr(library, "VARIANTS", (*VARIANTS, other))

    assert "reinstall" in library.absence()
    with pytest.raises(MachineError, match="reinstall"):
        library.cross_entropy(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, dtype=torch.int64))


def test_torch_alone_can_be_asked_for(monkeypatch):
    cell, inputs = make("lstm", {}, 5, 8), chance(4, 3, 5, seed=1)
    expected = plain.scan(cell, inputs, cell.zero_state(3), None, reverse=False)[0]

    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")

    assert engine(cell) == "plain"
    assert torch.equal(scan(cell, inputs)[0], expected)


@pytest.mark.parametrize("switch", ["LMTRAIN_KERNELS", "LMTRAIN_LEVEL"])
def test_a_wrong_switch_is_refused(switch, monkeypatch):
    monkeypatch.setenv(switch, "fast")

    with pytest.raises(ConfigError, match=f"{switch}=fast"):
        scan(LSTM(3, 7), torch.zeros(2, 2, 3).bfloat16())


@pytest.mark.slow
def test_no_byte_is_read_or_written_out_of_bounds(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    program = tmp_path / "sanitized"
    source = Path(__file__).with_name("sanitized.cpp")
    flags = ["-std=c++17", "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-pthread", "-Wno-psabi", "-I", str(Path(library.__file__).parent)]
    command = [compiler, *flags, str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)

    ended = subprocess.run([program], capture_output=True, text=True, timeout=120)

    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "scans" in ended.stdout
