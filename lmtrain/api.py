"""The objects a user holds: `train` a model, `load` one, let it sample, score and evaluate."""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lmtrain import assembly, checkpoint, device, evaluation, generation, tuning
from lmtrain import config as configuration
from lmtrain.adaptation import Adaptation, Cache, Dynamic, gradient_scales
from lmtrain.data import corpus
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokens import Tokens, tokenize
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.evaluation import Evaluation
from lmtrain.model.language_model import LanguageModel
from lmtrain.schema import Config
from lmtrain.tuning import Trial


@dataclass(frozen=True)
class SentenceScore:
    """How likely a sentence is.

    Args:
        text: the sentence.
        tokens: its tokens, the end of the sentence included.
        log_probs: log P of each given those before it, in nats.
        oov: how many of them are `<UNK>`.
    """

    text: str
    tokens: list[str]
    log_probs: list[float]
    oov: int

    @property
    def log_prob(self) -> float:
        """Log P(sentence), in nats."""
        return math.fsum(self.log_probs)


class TrainedModel:
    """A trained model with its tokenizer and settings.

    Args:
        path: the checkpoint folder.
        config: the settings it was trained with.
        tokenizer: text to ids and back.
        model: the network, on its device.
        state: what its state.json holds of its training.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        tokenizer: Tokenizer,
        model: LanguageModel,
        state: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.state = state
        self.step = int(state["step"])

    def sample(
        self,
        prompt: str = "",
        *,
        num: int = 1,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1,
    ) -> list[str]:
        """Novel texts that go on from `prompt`; the same seed gives the same texts.

        Args:
            prompt: text before the first drawn token; may be empty.
            num: texts, 1 or more.
            max_tokens: tokens drawn for each at most, 1 or more.
            temperature: above 0; below 1 the likely becomes likelier.
            top_k: draw from so many likeliest tokens; None for all.
            top_p: draw from the likeliest tokens that sum to this probability; None for all.
            seed: of the draws.

        Raises:
            ConfigError: an argument out of its range.
            TextError: at character level, a prompt with a character the model does not know.
        """
        texts = [""] * num
        for row, piece in self.stream(
            prompt, num=num, max_tokens=max_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed,
        ):  # fmt: skip
            texts[row] += piece
        return texts

    def stream(
        self,
        prompt: str = "",
        *,
        num: int = 1,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1,
    ) -> Iterator[tuple[int, str]]:
        """As `sample`, piece by piece as they are drawn: which text, and what comes next in it."""
        return generation.stream(
            self.model,
            self.tokenizer,
            prompt,
            num=num,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )

    def score(self, sentences: Iterable[str]) -> Iterator[SentenceScore]:
        """Log P of each sentence, its end included; each from a fresh state.

        Raises:
            TextError: at character level, a character the model does not know.
        """
        tokenizer = self.tokenizer
        texts = [sentence.rstrip("\n") for sentence in sentences]
        ends = [] if tokenizer.line_end_id is None else [tokenizer.line_end_id]
        ids = [tokenizer.encode(text).tolist() + ends for text in texts]
        scores = evaluation.sentence_log_probs(self.model, ids, tokenizer.start_id)
        for text, each, log_probs in zip(texts, ids, scores, strict=True):
            tokens = [tokenizer.vocabulary[index] for index in each]
            yield SentenceScore(text, tokens, log_probs, _count(each, tokenizer.unk_id))

    def evaluate(
        self,
        places: Sequence[str],
        *,
        batch_size: int = 1,
        cache: Cache | None = None,
        dynamic: Dynamic | None = None,
    ) -> Evaluation:
        """How well the model predicts a text, every token counted once.

        Args:
            places: files, globs, `-` or names of corpora, read one after the other; of a corpus
                the test part, else the validation part, else, if it has but one, all.
            batch_size: streams the text is cut into.
            cache: a pointer to words that followed states like the present one; None for none.
            dynamic: how the weights go on learning from the text; None if they do not.

        Raises:
            TextError: the text cannot be read, or has a character the model does not know; with
                `dynamic`, the training text is gone.
        """
        tokens = self.tokens(places)
        return self.evaluate_tokens(tokens, batch_size, cache=cache, dynamic=dynamic)

    def tokens(self, places: Sequence[str]) -> Tokens:
        """The tokens of a text, which `evaluate` predicts.

        Args:
            places: as for `evaluate`.

        Raises:
            TextError: the text cannot be read, or has a character the model does not know.
        """
        text = corpus.open_text(places, ("test", "valid", "train"))
        return tokenize(text, self.tokenizer)

    def evaluate_tokens(
        self,
        tokens: Tokens,
        batch_size: int = 1,
        *,
        cache: Cache | None = None,
        dynamic: Dynamic | None = None,
    ) -> Evaluation:
        """As `evaluate`, for a text that is tokens already."""
        self.model.eval()
        scales = self.gradient_scales if dynamic else []
        adapting = Adaptation(self.model, cache, dynamic, scales)
        with contextlib.closing(adapting):
            return evaluation.evaluate(
                self.model,
                tokens.ids,
                start_id=self.tokenizer.start_id,
                unk_id=self.tokenizer.unk_id,
                characters=tokens.characters,
                batch_size=batch_size,
                predict=adapting.log_probs if cache or dynamic else None,
                piece=dynamic.seq_len if dynamic else 1,
            )

    @functools.cached_property
    def gradient_scales(self) -> list[Tensor]:
        """The usual size of each weight's gradient on the training text, for dynamic evaluation.

        Raises:
            TextError: the text is gone.
            CheckpointError: the text changed.
        """
        self.model.eval()
        return gradient_scales(self.model, self.own_texts(("train",))["train"].ids)

    def tune_cache(self) -> Iterator[Trial]:
        """Caches with the loss of the run's validation text under each.

        Raises:
            TextError: there is no validation text, or it is gone.
            CheckpointError: the text changed.
        """
        tokens = self._validation_text()
        return tuning.cache_trials(self.model, tokens.ids, self.tokenizer.start_id)

    def tune_dynamic(self, seq_len: int = 5, max_tokens: int = 20_000) -> Iterator[Trial]:
        """Dynamic evaluations with the loss of the run's validation text under each.

        Args:
            seq_len: tokens between two steps of the weights, 1 or more.
            max_tokens: tokens of the text that are used, from its beginning.

        Raises:
            TextError: there is no validation text, or a text is gone.
            CheckpointError: a text changed.
        """
        ids, start_id = self._validation_text().ids[:max_tokens], self.tokenizer.start_id
        return tuning.dynamic_trials(self.model, ids, start_id, self.gradient_scales, seq_len)

    def _validation_text(self) -> Tokens:
        texts = self.own_texts(("valid",))
        if "valid" not in texts:
            raise TextError(f"{self.path} was trained without validation text")
        return texts["valid"]

    def own_texts(self, parts: Sequence[str] = ("valid", "test")) -> dict[str, Tokens]:
        """The run's own texts, from the token cache or cut anew.

        Args:
            parts: of train, valid and test.

        Raises:
            TextError: the text is gone.
            CheckpointError: the text changed.
        """
        return assembly.find_texts(self.state["texts"], self.config, self.tokenizer, parts=parts)


def train(
    config: Config | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overrides: Mapping[str, object] | None = None,
    is_quiet: bool = True,
) -> TrainedModel:
    """Trains a model and returns its best checkpoint, loaded.

    Args:
        config: the settings (see `lmtrain.load_config`); None for the recipe python-docs.
        out: the run folder; None for a new one under runs/.
        resume: whether to go on with the run in `out`, bit for bit as if it had never stopped.
        overrides: with `resume`, settings to change, such as {"train.max_epochs": 20}.
        is_quiet: whether no progress is shown.

    Raises:
        LmtrainError: see `lmtrain.errors`; its exit code says which kind.
    """
    # TensorBoard takes a second to import and is needed by training alone.
    from lmtrain.training.run import run_training

    summary = run_training(config, out, resume=resume, overrides=overrides, is_quiet=is_quiet)
    return load(summary.run)


def load(path: str | Path, *, device_name: str = "auto") -> TrainedModel:
    """The model of a run (its best checkpoint, else its newest) or of a checkpoint folder.

    Args:
        path: the run or checkpoint.
        device_name: auto, cpu or cuda.

    Raises:
        CheckpointError: missing, damaged or of a newer format.
        ConfigError: no such device.
        MachineError: the device is not there.
    """
    place = device.choose(device_name)
    trained = checkpoint.use(Path(path), _loaded)
    trained.model.to(place).eval()
    return trained


def _loaded(saved: checkpoint.Checkpoint) -> TrainedModel:
    """The model of a checkpoint that may come from anyone.

    Raises:
        CheckpointError: damaged, or its parts do not fit each other.
    """
    try:
        config = configuration.parse(saved.text("config.toml"), str(saved.path / "config.toml"))
        tokenizer = Tokenizer.from_json(saved.text("tokenizer.json"))
        # Sizes are compared with those of the weights before memory is taken for them.
        saved.require_shapes(assembly.weight_shapes(config, tokenizer.vocab_size))
        model = assembly.build_model(config, tokenizer.vocab_size)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    saved.load_weights(model)
    return TrainedModel(saved.path, config, tokenizer, model, saved.state)


def _count(ids: Sequence[int], wanted: int | None) -> int:
    return 0 if wanted is None else sum(index == wanted for index in ids)
