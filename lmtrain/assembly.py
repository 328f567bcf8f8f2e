"""Where the tree of settings becomes plain arguments: the texts, the tokenizer and the model.

Below, nothing knows the tree.
"""

from collections.abc import Mapping, Sequence

import torch

from lmtrain.cells import cell_class
from lmtrain.data import corpus
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokens import Tokens, cached_tokenizer, load_tokens, token_key, tokenize
from lmtrain.errors import CheckpointError
from lmtrain.kernels.native import library
from lmtrain.model.language_model import LanguageModel, Regularization
from lmtrain.schema import Config


def prepare(config: Config) -> tuple[Tokenizer, dict[str, Tokens]]:
    """The tokenizer and the tokens of the training, validation and test text.

    Raises:
        TextError: text is missing, unreadable or too short.
        MachineError: the token cache cannot be written.
    """
    data = config.data
    parts = _open_parts(config)
    tokenizer = cached_tokenizer(
        parts["train"],
        corpus.Text(parts["train"].sources),
        data.level,
        data.splitter,
        vocab_size=data.vocab_size,
        min_count=data.min_count,
        lowercase=data.lowercase,
    )
    return tokenizer, {part: tokenize(text, tokenizer) for part, text in parts.items()}


def _open_parts(config: Config) -> Mapping[str, corpus.Text]:
    data = config.data
    return corpus.open_parts(
        data.train,
        data.valid,
        data.test,
        valid_fraction=data.valid_fraction,
        test_fraction=data.test_fraction,
        at_line_ends=data.level == "word",
    )


def references(texts: Mapping[str, Tokens]) -> dict[str, dict[str, str]]:
    """What finds the texts again: their names and their keys in the token cache."""
    return {part: {"name": tokens.name, "key": tokens.key} for part, tokens in texts.items()}


def find_texts(
    saved: Mapping[str, Mapping[str, str]],
    config: Config,
    tokenizer: Tokenizer,
    parts: Sequence[str] = ("train", "valid", "test"),
) -> dict[str, Tokens]:
    """The texts of a run again: from the token cache or, if it lost them, cut anew.

    Args:
        saved: what `references` gave when the run began.
        config: the run's settings.
        tokenizer: the run's tokenizer.
        parts: which texts are wanted; those the run never had are left aside.

    Raises:
        TextError: a text is gone.
        CheckpointError: a text is not what it was.
    """
    wanted = {part: saved[part] for part in parts if part in saved}
    found = {}
    for part, reference in wanted.items():
        tokens = load_tokens(reference["key"], tokenizer.vocab_size, reference["name"])
        if tokens is None:
            break
        found[part] = tokens
    if len(found) == len(wanted):
        return found
    opened = _open_parts(config)
    for part, reference in wanted.items():
        # Compared before anything of it is kept: the run may come from anyone, and so the path.
        if part not in opened or token_key(opened[part], tokenizer) != reference["key"]:
            raise CheckpointError(
                f"the {part} text {reference['name']} is not the one this run was trained with"
            )
        found[part] = tokenize(opened[part], tokenizer)
    return found


def is_mixed(config: Config) -> bool:
    """Whether training steps take bf16 on this machine."""
    if config.train.precision != "auto":
        return config.train.precision == "bf16"
    # A model trained with CUDA is loaded where there is none, too.
    name = config.train.device
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    return library.has_bf16()


def weight_shapes(config: Config, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that the settings make; no memory is taken for them.

    Raises:
        ConfigError: no such cell, or sizes that do not fit.
    """
    with torch.device("meta"):
        model = build_model(config, vocab_size)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _cell_options(config: Config) -> dict[str, str]:
    """The settings that are options of the chosen cell."""
    network = config.model
    settings = {
        "cell_output": network.cell_output,
        "peephole": network.peephole,
        "activation": network.activation,
    }
    options = cell_class(network.cell).options
    return {name: value for name, value in settings.items() if name in options}


def build_model(config: Config, vocab_size: int, *, is_shared: bool = False) -> LanguageModel:
    """The model that the settings describe, with its first weights.

    Args:
        config: the settings.
        vocab_size: tokens in the vocabulary.
        is_shared: whether several processes train it, which exchange whole gradients.

    Raises:
        ConfigError: no such cell, or sizes that do not fit.
    """
    network = config.model
    return LanguageModel(
        vocab_size,
        cell=network.cell,
        embedding_size=config.embedding_size,
        hidden_size=network.hidden_size,
        num_layers=network.num_layers,
        regularization=Regularization(
            dropout=network.dropout,
            input_dropout=network.input_dropout,
            output_dropout=network.output_dropout,
            is_locked=network.locked_dropout,
            word_dropout=network.word_dropout,
            weight_dropout=network.weight_dropout,
            activation=network.activation_regularization,
            temporal=network.temporal_regularization,
        ),
        is_residual=network.residual,
        tied_embeddings=network.tied_embeddings,
        softmax=network.softmax,
        num_samples=network.samples,
        init_scale=network.init_scale,
        forget_bias=network.forget_bias,
        cell_options=_cell_options(config),
        is_mixed=is_mixed(config),
        # Rules that remember or decay need every row in every step.
        has_sparse_embedding=config.optimizer.name == "sgd"
        and config.optimizer.weight_decay == 0
        and not is_shared,
        seed=config.train.seed,
    )
