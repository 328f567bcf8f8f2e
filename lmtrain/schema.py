"""The tree of settings: a sentence, a unit and a range for each, which is also its help text."""

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


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Which text, and how it is cut into tokens."""

    train: Annotated[tuple[str, ...], Field(min_length=1)] = ("python-docs",)
    """Training text: files, globs, .gz files, - for standard input, or names of corpora."""
    valid: tuple[str, ...] = ()
    """Validation text; without it, the tail of the training text (see data.valid_fraction)."""
    test: tuple[str, ...] = ()
    """Test text, predicted by `evaluate` alone; without it, see data.test_fraction."""
    valid_fraction: Fraction | None = None
    """Share of the text, 0 to 1, cut off its tail for validation; else customary or 0.1."""
    test_fraction: Fraction | None = None
    """Share of the text, 0 to 1, cut off its very end for testing; else customary or none."""
    level: Literal["word", "char", "byte"] = "word"
    """What a token is: a word, a character or a byte of UTF-8."""
    splitter: Literal["whitespace", "words"] = "words"
    """Words between white space (text tokenized before), or words and punctuation of raw prose."""
    vocab_size: Annotated[int, Field(ge=3, le=10**9, strict=True)] = 10_000
    """Most words in the vocabulary, `<UNK>` and `<EOS>` included, 3 or more."""
    min_count: PositiveInt = 1
    """Least occurrences of a word or character that enters the vocabulary, 1 or more."""
    lowercase: bool = False
    """Whether words are put in lower case first."""

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if (self.valid_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError("data.valid_fraction and data.test_fraction leave no training text")
        return self


class ModelConfig(Section):
    """The network."""

    cell: str = "lstm"
    """The recurrent cell: rnn, simple-gru, gru, lstm, peephole-lstm; from Python one of yours."""
    embedding_size: Size | None = None
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
    word_dropout: Fraction = 0.0
    """Chance, 0 to 1, that a word is dropped wherever it stands in the input."""
    weight_dropout: Fraction = 0.0
    """Chance, 0 to 1, that a weight from one time step's state to the next is dropped."""
    activation_regularization: NonNegativeFloat = 0.0
    """Factor of the mean square of the last layer's dropped numbers, added to the loss."""
    temporal_regularization: NonNegativeFloat = 0.0
    """Factor of the mean square of the last layer's change from step to step, added too."""
    residual: bool = False
    """Whether layers after the first add their input to their output, where sizes agree."""
    tied_embeddings: bool = False
    """Whether the output weights are the embeddings; the last layer has their size then."""
    softmax: Literal["full", "sampled", "adaptive"] = "full"
    """Over all words; over a sample of them in training; or with cheaper rare words."""
    samples: PositiveInt = 1000
    """Softmax sampled: words drawn for a step, 1 or more; all, if there are no more in the text."""
    cell_output: Literal["tanh", "linear"] = "tanh"
    """LSTM cells: a = Γo ∘ tanh(c), or a = Γo ∘ c, which has no bound and diverges more easily."""
    peephole: Literal["full", "diagonal"] = "full"
    """Peephole LSTM: gates see c⟨t−1⟩ through a whole matrix, or each unit its own alone."""
    activation: Literal["tanh", "relu"] = "tanh"
    """The rnn cell's g."""
    init_scale: PositiveFloat | None = None
    """All weights start uniform in ± this; without it, orthogonal recurrent matrices and more."""
    forget_bias: float = 1.0
    """What the forget gate's bias starts at; 1 lets the state live from the first step."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        is_fitting = self.num_layers > 1 or self.embedding_size in (None, self.hidden_size)
        if self.tied_embeddings and not is_fitting:
            raise ValueError(
                f"model.tied_embeddings with one layer needs embedding_size {self.embedding_size} "
                f"to equal hidden_size {self.hidden_size}"
            )
        return self


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
    decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Schedule step: factor, above 0 to 1, for each epoch past optimizer.decay_after_epochs."""
    decay_after_epochs: NonNegativeInt = 4
    """Schedule step: epochs at the full learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of the weights per update over the learning rate (adamw), or L2 penalty (others)."""
    clip: Literal["l2", "l1"] = "l2"
    """Norm over all gradients together that is limited."""
    max_grad_norm: PositiveFloat | None = 5.0
    """The limit of optimizer.clip, above 0; none for no limit."""
    average: Literal["ema", "triggered"] | None = None
    """Average of the weights to keep: exponential, or since validation got worse; else none."""
    average_decay: Fraction = 0.999
    """Average ema: what is kept of it at each update, 0 to 1."""
    average_patience: PositiveInt = 5
    """Average triggered: validations that may be worse than one before them."""


class TrainConfig(Section):
    """How long, how wide, how often, and where."""

    batch_size: PositiveInt = 20
    """Streams of text trained on side by side, 1 or more."""
    seq_len: PositiveInt = 35
    """Steps of truncated backpropagation through time, 1 or more."""
    random_seq_len: bool = False
    """Whether each update draws its steps around train.seq_len, so that no epoch is cut alike."""
    state_reset: Fraction = 0.0
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

    @property
    def embedding_size(self) -> int:
        """Numbers a token is embedded in."""
        return self.model.embedding_size or self.model.hidden_size


def settings() -> dict[str, str]:
    """Every setting's path with its sentence."""
    return {
        f"{section}.{name}": field.description or ""
        for section, part in Config.model_fields.items()
        for name, field in _section(part.annotation).items()
    }


def default(path: str) -> Any:
    """The default of the setting at `path`."""
    section, name = path.split(".")
    return getattr(getattr(Config(), section), name)


def _section(annotation: Any) -> dict[str, Any]:
    return dict(annotation.model_fields)
