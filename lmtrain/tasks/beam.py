"""Beam search: the most likely outputs of an encoder–decoder, nearly."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmtrain.model.translator import Translator

# An output has at most so many tokens for each of its source's, and some more.
_MOST_A_TOKEN, _MORE = 2, 10


class Hypothesis(NamedTuple):
    """An output that has ended, or that is as long as it may be."""

    ids: list[int]
    """Its tokens, the end left out."""
    score: float
    """The mean of log P of its tokens, the end included: the length is normalized away."""


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
    """For each source, up to `beam` outputs, the best one first.

    Args:
        model: the network.
        sources: tokens (S, B).
        lengths: of each source, (B,).
        beam: outputs that are followed at once; 1 is greedy.
        end_id: the token that begins and ends an output.
        unknown_id: a token that is never chosen; None for none.

    Source: length normalization: Wu et al. 2016, with α = 1.
    """
    count, place = sources.shape[1], sources.device
    memory, state = model.encode(sources, lengths)
    memory = memory.repeated(beam)
    state = state.map(lambda part: part.repeat_interleave(beam, 0))
    ended: list[list[Hypothesis]] = [[] for _ in range(count)]
    outputs = torch.zeros(count * beam, 0, dtype=torch.long, device=place)
    last = torch.full((count * beam,), end_id, device=place)
    # At first all of a source's outputs are the same: one of them is followed.
    scores = torch.full((count, beam), -torch.inf, dtype=torch.float64, device=place)
    scores[:, 0] = 0
    first_rows = torch.arange(count, device=place).unsqueeze(1) * beam
    # Of each source by itself, so that an output does not depend on the sources beside it.
    most = (_MOST_A_TOKEN * lengths + _MORE).tolist()
    for step in range(1, max(most) + 1):
        hidden, state = model.decode(last.unsqueeze(0), memory, state)
        log_probs = model.head(hidden)[0].double().log_softmax(-1)  # (B · beam, V)
        if unknown_id is not None:
            log_probs[:, unknown_id] = -torch.inf
        vocab_size = log_probs.shape[1]
        following = scores.unsqueeze(2) + log_probs.view(count, beam, -1)
        # As many may end as are followed, and as many must be left.
        best, places = following.flatten(1).topk(min(2 * beam, beam * vocab_size), dim=1)
        rows, tokens = first_rows + places // vocab_size, places % vocab_size
        is_open = torch.tensor([step <= limit for limit in most], device=place).unsqueeze(1)
        _collect(ended, best / step, rows, (tokens == end_id) & is_open, outputs, beam)
        goes_on = torch.where(tokens == end_id, -torch.inf, best)
        scores, chosen = goes_on.topk(beam, dim=1)
        rows, last = rows.gather(1, chosen).flatten(), tokens.gather(1, chosen).flatten()
        outputs = torch.cat([outputs[rows], last.unsqueeze(1)], dim=1)
        state = state.map(lambda part, rows=rows: part[rows])  # type: ignore[misc]
        for source, limit in enumerate(most):
            if step == limit and not ended[source]:  # none has ended: the best so far
                ids = outputs[source * beam].tolist()
                ended[source].append(Hypothesis(ids, float(scores[source, 0]) / step))
        pairs = zip(ended, most, strict=True)
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
    """Takes the outputs that end at a step, of sources that have not enough of them."""
    is_end = is_end[:, :beam] & means[:, :beam].isfinite()
    for source, place in is_end.nonzero().tolist():
        if len(ended[source]) < beam:
            ids = outputs[rows[source, place]].tolist()
            ended[source].append(Hypothesis(ids, float(means[source, place])))
