"""The language model: embedding, recurrent layers, softmax over the vocabulary.

Knows ids, never text or settings.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain import cells
from lmtrain.errors import ConfigError
from lmtrain.kernels.cross_entropy import cross_entropy, log_likelihood
from lmtrain.model.adaptive_softmax import AdaptiveSoftmax
from lmtrain.model.dropout import Dropout, keep_mask
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import Recurrent, State
from lmtrain.model.sampled_softmax import SampledSoftmax


@dataclass(frozen=True)
class Regularization:
    """What keeps a model from learning its text by heart; all of it acts in training alone.

    Args:
        dropout: probability of dropping a number between layers.
        input_dropout: of the embedded tokens; None for `dropout`.
        output_dropout: of the last layer's hidden states; None for `dropout`.
        is_locked: whether what is dropped in a call is dropped at all its time steps.
        word_dropout: probability of dropping a word of the vocabulary wherever it stands.
        weight_dropout: probability of dropping a weight between the states of two time steps.
        activation: α: times the mean square of the hidden states after dropout, a time step.
        temporal: β: times the mean square of the hidden states' change, a time step.

    Source: dropout: Zaremba, Sutskever & Vinyals 2014; locked, word: Gal & Ghahramani 2016; weight,
    activation, temporal: Merity, Keskar & Socher 2018.
    """

    dropout: float = 0.0
    input_dropout: float | None = None
    output_dropout: float | None = None
    is_locked: bool = False
    word_dropout: float = 0.0
    weight_dropout: float = 0.0
    activation: float = 0.0
    temporal: float = 0.0


class Loss(NamedTuple):
    """What a window of text costs, each summed over time and the mean over streams."""

    objective: Tensor
    """What training makes small: the nats, and the penalties of the regularization."""
    nats: Tensor
    """−log P of the targets."""
    state: State
    """The state after the window."""


class LanguageModel(nn.Module):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩) = softmax(W_y a⟨t⟩ + b_y), a⟨t⟩ of the last recurrent layer.

    Args:
        vocab_size: V, tokens it knows.
        cell: name of a registered cell.
        embedding_size: E, numbers a token is embedded in.
        hidden_size: H, hidden units of each layer.
        num_layers: L, recurrent layers.
        regularization: dropout and penalties; none without it.
        is_residual: whether layers add their input to their hidden states; see Recurrent.
        tied_embeddings: whether W_y is the embedding; the last layer then has E hidden units.
        softmax: full; sampled, which training steps estimate (see SampledSoftmax); or adaptive,
            where rare words are cheaper (see AdaptiveSoftmax).
        num_samples: words that a sampled softmax draws for a training step; where there are no
            more, it is the full one.
        init_scale: every weight uniform in ± this at first; None for each part's own way.
        forget_bias: what forget gates' biases start at.
        cell_options: further arguments of the cell by name.
        is_mixed: whether training steps take bf16 for activations and the operands of products;
            weights, sums, cell states and losses are fp32, and so is all that is not training.
        has_sparse_embedding: whether the embedding's gradient may be sparse, one row for each
            token of the batch, where it has more rows than the batch; not if it is tied, not
            on CUDA.
        seed: of the first weights and of dropout.

    Raises:
        ConfigError: no such cell, a size below 1, tied embeddings of another size than a single
            layer or with an adaptive softmax, or an adaptive softmax of few tokens.

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
        regularization: Regularization | None = None,
        is_residual: bool = False,
        tied_embeddings: bool = False,
        softmax: str = "full",
        num_samples: int = 1000,
        init_scale: float | None = None,
        forget_bias: float = 1.0,
        cell_options: Mapping[str, Any] | None = None,
        is_mixed: bool = False,
        has_sparse_embedding: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if tied_embeddings and num_layers == 1 and embedding_size != hidden_size:
            raise ConfigError(
                f"tied embeddings: embedding_size {embedding_size} is not hidden_size "
                f"{hidden_size} of the only layer"
            )
        if tied_embeddings and softmax == "adaptive":
            raise ConfigError("tied embeddings: an adaptive softmax has weights of its own")
        self.vocab_size = vocab_size
        self.chance = ModelGenerator(seed)
        self.regularization = regularization or Regularization()
        self.embedding = nn.Parameter(torch.empty(vocab_size, embedding_size))
        self.output_size = embedding_size if tied_embeddings else hidden_size
        self.input_dropout = self._dropout(self.regularization.input_dropout)
        self.recurrent = Recurrent(
            lambda inputs, hidden: cells.create(cell, inputs, hidden, cell_options or {}),
            embedding_size,
            [hidden_size] * (num_layers - 1) + [self.output_size],
            self._dropout(None),
            weight_dropout=self.regularization.weight_dropout,
            is_residual=is_residual,
        )
        self.output_dropout = self._dropout(self.regularization.output_dropout)
        self.adaptive_softmax: AdaptiveSoftmax | None = None
        self.sampled_softmax: SampledSoftmax | None = None
        if softmax == "sampled" and num_samples < vocab_size:
            self.sampled_softmax = SampledSoftmax(vocab_size, num_samples)
        if softmax == "adaptive":
            self.adaptive_softmax = AdaptiveSoftmax(hidden_size, vocab_size)
        else:
            self.output_bias = nn.Parameter(torch.empty(vocab_size))
            if not tied_embeddings:
                self.output_weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self._tied = tied_embeddings
        self._is_mixed = is_mixed
        self._has_sparse_embedding = has_sparse_embedding and not tied_embeddings
        self._initialize(init_scale, forget_bias)

    def _dropout(self, p: float | None) -> Dropout:
        p = self.regularization.dropout if p is None else p
        return Dropout(p, self.chance, is_locked=self.regularization.is_locked)

    def _initialize(self, init_scale: float | None, forget_bias: float) -> None:
        # Uniform embeddings of this width have unit-sized sums over E, whatever E is.
        own = {
            "embedding": math.sqrt(3 / self.embedding.shape[1]) / 2,
            "output_weight": 1 / math.sqrt(self.output_size),
            "output_bias": 0.0,
        }
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                scale = own[name] if init_scale is None else init_scale
                parameter.uniform_(-scale, scale, generator=self.chance.generator)
        for layer in self.recurrent.cells:
            if isinstance(layer, cells.Cell):
                layer.initialize(self.chance.generator, init_scale, forget_bias)
        if self.adaptive_softmax is not None:
            self.adaptive_softmax.initialize(self.chance.generator, init_scale)

    @property
    def decoder(self) -> Tensor:
        """W_y of a full softmax, (V, H)."""
        return self.embedding if self._tied else self.output_weight

    @property
    def num_parameters(self) -> int:
        """Trained numbers, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Hidden states (T, B, H) of the last layer for tokens (T, B), and the state after them.

        The output's dropout has not acted on them.

        A token below 0 stands for "nothing yet": its embedding is 0, as x⟨1⟩ = 0 in the notes.
        """
        is_sparse = self._has_sparse_embedding and self.training
        is_sparse = is_sparse and inputs.numel() < self.vocab_size and not inputs.is_cuda
        embedded = F.embedding(inputs.clamp(min=0), self.embedding, sparse=is_sparse)  # (T, B, E)
        if self.training and self._is_mixed:
            embedded = embedded.bfloat16()
        if not self.training:
            embedded = embedded * (inputs >= 0).unsqueeze(-1)
        elif self.regularization.word_dropout:
            p = self.regularization.word_dropout
            words = keep_mask((self.vocab_size, 1), p, self.chance.on(inputs.device), embedded)
            embedded = embedded * F.embedding(inputs, words)  # (T, B, 1)
        hidden, state = self.recurrent(self.input_dropout(embedded), state)
        return hidden, state

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (T, B, V) for tokens (T, B), and the state after them."""
        hidden, state = self.hidden(inputs, state)
        return self.logits(self.output_dropout(hidden)), state

    def logits(self, hidden: Tensor) -> Tensor:
        """Numbers (T, B, V) whose softmax is ŷ, from hidden states (T, B, H)."""
        if self.adaptive_softmax is not None:
            logits: Tensor = self.adaptive_softmax(hidden)
        else:
            logits = F.linear(hidden, self.decoder, self.output_bias)
        return logits

    def loss(self, inputs: Tensor, targets: Tensor, state: State | None = None) -> Loss:
        """Nats of `targets` (T, B) given `inputs` (T, B), summed over time as in the notes."""
        hidden, state = self.hidden(inputs, state)
        dropped = self.output_dropout(hidden)
        scale = 1 / inputs.shape[1]
        if self.adaptive_softmax:
            nats = -scale * self.log_likelihood(dropped, targets).sum()
        elif self.sampled_softmax and self.training:
            head, weights = self.sampled_softmax, (self.decoder, self.output_bias)
            generator = self.chance.on(dropped.device)
            nats = scale * head.nats(dropped, *weights, targets, generator).sum()
        else:
            nats = cross_entropy(dropped, self.decoder, self.output_bias, targets, scale)
        return Loss(self._penalized(nats, hidden, dropped), nats.detach(), state)

    def _penalized(self, nats: Tensor, hidden: Tensor, dropped: Tensor) -> Tensor:
        """The loss with T · (α mean(a²) + β mean((a⟨t⟩ − a⟨t−1⟩)²))."""
        objective, steps = nats, len(hidden)
        if self.training and self.regularization.activation:
            square = dropped.float().square().mean()
            objective = objective + self.regularization.activation * steps * square
        if self.training and self.regularization.temporal and steps > 1:
            change = hidden.float().diff(dim=0).square().mean()
            objective = objective + self.regularization.temporal * steps * change
        return objective

    @torch.no_grad()
    def log_probs(
        self, inputs: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Log P of each token of `targets`, (T, B), in nats, and the state after `inputs`.

        A target below 0 is none, and what is said of it means nothing.
        """
        hidden, state = self.hidden(inputs, state)
        return self.log_likelihood(hidden, targets.clamp(min=0)), state

    def log_likelihood(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log P of each of `targets` (T, B) after hidden states (T, B, H), in nats."""
        if self.adaptive_softmax is not None:
            return self.adaptive_softmax.log_likelihood(hidden, targets)
        if torch.is_grad_enabled():
            log_probs = self.logits(hidden).log_softmax(-1)  # (T, B, V)
            return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return log_likelihood(hidden, self.decoder, self.output_bias, targets)
