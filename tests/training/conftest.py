import pytest

from corpora import TINY
from lmtrain import device


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TINY)
    return path


@pytest.fixture(params=["synchronous", "asynchronous"])
def device_kind(request, monkeypatch):
    """A synchronous device such as the CPU, and an asynchronous one such as a GPU."""
    if request.param == "asynchronous":
        monkeypatch.setattr(device, "is_asynchronous", lambda device: True)
