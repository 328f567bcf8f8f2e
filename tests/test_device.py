import os

import pytest
import torch

from lmtrain import device
from lmtrain.errors import ConfigError, MachineError, map_out_of_memory


@pytest.mark.parametrize(
    ("threads", "processes", "expected"), [(None, 1, 6), (None, 4, 1), (None, 9, 1), (3, 4, 3)]
)
@pytest.mark.parametrize("has_affinity", [True, False])
def test_processes_share_the_cores(monkeypatch, has_affinity, threads, processes, expected):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    if has_affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    else:
        # As on macOS.
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 6)

    assert device.set_threads(threads, processes) == expected
    assert calls == [expected]


@pytest.mark.parametrize("name", ["gpu", "cuda:0", "meta", ""])
def test_unknown_device_names_are_refused(name):
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        device.choose(name)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_needs_its_own_gpu(monkeypatch, name):
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    with pytest.raises(ConfigError, match="2 processes need a GPU each, but this machine has 1"):
        device.choose(name)
    assert device.choose("cpu") == torch.device("cpu")


def test_every_seed_and_rank_has_a_different_generator():
    samples = {
        tuple(torch.rand(4, generator=device.generator(seed, rank)).tolist())
        for seed in (0, 1, 1 << 32, (1 << 32) + 1, (1 << 64) - 1)
        for rank in range(4)
    }

    assert len(samples) == 20


def test_a_single_process_has_the_generator_of_torch():
    sample = torch.rand(4, generator=device.generator(7))

    assert torch.equal(sample, torch.rand(4, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 3 GiB"), "out of memory: Unable to allocate 3 GiB"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes\nat alloc.cpp"),
            "out of memory: DefaultCPUAllocator: can't allocate memory: 8 bytes",
        ),
    ],
)
def test_out_of_memory_errors_become_machine_errors(error, message):
    with (
        pytest.raises(MachineError, match=rf"^{message}\n  try: less$"),
        map_out_of_memory("try: less"),
    ):
        raise error


def test_other_runtime_errors_are_unchanged():
    text = "the tensor has a non-zero number of elements, but its data is not allocated yet"
    with pytest.raises(RuntimeError, match=text), map_out_of_memory("try: less"):
        raise RuntimeError(text)
