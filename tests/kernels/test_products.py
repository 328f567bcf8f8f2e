"""Native matrix products against float64, on every instruction set."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lmtrain import cells, device
from lmtrain.errors import ConfigError
from lmtrain.kernels import products
from lmtrain.kernels.cross_entropy import cross_entropy
from lmtrain.kernels.native import library
from lmtrain.kernels.scan import scan

if library.unavailable_reason():
    reason = f"no native kernels: {library.unavailable_reason()}"
    pytest.skip(reason, allow_module_level=True)

needs_amx = pytest.mark.skipif(not library.multiplies_bf16(), reason="a processor without AMX")
INSTRUCTION_SETS = library.INSTRUCTION_SETS[: library.instruction_set() + 1]
# M, K, N: below, at and above the sizes of tiles and panels, which differ by instruction set.
SIZES = [
    *((1, 1, 1), (5, 3, 7), (12, 256, 32), (13, 257, 33)),
    *((200, 400, 70), (40, 385, 33), (3, 600, 2100), (4, 0, 3), (16, 515, 131), (80, 650, 150)),
    # More rows for each of two threads than a block has.
    (500, 260, 100),
]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("LMTRAIN_INSTRUCTION_SET", request.param)


def operands(size: tuple[int, int, int], transposed: tuple[bool, bool]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, depth, columns = size
    made = []
    for shape, is_transposed in zip([(rows, depth), (depth, columns)], transposed, strict=True):
        drawn = torch.randn(shape[::-1] if is_transposed else shape, generator=generator)
        made.append(drawn.T if is_transposed else drawn)
    return made


@pytest.mark.parametrize("transposed", [*itertools.product((False, True), repeat=2)])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_products_are_those_of_float64(size, transposed):
    left, right = operands(size, transposed)
    result = library.product(left, right)
    expected = left.double() @ right.double()
    # Each of K additions rounds by half an ulp, 6e-8, of sums of the size of sqrt(K).
    bound = 6e-8 * size[1] * max(1.0, float(expected.abs().max()))
    assert float((result - expected).abs().max()) <= bound


def assert_equal_with_any_threads(left: Tensor, right: Tensor) -> None:
    found = []
    for threads in (1, 2, 3, 4):
        device.set_threads(threads)
        found.append(library.product(left, right))
    device.set_threads(2)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("rows", [11, 75, 85])
def test_the_number_of_threads_changes_no_bit(rows):
    assert_equal_with_any_threads(*operands((rows, 515, 131), (False, True)))


@pytest.mark.usefixtures("instruction_set")
def test_a_row_is_the_same_in_a_product_of_few_rows():
    left, right = operands((20, 515, 131), (False, True))
    whole = library.product(left, right)
    for rows in range(1, 20):
        assert torch.equal(library.product(left[:rows], right), whole[:rows])


def test_a_product_can_be_written_to_a_tensor():
    left, right = operands((60, 50, 70), (False, False))
    out = torch.empty(60, 70)

    assert library.product(left, right, out) is out
    torch.testing.assert_close(out, left @ right)
    with pytest.raises(ConfigError, match="contiguous"):
        library.product(left, right, torch.empty(70, 60).T)


def test_slices_of_matrices():
    whole = torch.randn(40, 90)
    left, right = whole[3:33:2, 5:50], whole.T[7:52, 1::3]
    expected = left.double() @ right.double()
    torch.testing.assert_close(library.product(left, right), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "right", [torch.zeros(4, 2), torch.zeros(3, 2).double(), torch.zeros(3, 2).bfloat16()]
)
def test_other_operands_are_refused(right):
    with pytest.raises(ConfigError, match="native product"):
        library.product(torch.zeros(2, 3), right)


# Below, at and above the sizes of tiles, of pieces of the depth, and of blocks of rows or columns.
BF16_SIZES = [
    *((1, 1, 1), (5, 3, 7), (33, 40, 65), (32, 64, 32), (17, 1500, 100), (4, 0, 3)),
    *((100, 705, 31), (513, 1100, 40), (50, 513, 800), (600, 35, 1600)),
]


@needs_amx
@pytest.mark.parametrize("is_out_bf16", [False, True])
@pytest.mark.parametrize("is_right_bf16", [False, True])
@pytest.mark.parametrize("transposed", [*itertools.product((False, True), repeat=2)])
@pytest.mark.parametrize("size", BF16_SIZES, ids=str)
def test_bf16_products_are_those_of_float64(size, transposed, is_right_bf16, is_out_bf16):
    left, right = operands(size, transposed)
    left, rounded = left.bfloat16(), right.bfloat16()
    expected = left.double() @ rounded.double()
    dtype = torch.bfloat16 if is_out_bf16 else torch.float32
    # Elements that are not written remain NaN.
    out = torch.full((size[0], size[2]), torch.nan, dtype=dtype)
    result = library.product(left, rounded if is_right_bf16 else right, out)
    bound = 6e-8 * size[1] * max(1.0, float(expected.abs().max()))
    if is_out_bf16:
        bound += 2**-8 * float(expected.abs().max())
    assert float((result - expected).abs().max()) <= bound


@needs_amx
@pytest.mark.parametrize("size", [(100, 705, 70), (600, 1100, 40)], ids=str)
def test_the_number_of_threads_changes_no_bit_in_bf16(size):
    left, right = operands(size, (True, False))
    assert_equal_with_any_threads(left.bfloat16(), right.bfloat16())


@needs_amx
def test_bf16_products_do_not_read_beyond_their_operands():
    # In the buffers, NaN follows each line of the left operand and each column of the right one.
    left = torch.full((40, 50), torch.nan, dtype=torch.bfloat16)[:, :33].fill_(1)
    right = torch.full((40, 50), torch.nan, dtype=torch.bfloat16)[:, :33].fill_(1).T
    assert torch.equal(library.product(left, right), torch.full((40, 40), 33.0).bfloat16())


@needs_amx
def test_bf16_operands_without_contiguous_lines_are_left_to_torch():
    left, right = torch.randn(80, 80).bfloat16(), torch.randn(80, 80).bfloat16()[::2, ::2]
    left = left[:, ::2]
    with pytest.raises(ConfigError, match="contiguous lines"):
        library.product(left, right)
    assert torch.equal(products.matmul(left, right), left @ right)


@pytest.mark.parametrize("rows", [5, 40])
def test_the_dtype_of_a_product_of_bf16(rows):
    left, right = operands((rows, 50, 60), (False, True))
    left = left.bfloat16()
    expected = left.double() @ right.bfloat16().double()
    for dtype in (torch.bfloat16, torch.float32):
        result = products.matmul(left, right, dtype=dtype)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=0.1)
    assert products.matmul(left, right).dtype == torch.bfloat16


def test_a_product_of_bf16_can_be_of_another_dtype():
    left, right = (each.bfloat16() for each in operands((40, 50, 60), (False, True)))
    result = products.matmul(left, right, dtype=torch.float64)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, left.double() @ right.double(), rtol=1e-2, atol=0.1)


# torch itself uses torch.jit in forward-mode differentiation.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_transforms_are_those_of_torch(dtype, monkeypatch):
    monkeypatch.setattr(products, "are_native", lambda dtype: True)
    left, right = (each.to(dtype) for each in operands((60, 50, 70), (False, False)))
    tangent = torch.ones_like(left)

    _, derivative = torch.func.jvp(lambda each: products.matmul(each, right), (left,), (tangent,))
    with forward_ad.dual_level():
        dual = products.matmul(forward_ad.make_dual(left, tangent), right)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent @ right)
    rows = torch.vmap(lambda each: products.matmul(each, right))(torch.stack([left, tangent]))

    assert torch.equal(derivative, tangent @ right)
    torch.testing.assert_close(rows, torch.stack([left @ right, tangent @ right]))


@needs_amx
def test_models_in_bf16_train_as_on_products_of_torch(monkeypatch):
    found = [each.detach() for each in gradients(51, torch.bfloat16)]
    monkeypatch.setattr(products, "are_native", lambda dtype: False)
    expected = [each.detach() for each in gradients(51, torch.bfloat16)]
    for each, other in zip(found, expected, strict=True):
        assert each.dtype == other.dtype
        assert float((each - other).norm()) <= 0.02 * float(other.norm())


@pytest.mark.usefixtures("instruction_set")
def test_the_rate_of_multiply_adds_is_that_of_a_processor():
    # From a tenth of a scalar unit to more than any socket has.
    assert 1e8 < library.multiply_add_rate() < 1e14


def gradients(hidden_size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A loss and the gradients of an LSTM and a softmax, from inputs in a dtype."""
    generator = device.generator(1)
    cell = cells.create("lstm", 50, hidden_size, options={})
    cell.initialize(generator, None, 1.0)
    weight = (torch.randn(300, hidden_size, generator=generator) / 8).requires_grad_()
    bias = torch.zeros(300, requires_grad=True)
    inputs = torch.randn(9, 6, 50, generator=generator).to(dtype).requires_grad_()
    hidden, _ = scan(cell, inputs)
    loss = cross_entropy(hidden, weight, bias, torch.arange(54).view(9, 6), 1.0)
    parameters = [inputs, weight, bias, *cell.parameters()]
    return [loss, *torch.autograd.grad(loss, parameters)]


def test_models_on_native_products_train_as_on_torch(monkeypatch, request):
    monkeypatch.setattr(products, "are_native", lambda dtype: False)
    expected = gradients(51)
    calls = request.getfixturevalue("native_calls")
    torch.testing.assert_close(gradients(51), expected, rtol=1e-4, atol=1e-5)
    # Inputs, logits, two gradients of each, and that of the recurrent weights.
    assert len(calls) == 7


@pytest.fixture
def native_calls(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """The operands of native products, which are used as on AMD processors."""
    calls: list[tuple[Tensor, Tensor]] = []
    run = library.product
    monkeypatch.setattr(library, "product", lambda *each: calls.append(each) or run(*each))
    monkeypatch.setattr(products, "are_native", lambda dtype: dtype == torch.float32)
    return calls


@pytest.mark.parametrize(
    ("size", "transposed", "is_native"),
    [
        ((48, 20, 48), (False, False), True),
        ((48, 20, 48), (True, True), True),
        ((47, 20, 48), (False, False), False),
        ((47, 20, 48), (True, True), False),
        ((47, 20, 48), (False, True), True),
        ((1, 20, 300), (False, True), True),
        ((300, 20, 47), (False, True), False),
    ],
    ids=str,
)
def test_products_are_native_where_these_are_faster(size, transposed, is_native, native_calls):
    left, right = operands(size, transposed)
    expected = left @ right

    torch.testing.assert_close(products.matmul(left, right), expected)
    sums = torch.ones_like(expected)
    assert products.add_product_(sums, left, right) is sums
    torch.testing.assert_close(sums, expected + 1)
    assert bool(native_calls) == is_native


@pytest.mark.parametrize("rows", [1, 30, 60])
def test_a_linear_layer_adds_its_bias(rows, native_calls):
    inputs, weight, bias = torch.randn(1, rows, 50), torch.randn(70, 50), torch.randn(70)
    expected = torch.nn.functional.linear(inputs, weight, bias)

    torch.testing.assert_close(products.linear(inputs, weight, bias), expected)
    assert len(native_calls) == 1


@pytest.mark.parametrize("rows", [1, 40])
def test_a_linear_layer_of_bf16_inputs_and_other_weights(rows):
    inputs, weight, bias = torch.randn(rows, 50), torch.randn(70, 50), torch.randn(70)
    result = products.linear(inputs.bfloat16(), weight, bias)
    assert result.dtype == torch.bfloat16
    expected = torch.nn.functional.linear(inputs, weight, bias).bfloat16()
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.2)


def test_products_that_need_a_gradient_have_one(native_calls):
    left, right = operands((60, 50, 70), (False, False))
    left.requires_grad_()
    products.matmul(left, right).sum().backward()
    torch.testing.assert_close(left.grad, right.sum(1).expand(60, 50))
    assert not native_calls
