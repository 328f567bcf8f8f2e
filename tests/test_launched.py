import os

import pytest

from lmtrain import launched


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "abc"}, None),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "abc"}, "abc"),
        # torchrun's word for a launch without a name.
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, f"launcher {os.getppid()}"),
        ({"RANK": "0"}, f"launcher {os.getppid()}"),
    ],
)
def test_a_launch_of_several_processes_has_a_name(variables, name, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)

    assert launched.name() == name
