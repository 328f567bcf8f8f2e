"""The language model: embedding, recurrent layers, softmax over the vocabulary.

Knows ids, never text or settings.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain import cells, device
from lmtrain.errors import ConfigError
from lmtrain.kernels.cross_entropy import cross_entropy, log_likelihood
from lmtrain.model.adaptive_softmax import AdaptiveSoftmax
from lmtrain.model.dropout import Dropout
from lmtrain.model.recurrent import Recurrent, State


class LanguageModel(nn.Module):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩) = softmax(W_y a⟨t⟩ + b_y), a⟨t⟩ of the last recurrent layer.

    Args:
        vocab_size: V, tokens it knows.
        cell: name of a registered cell.
        embedding_size: E, numbers a token is embedded in.
        hidden_size: H, hidden units of each layer.
        num_layers: L, recurrent layers.
        dropout: probability of dropping a number on the way into, between and out of the layers.
        tied_embeddings: whether W_y is the embedding; E must equal H.
        has_adaptive_softmax: whether rare words share a cheaper softmax; see AdaptiveSoftmax.
        init_scale: every weight uniform in ± this at first; None for each part's own way.
        forget_bias: what forget gates' biases start at.
        cell_options: further arguments of the cell by name.
        is_mixed: whether training steps take bf16 for activations and the operands of products;
            weights, sums, cell states and losses are fp32, and so is all that is not training.
        has_sparse_embedding: whether the embedding's gradient may be sparse, one row for each
            token of the batch, where it has more rows than the batch; not if it is tied.
        seed: of the first weights and of dropout.

    Raises:
        ConfigError: no such cell, a size below 1, tied embeddings of another size or with an
            adaptive softmax, or an adaptive softmax of few tokens.

    Example:
        >>> model = LanguageModel(10, embedding_size=4, hidden_size=8, num_layers=1)
        >>> logits, state = model(torch.zeros(5, 2, dtype=torch.long))
        >>> logits.shape
        torch.Size([5, 2, 10])
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        cell: str = "lstm",
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float = 0.0,
        tied_embeddings: bool = False,
        has_adaptive_softmax: bool = False,
        init_scale: float | None = None,
        forget_bias: float = 1.0,
        cell_options: Mapping[str, Any] | None = None,
        is_mixed: bool = False,
        has_sparse_embedding: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if tied_embeddings and embedding_size != hidden_size:
            raise ConfigError(
                f"tied embeddings: embedding_size {embedding_size} is not hidden_size {hidden_size}"
            )
        if tied_embeddings and has_adaptive_softmax:
            raise ConfigError("tied embeddings: an adaptive softmax has weights of its own")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.generator = device.generator(seed)
        self.embedding = nn.Parameter(torch.empty(vocab_size, embedding_size))
        self.dropout = Dropout(dropout, self.generator)
        self.recurrent = Recurrent(
            lambda size: cells.create(cell, size, hidden_size, cell_options or {}),
            embedding_size,
            num_layers,
            dropout,
            self.generator,
        )
        self.adaptive_softmax: AdaptiveSoftmax | None = None
        if has_adaptive_softmax:
            self.adaptive_softmax = AdaptiveSoftmax(hidden_size, vocab_size)
        else:
            self.output_bias = nn.Parameter(torch.empty(vocab_size))
            if not tied_embeddings:
                self.output_weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self._tied = tied_embeddings
        self._is_mixed = is_mixed
        self._has_sparse_embedding = has_sparse_embedding and not tied_embeddings
        self._initialize(init_scale, forget_bias)

    def _initialize(self, init_scale: float | None, forget_bias: float) -> None:
        # Uniform embeddings of this width have unit-sized sums over E, whatever E is.
        own = {
            "embedding": math.sqrt(3 / self.embedding.shape[1]) / 2,
            "output_weight": 1 / math.sqrt(self.hidden_size),
            "output_bias": 0.0,
        }
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                scale = own[name] if init_scale is None else init_scale
                parameter.uniform_(-scale, scale, generator=self.generator)
        for layer in self.recurrent.cells:
            if isinstance(layer, cells.Cell):
                layer.initialize(self.generator, init_scale, forget_bias)
        if self.adaptive_softmax is not None:
            self.adaptive_softmax.initialize(self.generator, init_scale)

    @property
    def decoder(self) -> Tensor:
        """W_y of the full softmax, (V, H)."""
        return self.embedding if self._tied else self.output_weight

    @property
    def num_parameters(self) -> int:
        """Trained numbers, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Hidden states (T, B, H) of the last layer for tokens (T, B), and the state after them.

        A token below 0 stands for "nothing yet": its embedding is 0, as x⟨1⟩ = 0 in the notes.
        """
        is_sparse = self._has_sparse_embedding and inputs.numel() < self.vocab_size
        embedded = F.embedding(inputs.clamp(min=0), self.embedding, sparse=is_sparse)  # (T, B, E)
        if self.training and self._is_mixed:
            embedded = embedded.bfloat16()
        if not self.training:
            embedded = embedded * (inputs >= 0).unsqueeze(-1)
        hidden, state = self.recurrent(self.dropout(embedded), state)
        return self.dropout(hidden), state

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (T, B, V) for tokens (T, B), and the state after them."""
        hidden, state = self.hidden(inputs, state)
        return self.logits(hidden), state

    def logits(self, hidden: Tensor) -> Tensor:
        """Numbers (T, B, V) whose softmax is ŷ, from hidden states (T, B, H)."""
        if self.adaptive_softmax is not None:
            log_probs: Tensor = self.adaptive_softmax(hidden)
            return log_probs
        return F.linear(hidden, self.decoder, self.output_bias)

    def loss(
        self, inputs: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Nats of `targets` (T, B) given `inputs` (T, B), and the state after them.

        Summed over time, as in the notes, and the mean over the B streams.
        """
        hidden, state = self.hidden(inputs, state)
        scale = 1 / inputs.shape[1]
        if self.adaptive_softmax is not None:
            return -scale * self.adaptive_softmax.log_likelihood(hidden, targets).sum(), state
        return cross_entropy(hidden, self.decoder, self.output_bias, targets, scale), state

    @torch.no_grad()
    def log_probs(
        self, inputs: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Log P of each token of `targets`, (T, B), in nats, and the state after `inputs`."""
        hidden, state = self.hidden(inputs, state)
        if self.adaptive_softmax is not None:
            return self.adaptive_softmax.log_likelihood(hidden, targets), state
        return log_likelihood(hidden, self.decoder, self.output_bias, targets), state
