"""The objects a user holds: `train` a model, `load` one."""

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
        resume: whether to go on with the run in `out`, bit for bit as if it had never stopped.
        overrides: with `resume`, settings to change, such as {"train.max_epochs": 20}.
        is_quiet: whether no progress is shown.

    Raises:
        LmtrainError: see `lmtrain.errors`; its exit code says which kind.
    """
    summary = run_training(config, out, resume=resume, overrides=overrides, is_quiet=is_quiet)
    return load(summary.run)


def load(path: str | Path, *, device_name: str = "auto") -> Trained:
    """The model of a run (its best checkpoint, else its newest) or of a checkpoint folder.

    Args:
        path: the run or checkpoint.
        device_name: auto, cpu or cuda.

    Returns:
        What the run's task makes of it, such as a `TrainedLanguageModel` or a `TrainedTagger`.

    Raises:
        CheckpointError: missing, damaged or of a newer format.
        ConfigError: no such device.
        MachineError: the device is not there.
    """
    place = device.choose(device_name)
    trained = checkpoint.use(Path(path), _loaded)
    trained.model.to(place).eval()
    return trained


def _loaded(saved: checkpoint.Checkpoint) -> Trained:
    """The model of a checkpoint that may come from anyone.

    Raises:
        CheckpointError: damaged, or its parts do not fit each other.
    """
    try:
        config = configuration.parse(saved.text("config.toml"), str(saved.path / "config.toml"))
        task = task_of(config)
        data = task.restore(saved, config)
        # Sizes are compared with those of the weights before memory is taken for them.
        saved.require_shapes(weight_shapes(task, config, data))
        model = task.build(config, data)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    saved.load_weights(model)
    return task.trained(saved.path, config, data, model, saved.state)
