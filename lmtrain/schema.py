"""The tree of settings: a sentence with the range of each, which is also its help text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

# Strict: true is not taken for 1.
PositiveInt = Annotated[int, Field(ge=1, le=10**12, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**12, strict=True)]
# Sizes beyond the memory of any machine are refused before allocation.
Size = Annotated[int, Field(ge=1, le=10**6, strict=True)]
Few = Annotated[int, Field(ge=1, le=1000, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class For:
    """States that a setting applies to certain values of another setting only.

    Args:
        path: the other setting.
        values: its values.
    """

    path: str
    values: tuple[Any, ...]


_TEXT_TASK = For("data.task", ("language-model",))
_STREAMS = For("data.labelled", (False,))
_LABELS = For("data.task", ("classify",))
_ENCODER = For("data.task", ("classify", "tag", "translate"))
_TOKENS = For("data.task", ("language-model", "classify", "tag", "translate"))
_TEXT = For("data.task", ("language-model", "classify", "translate"))
_LEVELS = For("data.task", ("language-model", "classify"))
_ONE_LANGUAGE = For("data.task", ("language-model", "classify", "tag"))
_TRANSLATION = For("data.task", ("translate",))
_TIED = For("data.task", ("language-model", "translate"))


def _with_cell(*names: str) -> For:
    return For("model.cell", names)


@dataclass(frozen=True)
class Names:
    """Says that certain values of a setting whose values are free are names of a fixed set.

    Args:
        names: the names.
    """

    names: tuple[str, ...]


def canonical(value: Any, names: Iterable[str]) -> Any:
    """The one of `names` that a text is in upper or lower case, or with `_` for `-`; else `value`.

    Example:
        >>> canonical("Peephole_LSTM", ["lstm", "peephole-lstm"])
        'peephole-lstm'
    """
    if not isinstance(value, str):
        return value
    folded = value.lower().replace("_", "-")
    return folded if folded in names else value


def _names(field: FieldInfo) -> list[str]:
    """The names that are values of a setting."""
    kinds = (field.annotation, *get_args(field.annotation))
    found = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    marked = (each.names for each in field.metadata if isinstance(each, Names))
    return [*found, *(name for names in marked for name in names)]


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _in_any_case(cls, value: object, info: ValidationInfo) -> object:
        return canonical(value, _names(cls.model_fields[info.field_name or ""]))


class DataConfig(Section):
    """Data, and how text is tokenized."""

    task: Literal["language-model", "classify", "tag", "frames", "translate"] = "language-model"
    """Task: language-model (next token), classify (one label), tag (a tag per token), frames (next
    vector) or translate (another sentence)."""
    train: Annotated[tuple[str, ...], Field(min_length=1)] = ("python-docs",)
    """Training data: files, glob patterns, `.gz` files, `-` for standard input, or names of corpora
    that `lmtrain corpora` lists."""
    valid: tuple[str, ...] = ()
    """Validation data, same forms as data.train; if empty, data.valid_fraction of the training data
    is held out."""
    test: tuple[str, ...] = ()
    """Test data, same forms as data.train, which only `lmtrain evaluate` reads; if empty, see
    data.test_fraction."""
    labelled: Annotated[bool, _TEXT_TASK] = False
    """Train a language model on lines `label<TAB>text`, in which the label comes first, so that
    `lmtrain sample --label` works."""
    target: Annotated[tuple[str, ...], _TRANSLATION] = ()
    """Translations of data.train, line by line; if empty, each line of data.train is
    `source<TAB>target`."""
    valid_target: Annotated[tuple[str, ...], _TRANSLATION] = ()
    """Translations of data.valid, line by line."""
    test_target: Annotated[tuple[str, ...], _TRANSLATION] = ()
    """Translations of data.test, line by line."""
    valid_fraction: Fraction | None = None
    """Fraction of the training data held out for validation, 0 to 1: the end of a text, random
    examples of other data; none means 0.1 or the corpus's own."""
    test_fraction: Fraction | None = None
    """Fraction of the training data held out for testing, 0 to 1: the end of a text, random
    examples of other data; none means 0 or the corpus's own."""
    level: Annotated[Literal["word", "char", "byte"], _LEVELS] = "word"
    """Token unit: word, char (Unicode character) or byte (of UTF-8); use char or byte for small
    texts, names and code."""
    splitter: Annotated[Literal["whitespace", "words"], _TEXT] = "words"
    """Word splitting: words separates punctuation in raw prose; whitespace only splits at spaces,
    for text that is already tokenized."""
    vocabulary: Annotated[str | None, _ONE_LANGUAGE, For("data.level", ("word",))] = None
    """Vocabulary file, one word per line in the order of the ids, for perplexities comparable with
    other programs; none means the most frequent words of the training data."""
    vocab_size: Annotated[int, Field(ge=3, le=10**9, strict=True), _TOKENS] = 10_000
    """Vocabulary size, 3 or more, `<UNK>` and `<EOS>` included; less frequent words become
    `<UNK>`."""
    min_count: Annotated[PositiveInt, _TOKENS] = 1
    """Minimum number of occurrences of a token in the vocabulary, 1 or more; raise it so that
    `<UNK>` is seen in training."""
    lowercase: Annotated[bool, _TOKENS] = False
    """Convert text to lower case: fewer unknown words, but case is lost."""
    nfc: Annotated[bool, _TOKENS] = False
    """Normalize text to Unicode NFC first, so that é is one character however it was typed; use it
    for text from several sources."""

    @field_validator(
        "train", "valid", "test", "target", "valid_target", "test_target", mode="before"
    )
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if (self.valid_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError("data.valid_fraction and data.test_fraction leave no training text")
        if self.vocabulary is not None:
            for name in ("vocab_size", "min_count"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(
                        f"data.{name} = {value} cannot be combined with data.vocabulary, which is "
                        "the vocabulary as it is"
                    )
            if self.task == "translate":
                raise ValueError(
                    "data.vocabulary is one vocabulary, and data.task = translate has one for "
                    "each language"
                )
        for split in ("valid", "test"):
            if getattr(self, f"{split}_target") and not getattr(self, split):
                raise ValueError(f"data.{split}_target needs data.{split}, the sources")
        return self


CELLS = ("rnn", "simple-gru", "gru", "lstm", "peephole-lstm")
"""The cells of lmtrain; any other name is a cell of the user's own."""


class ModelConfig(Section, extra="allow"):
    """The network and its regularization. Other names are options of a user-defined cell."""

    cell: Annotated[str, Names(CELLS)] = "lstm"
    """Recurrent cell: rnn, simple-gru, gru, lstm, peephole-lstm, or FILE.py:NAME for a cell of your
    own."""
    embedding_size: Annotated[Size | None, _TOKENS] = None
    """Embedding size, 1 or more; none means model.hidden_size."""
    embeddings: Annotated[str | None, _TOKENS, For("data.level", ("word",))] = None
    """File of pretrained word vectors (word2vec text, GloVe or fastText, also `.gz`) to initialize
    the embeddings with, those of the source in translation; use it for small training data."""
    freeze_embeddings: Annotated[bool, _TOKENS] = False
    """Keep the embeddings initialized by model.embeddings fixed during training, words without a
    vector included; use it for very small training data."""
    hidden_size: Size = 200
    """Hidden units per layer, 1 or more; more units fit more data, cost more time per step and
    overfit sooner."""
    num_layers: Few = 2
    """Number of recurrent layers, 1 to 1,000; try 1 to 3."""
    dropout: Fraction = 0.0
    """Dropout probability between layers (not across time steps), 0 to 1; raise it when validation
    loss rises while training loss falls."""
    input_dropout: Fraction | None = None
    """Dropout probability of the input vectors, 0 to 1; none means model.dropout."""
    output_dropout: Fraction | None = None
    """Dropout probability of the last layer's output, 0 to 1; none means model.dropout."""
    locked_dropout: bool = False
    """Use the same dropout mask at every time step of a sequence (variational dropout)."""
    word_dropout: Annotated[Fraction, _TOKENS] = 0.0
    """Probability, 0 to 1, that an input word is dropped at all its positions in a batch (embedding
    dropout)."""
    weight_dropout: Fraction = 0.0
    """Dropout probability of the recurrent weights (DropConnect), 0 to 1; raise it like
    model.dropout."""
    activation_regularization: Annotated[NonNegativeFloat, _TEXT_TASK, _STREAMS] = 0.0
    """Factor, 0 or more, of an L2 penalty on the last layer's output after dropout (AR); AWD-LSTM
    uses 2."""
    temporal_regularization: Annotated[NonNegativeFloat, _TEXT_TASK, _STREAMS] = 0.0
    """Factor, 0 or more, of an L2 penalty on changes of the last layer's output between steps
    (TAR); AWD-LSTM uses 1."""
    residual: bool = False
    """Add the input of each layer after the first to its output, where sizes agree; can help deep
    networks."""
    bidirectional: Annotated[bool, _ENCODER] = False
    """Also run each layer from the end to the start, with its own weights; usually better for tags
    and labels."""
    pooling: Annotated[Literal["last", "mean", "max"], _LABELS] = "last"
    """Hidden states that predict the label: the last, or the mean or maximum over time, which suit
    long sequences."""
    characters: Annotated[bool, For("data.task", ("tag",))] = False
    """Add a vector computed from a word's characters to its embedding; helps with rare and unknown
    words."""
    attention: Annotated[Literal["dot", "additive"] | None, _TRANSLATION] = "dot"
    """Attention of the decoder over the encoder's states: dot, additive, or none to use the last
    state alone."""
    tied_embeddings: Annotated[bool, _TIED, _STREAMS] = False
    """Share the embedding with the output weights, which saves parameters; the last layer gets
    model.embedding_size units."""
    softmax: Annotated[Literal["full", "sampled", "adaptive"], _TEXT_TASK, _STREAMS] = "full"
    """Output layer: full softmax, sampled (estimated in training, faster), or adaptive (faster for
    large vocabularies)."""
    samples: Annotated[PositiveInt, For("model.softmax", ("sampled",))] = 1000
    """Number of samples of the sampled softmax per step, 1 or more; fewer are faster and less
    accurate."""
    cell_output: Annotated[Literal["tanh", "linear"], _with_cell("lstm", "peephole-lstm")] = "tanh"
    """LSTM output: tanh for Γo ∘ tanh(c), or linear for Γo ∘ c, which is unbounded and diverges
    more easily."""
    peephole: Annotated[Literal["full", "diagonal"], _with_cell("peephole-lstm")] = "full"
    """Peephole connections of the gates to the cell state: full matrices, or diagonal, which
    usually trains better."""
    activation: Annotated[Literal["tanh", "relu"], _with_cell("rnn")] = "tanh"
    """Activation of the rnn cell: tanh or relu."""
    init_scale: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Initial weights are uniform in ± this value, above 0 up to 1,000; none means orthogonal
    recurrent weights and scaled others."""
    frequency_bias: Annotated[
        bool, _TEXT_TASK, _STREAMS, For("model.softmax", ("full", "sampled"))
    ] = False
    """Whether the output biases start as the log frequencies of the tokens, so that the first
    predictions are frequencies. A single layer then learns faster; with SGD, several layers learn
    slower and may learn nothing for some epochs."""
    forget_bias: Annotated[float, _with_cell("lstm", "peephole-lstm")] = 1.0
    """Initial bias of the forget gate; 1 keeps most of the cell state at the start of training, 0
    half of it per step."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.tied_embeddings and self.softmax == "adaptive":
            raise ValueError("model.tied_embeddings: an adaptive softmax has weights of its own")
        if self.freeze_embeddings and self.embeddings is None:
            raise ValueError("model.freeze_embeddings needs model.embeddings")
        return self


_BY_EPOCH = For("optimizer.schedule", ("step",))


class OptimizerConfig(Section):
    """Optimizer, learning rate, gradient clipping, weight averaging."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    """Optimizer: adamw is a robust default; sgd with a learning rate near 1 and clipping often
    generalizes better on words."""
    learning_rate: PositiveFloat = 0.002
    """Peak learning rate, above 0; find a good one with `lmtrain find-lr`, lower it if training
    diverges."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """Learning rate schedule after warmup: constant, step (see optimizer.decay), or cosine down to
    0."""
    warmup_steps: NonNegativeInt = 0
    """Number of updates over which the learning rate rises linearly from 0; raise it if the first
    updates diverge."""
    decay: Annotated[float, Field(gt=0, le=1), _BY_EPOCH] = 0.5
    """Factor of the learning rate per epoch once the step schedule decays, above 0 up to 1."""
    decay_after_epochs: Annotated[NonNegativeInt, _BY_EPOCH] = 4
    """Number of epochs before the step schedule starts to decay, 0 or more."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, 0 or more: decoupled with adamw, an L2 penalty with sgd and adam; raise it
    against overfitting."""
    clip: Literal["l2", "l1"] = "l2"
    """Norm used for gradient clipping, over all gradients together unless embeddings have a
    threshold of their own: l2 or l1."""
    max_grad_norm: PositiveFloat | None = 5.0
    """Gradient clipping threshold, above 0; none turns clipping off."""
    max_embedding_grad_norm: Annotated[PositiveFloat | None, _TOKENS] = None
    """Gradient clipping threshold of embeddings, which are then clipped apart from other weights,
    above 0; none clips all together."""
    average: Literal["ema", "nt-asgd"] | None = None
    """Average of the weights that is validated and saved: ema (exponential), nt-asgd (mean since
    validation stopped improving), or none."""
    average_decay: Annotated[Fraction, For("optimizer.average", ("ema",))] = 0.999
    """Decay of the exponential moving average per update, 0 to 1; closer to 1 averages over more
    updates."""
    average_patience: Annotated[PositiveInt, For("optimizer.average", ("nt-asgd",))] = 5
    """Number of validations without improvement before nt-asgd starts to average, 1 or more."""


class TrainConfig(Section):
    """Training: duration, batches, hardware, logging."""

    batch_size: PositiveInt = 20
    """Parallel text streams, or examples, per update, 1 or more; larger is faster per token, but
    makes fewer updates."""
    seq_len: Annotated[PositiveInt, _TEXT_TASK, _STREAMS] = 35
    """Time steps of truncated backpropagation through time, 1 or more; longer learns longer
    dependencies, costs memory."""
    random_seq_len: Annotated[bool, _TEXT_TASK, _STREAMS] = False
    """Vary the windows from epoch to epoch: their length, around train.seq_len, and the position at
    which each stream starts."""
    state_reset: Annotated[Fraction, _TEXT_TASK, _STREAMS] = 0.1
    """Fraction, 0 to 1, of windows that start with a zero state, chosen among those after the end
    of a line; teaches the model to start texts, as sampling does."""
    noise: Annotated[Fraction, _TEXT_TASK, _STREAMS] = 0.0
    """Rate, 0 to 1, at which input tokens are replaced at random, most often those that many
    different tokens follow; try 0.1 against overfitting on small texts."""
    max_epochs: PositiveInt = 10
    """Number of passes over the training data, 1 or more."""
    max_steps: PositiveInt | None = None
    """Maximum number of updates, 1 or more, if train.max_epochs does not end training before."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: stop the training, or skip the update."""
    max_seconds: PositiveFloat | None = None
    """Time limit in seconds over all starts of a run, above 0; the learning rate schedule adapts to
    it."""
    seed: Seed = 1
    """Random seed of weights, dropout and the order of examples, 0 or more and below 2^64."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device: auto uses CUDA if it is available."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of training steps: auto uses bf16 where the processor supports it, else fp32;
    evaluation is always fp32."""
    deterministic: bool = False
    """Use only deterministic operations on CUDA; some are slower."""
    threads: Few | None = None
    """Number of CPU threads, 1 to 1,000; none means all available cores, divided among the
    processes of --devices."""
    eval_every: PositiveInt | None = None
    """Number of updates between validations; none means once per epoch."""
    save_every: PositiveInt | None = None
    """Number of updates between checkpoints, in addition to those at validations; none means no
    others."""
    log_every: PositiveInt = 20
    """Number of updates per line of metrics.jsonl, 1 or more."""
    log_gradients: Annotated[PositiveInt | None, _TEXT_TASK, _STREAMS] = None
    """Number of updates between measurements of gradient norms over time (vanishing gradients);
    none means never."""
    patience: PositiveInt | None = None
    """Number of validations without improvement after which training stops early; none means
    never."""
    keep_checkpoints: PositiveInt = 2
    """Number of recent checkpoints to keep besides the best one, 1 or more."""


class Config(Section):
    """All settings of a run."""

    data: DataConfig = DataConfig()
    """Data, and how text is tokenized."""
    model: ModelConfig = ModelConfig()
    """The network and its regularization."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, learning rate, gradient clipping, weight averaging."""
    train: TrainConfig = TrainConfig()
    """Training: duration, batches, hardware, logging."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        problems = list(self._meaningless())
        network = self.model
        is_fitting = network.num_layers > 1 or self.embedding_size == network.hidden_size
        # A decoder with attention maps to the size of its embeddings.
        if network.tied_embeddings and not is_fitting and self.data.task != "translate":
            problems.append(
                "model.tied_embeddings with one layer needs embedding_size "
                f"{network.embedding_size} to equal hidden_size {network.hidden_size}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _meaningless(self) -> Iterator[str]:
        """Settings that have no effect with the values of others, as messages."""
        for name in unknown_options(self.model.model_dump()):
            yield f"{UNKNOWN}model.{name}"
        is_tied = self.model.tied_embeddings and self.data.task != "translate"
        if self.model.freeze_embeddings and is_tied:
            yield (
                "model.freeze_embeddings cannot be combined with model.tied_embeddings: the output "
                "weights would be frozen, too"
            )
        for path, field in _fields():
            section, name = path.split(".")
            value = getattr(getattr(self, section), name)
            for needed in (each for each in field.metadata if isinstance(each, For)):
                other = self._at(needed.path)
                is_own_cell = needed.path == "model.cell" and other not in CELLS
                if value != field.default and other not in needed.values and not is_own_cell:
                    means = " or ".join(map(_as_written, needed.values))
                    yield (
                        f"{path} = {_as_written(value)} means nothing with "
                        f"{needed.path} = {_as_written(other)}: "
                        f"it is for {means}"
                    )

    def _at(self, path: str) -> Any:
        section, name = path.split(".")
        return getattr(getattr(self, section), name)

    @property
    def embedding_size(self) -> int:
        """Embedding size; model.hidden_size unless it is set."""
        return self.model.embedding_size or self.model.hidden_size


def _as_written(value: object) -> str:
    """A value as `--set` takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


UNKNOWN = "unknown setting "
"""Prefix of messages about settings that do not exist; the path follows."""


def unknown_options(model: Any) -> list[str]:
    """Unknown names in a section `model` whose cell is one of lmtrain's."""
    if not isinstance(model, dict) or model.get("cell", "lstm") not in CELLS:
        return []
    return [name for name in model if name not in ModelConfig.model_fields]


def _fields() -> Iterator[tuple[str, Any]]:
    """The path of every setting with its field."""
    for section, part in Config.model_fields.items():
        for name, field in dict(part.annotation.model_fields).items():  # type: ignore[union-attr]
            yield f"{section}.{name}", field


def settings() -> dict[str, str]:
    """The path of every setting with its sentence."""
    return {path: " ".join((field.description or "").split()) for path, field in _fields()}


def default(path: str) -> Any:
    """The default of the setting at `path`."""
    return Config()._at(path)
