"""The tasks by the names that `data.task` gives them."""

from lmtrain.schema import Config
from lmtrain.tasks.base import Task
from lmtrain.tasks.classify import Classification
from lmtrain.tasks.frames import Frames
from lmtrain.tasks.language_model import LanguageModelling
from lmtrain.tasks.tag import Tagging

_TASKS: dict[str, type[Task]] = {
    "language-model": LanguageModelling,
    "classify": Classification,
    "tag": Tagging,
    "frames": Frames,
}


def task_of(config: Config) -> type[Task]:
    """The task that the settings name."""
    return _TASKS[config.data.task]
