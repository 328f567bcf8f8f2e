"""lmtrain trains recurrent language models and writes novel text with them.

text → vocabulary → tokens → batches → cells over time → loss → update → checkpoint → samples

data/        where text comes from, how it becomes ids, which ids a step sees
cells/       the recurrent cells: one equation a file
kernels/     how a cell runs over time; softmax cross-entropy
model/       layers, directions, dropout; embedding, softmax, loss
training/    the update, the record, the loop
evaluation, generation, checkpoint, assembly
api          what a user holds: train, load, sample, score, evaluate
cli/         one small file a command
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "TrainedModel", "load", "load_config", "train"]

if TYPE_CHECKING:
    from lmtrain.api import TrainedModel, load, train
    from lmtrain.config import load as load_config
    from lmtrain.schema import Config


def __getattr__(name: str) -> Any:
    # torch is imported by the first use of a model, not by `import lmtrain`.
    if name in ("Config", "load_config"):
        from lmtrain import config, schema

        return schema.Config if name == "Config" else config.load
    if name in __all__:
        from lmtrain import api

        return getattr(api, name)
    raise AttributeError(f"module 'lmtrain' has no attribute {name!r}")
