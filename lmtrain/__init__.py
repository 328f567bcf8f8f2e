"""lmtrain trains recurrent networks for text and sequences, language models first.

text → examples → batches → model → loss → update → checkpoint → samples, predictions, scores

data/        readers, vocabularies, token files; which examples a step sees
cells/       the recurrent cells: one equation a file
kernels/     how a cell runs over time; softmax cross-entropy
model/       layers, directions, dropout; embedding, heads; the networks
checkpoint   one folder holds a complete model and its training state
tasks/       one module a task: its loss, metrics, preview, and what its trained model does
training/    the loop, the update, the record; knows the interface of a task only
api          train, load
cli/         one module a command
"""

import os
from typing import TYPE_CHECKING, Any

# All are read when torch is imported; a value of the user's own stays.
#
# Idle threads of torch spin before they sleep, by default for so long that on a machine that runs
# other programs they keep each other from the processor: a step takes ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# torch and oneDNN keep what they have prepared for bf16 products of each shape. Batches of examples
# have many shapes: of 1,024 of them, the default of both, gigabytes are kept.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

__version__ = "0.1.0"
__all__ = ["Config", "load", "load_config", "train"]

if TYPE_CHECKING:
    from lmtrain.api import load, train
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
