import pytest

from lmtrain import device


@pytest.fixture(params=["synchronous", "asynchronous"])
def device_kind(request, monkeypatch):
    """A synchronous device such as the CPU, and an asynchronous one such as a GPU."""
    if request.param == "asynchronous":
        monkeypatch.setattr(device, "is_asynchronous", lambda device: True)
