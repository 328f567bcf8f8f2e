"""A softmax that meets a sample of the words in training, since most words are rare."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.generator import ModelGenerator
from lmtrain.model.head import Softmax


class SampledSoftmax(Softmax):
    """A softmax whose training loss is estimated from K words drawn for each batch.

        L = log(e^(z_y) + Σ_{v drawn, v ≠ y} e^(z_v) / n_v) − z_y,    n_v = E[times v is drawn]

    The estimate of the sum is right on average whatever is drawn. The frequent words are drawn in
    every batch; of the others n_v falls as 1 / rank, as frequencies do. Ids should be in the order
    of frequency, as those of words are. Outside training all words count.

    Args:
        hidden_size: H, numbers in a hidden state.
        num_classes: V.
        num_samples: K; V or more is the full softmax.
        generator: what words are drawn from.
        tied: as of `Softmax`.

    Source: Bengio & Senécal 2008; one sample for a batch: Jean et al. 2015 (arXiv 1412.2007). Here
    the sample is stratified, one word of each K-th of Σ n_v, rather than drawn word by word.
    """

    expected: Tensor
    strata: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        num_samples: int,
        generator: ModelGenerator,
        tied: nn.Parameter | None = None,
    ) -> None:
        super().__init__(hidden_size, num_classes, tied)
        self._num_samples = min(num_samples, num_classes)
        self.generator = generator
        expected = _expected_draws(num_classes, self._num_samples)
        # They follow from its arguments, and so are in no checkpoint.
        self.register_buffer("expected", expected, persistent=False)
        self.register_buffer("strata", expected.cumsum(0), persistent=False)

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

    def nats(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Scale · Σ L; outside training, or where all words would be drawn, not estimated."""
        if not self.training or self._num_samples == len(self.expected):
            return super().nats(hidden, targets, scale)
        drawn = self.draw(self.generator.on(hidden.device))
        return scale * self.estimated(hidden, targets, drawn).sum()

    def estimated(self, hidden: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
        """L of each of `targets` (T, B) after hidden states (T, B, H), with words `drawn` (K)."""
        rows, target_rows = hidden.flatten(0, 1), targets.flatten()
        correction = self.expected[drawn].log().to(self.bias.dtype)
        # One look-up for both, so that the weights get one gradient.
        words, parts = torch.cat([drawn, target_rows]), [len(drawn), len(target_rows)]
        of_drawn, of_targets = F.embedding(words, self.weight).to(rows.dtype).split(parts)
        bias_of_drawn, bias_of_targets = self.bias[words].split(parts)
        others = (rows @ of_drawn.T).to(self.bias.dtype) + (bias_of_drawn - correction)  # (N, K)
        others = others.masked_fill(target_rows.unsqueeze(1) == drawn, -torch.inf)
        score = (rows * of_targets).sum(1, dtype=self.bias.dtype) + bias_of_targets  # (N)
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
