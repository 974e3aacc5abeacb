"""What can be tested of GPUs on a machine without one."""
import sys

import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import SMALL, train_here

import data
import evaluate
import stego

IMAGES = ["--data-root", "images", "--no-crf", *SMALL]


# ---- choice of device and precision ----

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


def test_precision_follows_from_the_hardware_or_the_option(monkeypatch):
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert evaluate.choose_precision("auto", torch.device("cuda", 0)) == expected
    assert evaluate.choose_precision("float16", torch.device("mps")) == torch.float16
    for flags, expected in (("avx2 amx_bf16 amx_tile", torch.bfloat16), ("avx512_bf16", torch.float32)):
        monkeypatch.setattr(evaluate.Path, "is_file", lambda path: str(path) == "/proc/cpuinfo")
        monkeypatch.setattr(evaluate.Path, "read_text", lambda _, found=flags: found)
        assert evaluate.choose_precision("auto", torch.device("cpu")) == expected


# ---- memory and waiting ----

@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 TB")])
def test_a_full_memory_ends_in_one_sentence_and_other_errors_in_a_traceback(error, capsys):
    def full():
        raise error  # whichever it is when this is called
    with pytest.raises(SystemExit) as stopped:
        evaluate.run_main(full)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: the memory is full") and told.count("\n") == 1
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        evaluate.run_main(full)


@pytest.mark.parametrize("crop, batches", [("none", [32, 4]), ("five", [30] * 6)])
def test_the_backbone_sees_at_most_32_views_at_once(crop, batches, workplace):
    model, seen = stego.Stego(stego.load_backbone("vit.pth"), 5, 3), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    images = data.load_collection("directory", "images", "train", 3)
    images.images, images.labels = 3 * images.images, 3 * images.labels
    data.extract_features(model, images, 32, crop)
    assert seen == batches


def test_numbers_of_normalisation_wait_for_a_device_once():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = TF.normalize(images / 255, data.IMAGE_MEAN, data.IMAGE_STD)
    torch.testing.assert_close(data.normalize(images), expected)
    assert data.mean_and_std(images.device) is data.mean_and_std(torch.device("cpu"))


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
