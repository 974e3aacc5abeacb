"""What can be tested of GPUs on a machine without one."""
import sys

import pytest
import torch
from conftest import IMAGES, train_here

import evaluate
import stego


@pytest.fixture
def pretended(monkeypatch):
    """Makes CUDA and MPS seem to be there, with a gradient that is wrong by a function of the device."""
    def pretend(error):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(evaluate, "gradient_of_sample",
                            lambda device: torch.ones(3) + error(torch.device(device).type))
    return pretend


def test_a_device_that_computes_wrong_gradients_or_none_is_not_used(pretended, capsys):
    def error(kind):
        if kind == "cuda":
            raise RuntimeError("no kernel image is available for execution on the device\nmore")
        return 0.1 if kind == "mps" else 0
    pretended(error)
    assert evaluate.choose_device("auto") == torch.device("cpu")
    assert capsys.readouterr().out.splitlines() == [
        "cuda is not used: no kernel image is available for execution on the device",
        "mps is not used: this version of PyTorch computes wrong gradients there"]
    for name, reason in (("cuda:1", "no kernel image"), ("mps", "wrong gradients"), ("abacus", "abacus")):
        with pytest.raises(stego.InputError, match=f"--device {name}: not usable here .*{reason}"):
            evaluate.choose_device(name)


def test_the_device_is_the_first_that_works_and_a_gpu_has_its_number(pretended):
    pretended(lambda kind: 0)
    assert evaluate.choose_device("auto") == evaluate.choose_device("cuda") == torch.device("cuda", 3)
    assert evaluate.choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert evaluate.choose_device("cuda:2") == torch.device("cuda", 2)
    pretended(lambda kind: kind == "cuda")
    assert evaluate.choose_device("auto") == evaluate.choose_device("mps") == torch.device("mps")


def test_copies_wait_but_on_cuda_and_checkpoints_are_read_to_the_cpu(workplace, monkeypatch):
    """Elsewhere a copy that does not wait reads memory that is already another's (pytorch 189690)."""
    to, load, read_to, waits = torch.Tensor.to, torch.load, [], []

    def noting_to(tensor, *arguments, **options):
        waits.append(not options.get("non_blocking") and True not in arguments)
        return to(tensor, *arguments, **options)

    def noting_load(*arguments, **options):
        read_to.append(options["map_location"])
        return load(*arguments, **options)
    monkeypatch.setattr(torch.Tensor, "to", noting_to)
    monkeypatch.setattr(torch, "load", noting_load)
    train_here(monkeypatch, *IMAGES, "--name", "t", "--steps", "2")
    train_here(monkeypatch, "--resume", "t", "--steps", "4")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/t", "--no-crf"])
    evaluate.main()
    assert all(waits) and len(waits) > 12
    assert len(read_to) >= 4 and all(torch.device(place).type == "cpu" for place in read_to)


def test_kmeans_adds_nothing_in_an_order_that_a_gpu_chooses():
    """index_add_ and the like do, so that two runs on one GPU would end in other centroids."""
    called = set()

    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            called.add(function.overloadpacket.__name__)
            return function(*arguments, **(options or {}))
    with Noting():
        evaluate.kmeans(torch.randn(40, 5), 3, restarts=2)
    assert "mm" in called
    assert not called & {"index_add", "index_add_", "scatter_add", "scatter_add_", "bincount"}
