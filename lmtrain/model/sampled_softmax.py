"""A softmax that meets a sample of the words in training, since most words are rare."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SampledSoftmax(nn.Module):
    """Σ_v e^(z_v) over all words but the target, estimated from K words drawn for each batch.

        L = log(e^(z_y) + Σ_{v drawn, v ≠ y} e^(z_v) / n_v) − z_y,    n_v = E[times v is drawn]

    The estimate of the sum is right on average whatever is drawn. The frequent words are drawn in
    every batch; of the others n_v falls as 1 / rank, as frequencies do. Ids should be in the order
    of frequency, as those of words are. It has no weights of its own: a model trained with it
    is used with the full softmax.

    Args:
        vocab_size: V.
        num_samples: K, from 1 to V; with V it is the full softmax.

    Source: Bengio & Senécal 2008; one sample for a batch: Jean et al. 2015 (arXiv 1412.2007). Here
    the sample is stratified, one word of each K-th of Σ n_v, rather than drawn word by word.
    """

    expected: Tensor
    strata: Tensor

    def __init__(self, vocab_size: int, num_samples: int) -> None:
        super().__init__()
        expected = _expected_draws(vocab_size, num_samples)
        # They follow from its arguments, and so are in no checkpoint.
        self.register_buffer("expected", expected, persistent=False)
        self.register_buffer("strata", expected.cumsum(0), persistent=False)
        self._num_samples = num_samples

    def draw(self, generator: torch.Generator) -> Tensor:
        """K words, in the order of their ids; a rare one may be among them twice."""
        place = self.strata.device
        uniform = torch.rand(
            self._num_samples, dtype=torch.float64, device=place, generator=generator
        )
        stratum = torch.arange(self._num_samples, device=place)
        drawn = torch.searchsorted(self.strata, stratum + uniform, right=True)
        # Rounding may leave the last stratum a hair shorter than its number.
        return drawn.clamp_(max=len(self.expected) - 1)

    def nats(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """L of each of `targets` (T, B), estimated.

        Args:
            hidden: (T, B, H); in bf16, the operands of products are bf16.
            weight: W_y, (V, H).
            bias: b_y, (V).
            targets: (T, B).
            generator: the source of chance, where the weights are.
        """
        rows, came = hidden.flatten(0, 1), targets.flatten()
        drawn = self.draw(generator)
        correction = self.expected[drawn].log().to(bias.dtype)
        # One look-up for both, so that the weights get one gradient.
        words, parts = torch.cat([drawn, came]), [len(drawn), len(came)]
        of_drawn, of_targets = F.embedding(words, weight).to(rows.dtype).split(parts)
        bias_of_drawn, bias_of_targets = bias[words].split(parts)
        others = (rows @ of_drawn.T).to(bias.dtype) + (bias_of_drawn - correction)  # (N, K)
        others = others.masked_fill(came.unsqueeze(1) == drawn, -torch.inf)
        score = (rows * of_targets).sum(1, dtype=bias.dtype) + bias_of_targets  # (N)
        nats: Tensor = torch.logaddexp(others.logsumexp(1), score) - score
        return nats.view(targets.shape)


def _expected_draws(vocab_size: int, num_samples: int) -> Tensor:
    """n_v of each word, (V): at most 1, then falling as 1 / rank, K together."""
    share = 1 / np.arange(1, vocab_size + 1)
    # The height of the fall if it began at a word, with the draws that are left there.
    height = (num_samples - np.arange(vocab_size)) / share[::-1].cumsum()[::-1]
    # It begins at the first word that is then not worth a whole draw; with K = V nowhere.
    falls = np.flatnonzero(height * share < 1)
    return torch.from_numpy(
        np.minimum(1, height[falls[0]] * share if len(falls) else share * vocab_size)
    )
