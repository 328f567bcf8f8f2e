"""The random generator of a model: for initialization, dropout and the sampled softmax."""

import torch

from lmtrain.device import generator as cpu_generator


class ModelGenerator:
    """A CPU generator, and a GPU generator that is seeded from it.

    Random numbers are drawn on the device that uses them. A checkpoint stores the state of the CPU
    generator only.

    Args:
        seed: seed of the CPU generator.
    """

    def __init__(self, seed: int) -> None:
        self.generator = cpu_generator(seed)
        self._on_gpu: torch.Generator | None = None
        self._seed = 0

    def on(self, device: torch.device) -> torch.Generator:
        """The generator for tensors on `device`."""
        if device.type == "cpu":
            return self.generator
        if self._on_gpu is None or self._on_gpu.device != device:
            self.reseed(device)
        return self._on_gpu or self.generator

    def reseed(self, device: torch.device) -> None:
        """Seeds the GPU generator from the CPU generator; does nothing if `device` is the CPU."""
        if device.type == "cpu":
            return
        self._seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        if self._on_gpu is None or self._on_gpu.device != device:
            self._on_gpu = torch.Generator(device)
        self._on_gpu.manual_seed(self._seed)

    def rewind(self) -> None:
        """Replaces the GPU generator by a new one in its state after the last `reseed`."""
        if self._on_gpu is not None:
            self._on_gpu = torch.Generator(self._on_gpu.device).manual_seed(self._seed)
