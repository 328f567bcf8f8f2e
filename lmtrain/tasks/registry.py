"""The tasks by the names that `data.task` gives them."""

from lmtrain.schema import Config
from lmtrain.tasks.base import Task
from lmtrain.tasks.classify import Classification
from lmtrain.tasks.frames import Frames
from lmtrain.tasks.labelled_language_model import LabelledLanguageModelling
from lmtrain.tasks.language_model import LanguageModelling
from lmtrain.tasks.tag import Tagging
from lmtrain.tasks.translate import Translation

_TASKS: dict[str, type[Task]] = {
    "language-model": LanguageModelling,
    "classify": Classification,
    "tag": Tagging,
    "frames": Frames,
    "translate": Translation,
}


def task_of(config: Config) -> type[Task]:
    """The task that the settings name."""
    return LabelledLanguageModelling if config.data.labelled else _TASKS[config.data.task]
