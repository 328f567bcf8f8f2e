"""Frames: predict the next vector of independent binary outputs, such as piano keys."""

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
from lmtrain.data.padded import PADDING
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
    """Loss and accuracy of predicted frames.

    Args:
        total_nats: Σ −y log ŷ − (1 − y) log(1 − ŷ) over outputs and steps.
        count: number of steps.
        hits: number of outputs that are on and predicted on (ŷ > 1/2).
        misses: number of outputs that are either on or predicted on, but not both.
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
        """Hits / (hits + misses).

        Source: Bay, Ehmann & Downie 2009.
        """
        return self.hits / max(1, self.hits + self.misses)

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        return {"loss": self.loss, "nats_per_step": self.loss, "accuracy": self.accuracy}

    def table(self) -> list[tuple[str, str]]:
        """Names and formatted values of all figures."""
        return [
            ("nats per step", f"{self.loss:.4f}"),
            ("accuracy of what is on", f"{self.accuracy:.4f}"),
            ("steps", f"{self.count:,.0f}"),
        ]


@dataclass(frozen=True)
class FrameData(ExampleData):
    """The number of outputs, and the sequences of the splits.

    Args:
        outputs: F, size of a frame.
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

    def encode_examples(self, examples: Sequence[VectorSequence], name: str) -> Examples:
        """Encodes sequences as int8; the input of a step is the previous frame, at first zeros.

        Raises:
            TextError: frames of another size, or a value other than 0 and 1.
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
    """A trained frame model with its settings."""

    model: FrameModel
    data: FrameData

    @property
    def task(self) -> "type[Frames]":
        """The task that the model was trained for."""
        return Frames

    def compose(
        self, *, num_steps: int = 200, temperature: float = 1.0, seed: int = 1
    ) -> NDArray[np.int8]:
        """Samples a new sequence of frames, (num_steps, F).

        Args:
            num_steps: number of frames, 1 or more.
            temperature: 0 or more; the logits are divided by it, and 0 is greedy: an output is on
                where its probability is above one half.
            seed: 0 or more; the same seed gives the same frames.

        Raises:
            ConfigError: an argument out of its range.
            DivergedError: the model's probabilities are not finite.
        """
        if num_steps < 1 or not 0 <= temperature < float("inf") or seed < 0:
            raise ConfigError(
                "compose: num_steps must be 1 or more, temperature and seed 0 or more"
            )
        return _composed(self.model, self.data.outputs, num_steps, temperature, seed)


class Frames(ExampleTask):
    """Trains a frame model."""

    unit = "frames"
    command = "sample --out tune.mid"
    metrics = NatsPerStep
    baseline_name = "from the last frame alone"
    trained = TrainedFrames
    model: FrameModel
    data: FrameData

    @classmethod
    def read_files(cls, paths: Sequence[str], config: Config) -> list[VectorSequence]:
        """Reads the sequences of files."""
        return list(vectors.read(paths, labels=False))

    @classmethod
    def build_vocabularies(cls, examples: Sequence[VectorSequence], config: Config) -> FrameData:
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
    def build(cls, config: Config, data: FrameData) -> FrameModel:
        """The frame model with initial weights."""
        network, builder = config.model, Builder(config)
        encoder = builder.encoder(Vectors(data.outputs))
        head = Logistic(network.hidden_size, data.outputs)
        model = FrameModel(encoder, builder.dropout(network.output_dropout), head)
        model.initialize(network.init_scale, network.forget_bias)
        return model

    @staticmethod
    def collate(examples: Examples, indices: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Previous frames (T, B, F), lengths (B,) and frames (T, B, F)."""
        inputs, lengths, targets = ExampleTask.collate(examples, indices)
        return inputs.astype(np.float32), lengths, targets

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The sum over outputs, time and sequences; the objective is the mean over sequences."""
        inputs, lengths, targets = batch.tensors
        hidden, _ = self.model.hidden(inputs, lengths)
        loss = self.model.head.loss(hidden, targets, 1 / batch.rows)
        # The outputs of a step count as one prediction.
        return self.mean_loss(loss, batch, targets[..., 0])

    @staticmethod
    def batch_metrics(
        model: FrameModel,
        data: FrameData,
        tensors: tuple[Tensor, ...],
        examples: Examples,
        indices: NDArray[np.int64],
    ) -> NatsPerStep:
        """Loss and accuracy of a batch."""
        inputs, lengths, targets = tensors
        logits, _ = model(inputs, lengths)
        total = -log_probs(logits.double(), targets).sum()
        is_counted = targets != PADDING
        is_on, is_predicted = targets == 1, (logits > 0) & is_counted
        hits = (is_on & is_predicted).sum()
        misses = (is_on != is_predicted).sum()
        return NatsPerStep(*map(float, (total, is_counted[..., 0].sum(), hits, misses)))

    def preview(self, step: int) -> str:
        """A sample: for each step a word that lists the outputs that are on, from 0."""
        frames = _composed(self.model, self.data.outputs, _PREVIEWED, 1.0, seed=step)
        return " ".join(",".join(map(str, np.flatnonzero(frame))) or "-" for frame in frames)

    def picture(self, preview: str) -> NDArray[np.uint8]:
        """The piano roll of a preview."""
        frames = np.zeros((_PREVIEWED, self.data.outputs), np.int8)
        # Previews are read from metrics.jsonl, which may have been edited.
        keys = {str(key): key for key in range(self.data.outputs)}
        for frame, word in zip(frames, preview.split(), strict=False):
            frame[[keys[name] for name in word.split(",") if name in keys]] = 1
        return midi.picture(frames)

    def baseline(self, split: str) -> NatsPerStep | None:
        """Predicts each output from its previous value, by frequencies in the training data."""
        if split not in self.data.splits:
            return None
        probabilities = [_frequency(self._train, was_on=was_on) for was_on in (False, True)]
        total = count = hits = misses = 0.0
        examples = self.data.splits[split]
        for before, frames in zip(examples.inputs, examples.targets, strict=True):
            p = np.where(before, probabilities[True], probabilities[False])
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
    """Samples frames, (num_steps, F): see `TrainedFrames.compose`.

    Raises:
        DivergedError: the model's probabilities are not finite.
    """
    model.eval()
    generator, state = np.random.default_rng(seed), None
    frames = np.zeros((num_steps + 1, outputs), np.int8)
    for step in range(num_steps):
        last = device.from_numpy(frames[step].astype(np.float32)[None, None], device.of(model))
        logits, state = model(last, None, state)
        probabilities = (logits[0, 0].double() / (temperature or 1.0)).sigmoid().cpu().numpy()
        require_finite(probabilities)
        frames[step + 1] = (generator.random(outputs) if temperature else 0.5) < probabilities
    return frames[1:]


def _frequency(examples: Examples, *, was_on: bool) -> float:
    """Frequency in the training data with which an output is on, given its previous value."""
    pairs = list(zip(examples.inputs, examples.targets, strict=True))
    on = sum(int(frames[before == was_on].sum()) for before, frames in pairs)
    return (on + 0.5) / (sum(int((before == was_on).sum()) for before, _ in pairs) + 1)
