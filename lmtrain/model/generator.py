"""The random generator of a model: for first weights, dropout and the sampled softmax."""

import torch

from lmtrain import device


class ModelGenerator:
    """Random numbers that follow from one generator on the processor, wherever they are drawn.

    A GPU has a generator of its own, so that no numbers travel; it is seeded from the one on the
    processor, which is all that a checkpoint holds.

    Args:
        seed: of the generator on the processor.
    """

    def __init__(self, seed: int) -> None:
        self.generator = device.generator(seed)
        self._on_gpu: torch.Generator | None = None
        self._seed = 0

    def on(self, place: torch.device) -> torch.Generator:
        """The generator that draws on a device."""
        if place.type == "cpu":
            return self.generator
        if self._on_gpu is None or self._on_gpu.device != place:
            self.renew(place)
        return self._on_gpu or self.generator

    def renew(self, place: torch.device) -> None:
        """Seeds the generator of a GPU anew, so that the one on the processor determines it."""
        if place.type == "cpu":
            return
        self._seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        if self._on_gpu is None or self._on_gpu.device != place:
            self._on_gpu = torch.Generator(place)
        self._on_gpu.manual_seed(self._seed)

    def restart(self) -> None:
        """Replaces the generator of a GPU by one that is as it was after `renew`."""
        if self._on_gpu is not None:
            self._on_gpu = torch.Generator(self._on_gpu.device).manual_seed(self._seed)
