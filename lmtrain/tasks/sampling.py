"""Samples text from a language model, token by token.

x⟨1⟩ is the start token; y⟨t⟩ is sampled from ŷ⟨t⟩ and becomes x⟨t+1⟩. `<UNK>` is rejected and
sampled again; `<EOS>` ends a text.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain import device
from lmtrain.data.detokenizer import Detokenizer
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import ConfigError, DivergedError, TextError
from lmtrain.model.language_model import LanguageModel

# After this many rejected draws of <UNK> its probability is set to 0 instead.
_MAX_REJECTIONS = 100
# Steps of a prompt that are computed at once.
_PROMPT_STEPS = 256
# Rows that are sampled at once, so that their probabilities take little memory.
_MAX_DRAWN_ROWS = 64
# Nucleus sampling first looks at this many tokens, then at more by this factor.
_NUCLEUS_SIZE, _NUCLEUS_FACTOR = 64, 8


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Args:
        num: number of texts, 1 or more.
        max_tokens: maximum number of sampled tokens of each text, 1 or more.
        temperature: 0 or more; 0 is greedy, lower values make likely tokens more likely.
        top_k: sample from the k most likely tokens; None for all.
        top_p: sample from the most likely tokens that sum to this probability; None for all.
        seed: random seed, 0 or more.
        stop: a text ends before the first occurrence of any of these strings after the prompt.

    Raises:
        ConfigError: an argument out of its range.
    """

    num: int = 1
    max_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        top_k, top_p, stop = self.top_k, self.top_p, self.stop
        is_list = not isinstance(stop, str) and all(isinstance(each, str) for each in stop)
        checks = {
            f"num {self.num} is below 1": self.num < 1,
            f"max_tokens {self.max_tokens} is below 1": self.max_tokens < 1,
            f"temperature {self.temperature} is not 0 or more": not 0
            <= self.temperature
            < math.inf,
            f"top_k {top_k} is below 1": top_k is not None and top_k < 1,
            f"top_p {top_p} is not above 0 and at most 1": top_p is not None and not 0 < top_p <= 1,
            f"seed {self.seed} is below 0": self.seed < 0,
            f"stop {stop!r} is not a list of strings": not is_list,
            "stop: an empty string would end every text": is_list and "" in stop,
        }
        for problem, is_wrong in checks.items():
            if is_wrong:
                raise ConfigError(problem)

    @property
    def num_kept(self) -> int | None:
        """Number of most likely tokens to sample from; None for all."""
        return 1 if self.temperature == 0 else self.top_k

    def distribution(self, logits: Tensor) -> Tensor:
        """softmax(logits / temperature), (B, V), restricted to the most likely tokens.

        With a temperature of 0 the most likely token, or the first of several, has probability 1.

        Args:
            logits: (B, V), float64, on the CPU.

        Source: nucleus (top-p) sampling: Holtzman et al. 2020.
        """
        if self.temperature not in (0, 1):
            # Differences: a tiny temperature then gives -inf, and e^-inf = 0.
            logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probabilities = logits.softmax(-1)
        if self.num_kept is None and self.top_p is None:
            return probabilities
        for row in probabilities.numpy():
            if self.num_kept is not None and self.num_kept < len(row):
                _keep(row, _largest(row, self.num_kept))
            if self.top_p is not None:
                _keep(row, _nucleus(row, self.top_p))
        return probabilities / probabilities.sum(-1, keepdim=True)


def _keep(weights: NDArray[np.float64], indices: NDArray[np.intp]) -> None:
    """Sets all weights to 0 in place, except those at indices."""
    kept = weights[indices]
    weights[:] = 0
    weights[indices] = kept


def _largest(weights: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Indices of the largest weights in descending order, of equal weights the first ones.

    The result is that of a stable sort of all weights, which would take most of the time of
    sampling. Weights that are not finite are all kept, so that the caller can report them.
    """
    if count >= len(weights) or np.isnan(weights[0]):
        return np.argsort(-weights, kind="stable")
    threshold = np.partition(weights, -count)[-count]
    candidates = np.flatnonzero(weights >= threshold)
    return candidates[np.argsort(-weights[candidates], kind="stable")[:count]]


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices of the fewest largest weights whose sum is at least a fraction of the total."""
    count, total = _NUCLEUS_SIZE, weights.sum()
    while True:
        indices = _largest(weights, count)
        reached = weights[indices].cumsum() / total
        if reached[-1] >= top_p or len(indices) == len(weights):
            return indices[: 1 + int(np.searchsorted(reached, top_p))]
        count *= _NUCLEUS_FACTOR


def draw(
    probabilities: Tensor, generators: Sequence[np.random.Generator], unk_id: int | None = None
) -> list[int]:
    """Samples an index from each row as `generator.choice(V, p=row)` does; rejects `unk_id`.

    Args:
        probabilities: (B, V), float64; each row has sum 1.
        generators: of each row; one random number is drawn from it for each sample.
        unk_id: the index to reject; None for none.

    Raises:
        DivergedError: in a row only `unk_id` has a probability above 0, or one is not finite.

    Example:
        >>> p = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64)
        >>> draw(p, [np.random.default_rng(3)])[0] == np.random.default_rng(3).choice(3, p=p[0])
        True
    """
    # The same sums as those of numpy, in a fifth of the time.
    cumulative = probabilities.cumsum(-1)
    totals = cumulative[:, -1:].clone()
    if not totals.isfinite().all():
        raise DivergedError(
            "the model diverged: its probabilities are not finite numbers",
            "try: an earlier checkpoint, or training with a smaller --lr",
        )
    cumulative /= totals
    rows = zip(probabilities.numpy(), cumulative.numpy(), generators, strict=True)
    return [_draw_known(*row, unk_id) for row in rows]


def _draw_known(
    probabilities: NDArray[np.float64],
    cumulative: NDArray[np.float64],
    generator: np.random.Generator,
    unk_id: int | None,
) -> int:
    """Samples an index of one row; arguments and errors as `draw`.

    Raises:
        DivergedError: only `unk_id` has a probability above 0.
    """
    for _ in range(_MAX_REJECTIONS):
        index = int(cumulative.searchsorted(generator.random(), side="right"))
        if index != unk_id:
            return index
    known = torch.from_numpy(probabilities).clone()
    known[unk_id] = 0
    if known.sum() == 0:
        raise DivergedError("the model expects nothing but <UNK>", "try: a higher --temperature")
    return draw((known / known.sum()).unsqueeze(0), [generator])[0]


class Ends(NamedTuple):
    """The tokens that a sequence starts and ends with."""

    start_id: int | None
    """The input before the first token; None for none."""
    end_id: int | None
    """The token that ends a sequence; None for none."""

    @classmethod
    def of_sentences(cls, tokenizer: Tokenizer) -> "Ends":
        """`<EOS>` for words; characters start after a newline and have no end token."""
        return cls(tokenizer.start_id, tokenizer.eos_id)


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    ends: Ends | None = None,
) -> Iterator[list[int | None]]:
    """Samples sequences in a batch, one token of each at a time.

    Each sequence has its own random generator, seeded by the seed and its index, so that its text
    does not depend on the number of sequences. Sequences that have ended leave the batch.

    Args:
        model: the model.
        tokenizer: has the id of `<UNK>`.
        prompt: token ids that the sequences continue; may be empty.
        sampling: the sampling parameters.
        ends: start and end token; None for those of sentences.

    Yields:
        For each sequence its next token id, or None once it has ended.

    Raises:
        DivergedError: the model's probabilities are not finite.
    """
    model.eval()
    model_device, num = device.of(model), sampling.num
    start_id, end_id = ends or Ends.of_sentences(tokenizer)
    unk_id = tokenizer.unk_id
    generators = [np.random.default_rng([sampling.seed, row]) for row in range(num)]
    start = torch.tensor([-1 if start_id is None else start_id, *prompt]).unsqueeze(1)
    first, *windows = start.to(model_device).split(_PROMPT_STEPS)
    hidden, state = model.hidden(first)
    for window in windows:
        hidden, state = model.hidden(window, state)
    logits = model.head(hidden[-1:])[0].repeat(num, 1)  # (num, V)
    state = state.map(lambda part: part.expand(num, -1).contiguous())
    rows = list(range(num))
    for _ in range(sampling.max_tokens):
        if unk_id is not None and (sampling.num_kept is not None or sampling.top_p is not None):
            # Otherwise the tokens that are kept could be <UNK> alone.
            logits[:, unk_id] = -math.inf
        drawn = _draw(logits, sampling, [generators[row] for row in rows], unk_id)
        tokens: list[int | None] = [None] * num
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
        yield tokens
        continued = [index for index, token in enumerate(drawn) if token != end_id]
        if not continued:
            return
        if len(continued) < len(rows):
            rows = [rows[index] for index in continued]
            drawn = [drawn[index] for index in continued]
            state = state.map(lambda part, continued=continued: part[continued])  # type: ignore[misc]
        hidden, state = model.hidden(torch.tensor([drawn]).to(model_device), state)
        logits = model.head(hidden)[0]


def _draw(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[np.random.Generator],
    unk_id: int | None,
) -> list[int]:
    """Samples a token other than `<UNK>` for each row of logits (B, V)."""
    drawn: list[int] = []
    for rows in logits.split(_MAX_DRAWN_ROWS):
        exact = rows.double().cpu()
        probabilities = sampling.distribution(exact)
        if unk_id is not None and (is_unknown := probabilities[:, unk_id] == 1).any():
            exact[is_unknown, unk_id] = -math.inf
            probabilities[is_unknown] = sampling.distribution(exact[is_unknown])
        drawn += draw(probabilities, generators[len(drawn) : len(drawn) + len(rows)], unk_id)
    return drawn


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    ends: Ends | None = None,
) -> Iterator[tuple[int, str]]:
    """Samples texts that continue a prompt, in pieces: the index of a text and its next piece.

    The first piece of each text is the prompt as it was given.

    Args:
        model: the model.
        tokenizer: the tokenizer of the model.
        prompt: text to continue; may be empty.
        sampling: the sampling parameters.
        ends: start and end token; None for those of sentences.

    Raises:
        TextError: a prompt that is not valid Unicode.
        DivergedError: the model's probabilities are not finite.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TextError("the prompt is not valid UTF-8") from None
    ids = tokenizer.encode(prompt).tolist() if prompt else []
    ends = ends or Ends.of_sentences(tokenizer)
    texts = [
        _SampledText(tokenizer.detokenizer(prompt), sampling.stop) for _ in range(sampling.num)
    ]
    return _pieces(
        prompt, texts, generate(model, tokenizer, ids, sampling, ends), end_id=ends.end_id
    )


def _pieces(
    prompt: str,
    texts: list["_SampledText"],
    drawn: Iterator[list[int | None]],
    end_id: int | None,
) -> Iterator[tuple[int, str]]:
    """The pieces of texts, of which the prompt is the first, from tokens of all texts."""
    if prompt:
        yield from ((row, prompt) for row in range(len(texts)))
    for indices in drawn:
        for row, (text, index) in enumerate(zip(texts, indices, strict=True)):
            if index is not None and index != end_id:
                yield row, text.add(index)
        if all(text.is_stopped for text in texts):
            break
    for row, text in enumerate(texts):
        yield row, text.end()


class _SampledText:
    """A text while its tokens are sampled.

    Args:
        detokenizer: a detokenizer for tokens after the prompt.
        stop: strings that end the text.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._until = Until(stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._until.is_reached

    def add(self, index: int) -> str:
        """The text that is certain after another token."""
        return self._until.add(self._detokenizer.add(index))

    def end(self) -> str:
        """The rest after the last token."""
        return self._until.add(self._detokenizer.end()) + self._until.end()


class Until:
    """Cuts a text that arrives in pieces at the first occurrence of a string.

    The string that is complete first counts, and the longest of those that are complete at the same
    character. The result does not depend on where pieces end.

    Args:
        strings: strings that are not empty; may be none.

    Example:
        >>> until = Until(["END"])
        >>> until.add("the E"), until.add("N"), until.add("D of"), until.is_reached
        ('the ', '', '', True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.is_reached = False
        self._strings = strings
        self._held = ""

    def add(self, piece: str) -> str:
        """The text that precedes the strings for certain; possible starts are held back."""
        if self.is_reached:
            return ""
        text = self._held + piece
        matches = [(at + len(each), at) for each in self._strings if (at := text.find(each)) >= 0]
        if matches:
            self.is_reached, self._held = True, ""
            return text[: min(matches)[1]]
        starts = (
            size
            for each in self._strings
            for size in range(min(len(each) - 1, len(text)), 0, -1)
            if text.endswith(each[:size])
        )
        written = len(text) - max(starts, default=0)
        self._held = text[written:]
        return text[:written]

    def end(self) -> str:
        """The text held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
