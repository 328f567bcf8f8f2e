"""Sampled softmax: a training loss estimated from a sample of the vocabulary."""

import numpy as np
import torch
from torch import Tensor, nn

from lmtrain.kernels.cross_entropy import sampled_cross_entropy
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.head import Softmax
from lmtrain.model.lookup import Lookup


class SampledSoftmax(Softmax, Lookup):
    """Softmax whose training loss is estimated from K words drawn for each batch.

        L = log(e^(z_y) + Σ_{v drawn, v ≠ y} e^(z_v) / n_v) − z_y,    n_v = E[times v is drawn]

    The estimate of the sum is unbiased. The most frequent words are drawn in every batch (n_v = 1);
    for the others n_v is proportional to 1 / rank. Ids should be in order of decreasing frequency,
    as those of word vocabularies are. In evaluation mode the softmax is exact. Targets below 0 are
    not supported in training unless K ≥ V.

    Args:
        hidden_size: H, features of a hidden state.
        num_classes: V, number of words.
        num_samples: K, words drawn for a batch; V or more for the full softmax.
        generator: the model's random generator.
        tied: see `Softmax`.

    Source: Bengio & Senécal 2008; one sample for a batch: Jean et al. 2015 (arXiv 1412.2007). The
    sample is stratified: one word from each of K equal intervals of the cumulative n_v.
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
        # Derived from the arguments, so not stored in checkpoints.
        self.register_buffer("expected", expected, persistent=False)
        self.register_buffer("strata", expected.cumsum(0), persistent=False)

    def draw(self, generator: torch.Generator) -> Tensor:
        """K word ids, (K,), ascending; a rare word may occur twice."""
        device = self.strata.device
        uniform = torch.rand(
            self._num_samples, dtype=torch.float64, device=device, generator=generator
        )
        stratum = torch.arange(self._num_samples, device=device)
        drawn = torch.searchsorted(self.strata, stratum + uniform, right=True)
        # By rounding, the cumulative sum may end slightly below K.
        return drawn.clamp_(max=len(self.expected) - 1)

    def loss(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Scale · Σ L, a scalar; exact in evaluation mode or if K ≥ V, otherwise estimated."""
        if not self.training or self._num_samples == len(self.expected):
            return super().loss(hidden, targets, scale)
        return self.estimated(hidden, targets, self.draw(self.generator.on(hidden.device)), scale)

    def estimated(self, hidden: Tensor, targets: Tensor, drawn: Tensor, scale: float) -> Tensor:
        """Scale · Σ L of `targets` (T, B), from hidden states (T, B, H) and `drawn` words (K,)."""
        rows, target_rows = hidden.flatten(0, 1), targets.flatten()
        correction = self.expected[drawn].log().to(self.bias.dtype)
        # One lookup for both, so that autograd builds one gradient of the weights.
        words, parts = torch.cat([drawn, target_rows]), [len(drawn), len(target_rows)]
        of_drawn, of_targets = self.lookup(words).to(rows.dtype).split(parts)
        bias_of_drawn, bias_of_targets = self.bias[words].split(parts)
        return sampled_cross_entropy(
            *(rows, of_drawn, bias_of_drawn - correction, of_targets, bias_of_targets),
            is_target=target_rows.unsqueeze(1) == drawn,
            scale=scale,
        )


def _expected_draws(vocab_size: int, num_samples: int) -> Tensor:
    """n_v of each word, (V,): 1 for the most frequent words, then ∝ 1 / rank; the sum is K."""
    weight = 1 / np.arange(1, vocab_size + 1)
    # scale[i]: if words from i on are ∝ 1 / rank and share the draws that are left, K − i.
    scale = (num_samples - np.arange(vocab_size)) / weight[::-1].cumsum()[::-1]
    # The first word with n_v below 1 starts the tail; there is none if K = V.
    tail = np.flatnonzero(scale * weight < 1)
    return torch.from_numpy(
        np.minimum(1, scale[tail[0]] * weight if len(tail) else weight * vocab_size)
    )
