"""The Python API: `train` a model, `load` one."""

from collections.abc import Mapping
from pathlib import Path

from lmtrain import checkpoint, device
from lmtrain import config as configuration
from lmtrain.errors import CheckpointError, ConfigError
from lmtrain.schema import Config
from lmtrain.tasks.base import Trained, weight_shapes
from lmtrain.tasks.registry import task_of
from lmtrain.training.run import run_training


def train(
    config: Config | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overrides: Mapping[str, object] | None = None,
    is_quiet: bool = True,
) -> Trained:
    """Trains a model and returns its best checkpoint, loaded.

    Args:
        config: the settings (see `lmtrain.load_config`); None for the recipe python-docs.
        out: the run folder; None for a new one under runs/.
        resume: whether to resume the run in `out`; the result is that of an uninterrupted run.
        overrides: with `resume`, settings to change, such as {"train.max_epochs": 40}.
        is_quiet: whether to hide progress.

    Raises:
        LmtrainError: errors of training, see `lmtrain.errors`.
    """
    summary = run_training(config, out, resume=resume, overrides=overrides, is_quiet=is_quiet)
    return load(summary.run)


def load(path: str | Path, *, device_name: str = "auto") -> Trained:
    """Loads the model of a run (its best checkpoint, else its newest) or of a checkpoint.

    Args:
        path: the run or checkpoint folder.
        device_name: auto, cpu or cuda.

    Returns:
        The trained model of the run's task, such as a `TrainedLanguageModel` or `TrainedTagger`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another format version.
        ConfigError: unknown device name.
        MachineError: the device is not available.
    """
    target_device = device.choose(device_name)
    trained = checkpoint.load_with(Path(path), _load)
    trained.model.to(target_device).eval()
    return trained


def _load(saved: checkpoint.Checkpoint) -> Trained:
    """Loads the model of an untrusted checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged or inconsistent.
    """
    try:
        config = configuration.parse(saved.text("config.toml"), str(saved.path / "config.toml"))
        task = task_of(config)
        data = task.restore(saved, config)
        # Checked before memory is allocated for the weights.
        saved.require_shapes(weight_shapes(task, config, data))
        model = task.build(config, data)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    saved.load_weights(model)
    return task.trained(saved.path, config, data, model, saved.state)
