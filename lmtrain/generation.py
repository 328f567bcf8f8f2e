"""Novel text: one token drawn after the other from what the model expects.

x⟨1⟩ is the start; y⟨t⟩ is drawn from ŷ⟨t⟩ and becomes x⟨t+1⟩; `<UNK>` is drawn again; `<EOS>` ends.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import ConfigError, DivergedError, TextError
from lmtrain.model.language_model import LanguageModel

# So many draws of <UNK> in a row are given up; the other tokens then share its probability.
_MOST_REJECTIONS = 100


def draw(probabilities: NDArray[np.float64], chance: np.random.Generator) -> int:
    """One index by the inverse of the cumulative distribution, as `chance.choice(V, p=p)` draws it.

    Args:
        probabilities: (V,), summing to 1.
        chance: the generator; one number is taken from it.

    Example:
        >>> p = np.array([0.25, 0.0, 0.75])
        >>> draw(p, np.random.default_rng(3)) == np.random.default_rng(3).choice(3, p=p)
        True
    """
    cumulative = probabilities.cumsum()
    cumulative /= cumulative[-1]
    return int(cumulative.searchsorted(chance.random(), side="right"))


def draw_known(
    probabilities: NDArray[np.float64], chance: np.random.Generator, unk_id: int | None
) -> int:
    """One index that is not `unk_id`: a draw of it is rejected and repeated.

    Args:
        probabilities: (V,), summing to 1.
        chance: the generator.
        unk_id: the index that is rejected; None for none.

    Raises:
        DivergedError: nothing but `unk_id` is possible, or a probability is not finite.
    """
    if not np.isfinite(probabilities).all():
        raise DivergedError(
            "the model diverged: its probabilities are not finite numbers",
            "try: an earlier checkpoint, or training with a smaller --lr",
        )
    for _ in range(_MOST_REJECTIONS):
        if (index := draw(probabilities, chance)) != unk_id:
            return index
    known = probabilities.copy()
    known[unk_id] = 0
    if known.sum() == 0:
        raise DivergedError("the model expects nothing but <UNK>", "try: a higher --temperature")
    return draw(known / known.sum(), chance)


def distribution(
    logits: NDArray[np.float64], temperature: float, top_k: int | None, top_p: float | None
) -> NDArray[np.float64]:
    """softmax(logits / temperature), cut down to the likeliest tokens.

    Args:
        logits: (V,).
        temperature: above 0; below 1 the likely becomes likelier.
        top_k: tokens kept at most, the likeliest first; None for all.
        top_p: tokens kept until their probabilities sum to this; None for all.

    Source: nucleus (top-p) sampling: Holtzman et al. 2020.
    """
    scaled = (logits - logits.max()) / temperature
    weights = np.exp(scaled)
    order = np.argsort(-weights, kind="stable")
    if top_k is not None:
        weights[order[top_k:]] = 0
    if top_p is not None:
        reached = np.cumsum(weights[order]) / weights.sum()
        weights[order[1 + int(np.searchsorted(reached, top_p)) :]] = 0
    return np.asarray(weights / weights.sum())


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    start_id: int | None,
    eos_id: int | None,
    unk_id: int | None,
    num: int,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1,
) -> Iterator[list[int | None]]:
    """Tokens of `num` sequences drawn side by side, one of each at a time.

    Each sequence has a generator of its own, seeded by `seed` and its place, so that its text does
    not depend on how many others are drawn.

    Args:
        model: the model.
        prompt: ids that the sequences go on from; may be empty.
        start_id: the token taken to stand before the first; None for nothing.
        eos_id: the token that ends a sequence; None if none does.
        unk_id: the token that is never drawn; None for none.
        num: sequences, at least 1.
        max_tokens: tokens drawn for each at most.
        temperature: see `distribution`.
        top_k: see `distribution`.
        top_p: see `distribution`.
        seed: of the draws.

    Yields:
        For each sequence its next id, or None once it has ended.

    Raises:
        DivergedError: the model's probabilities are not finite.
    """
    model.eval()
    place = model.embedding.device
    chances = [np.random.default_rng([seed, row]) for row in range(num)]
    begin = torch.tensor([-1 if start_id is None else start_id, *prompt]).unsqueeze(1)
    hidden, state = model.hidden(begin.to(place))
    logits = _logits(model, hidden[-1:]).repeat(num, axis=0)  # (num, V)
    state = state.map(lambda part: part.expand(num, -1).contiguous())
    ended = [False] * num
    for _ in range(max_tokens):
        drawn: list[int | None] = [None] * num
        if unk_id is not None and (top_k is not None or top_p is not None):
            # What is kept is kept of the known: <UNK> alone might be left.
            logits[:, unk_id] = -np.inf
        for row, chance in enumerate(chances):
            if not ended[row]:
                p = distribution(logits[row], temperature, top_k, top_p)
                if unk_id is not None and p[unk_id] == 1:
                    logits[row, unk_id] = -np.inf
                    p = distribution(logits[row], temperature, top_k, top_p)
                drawn[row] = draw_known(p, chance, unk_id)
                ended[row] = drawn[row] == eos_id
        yield drawn
        if all(ended):
            return
        following = torch.tensor([[0 if index is None else index for index in drawn]])
        hidden, state = model.hidden(following.to(place), state)
        logits = _logits(model, hidden)


def _logits(model: LanguageModel, hidden: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray(model.logits(hidden)[0].double().cpu().numpy())


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num: int,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1,
) -> Iterator[tuple[int, str]]:
    """Texts that go on from `prompt`, piece by piece: which text, and what comes next in it.

    Args:
        model: the model.
        tokenizer: text to ids and back.
        prompt: text before the first drawn token; may be empty.
        num: texts, 1 or more.
        max_tokens: tokens drawn for each at most, 1 or more.
        temperature: above 0; below 1 the likely becomes likelier.
        top_k: draw from so many likeliest tokens; None for all.
        top_p: draw from the likeliest tokens that sum to this probability; None for all.
        seed: of the draws, 0 or more.

    Raises:
        ConfigError: an argument out of its range.
        TextError: a prompt that is no text or, at character level, has an unknown character.
        DivergedError: the model's probabilities are not finite.
    """
    _check(prompt, num, max_tokens, temperature, top_k, top_p, seed)
    ids = tokenizer.encode(prompt).tolist() if prompt else []
    detokenizers = [tokenizer.detokenizer() for _ in range(num)]
    for row, detokenizer in enumerate(detokenizers):
        if ids:
            yield row, "".join(detokenizer.add(index) for index in ids)
    drawn = generate(
        model,
        ids,
        start_id=tokenizer.start_id,
        eos_id=tokenizer.eos_id,
        unk_id=tokenizer.unk_id,
        num=num,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    for indices in drawn:
        for row, index in enumerate(indices):
            if index is not None and index != tokenizer.eos_id:
                yield row, detokenizers[row].add(index)
    for row, detokenizer in enumerate(detokenizers):
        yield row, detokenizer.end()


def _check(
    prompt: str,
    num: int,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    checks = {
        f"num {num} is below 1": num < 1,
        f"max_tokens {max_tokens} is below 1": max_tokens < 1,
        f"temperature {temperature} is not above 0": not 0 < temperature < math.inf,
        f"top_k {top_k} is below 1": top_k is not None and top_k < 1,
        f"top_p {top_p} is not above 0 and at most 1": top_p is not None and not 0 < top_p <= 1,
        f"seed {seed} is below 0": seed < 0,
    }
    for problem, is_wrong in checks.items():
        if is_wrong:
            raise ConfigError(problem)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TextError("the prompt is not valid UTF-8") from None
