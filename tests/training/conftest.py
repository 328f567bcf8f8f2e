import pytest

from lmtrain import device


@pytest.fixture(params=["at once", "ahead"])
def reading(request, monkeypatch):
    """A device whose numbers are there at once, or one that is not waited for, as a GPU."""
    if request.param == "ahead":
        monkeypatch.setattr(device, "runs_ahead", lambda place: True)
