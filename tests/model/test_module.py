"""A language model supports what torch does with modules: compile, export, copy, pickle."""

import copy
import functools
import io
import pickle
import shutil

import pytest
import torch
from every_cell import CELLS, each_cell
from networks import language_modelling, loss
from numerics import assert_same
from torch.utils import _pytree as pytree

from lmtrain import device
from lmtrain.model.language_model import LanguageModel

VOCAB_SIZE = 11


def task(name: str = "lstm", options: dict | None = None, *, seed: int = 1, dropout: float = 0.0):
    return language_modelling(
        VOCAB_SIZE, cell=name, embedding_size=6, hidden_size=6, dropout=dropout,
        train__seed=seed, **(options or {}),
    )  # fmt: skip


def model(*arguments, **changes) -> LanguageModel:
    return task(*arguments, **changes).model


def tokens(steps: int = 5, rows: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (steps, rows), generator=device.generator(seed))


def results(network, run, *arguments) -> list[torch.Tensor]:
    """All tensors that a call returns, and the gradients of their sum."""
    outputs = pytree.tree_leaves(run(*arguments))
    total = sum(output.sum() for output in outputs if output.requires_grad)
    return [*outputs, *torch.autograd.grad(total, list(network.parameters()), allow_unused=True)]


def assert_all_same(actual, expected) -> None:
    for index, (tensor, reference) in enumerate(zip(actual, expected, strict=True)):
        if reference is None:
            assert tensor is None
        else:
            assert_same(tensor, reference, f"result {index}")


@pytest.fixture
def empty_compile_cache():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@each_cell
def test_compiled_outputs_and_gradients_are_the_same(name, options, empty_compile_cache):
    language = task(name, options)
    network, objective = language.model, functools.partial(loss, language)
    inputs, targets = tokens(), tokens(seed=2)
    state = network(inputs)[1].detach()

    forward = torch.compile(network, fullgraph=True, backend="aot_eager")
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")

    expected = results(network, network, inputs, state)
    assert_all_same(results(network, forward, inputs, state), expected)
    expected = results(network, objective, inputs, targets, state)
    assert_all_same(results(network, compiled, inputs, targets, state), expected)


# torch warns when it imports its compiler.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_inductor_compiles_a_model(empty_compile_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = model("gru")
    compiled = torch.compile(network, fullgraph=True, backend="inductor")

    expected = results(network, network, tokens())
    assert_all_same(results(network, compiled, tokens()), expected)


@pytest.mark.slow
def test_compiled_log_probabilities_are_the_same(empty_compile_cache):
    network = model().eval()
    compiled = torch.compile(network.log_probs, fullgraph=True, backend="aot_eager")
    inputs, targets = tokens(), tokens(seed=2)

    expected, _ = network.log_probs(inputs, targets)
    assert_same(compiled(inputs, targets)[0], expected)


def test_an_exported_program_runs_without_kernels(monkeypatch):
    network = model("peephole-lstm").eval()
    program = torch.export.export(network, (tokens(),)).module()
    expected = network(tokens())

    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")

    assert_all_same(pytree.tree_leaves(program(tokens())), pytree.tree_leaves(expected))


# torch reads .grad of the tensors that it resumes with after the graph break.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_without_fullgraph_dropout_draws_the_same_masks(empty_compile_cache):
    network, eager = model(dropout=0.5), model(dropout=0.5)
    compiled = torch.compile(network, backend="aot_eager")

    for _ in range(2):
        assert_same(compiled(tokens())[0], eager(tokens())[0])


@each_cell
def test_an_exported_program_accepts_any_number_of_steps_and_rows(name, options):
    network = model(name, options).eval()
    state = network(tokens())[1].detach()
    sizes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    rows = [tuple({0: sizes[1]} for _ in parts) for parts in state]

    program = torch.export.export(network, (tokens(), state), dynamic_shapes=(sizes, rows))

    for steps, batch_size in ((9, 2), (2, 7)):
        inputs = tokens(steps, batch_size, seed=3)
        state = network(tokens(2, batch_size))[1].detach()
        actual, expected = program.module()(inputs, state), network(inputs, state)
        assert_all_same(pytree.tree_leaves(actual), pytree.tree_leaves(expected))


def test_an_exported_program_can_be_saved_and_loaded():
    network = model().eval()
    file = io.BytesIO()

    torch.export.save(torch.export.export(network, (tokens(),)), file)
    file.seek(0)
    logits, state = torch.export.load(file).module()(tokens())

    expected, expected_state = network(tokens())
    assert_same(logits, expected)
    assert type(state) is type(expected_state)


def pickled(network):
    return pickle.loads(pickle.dumps(network))  # noqa: S301 - its own bytes


@each_cell
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_equal_and_independent(name, options, copied):
    network = model(name, options, dropout=0.5)
    network(tokens())  # advances the generator
    copy_of_network = copied(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}

    assert torch.equal(copy_of_network(tokens())[0], network(tokens())[0])
    for parameter in copy_of_network.parameters():
        parameter.data += 1
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


@each_cell
def test_a_state_dict_loads_into_another_model(name, options):
    source, target = model(name, options, seed=1), model(name, options, seed=2)
    assert not torch.equal(target(tokens())[0], source(tokens())[0])

    target.load_state_dict(source.state_dict(), strict=True)

    assert torch.equal(target(tokens())[0], source(tokens())[0])


@each_cell
def test_a_model_converts_to_float64_and_back(name, options):
    language = task(name, options)
    network = language.model

    def objective(inputs, targets):
        return loss(language, inputs, targets).objective

    float32 = results(network, objective, tokens(), tokens(seed=2))
    float64 = results(network.to(torch.float64), objective, tokens(), tokens(seed=2))
    restored = results(network.to(torch.float32), objective, tokens(), tokens(seed=2))

    for double, single, again in zip(float64, float32, restored, strict=True):
        assert double.dtype == torch.float64
        assert_same(single, double.float())
        assert torch.equal(again, single)


@each_cell
def test_functional_call_uses_the_given_parameters(name, options):
    network, other = model(name, options, seed=1), model(name, options, seed=2)
    replaced = {key: value.detach().requires_grad_() for key, value in other.named_parameters()}

    logits, _ = torch.func.functional_call(network, replaced, (tokens(),))
    gradients = torch.autograd.grad(logits.square().sum(), list(replaced.values()))

    expected, _ = other(tokens())
    assert torch.equal(logits, expected)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(other.parameters()))
    assert all(map(torch.equal, gradients, expected_gradients))
    assert not torch.equal(logits, network(tokens())[0])


def test_every_cell_is_among_those_tested():
    assert {"rnn", "simple-gru", "gru", "lstm", "peephole-lstm"} <= {name for name, _ in CELLS}
