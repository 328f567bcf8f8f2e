"""Beam search for likely outputs of an encoder–decoder."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmtrain.model.translator import Translator

# An output has at most ratio · (length of its source) + extra tokens.
_MAX_LENGTH_RATIO, _EXTRA_LENGTH = 2, 10


class Hypothesis(NamedTuple):
    """An output that has ended or reached its maximum length."""

    ids: list[int]
    """Its tokens, without the end token."""
    score: float
    """Mean log P of its tokens including the end token (length normalization)."""


@torch.no_grad()
def search(
    model: Translator,
    sources: Tensor,
    lengths: Tensor,
    *,
    beam: int,
    end_id: int,
    unknown_id: int | None,
) -> list[list[Hypothesis]]:
    """Up to `beam` outputs for each source, best first.

    Args:
        model: the network.
        sources: tokens (S, B).
        lengths: of each source, (B,).
        beam: beam size; 1 is greedy.
        end_id: the token that starts and ends an output.
        unknown_id: a token that is never chosen; None for none.

    Source: length normalization: Wu et al. 2016, with α = 1.
    """
    count, device = sources.shape[1], sources.device
    memory, state = model.encode(sources, lengths)
    memory = memory.repeated(beam)
    state = state.map(lambda part: part.repeat_interleave(beam, 0))
    ended: list[list[Hypothesis]] = [[] for _ in range(count)]
    outputs = torch.zeros(count * beam, 0, dtype=torch.long, device=device)
    last = torch.full((count * beam,), end_id, device=device)
    # Before the first step the hypotheses of a source are equal: only one of them is expanded.
    scores = torch.full((count, beam), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0
    first_rows = torch.arange(count, device=device).unsqueeze(1) * beam
    # One limit for each source, so that an output does not depend on the rest of the batch.
    limits = (_MAX_LENGTH_RATIO * lengths + _EXTRA_LENGTH).tolist()
    for step in range(1, max(limits) + 1):
        hidden, state = model.decode(last.unsqueeze(0), memory, state)
        log_probs = model.head(hidden)[0].double().log_softmax(-1)  # (B · beam, V)
        if unknown_id is not None:
            log_probs[:, unknown_id] = -torch.inf
        vocab_size = log_probs.shape[1]
        following = scores.unsqueeze(2) + log_probs.view(count, beam, -1)
        # Of 2 · beam candidates at most `beam` end, so that at least `beam` continue.
        best, candidates = following.flatten(1).topk(min(2 * beam, beam * vocab_size), dim=1)
        rows, tokens = first_rows + candidates // vocab_size, candidates % vocab_size
        is_open = torch.tensor([step <= limit for limit in limits], device=device).unsqueeze(1)
        _collect(ended, best / step, rows, (tokens == end_id) & is_open, outputs, beam)
        continued = torch.where(tokens == end_id, -torch.inf, best)
        scores, chosen = continued.topk(beam, dim=1)
        rows, last = rows.gather(1, chosen).flatten(), tokens.gather(1, chosen).flatten()
        outputs = torch.cat([outputs[rows], last.unsqueeze(1)], dim=1)
        state = state.map(lambda part, rows=rows: part[rows])  # type: ignore[misc]
        for source, limit in enumerate(limits):
            # If no output has ended, the best one so far is returned.
            if step == limit and not ended[source]:
                ids = outputs[source * beam].tolist()
                ended[source].append(Hypothesis(ids, float(scores[source, 0]) / step))
        pairs = zip(ended, limits, strict=True)
        if all(len(each) >= beam or step >= limit for each, limit in pairs):
            break
    return [sorted(found, key=lambda each: -each.score)[:beam] for found in ended]


def _collect(
    ended: list[list[Hypothesis]],
    means: Tensor,
    rows: Tensor,
    is_end: Tensor,
    outputs: Tensor,
    beam: int,
) -> None:
    """Adds the outputs that end at a step, up to `beam` for each source."""
    is_end = is_end[:, :beam] & means[:, :beam].isfinite()
    for source, candidate in is_end.nonzero().tolist():
        if len(ended[source]) < beam:
            ids = outputs[rows[source, candidate]].tolist()
            ended[source].append(Hypothesis(ids, float(means[source, candidate])))
