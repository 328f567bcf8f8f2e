"""The random generator of a model: for first weights, dropout and the sampled softmax."""

import torch

from lmtrain import device


class ModelGenerator:
    """Random numbers that follow from one generator on the processor, wherever they are drawn.

    A GPU has a generator of its own, so that nothing travels; it is seeded from that on the
    processor, which is all that a checkpoint holds.

    Args:
        seed: of the generator on the processor.
    """

    def __init__(self, seed: int) -> None:
        self.generator = device.generator(seed)
        self._there: torch.Generator | None = None
        self._seed = 0

    def on(self, place: torch.device) -> torch.Generator:
        """The generator that draws on a device."""
        if place.type == "cpu":
            return self.generator
        if self._there is None or self._there.device != place:
            self.renew(place)
        return self._there or self.generator

    def renew(self, place: torch.device) -> None:
        """Seeds the generator of a GPU anew, so that a checkpoint here knows all it will draw."""
        if place.type == "cpu":
            return
        self._seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        if self._there is None or self._there.device != place:
            self._there = torch.Generator(place)
        self._there.manual_seed(self._seed)

    def restart(self) -> None:
        """Replaces the generator of a GPU by a new one in the state that `renew` left."""
        if self._there is not None:
            self._there = torch.Generator(self._there.device).manual_seed(self._seed)
