"""The encoder–decoder: a sequence in, another of its own length out (T_x ≠ T_y)."""

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
    """The encoder's result that attention reads."""

    hidden: Tensor
    """The encoder's hidden states, (S, B, M)."""
    lengths: Tensor
    """How many there are of each source, (B,)."""

    def repeated(self, count: int) -> "Memory":
        """Each source so many times, one after the other."""
        hidden, lengths = self
        return Memory(hidden.repeat_interleave(count, 1), lengths.repeat_interleave(count))


class Bridge(nn.Module):
    """The decoder's first state, a linear map of the encoder's last states in both directions.

    Args:
        hidden_size: H of both.
        num_parts: parts of the state of all layers together.

    Shapes: `weight` (parts, H, 2H).
    """

    def __init__(self, hidden_size: int, num_parts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_parts, hidden_size, 2 * hidden_size))

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws the first weights: uniform in ± init_scale; without it ± √3/√2H."""
        scale = (3 / self.weight.shape[-1]) ** 0.5 if init_scale is None else init_scale
        with torch.no_grad():
            self.weight.uniform_(-scale, scale, generator=generator)

    def forward(self, last: State) -> State:
        """The decoder's state before its first step."""
        weights = iter(self.weight)
        pairs = zip(last[::2], last[1::2], strict=True)  # forward and backward, layer by layer
        joined = [[torch.cat(parts, dim=1) for parts in zip(*pair, strict=True)] for pair in pairs]
        return State([tuple(F.linear(part, next(weights)) for part in each) for each in joined])


class Translator(Network):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩, x) = softmax(W_y ã⟨t⟩ + b_y), ã⟨t⟩ of decoder and attention.

    Args:
        encoder: the source's tokens to hidden states.
        decoder: the target's tokens to hidden states; begins with what the encoder ends with.
        attention: of the decoder to the encoder's states; None for ã = a, the network of the notes.
        dropout: acts on ã.
        head: ã to probabilities.

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
        is_both_ways = encoder.recurrent.directions == 2
        self.bridge = Bridge(cells[0].hidden_size, parts) if is_both_ways else None

    def initialize(self, init_scale: float | None = None, forget_bias: float = 1.0) -> None:
        """Draws the first weights, as `Network.initialize`."""
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
        """The memory of sources (S, B), and the decoder's state before the first step."""
        hidden, last = self.encoder(tokens, None, lengths)
        return Memory(hidden, lengths), last if self.bridge is None else self.bridge(last)

    def decode(
        self, tokens: Tensor, memory: Memory, state: State, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """ã after dropout (T, B, O) for the target's tokens so far (T, B), and the state then."""
        hidden, state = self.decoder(tokens, state, lengths)
        if self.attention is not None:
            hidden, _ = self.attention(hidden, memory.hidden, memory.lengths)
        return self.dropout(hidden), state

    def hidden(self, sources: Tensor, lengths: Tensor, targets: Tensor, start_id: int) -> Tensor:
        """ã after dropout (T, B, O), each for the target's tokens before it.

        Args:
            sources: (S, B).
            lengths: tokens of each source, (B,).
            targets: (T, B), below 0 beyond their ends.
            start_id: the token taken to stand before the first.
        """
        memory, state = self.encode(sources, lengths)
        before = torch.cat([torch.full_like(targets[:1], start_id), targets[:-1]])
        sizes = (targets >= 0).sum(0).clamp(min=1)
        hidden, _ = self.decode(before, memory, state, sizes)
        return hidden
