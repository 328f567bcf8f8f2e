"""lmtrain trains recurrent networks for text and sequences, language models first.

text → examples → batches → model → loss → update → checkpoint → samples, predictions, scores

data/        readers, vocabularies, token files, batches
cells/       the recurrent cells: one equation per file
kernels/     cells over time on CPU and GPU; softmax cross-entropy
model/       layers, dropout, embeddings, heads; the networks
checkpoint   folders with a complete model and its training state
tasks/       one module per task: data, loss, metrics; its trained model
training/    the training loop, optimizer, log; depends on the task interface only
api          train, load
cli/         one module per command
"""

import os
from typing import TYPE_CHECKING, Any

# torch reads these variables when it is imported. Values that the user has set are kept.
#
# Idle OpenMP threads spin before they sleep. With the default duration they slow a training step
# down by up to ten times on a machine that runs other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# torch and oneDNN cache prepared bf16 products by shape, 1,024 by default. Batches of examples have
# many shapes, so that these caches would take gigabytes.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

__version__ = "0.1.0"
__all__ = ["Config", "load", "load_config", "train"]

if TYPE_CHECKING:
    from lmtrain.api import load, train
    from lmtrain.config import load as load_config
    from lmtrain.schema import Config


def __getattr__(name: str) -> Any:
    # `import lmtrain` does not import torch.
    if name in ("Config", "load_config"):
        from lmtrain import config, schema

        return schema.Config if name == "Config" else config.load
    if name in __all__:
        from lmtrain import api

        return getattr(api, name)
    raise AttributeError(f"module 'lmtrain' has no attribute {name!r}")
