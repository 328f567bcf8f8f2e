"""Novel text: one token drawn after the other from what the model expects.

x⟨1⟩ is the start; y⟨t⟩ is drawn from ŷ⟨t⟩ and becomes x⟨t+1⟩; `<UNK>` is drawn again; `<EOS>` ends.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lmtrain import device
from lmtrain.data.detokenizer import Detokenizer
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import ConfigError, DivergedError, TextError
from lmtrain.model.language_model import LanguageModel

# So many draws of <UNK> in a row are given up; the other tokens then share its probability.
_MAX_REJECTIONS = 100


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn.

    Args:
        num: texts, 1 or more.
        max_tokens: tokens drawn for each at most, 1 or more.
        temperature: 0 or more; 0 is greedy, lower values make likely tokens more likely.
        top_k: sample from the k most likely tokens; None for all.
        top_p: sample from the most likely tokens that sum to this probability; None for all.
        seed: of the draws, 0 or more.
        stop: a text ends before the first occurrence of any of these strings after the prompt.

    Raises:
        ConfigError: an argument out of its range.
    """

    num: int = 1
    max_tokens: int = 100
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
        """The most likely tokens that are sampled from; None for all."""
        return 1 if self.temperature == 0 else self.top_k

    def distribution(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """softmax(logits / temperature), (V,), cut down to the most likely tokens.

        With a temperature of 0 the most likely token, of several the first, has probability 1.

        Source: nucleus (top-p) sampling: Holtzman et al. 2020.
        """
        scaled = (logits - logits.max()) / (self.temperature or 1.0)
        weights = np.exp(scaled)
        order = np.argsort(-weights, kind="stable")
        if self.num_kept is not None:
            weights[order[self.num_kept :]] = 0
        if self.top_p is not None:
            reached = np.cumsum(weights[order]) / weights.sum()
            weights[order[1 + int(np.searchsorted(reached, self.top_p)) :]] = 0
        return np.asarray(weights / weights.sum())


def draw(probabilities: NDArray[np.float64], generator: np.random.Generator) -> int:
    """One index, as `generator.choice(V, p=p)` draws it: by the inverse cumulative distribution.

    Args:
        probabilities: (V,), summing to 1.
        generator: one number is taken from it.

    Example:
        >>> p = np.array([0.25, 0.0, 0.75])
        >>> draw(p, np.random.default_rng(3)) == np.random.default_rng(3).choice(3, p=p)
        True
    """
    cumulative = probabilities.cumsum()
    cumulative /= cumulative[-1]
    return int(cumulative.searchsorted(generator.random(), side="right"))


def draw_known(
    probabilities: NDArray[np.float64], generator: np.random.Generator, unk_id: int | None
) -> int:
    """One index that is not `unk_id`: a draw of it is rejected and repeated.

    Args:
        probabilities: (V,), summing to 1.
        generator: what is drawn from.
        unk_id: the index that is rejected; None for none.

    Raises:
        DivergedError: nothing but `unk_id` is possible, or a probability is not finite.
    """
    if not np.isfinite(probabilities).all():
        raise DivergedError(
            "the model diverged: its probabilities are not finite numbers",
            "try: an earlier checkpoint, or training with a smaller --lr",
        )
    for _ in range(_MAX_REJECTIONS):
        if (index := draw(probabilities, generator)) != unk_id:
            return index
    known = probabilities.copy()
    known[unk_id] = 0
    if known.sum() == 0:
        raise DivergedError("the model expects nothing but <UNK>", "try: a higher --temperature")
    return draw(known / known.sum(), generator)


class Ends(NamedTuple):
    """The tokens that a sequence begins and ends with."""

    start_id: int | None
    """Taken to stand before the first token; None for nothing."""
    end_id: int | None
    """None for a sequence that does not end."""

    @classmethod
    def of_sentences(cls, tokenizer: Tokenizer) -> "Ends":
        """`<EOS>` for words; for characters the newline begins a text and nothing ends it."""
        return cls(tokenizer.start_id, tokenizer.eos_id)


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    ends: Ends | None = None,
) -> Iterator[list[int | None]]:
    """Tokens of sequences drawn side by side, one of each at a time.

    Each sequence has a generator of its own, seeded by the seed and its place, so that its text
    does not depend on how many others are drawn.

    Args:
        model: the model.
        tokenizer: names `<UNK>`.
        prompt: ids that the sequences go on from; may be empty.
        sampling: how tokens are drawn.
        ends: what a sequence begins and ends with; None for what sentences begin and end with.

    Yields:
        For each sequence its next id, or None once it has ended.

    Raises:
        DivergedError: the model's probabilities are not finite.
    """
    model.eval()
    place, num = device.of(model), sampling.num
    start_id, end_id = ends or Ends.of_sentences(tokenizer)
    unk_id = tokenizer.unk_id
    generators = [np.random.default_rng([sampling.seed, row]) for row in range(num)]
    begin = torch.tensor([-1 if start_id is None else start_id, *prompt]).unsqueeze(1)
    hidden, state = model.hidden(begin.to(place))
    logits = _logits(model, hidden[-1:]).repeat(num, axis=0)  # (num, V)
    state = state.map(lambda part: part.expand(num, -1).contiguous())
    ended = [False] * num
    for _ in range(sampling.max_tokens):
        drawn: list[int | None] = [None] * num
        if unk_id is not None and (sampling.num_kept is not None or sampling.top_p is not None):
            # What is kept is kept of the known: <UNK> alone might be left.
            logits[:, unk_id] = -np.inf
        for row, generator in enumerate(generators):
            if not ended[row]:
                p = sampling.distribution(logits[row])
                if unk_id is not None and p[unk_id] == 1:
                    logits[row, unk_id] = -np.inf
                    p = sampling.distribution(logits[row])
                drawn[row] = draw_known(p, generator, unk_id)
                ended[row] = drawn[row] == end_id
        yield drawn
        if all(ended):
            return
        following = torch.tensor([[0 if index is None else index for index in drawn]])
        hidden, state = model.hidden(following.to(place), state)
        logits = _logits(model, hidden)


def _logits(model: LanguageModel, hidden: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray(model.head(hidden)[0].double().cpu().numpy())


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    ends: Ends | None = None,
) -> Iterator[tuple[int, str]]:
    """Texts that go on from `prompt`, piece by piece: which text, and what comes next in it.

    The prompt is the first piece of each, as it was given.

    Args:
        model: the model.
        tokenizer: text to ids and back.
        prompt: text before the first drawn token; may be empty.
        sampling: how tokens are drawn.
        ends: what a text begins and ends with; None for what sentences begin and end with.

    Raises:
        TextError: a prompt that is no text.
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
    """The pieces of texts, each begun by the prompt, from tokens drawn for all side by side."""
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
    """One text as its tokens are drawn.

    Args:
        detokenizer: knows what stands before the text.
        stop: the strings that end it.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._until = Until(stop)

    @property
    def is_stopped(self) -> bool:
        """Whether one of the strings that end it has occurred."""
        return self._until.is_reached

    def add(self, index: int) -> str:
        """What can be written after the next token."""
        return self._until.add(self._detokenizer.add(index))

    def end(self) -> str:
        """What is left to write after the last token."""
        return self._until.add(self._detokenizer.end()) + self._until.end()


class Until:
    """Text up to the first occurrence of a string, as the text comes in pieces.

    Of several strings the one that is complete first counts; of those that are complete at the same
    character, the longest. Where pieces end makes no difference.

    Args:
        strings: the strings, none of them empty; may be none.

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
        """What comes before any of the strings for certain; their possible beginnings are held."""
        if self.is_reached:
            return ""
        text = self._held + piece
        found = [(at + len(each), at) for each in self._strings if (at := text.find(each)) >= 0]
        if found:
            self.is_reached, self._held = True, ""
            return text[: min(found)[1]]
        beginnings = (
            size
            for each in self._strings
            for size in range(min(len(each) - 1, len(text)), 0, -1)
            if text.endswith(each[:size])
        )
        written = len(text) - max(beginnings, default=0)
        self._held = text[written:]
        return text[:written]

    def end(self) -> str:
        """What was held, once the text has ended."""
        held, self._held = self._held, ""
        return held
