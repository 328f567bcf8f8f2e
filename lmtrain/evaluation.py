"""How well a model predicts text: sums of nats and counts of tokens, divided once at the end."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State

Predict = Callable[[Tensor, Tensor, State | None], tuple[Tensor, State]]

_SEQ_LEN = 256
_SENTENCES_AT_ONCE = 64


@dataclass(frozen=True)
class Evaluation:
    """What a text cost.

    Args:
        total_nats: −log P of the text.
        num_tokens: tokens predicted, every token of the text once.
        characters: characters of the text.
        oov: tokens that are `<UNK>`.
        oov_nats: −log P of those.
        seconds: time taken.
    """

    total_nats: float
    num_tokens: int
    characters: int
    oov: int
    oov_nats: float
    seconds: float

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.total_nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_token(self) -> float:
        """Mean bits a token."""
        return self.loss / math.log(2)

    @property
    def bits_per_char(self) -> float:
        """All bits over all characters."""
        return self.total_nats / math.log(2) / self.characters

    @property
    def oov_rate(self) -> float:
        """Share of `<UNK>` among the tokens."""
        return self.oov / self.num_tokens

    @property
    def perplexity_without_oov(self) -> float | None:
        """Perplexity over the tokens that are not `<UNK>`; None if all are."""
        known = self.num_tokens - self.oov
        return perplexity((self.total_nats - self.oov_nats) / known) if known else None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float.

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
    ids: NDArray[np.integer],
    *,
    start_id: int | None,
    unk_id: int | None,
    characters: int,
    batch_size: int = 1,
    columns: slice = slice(None),
    predict: Predict | None = None,
    piece: int = 1,
) -> Evaluation:
    """The cost of a text under `model`, every token predicted once, hidden state carried.

    Args:
        model: the model.
        ids: the text, (N,), at least one token.
        start_id: the token taken to stand before the first; None for nothing.
        unk_id: the id of `<UNK>`, if there is one.
        characters: characters of the text.
        batch_size: streams the text is cut into; each begins without a state, so that more than
            one is faster and a little dearer.
        columns: the streams whose cost is wanted; the tokens are counted over all.
        predict: what stands for `model.log_probs`: a model that adapts. A target below 0 is none.
        piece: time steps that `predict` learns from at once: windows are a whole number of them.
    """
    begin = time.monotonic()
    was_training = model.training
    model.eval()
    place = model.embedding.device
    total, oov, oov_nats = 0.0, 0, 0.0
    state = None
    predict = predict or model.log_probs
    seq_len = piece * max(1, _SEQ_LEN // piece)
    for window in _windows(ids, start_id, batch_size, seq_len):
        inputs, came = (torch.from_numpy(tokens[:, columns]) for tokens in window)
        counted = came >= 0
        log_probs, state = predict(inputs.to(place), came.to(place), state)
        nats = -log_probs.cpu().double()
        total += float(nats[counted].sum())
        if unk_id is not None:
            unknown = came == unk_id
            oov += int(unknown.sum())
            oov_nats += float(nats[unknown].sum())
    model.train(was_training)
    seconds = time.monotonic() - begin
    return Evaluation(total, len(ids), characters, oov, oov_nats, seconds)


def _windows(
    ids: NDArray[np.integer], start_id: int | None, batch_size: int, seq_len: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Inputs and targets, each (T, B); −1 marks inputs that are nothing, targets not counted."""
    batch_size = min(batch_size, len(ids))
    length = math.ceil(len(ids) / batch_size)
    for start in range(0, length, seq_len):
        stop = min(start + seq_len, length)
        inputs = np.full((stop - start, batch_size), -1, np.int64)
        targets = np.full((stop - start, batch_size), -1, np.int64)
        for row in range(batch_size):
            first = row * length
            piece = ids[first + start : min(first + stop, first + length)]
            before = ids[max(first + start - 1, 0) : first + start + len(piece) - 1]
            targets[: len(piece), row] = piece
            inputs[len(piece) - len(before) : len(piece), row] = before
        if start == 0 and start_id is not None:
            inputs[0, 0] = start_id
        yield inputs, targets


def sentence_log_probs(
    model: LanguageModel, sentences: Sequence[Sequence[int]], start_id: int | None
) -> Iterator[list[float]]:
    """Log P of each token of each sentence given those before it, in nats.

    P(y1, y2, y3) = P(y1) P(y2|y1) P(y3|y1, y2), every sentence from a fresh state.

    Args:
        model: the model.
        sentences: ids, the end of the sentence included.
        start_id: the token taken to stand before each; None for nothing.
    """
    was_training = model.training
    model.eval()
    place = model.embedding.device
    for first in range(0, len(sentences), _SENTENCES_AT_ONCE):
        group = sentences[first : first + _SENTENCES_AT_ONCE]
        longest = max(map(len, group))
        inputs = torch.full((longest + 1, len(group)), -1 if start_id is None else start_id)
        for column, sentence in enumerate(group):
            inputs[1 : len(sentence) + 1, column] = torch.tensor(sentence, dtype=torch.long)
        # Time runs forward alone: what stands behind a shorter sentence changes nothing in it.
        parts, state = [torch.zeros(0, len(group), dtype=torch.float64)], None
        for start in range(0, longest, _SEQ_LEN):
            window = inputs[start : start + _SEQ_LEN + 1].to(place)
            log_probs, state = model.log_probs(window[:-1], window[1:], state)
            parts.append(log_probs.double().cpu())
        for sentence, column in zip(group, torch.cat(parts).T.tolist(), strict=True):
            yield column[: len(sentence)]
    model.train(was_training)


def unigram_loss(
    train_ids: NDArray[np.integer], ids: NDArray[np.integer], vocab_size: int
) -> float:
    """Mean nats a token of `ids` under the word frequencies of `train_ids`, each count plus one.

    The least a model must beat: it knows how often words come, and nothing of their order.
    """
    counts = _counts(train_ids, vocab_size) + 1
    return float(-(_counts(ids, vocab_size) @ np.log(counts / counts.sum())) / len(ids))


def _counts(ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.float64]:
    counts = np.zeros(vocab_size)
    for start in range(0, len(ids), 1 << 20):
        counts += np.bincount(ids[start : start + (1 << 20)], minlength=vocab_size)
    return counts
