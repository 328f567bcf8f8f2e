"""Perplexity of texts and log-probabilities of sentences under a language model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain import device
from lmtrain.data.padded import by_length
from lmtrain.data.streams import windows
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokens import Tokens
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.tasks.base import Metrics, Shard

Predict = Callable[[Tensor, Tensor, State | None], tuple[Tensor, State]]

_SEQ_LEN = 256
_SENTENCES_AT_ONCE = 64
# Most tokens of a padded batch of sentences.
_MAX_TOKENS = 1 << 16
_WHOLE = Shard()


@dataclass(frozen=True)
class Perplexity(Metrics):
    """Negative log-probability of a text, with counts.

    Args:
        total_nats: −log P of the text.
        count: number of predicted tokens; each token of the text is predicted once.
        characters: number of characters in the text.
        oov: number of tokens that are `<UNK>`.
        oov_nats: Σ −log P of these.
    """

    headline = "perplexity"
    is_higher_better = False
    digits = 2

    characters: float
    oov: float
    oov_nats: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_char(self) -> float:
        """Bits of the text divided by its characters."""
        return self.total_nats / math.log(2) / self.characters

    @property
    def bits_per_char_without_oov(self) -> float | None:
        """Over the characters that are not `<UNK>`; None where tokens are not characters."""
        known = self.characters - self.oov
        if self.characters != self.count or not known:
            return None
        return (self.total_nats - self.oov_nats) / math.log(2) / known

    @property
    def perplexity_without_oov(self) -> float | None:
        """Perplexity over the tokens that are not `<UNK>`; None if all are."""
        known = self.count - self.oov
        return perplexity((self.total_nats - self.oov_nats) / known) if known else None

    @classmethod
    def cost(cls, values: Mapping[str, float | None]) -> float:
        """The loss: it has the same order as perplexity and does not overflow."""
        loss = values.get("loss")
        return math.inf if loss is None else loss

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        bits = self.bits_per_char_without_oov
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_token": self.loss / math.log(2),
            "bits_per_char": self.bits_per_char,
            "characters": round(self.characters),
            "oov": round(self.oov),
            "oov_rate": self.oov / self.count,
            "perplexity_without_oov": self.perplexity_without_oov,
        } | ({} if bits is None else {"bits_per_char_without_oov": bits})

    def table(self) -> list[tuple[str, str]]:
        """Names and formatted values of all figures."""
        known, bits = self.perplexity_without_oov, self.bits_per_char_without_oov
        without = [] if bits is None else [("bits per character without <UNK>", f"{bits:.5f}")]
        return [
            ("perplexity", _shown(self.perplexity)),
            ("perplexity without <UNK>", "none" if known is None else _shown(known)),
            ("loss (nats per token)", f"{self.loss:.5f}"),
            ("bits per token", f"{self.loss / math.log(2):.5f}"),
            ("bits per character", f"{self.bits_per_char:.5f}"),
            *without,
            ("tokens", f"{self.count:,.0f}"),
            ("characters", f"{self.characters:,.0f}"),
            ("out of vocabulary", f"{self.oov:,.0f} ({100 * self.oov / self.count:.2f} %)"),
        ]

    @classmethod
    def line(cls, figures: Mapping[str, float | None]) -> str:
        """The main figures in one line of text."""
        bits = figures.get("bits_per_char")
        return super().line(figures) + ("" if bits is None else f", {bits:.3f} bits per character")


def _shown(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 1e9 else f"{perplexity:.3g}"


def perplexity(loss: float) -> float:
    """exp(loss), or infinity on overflow.

    Example:
        >>> perplexity(0.0), perplexity(1000.0)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def evaluate(
    model: LanguageModel,
    text: Tokens,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 1,
    shard: Shard = _WHOLE,
    predict: Predict | None = None,
    piece: int = 1,
) -> Perplexity:
    """Perplexity of a text under `model`; the state is carried over the whole text.

    Args:
        model: the model.
        text: at least one token.
        tokenizer: has the ids of the start token and of `<UNK>`.
        batch_size: number of streams the text is split into; each starts with a zero state, so
            more streams are faster and give a slightly higher perplexity.
        shard: the streams of this process; the first one counts the characters.
        predict: used instead of `model.log_probs`; targets below 0 are padding.
        piece: window lengths are multiples of it.
    """
    was_training = model.training
    model.eval()
    model_device, unk_id = device.of(model), tokenizer.unk_id
    total, count, oov, oov_nats = 0.0, 0, 0, 0.0
    state = None
    predict = predict or model.log_probs
    batch_size = min(batch_size, len(text))
    seq_len = piece * max(1, _SEQ_LEN // piece)
    for window in windows(text.ids, tokenizer.start_id, batch_size, seq_len):
        inputs, targets = (torch.from_numpy(ids[:, shard.of(batch_size)]) for ids in window)
        is_counted = targets >= 0
        log_probs, state = predict(inputs.to(model_device), targets.to(model_device), state)
        nats = -log_probs.cpu().double()
        total += float(nats[is_counted].sum())
        count += int(is_counted.sum())
        if unk_id is not None:
            is_unknown = targets == unk_id
            oov += int(is_unknown.sum())
            oov_nats += float(nats[is_unknown].sum())
    model.train(was_training)
    return Perplexity(total, count, 0 if shard.rank else text.characters, oov, oov_nats)


def sentence_log_probs(
    model: LanguageModel, sentences: Sequence[Sequence[int]], start_id: int | None
) -> list[list[float]]:
    """Log P of each token of each sentence given the tokens before it, in nats.

    P(y1, y2, y3) = P(y1) P(y2|y1) P(y3|y1, y2); each sentence starts with a zero state.

    Args:
        model: the model.
        sentences: token ids, including the end of the sentence.
        start_id: the token before each sentence; None for none.
    """
    was_training = model.training
    model.eval()
    # Sentences of similar length are scored together, so that little of a batch is padding.
    lengths = np.array([len(sentence) for sentence in sentences])
    scores: dict[int, list[float]] = {}
    for indices in by_length(lengths, _SENTENCES_AT_ONCE, _MAX_TOKENS):
        batch = [sentences[index] for index in indices]
        scores |= zip(indices.tolist(), _batch_log_probs(model, batch, start_id), strict=True)
    model.train(was_training)
    return [scores[index] for index in range(len(sentences))]


def _batch_log_probs(
    model: LanguageModel, sentences: Sequence[Sequence[int]], start_id: int | None
) -> list[list[float]]:
    """Log P of each token of some sentences, which are padded to the longest one."""
    longest, model_device = max(map(len, sentences)), device.of(model)
    inputs = torch.full((longest + 1, len(sentences)), -1 if start_id is None else start_id)
    for column, sentence in enumerate(sentences):
        inputs[1 : len(sentence) + 1, column] = torch.tensor(sentence, dtype=torch.long)
    # The model is causal: padding after a sentence does not change its log-probabilities.
    parts, state = [torch.zeros(0, len(sentences), dtype=torch.float64)], None
    for start in range(0, longest, _SEQ_LEN):
        window = inputs[start : start + _SEQ_LEN + 1].to(model_device)
        log_probs, state = model.log_probs(window[:-1], window[1:], state)
        parts.append(log_probs.double().cpu())
    columns = torch.cat(parts).T
    return [column[: len(each)].tolist() for each, column in zip(sentences, columns, strict=True)]


def unigram(train: Tokens, text: Tokens, tokenizer: Tokenizer) -> Perplexity:
    """Perplexity of a text under the token frequencies of the training text."""
    occurrences = _counts(text.ids, tokenizer.vocab_size)
    nats = -occurrences * log_frequencies(train.ids, tokenizer.vocab_size)
    unk_id = tokenizer.unk_id
    oov, oov_nats = (
        (0.0, 0.0) if unk_id is None else (float(occurrences[unk_id]), float(nats[unk_id]))
    )
    return Perplexity(float(nats.sum()), len(text), text.characters, oov, oov_nats)


def log_frequencies(ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.float64]:
    """Log of the frequency of each token in a text, (V,), with add-one smoothing."""
    counts = _counts(ids, vocab_size) + 1
    frequencies: NDArray[np.float64] = np.log(counts / counts.sum())
    return frequencies


def _counts(ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.float64]:
    counts = np.zeros(vocab_size)
    for start in range(0, len(ids), 1 << 20):
        counts += np.bincount(ids[start : start + (1 << 20)], minlength=vocab_size)
    return counts
