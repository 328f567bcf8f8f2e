"""The tree of settings: a sentence, a unit and a range for each, which is also its help text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator

# Strict: true is not taken for 1.
PositiveInt = Annotated[int, Field(ge=1, le=10**12, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**12, strict=True)]
# What no machine can hold is refused before it is tried.
Size = Annotated[int, Field(ge=1, le=10**6, strict=True)]
Few = Annotated[int, Field(ge=1, le=1000, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class For:
    """Says that a setting means something with certain values of another one only.

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
_TRANSLATION = For("data.task", ("translate",))
_TIED = For("data.task", ("language-model", "translate"))


def _with_cell(*names: str) -> For:
    return For("model.cell", names)


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Which text, and how it is cut into tokens."""

    task: Literal["language-model", "classify", "tag", "frames", "translate"] = "language-model"
    """What is predicted: the next token, a label, a tag for each token, a frame, a translation."""
    train: Annotated[tuple[str, ...], Field(min_length=1)] = ("python-docs",)
    """Training text: files, globs, .gz files, - for standard input, or names of corpora."""
    valid: tuple[str, ...] = ()
    """Validation text; without it, the tail of the training text (see data.valid_fraction)."""
    test: tuple[str, ...] = ()
    """Test text, predicted by `evaluate` alone; without it, see data.test_fraction."""
    labelled: Annotated[bool, _TEXT_TASK] = False
    """Whether the data is lines of `label<TAB>text`, and texts are predicted from their labels."""
    target: Annotated[tuple[str, ...], _TRANSLATION] = ()
    """Translations of the training text, line by line; without it, data.train has both."""
    valid_target: Annotated[tuple[str, ...], _TRANSLATION] = ()
    """Translations of the validation text, line by line."""
    test_target: Annotated[tuple[str, ...], _TRANSLATION] = ()
    """Translations of the test text, line by line."""
    valid_fraction: Fraction | None = None
    """Fraction of the data, 0 to 1, for validation: the tail of a text, or examples at random."""
    test_fraction: Fraction | None = None
    """Fraction of the data, 0 to 1, for testing: the very end of a text, or examples at random."""
    level: Annotated[Literal["word", "char", "byte"], _LEVELS] = "word"
    """What a token is: a word, a character or a byte of UTF-8."""
    splitter: Annotated[Literal["whitespace", "words"], _TEXT] = "words"
    """Words between white space (text tokenized before), or words and punctuation of raw prose."""
    vocab_size: Annotated[int, Field(ge=3, le=10**9, strict=True), _TOKENS] = 10_000
    """Most words in the vocabulary, `<UNK>` and `<EOS>` included, 3 or more."""
    min_count: Annotated[PositiveInt, _TOKENS] = 1
    """Least occurrences of a word or character that enters the vocabulary, 1 or more."""
    lowercase: Annotated[bool, _TOKENS] = False
    """Whether words are put in lower case first."""
    nfc: Annotated[bool, _TOKENS] = False
    """Whether text is brought to Unicode's form NFC first: é is one character, however written."""

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
        return self


CELLS = ("rnn", "simple-gru", "gru", "lstm", "peephole-lstm")
"""The cells of lmtrain; any other name is a cell of the user's own."""


class ModelConfig(Section, extra="allow"):
    """The network. Settings with other names are options of a cell of the user's own."""

    cell: str = "lstm"
    """The recurrent cell: rnn, simple-gru, gru, lstm, peephole-lstm, or FILE.py:NAME, your own."""
    embedding_size: Annotated[Size | None, _TOKENS] = None
    """Numbers a token is embedded in, 1 or more; without it, as many as model.hidden_size."""
    hidden_size: Size = 200
    """Hidden units of each layer, 1 or more."""
    num_layers: Few = 2
    """Recurrent layers, 1 to 1,000."""
    dropout: Fraction = 0.0
    """Chance, 0 to 1, that a number between layers (never within time) is dropped."""
    input_dropout: Fraction | None = None
    """Chance, 0 to 1, that a number of an embedded token is; without it, model.dropout."""
    output_dropout: Fraction | None = None
    """Chance, 0 to 1, that a number of the last layer is; without it, model.dropout."""
    locked_dropout: bool = False
    """Whether what is dropped stays dropped for all train.seq_len time steps."""
    word_dropout: Annotated[Fraction, _TOKENS] = 0.0
    """Chance, 0 to 1, that a word is dropped wherever it stands in the input."""
    weight_dropout: Fraction = 0.0
    """Chance, 0 to 1, that a weight from one time step's state to the next is dropped."""
    activation_regularization: Annotated[NonNegativeFloat, _TEXT_TASK, _STREAMS] = 0.0
    """Factor of the mean square of the last layer's dropped numbers, added to the loss."""
    temporal_regularization: Annotated[NonNegativeFloat, _TEXT_TASK, _STREAMS] = 0.0
    """Factor of the mean square of the last layer's change from step to step, added too."""
    residual: bool = False
    """Whether layers after the first add their input to their output, where sizes agree."""
    bidirectional: Annotated[bool, _ENCODER] = False
    """Whether each layer also runs from the last token to the first, with weights of its own."""
    pooling: Annotated[Literal["last", "mean", "max"], _LABELS] = "last"
    """Hidden states that the label is predicted from: the last, or their mean or maximum."""
    characters: Annotated[bool, For("data.task", ("tag",))] = False
    """Whether a word's vector also comes from its characters, for rare and unknown words."""
    attention: Annotated[Literal["dot", "additive"] | None, _TRANSLATION] = "dot"
    """Attention of the decoder to the encoder's states; none for their last state alone."""
    tied_embeddings: Annotated[bool, _TIED, _STREAMS] = False
    """Whether the output weights are the embeddings; the last layer has their size then."""
    softmax: Annotated[Literal["full", "sampled", "adaptive"], _TEXT_TASK, _STREAMS] = "full"
    """Over all words; over a sample of them in training; or with cheaper rare words."""
    samples: Annotated[PositiveInt, For("model.softmax", ("sampled",))] = 1000
    """Softmax sampled: words drawn for a step, 1 or more; all, if there are no more in the text."""
    cell_output: Annotated[Literal["tanh", "linear"], _with_cell("lstm", "peephole-lstm")] = "tanh"
    """LSTM cells: a = Γo ∘ tanh(c), or a = Γo ∘ c, which has no bound and diverges more easily."""
    peephole: Annotated[Literal["full", "diagonal"], _with_cell("peephole-lstm")] = "full"
    """Peephole LSTM: gates see c⟨t−1⟩ through a whole matrix, or each unit its own alone."""
    activation: Annotated[Literal["tanh", "relu"], _with_cell("rnn")] = "tanh"
    """The rnn cell's g."""
    init_scale: PositiveFloat | None = None
    """All weights start uniform in ± this; without it, orthogonal recurrent matrices and more."""
    forget_bias: Annotated[float, _with_cell("lstm", "peephole-lstm")] = 1.0
    """What the forget gate's bias starts at; 1 lets the state live from the first step."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        is_fitting = self.num_layers > 1 or self.embedding_size in (None, self.hidden_size)
        if self.tied_embeddings and not is_fitting:
            raise ValueError(
                f"model.tied_embeddings with one layer needs embedding_size {self.embedding_size} "
                f"to equal hidden_size {self.hidden_size}"
            )
        if self.tied_embeddings and self.softmax == "adaptive":
            raise ValueError("model.tied_embeddings: an adaptive softmax has weights of its own")
        return self


_BY_EPOCH = For("optimizer.schedule", ("step",))


class OptimizerConfig(Section):
    """How the gradient becomes an update."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    """The update rule."""
    learning_rate: PositiveFloat = 0.002
    """Learning rate at its highest, above 0."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """Learning rate over time: constant, falling by epochs, or half a cosine to 0."""
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises from 0 first."""
    decay: Annotated[float, Field(gt=0, le=1), _BY_EPOCH] = 0.5
    """Schedule step: factor, above 0 to 1, for each epoch past optimizer.decay_after_epochs."""
    decay_after_epochs: Annotated[NonNegativeInt, _BY_EPOCH] = 4
    """Schedule step: epochs at the full learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of the weights per update over the learning rate (adamw), or L2 penalty (others)."""
    clip: Literal["l2", "l1"] = "l2"
    """Norm over all gradients together that is limited."""
    max_grad_norm: PositiveFloat | None = 5.0
    """The limit of optimizer.clip, above 0; none for no limit."""
    average: Literal["ema", "nt-asgd"] | None = None
    """Average of the weights that is kept: exponential, or since validation got worse."""
    average_decay: Annotated[Fraction, For("optimizer.average", ("ema",))] = 0.999
    """Average ema: what is kept of it at each update, 0 to 1."""
    average_patience: Annotated[PositiveInt, For("optimizer.average", ("nt-asgd",))] = 5
    """Average nt-asgd: validations that may be worse than one before them."""


class TrainConfig(Section):
    """How long, how wide, how often, and where."""

    batch_size: PositiveInt = 20
    """Streams of text, or examples, trained on side by side, 1 or more."""
    seq_len: Annotated[PositiveInt, _TEXT_TASK, _STREAMS] = 35
    """Steps of truncated backpropagation through time, 1 or more."""
    random_seq_len: Annotated[bool, _TEXT_TASK, _STREAMS] = False
    """Whether each update draws its steps around train.seq_len, so that no epoch is cut alike."""
    state_reset: Annotated[Fraction, _TEXT_TASK, _STREAMS] = 0.0
    """Chance, 0 to 1, that a stream begins a window with zeros, as new text does, not its state."""
    max_epochs: PositiveInt = 10
    """Passes over the training text, 1 or more."""
    max_steps: PositiveInt | None = None
    """Updates after which training ends, if train.max_epochs does not end it before."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: ends training, or leaves its update out."""
    max_seconds: PositiveFloat | None = None
    """Seconds, of all starts of a run together, after which its training and learning rate end."""
    seed: Seed = 1
    """Seed of weights, dropout and samples, 0 or more and below 2^64."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes CUDA if there is any."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of activations and products in training: auto takes bf16 where the processor has it."""
    deterministic: bool = False
    """Whether CUDA takes only operations that give the same bits each time; some are slower."""
    threads: PositiveInt | None = None
    """Processor threads; without it, the cores open to this process, divided among --devices."""
    eval_every: PositiveInt | None = None
    """Updates between validations; without it, once an epoch."""
    save_every: PositiveInt | None = None
    """Updates between checkpoints beside those after each validation; none without it."""
    log_every: PositiveInt = 20
    """Updates that one line of metrics.jsonl covers, 1 or more."""
    log_gradients: Annotated[PositiveInt | None, _TEXT_TASK] = None
    """Updates between measurements of how gradients vanish over time; none without it."""
    patience: PositiveInt | None = None
    """Validations without a new best after which training stops early; never without it."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept beside the best, 1 or more."""


class Config(Section):
    """All settings of a run."""

    data: DataConfig = DataConfig()
    """Which text, and how it is cut into tokens."""
    model: ModelConfig = ModelConfig()
    """The network."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the gradient becomes an update."""
    train: TrainConfig = TrainConfig()
    """How long, how wide, how often, and where."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        problems = list(self._meaningless())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _meaningless(self) -> Iterator[str]:
        """What is wrong with settings that mean nothing with the values of others."""
        for name in unknown_options(self.model.model_dump()):
            yield f"{UNKNOWN}model.{name}"
        for path, field in _fields():
            section, name = path.split(".")
            value = getattr(getattr(self, section), name)
            for needed in (each for each in field.metadata if isinstance(each, For)):
                other = self._at(needed.path)
                is_own_cell = needed.path == "model.cell" and other not in CELLS
                if value != field.default and other not in needed.values and not is_own_cell:
                    means = " or ".join(map(str, needed.values))
                    yield (
                        f"{path} = {value} means nothing with {needed.path} = {other}: "
                        f"it is for {means}"
                    )

    def _at(self, path: str) -> Any:
        section, name = path.split(".")
        return getattr(getattr(self, section), name)

    @property
    def embedding_size(self) -> int:
        """Numbers a token is embedded in."""
        return self.model.embedding_size or self.model.hidden_size


UNKNOWN = "unknown setting "
"""What a message about a setting that does not exist begins with; its path follows."""


def unknown_options(model: Any) -> list[str]:
    """The names in a section `model` that are no settings, where its cell takes no others."""
    if not isinstance(model, dict) or model.get("cell", "lstm") not in CELLS:
        return []
    return [name for name in model if name not in ModelConfig.model_fields]


def _fields() -> Iterator[tuple[str, Any]]:
    """Every setting's path with its field."""
    for section, part in Config.model_fields.items():
        for name, field in dict(part.annotation.model_fields).items():  # type: ignore[union-attr]
            yield f"{section}.{name}", field


def settings() -> dict[str, str]:
    """Every setting's path with its sentence."""
    return {path: field.description or "" for path, field in _fields()}


def default(path: str) -> Any:
    """The default of the setting at `path`."""
    return Config()._at(path)
