"""The encoder–decoder: maps a sequence to another of a different length (T_x ≠ T_y)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.cells import Cell
from lmtrain.model.attention import Attention
from lmtrain.model.dropout import Dropout
from lmtrain.model.encoder import Encoder
from lmtrain.model.head import Head
from lmtrain.model.network import Network
from lmtrain.model.recurrent import State


class Memory(NamedTuple):
    """The encoder's hidden states, which attention reads."""

    hidden: Tensor
    """Hidden states, (S, B, M)."""
    lengths: Tensor
    """Tokens of each source, (B,)."""

    def repeated(self, count: int) -> "Memory":
        """The memory with each row repeated `count` times in succession, (S, B·count, M)."""
        hidden, lengths = self
        return Memory(hidden.repeat_interleave(count, 1), lengths.repeat_interleave(count))


class Bridge(nn.Module):
    """Linear maps from the final states of a bidirectional encoder to the decoder's initial state.

        s = W [s→, s←]      for each part of the state of each layer

    Shapes: s→, s← and s (B, H); `weight` (P, H, 2H).

    Args:
        hidden_size: H of encoder and decoder.
        num_parts: P, parts of the state, summed over the layers of the decoder.
    """

    def __init__(self, hidden_size: int, num_parts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_parts, hidden_size, 2 * hidden_size))

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Initializes the weights: uniform in ± init_scale; None for ± √(3 / 2H)."""
        scale = (3 / self.weight.shape[-1]) ** 0.5 if init_scale is None else init_scale
        with torch.no_grad():
            self.weight.uniform_(-scale, scale, generator=generator)

    def forward(self, last: State) -> State:
        """The decoder's initial state, from the encoder's final state of both directions."""
        weights = iter(self.weight)
        pairs = zip(last[::2], last[1::2], strict=True)  # forward and backward, layer by layer
        joined = [[torch.cat(parts, dim=1) for parts in zip(*pair, strict=True)] for pair in pairs]
        return State([tuple(F.linear(part, next(weights)) for part in each) for each in joined])


class Translator(Network):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩, x) = softmax(W_y ã⟨t⟩ + b_y), ã⟨t⟩ from decoder and attention.

    Shapes: sources (S, B) and targets (T, B) give ã (T, B, O).

    Args:
        encoder: maps the source's tokens to hidden states.
        decoder: maps the target's tokens to hidden states; starts from the encoder's final state.
        attention: attention of the decoder to the encoder's hidden states; None for ã = a, the
            network of the notes.
        dropout: applied to ã.
        head: maps ã to logits.

    Source: Sutskever, Vinyals & Le 2014; Cho et al. 2014.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Encoder,
        attention: Attention | None,
        dropout: Dropout,
        head: Head,
    ) -> None:
        super().__init__(encoder, dropout, head)
        self.decoder = decoder
        self.attention = attention
        cells = [cell for cell in decoder.recurrent.cells if isinstance(cell, Cell)]
        parts = sum(len(cell.state_names) for cell in cells)
        is_bidirectional = encoder.recurrent.directions == 2
        self.bridge = Bridge(cells[0].hidden_size, parts) if is_bidirectional else None

    def initialize(self, init_scale: float | None = None, forget_bias: float = 1.0) -> None:
        """Initializes all parameters; see `Network.initialize`."""
        super().initialize(init_scale, forget_bias)
        generator = self.generator.generator
        self.decoder.embedding.initialize(generator, init_scale)
        for cell in self.decoder.recurrent.cells:
            if isinstance(cell, Cell):
                cell.initialize(generator, init_scale, forget_bias)
        for part in (self.attention, self.bridge):
            if part is not None:
                part.initialize(generator, init_scale)

    def encode(self, tokens: Tensor, lengths: Tensor) -> tuple[Memory, State]:
        """The memory of the sources, and the decoder's initial state.

        Args:
            tokens: sources, (S, B).
            lengths: tokens of each source, (B,), 1 to S.
        """
        hidden, last = self.encoder(tokens, None, lengths)
        return Memory(hidden, lengths), last if self.bridge is None else self.bridge(last)

    def decode(
        self, tokens: Tensor, memory: Memory, state: State, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """ã after dropout, (T, B, O), and the decoder's final state.

        Args:
            tokens: the decoder's inputs: each target's token before the one to predict, (T, B).
            memory: what `encode` returned.
            state: the decoder's state before `tokens`.
            lengths: steps of each row, (B,), 1 to T; None for T.
        """
        hidden, state = self.decoder(tokens, state, lengths)
        if self.attention is not None:
            hidden, _ = self.attention(hidden, memory.hidden, memory.lengths)
        return self.dropout(hidden), state

    def hidden(self, sources: Tensor, lengths: Tensor, targets: Tensor, start_id: int) -> Tensor:
        """ã after dropout, (T, B, O); ã⟨t⟩ depends on the targets before t.

        Args:
            sources: (S, B).
            lengths: tokens of each source, (B,), 1 to S.
            targets: (T, B), below 0 for padding.
            start_id: the decoder's first input.
        """
        memory, state = self.encode(sources, lengths)
        previous = torch.cat([torch.full_like(targets[:1], start_id), targets[:-1]])
        target_lengths = (targets >= 0).sum(0).clamp(min=1)
        hidden, _ = self.decode(previous, memory, state, target_lengths)
        return hidden
