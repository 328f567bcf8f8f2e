"""Frames: the next vector of independent yes or no, such as the keys of a piano that sound."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from lmtrain import device
from lmtrain.data import midi, vectors
from lmtrain.data.padded import NOTHING
from lmtrain.data.vectors import VectorSequence
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.model.embedding import Vectors
from lmtrain.model.frame_model import FrameModel
from lmtrain.model.logistic_head import Logistic, log_probs
from lmtrain.model.recurrent import State
from lmtrain.schema import Config
from lmtrain.tasks.base import Batch, Files, Loss, Metrics
from lmtrain.tasks.building import Builder
from lmtrain.tasks.examples import (
    ExampleData,
    Examples,
    ExampleTask,
    TrainedExamples,
    require_finite,
)

_FILE = "frames.json"
_SIZE = Field(ge=1, le=vectors.MOST_NUMBERS, strict=True)
_CONTENT = TypeAdapter(dict[Literal["outputs"], Annotated[int, _SIZE]])
_PREVIEWED = 64


@dataclass(frozen=True)
class NatsPerStep(Metrics):
    """How well frames are predicted.

    Args:
        total_nats: Σ −y log ŷ − (1 − y) log(1 − ŷ) over outputs and steps.
        count: steps.
        hits: outputs that are on and predicted on, ŷ above one half.
        misses: outputs that are on or predicted on, but not both.
    """

    headline = "nats_per_step"
    is_higher_better = False

    hits: float
    misses: float

    @property
    def nats_per_step(self) -> float:
        """The mean over steps of the sum over outputs."""
        return self.loss

    @property
    def accuracy(self) -> float:
        """The fraction that is both, of what is on or predicted on: hits / (hits + misses).

        Source: Bay, Ehmann & Downie 2009.
        """
        return self.hits / max(1, self.hits + self.misses)

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        return {"loss": self.loss, "nats_per_step": self.loss, "accuracy": self.accuracy}

    def table(self) -> list[tuple[str, str]]:
        """All figures, as a person reads them."""
        return [
            ("nats per step", f"{self.loss:.4f}"),
            ("accuracy of what is on", f"{self.accuracy:.4f}"),
            ("steps", f"{self.count:,.0f}"),
        ]


@dataclass(frozen=True)
class FrameData(ExampleData):
    """The number of outputs, and the sequences of the splits.

    Args:
        outputs: F, numbers of a frame.
    """

    outputs: int

    def files(self) -> dict[str, str]:
        """The number of outputs."""
        return {_FILE: json.dumps({"outputs": self.outputs})}

    def sizes(self) -> dict[str, int]:
        """The number of outputs."""
        return {"outputs": self.outputs}

    def fingerprint(self, examples: Sequence[VectorSequence]) -> str:
        """A hash of the frames."""
        return vectors.fingerprint(examples)

    def encoded(self, examples: Sequence[VectorSequence], name: str) -> Examples:
        """Frames as numbers of one byte; a frame's input is the frame before it, first zeros.

        Raises:
            TextError: frames of another size, or a number that is neither 0 nor 1.
        """
        for number, each in enumerate(examples, start=1):
            if each.vectors.shape[1] != self.outputs:
                size = each.vectors.shape[1]
                raise TextError(f"{name}: frames of {size} numbers, the model has {self.outputs}")
            if not np.isin(each.vectors, (0, 1)).all():
                raise TextError(f"{name}: sequence {number} has a number that is neither 0 nor 1")
        targets = [each.vectors.astype(np.int8) for each in examples]
        inputs = [np.concatenate([np.zeros_like(each[:1]), each[:-1]]) for each in targets]
        return Examples(inputs, targets, self.fingerprint(examples), name)


class TrainedFrames(TrainedExamples):
    """A trained model of frames with its settings."""

    model: FrameModel
    data: FrameData

    @property
    def task(self) -> "type[Frames]":
        """Its task."""
        return Frames

    def compose(
        self, *, num_steps: int = 200, temperature: float = 1.0, seed: int = 1
    ) -> NDArray[np.int8]:
        """A novel sequence of frames, (num_steps, F), drawn from its beginning.

        Args:
            num_steps: frames, 1 or more.
            temperature: 0 or more; the logits are divided by it, and 0 is greedy: an output is on
                where its probability is above one half.
            seed: the same seed gives the same frames.

        Raises:
            ConfigError: an argument out of its range.
            DivergedError: the model's probabilities are not finite.
        """
        if num_steps < 1 or not 0 <= temperature < float("inf"):
            raise ConfigError("compose: num_steps must be 1 or more, temperature 0 or more")
        return _composed(self.model, self.data.outputs, num_steps, temperature, seed)


class Frames(ExampleTask):
    """Trains a model of frames."""

    unit = "frames"
    command = "sample --out tune.mid"
    metrics = NatsPerStep
    trivial = "from the last frame alone"
    trained = TrainedFrames
    model: FrameModel
    data: FrameData

    @classmethod
    def read_files(cls, places: Sequence[str], config: Config) -> list[VectorSequence]:
        """The examples of files."""
        return list(vectors.read(places, labels=False))

    @classmethod
    def vocabularies(cls, examples: Sequence[VectorSequence], config: Config) -> FrameData:
        """The number of outputs."""
        return FrameData(examples[0].vectors.shape[1])

    @classmethod
    def restore(cls, files: Files, config: Config) -> FrameData:
        """The number of outputs of a checkpoint.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            return FrameData(_CONTENT.validate_json(files.text(_FILE))["outputs"])
        except (ValidationError, KeyError):
            raise CheckpointError(f"{_FILE} is damaged") from None

    @classmethod
    def build(cls, config: Config, data: FrameData, *, is_shared: bool = False) -> FrameModel:
        """The model with its first weights."""
        network, builder = config.model, Builder(config, is_shared=is_shared)
        encoder = builder.encoder(Vectors(data.outputs))
        head = Logistic(network.hidden_size, data.outputs)
        model = FrameModel(encoder, builder.dropout(network.output_dropout), head)
        model.initialize(network.init_scale, network.forget_bias)
        return model

    @staticmethod
    def collated(examples: Examples, indices: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Frames before (T, B, F), lengths (B,) and frames (T, B, F)."""
        inputs, lengths, targets = ExampleTask.collated(examples, indices)
        return inputs.astype(np.float32), lengths, targets

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The total over outputs, time and sequences; the objective is its mean over sequences."""
        inputs, lengths, targets = batch.tensors
        hidden, _ = self.model.hidden(inputs, lengths)
        loss = self.model.head.loss(hidden, targets, 1 / batch.rows)
        # All outputs of a step are one prediction.
        return self.mean(loss, batch, targets[..., 0])

    @staticmethod
    def measured(
        model: FrameModel,
        data: FrameData,
        tensors: tuple[Tensor, ...],
        examples: Examples,
        indices: NDArray[np.int64],
    ) -> NatsPerStep:
        """How well a batch is predicted."""
        inputs, lengths, targets = tensors
        logits, _ = model(inputs, lengths)
        total = -log_probs(logits.double(), targets).sum()
        is_counted = targets != NOTHING
        is_on, is_predicted = targets == 1, (logits > 0) & is_counted
        hits = (is_on & is_predicted).sum()
        misses = (is_on != is_predicted).sum()
        return NatsPerStep(*map(float, (total, is_counted[..., 0].sum(), hits, misses)))

    def preview(self, step: int) -> str:
        """A novel sequence: the outputs that are on in each step, counted from 0, a step a word."""
        frames = _composed(self.model, self.data.outputs, _PREVIEWED, 1.0, seed=step)
        return " ".join(",".join(map(str, np.flatnonzero(frame))) or "-" for frame in frames)

    def picture(self, preview: str) -> NDArray[np.uint8]:
        """The piano roll of a preview."""
        frames = np.zeros((_PREVIEWED, self.data.outputs), np.int8)
        # A preview is read from metrics.jsonl, which may have been changed.
        keys = {str(key): key for key in range(self.data.outputs)}
        for frame, word in zip(frames, preview.split(), strict=False):
            frame[[keys[name] for name in word.split(",") if name in keys]] = 1
        return midi.picture(frames)

    def baseline(self, split: str) -> NatsPerStep | None:
        """A copy of the last frame: how often an output stays on, or is on after being off."""
        if split not in self.data.splits:
            return None
        likelihoods = [_frequency(self._train, was_on=was_on) for was_on in (False, True)]
        total = count = hits = misses = 0.0
        examples = self.data.splits[split]
        for before, frames in zip(examples.inputs, examples.targets, strict=True):
            p = np.where(before, likelihoods[True], likelihoods[False])
            total -= np.log(np.where(frames, p, 1 - p)).sum()
            count += len(frames)
            hits += ((p > 0.5) & (frames == 1)).sum()
            misses += ((p > 0.5) != (frames == 1)).sum()
        return NatsPerStep(float(total), count, float(hits), float(misses))

    def described(self) -> str:
        """The number of sequences and of outputs."""
        steps = int(self._train.lengths.sum())
        return (
            f"{len(self._train.inputs):,} sequences, {steps:,} steps, {self.data.outputs:,} outputs"
        )


@torch.no_grad()
def _composed(
    model: FrameModel, outputs: int, num_steps: int, temperature: float, seed: int
) -> NDArray[np.int8]:
    """A novel sequence of frames, (num_steps, F): see `TrainedFrames.compose`.

    Raises:
        DivergedError: the model's probabilities are not finite.
    """
    model.eval()
    generator, state = np.random.default_rng(seed), None
    frames = np.zeros((num_steps + 1, outputs), np.int8)
    for step in range(num_steps):
        last = device.from_numpy(frames[step].astype(np.float32)[None, None], device.of(model))
        logits, state = model(last, None, state)
        likelihoods = (logits[0, 0].double() / (temperature or 1.0)).sigmoid().cpu().numpy()
        require_finite(likelihoods)
        frames[step + 1] = (generator.random(outputs) if temperature else 0.5) < likelihoods
    return frames[1:]


def _frequency(examples: Examples, *, was_on: bool) -> float:
    """How often an output is on in the training data after it was on, or off."""
    pairs = list(zip(examples.inputs, examples.targets, strict=True))
    on = sum(int(frames[before == was_on].sum()) for before, frames in pairs)
    return (on + 0.5) / (sum(int((before == was_on).sum()) for before, _ in pairs) + 1)
