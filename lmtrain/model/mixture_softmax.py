"""A mixture of softmaxes: output distributions that one product of low rank cannot give."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Bytes of logits that are alive at once.
_MOST_BYTES = 64 << 20


class MixtureSoftmax(nn.Module):
    """ŷ = Σ_k π_k softmax(W_y h_k + b_y), π = softmax(W_π a), h_k = tanh(W_k a + b_k).

    Shapes: `weight_prior` holds W_π, (K, H); `weight_latent` holds all W_k, (K·E, H).

    Args:
        hidden_size: H, numbers in a hidden state.
        latent_size: E, numbers in each h_k and in a row of W_y.
        num_mixtures: K, softmaxes, at least 1.

    Source: Yang, Dai, Salakhutdinov & Cohen 2018 (arXiv 1711.03953).
    """

    def __init__(self, hidden_size: int, latent_size: int, num_mixtures: int) -> None:
        super().__init__()
        self.weight_prior = nn.Parameter(torch.empty(num_mixtures, hidden_size))
        self.weight_latent = nn.Parameter(torch.empty(num_mixtures * latent_size, hidden_size))
        self.bias_latent = nn.Parameter(torch.empty(num_mixtures * latent_size))

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws the first weights: uniform in ± init_scale, or in ± 1/√H without it."""
        with torch.no_grad():
            for parameter in self.parameters():
                own = 1 / math.sqrt(self.weight_prior.shape[1]) if parameter.dim() == 2 else 0.0
                scale = own if init_scale is None else init_scale
                parameter.uniform_(-scale, scale, generator=generator)

    def _parts(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log π, (N, K), and h, (N, K, E), of hidden states (N, H)."""
        hidden = hidden.to(self.weight_prior.dtype)
        log_prior = F.linear(hidden, self.weight_prior).log_softmax(-1)
        latent = torch.tanh(F.linear(hidden, self.weight_latent, self.bias_latent))
        return log_prior, latent.unflatten(1, (len(self.weight_prior), -1))

    def log_likelihood(
        self, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Log P of each of `targets` (T, B) after hidden states (T, B, H), in nats.

        Args:
            hidden: (T, B, H).
            targets: (T, B).
            weight: W_y, (V, E).
            bias: b_y, (V).
        """
        log_prior, latent = self._parts(hidden.flatten(0, 1))
        rows = max(1, _MOST_BYTES // (4 * len(weight) * log_prior.shape[1]))
        # The logits of a piece are computed again for its gradient rather than kept.
        pieces = [
            checkpoint(
                *(_log_likelihood, *piece, weight, bias),
                use_reentrant=False, preserve_rng_state=False,
            )
            for piece in zip(
                log_prior.split(rows), latent.split(rows), targets.flatten().split(rows),
                strict=True,
            )
        ]  # fmt: skip
        return torch.cat(pieces).view(targets.shape)

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Log P of every word, (T, B, V), after hidden states (T, B, H)."""
        log_prior, latent = self._parts(hidden.flatten(0, 1))
        log_probs = F.linear(latent, weight, bias).log_softmax(-1)  # (N, K, V)
        mixed = (log_probs + log_prior.unsqueeze(-1)).logsumexp(1)
        return mixed.view(*hidden.shape[:2], -1)


def _log_likelihood(
    log_prior: Tensor, latent: Tensor, targets: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    logits = F.linear(latent, weight, bias)  # (N, K, V)
    index = targets.view(-1, 1, 1).expand(-1, latent.shape[1], 1)
    score = logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)
    return (score + log_prior).logsumexp(-1)
