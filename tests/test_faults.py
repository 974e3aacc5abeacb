"""Runs that are killed, two processes that share one, and what GPUs meet, as far as a CPU can show it."""
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGES, ROOT, same_weights, train_here

import data
import evaluate
import stego


def python(*arguments):
    """Another Python process that finds the scripts. The output ends once all its processes have ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False,
                          env=environment, timeout=120)


FAULTY = """
import itertools, multiprocessing, os, signal, sys, time, types
from pathlib import Path
import data, evaluate, stego, train

def main():
    owner, name, when = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
    owner, calls = globals()[owner], itertools.count(1)
    function = getattr(owner, name)
    def faulty(*arguments):
        if next(calls) == when:
            if name == "write_bytes":
                open(arguments[0], "wb").write(arguments[1][:1000])
            print(len(multiprocessing.active_children()), "children", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    setattr(owner, name, faulty)
    data.fill_cache.__defaults__ = (4,)  # views at once: three batches
    clock = itertools.count(0, 10)  # ten seconds a step: a checkpoint every fifth
    train.time = types.SimpleNamespace(monotonic=clock.__next__, perf_counter=time.perf_counter)
    evaluate.run_main(train.main)

if __name__ == "__main__":
    main()
"""


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(workplace, monkeypatch):
    Path("faulty.py").write_text(FAULTY)

    def killed_in(function, call, *arguments):
        """The output of a run that gets SIGKILL in a certain call of a function."""
        result = python("faulty.py", *function.split("."), str(call), *arguments)
        assert result.returncode == -signal.SIGKILL, result.stderr
        return result.stdout

    def saved_step():
        return torch.load("runs/t/checkpoint.pt", weights_only=True)["training"]["step"]

    resume = ["--resume", "t"]
    killed_in("data.normalize", 3, *IMAGES, "--name", "t")  # in the extraction
    assert 4 <= np.load(next(Path("cache").glob("*.partial/done.npy"))).sum() <= 8 and saved_step() == 0
    killed_in("stego.stego_loss", 8, *resume)
    assert saved_step() == 5
    killed_in("Path.write_bytes", 1, *resume)  # in the checkpoint of step 10
    assert saved_step() == 5 and next(Path("runs/t").glob("checkpoint.pt.*.tmp")).stat().st_size == 1000
    # In the evaluation, while a CRF process runs. That this returns shows that no process keeps its output.
    assert "1 children" in killed_in("evaluate.confusion_matrix", 2, *resume, "--crf")
    assert saved_step() == 12
    train_here(monkeypatch, *resume, "--no-crf")

    monkeypatch.setattr(data.fill_cache, "__defaults__", (4,))
    train_here(monkeypatch, *IMAGES, "--name", "undisturbed", "--cache-dir", "other")
    assert same_weights("t", "undisturbed")
    assert Path("runs/t/log.jsonl").read_text() == Path("runs/undisturbed/log.jsonl").read_text()
    for array in Path("other").glob("*/*.npy"):
        assert array.read_bytes() == Path("cache", *array.parts[1:]).read_bytes()
    assert not list(workplace.glob("*/*.partial")) + list(workplace.glob("runs/*/*.tmp"))


TELLING = """
import torch
import data, evaluate, stego, train
evaluate_once, loss_once, batches = evaluate.evaluate, stego.stego_loss, []

def noting(features, *arguments):
    batches.append(features)
    return loss_once(features, *arguments)

def telling(model, collection, size, probes, crf, workers, rank, world):
    found = evaluate_once(model, collection, size, probes, crf, workers, rank, world)
    one = data.Collection(".", "val", collection.images[:1], collection.labels[:1], collection.names)
    of_one, _ = evaluate_once(model, one, size, probes, crf, workers, rank, world)
    torch.save((model.state_dict(), *found, of_one, torch.stack(batches)), f"told-{rank}.pt")
    return found

evaluate.evaluate, stego.stego_loss = telling, noting
evaluate.run_main(train.main)
"""


def test_two_processes_share_a_run_and_end_with_one_model(workplace, monkeypatch):
    Path("telling.py").write_text(TELLING)
    result = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "telling.py",
                    "--name", "t", *IMAGES)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("scores.json, pictures and checkpoint.pt are in") == 1
    one, other = (torch.load(f"told-{rank}.pt", weights_only=False) for rank in (0, 1))
    for ours, theirs in ((one[0], other[0]), (one[1], other[1]), (one[3], other[3])):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert one[4].shape == other[4].shape == (12, 2, 16, 4, 4)  # each trains on half of each batch of four
    assert not torch.equal(one[4] == 0, other[4] == 0)  # with a dropout of its own
    assert len(one[2]) == len(other[2]) == 1  # and evaluates one image of two

    model, _ = stego.load_checkpoint("runs/t/checkpoint.pt")
    val = data.load_collection("directory", "images", "val", 3)
    val_one = data.Collection(".", "val", val.images[:1], val.labels[:1], val.names)
    for collection, found in ((val, one[1]), (val_one, one[3])):
        alone, _ = evaluate.evaluate(model, collection, 32, evaluate.model_probes(model), crf=False)
        assert len(alone) == 3 and all(torch.equal(alone[row], found[row]) for row in alone)
    train_here(monkeypatch, *IMAGES, "--name", "alone", "--cache-dir", "other")
    for array in Path("other").glob("*/*.npy"):
        ours, shared = (np.load(Path(cache, *array.parts[1:])) for cache in ("other", "cache"))
        np.testing.assert_allclose(ours.astype(float), shared, atol=1e-3)


def test_a_batch_that_processes_cannot_share_is_refused(workplace, monkeypatch):
    monkeypatch.setattr(evaluate, "join_processes", lambda _: (torch.device("cpu"), 0, 2))
    for size in ("3", "2"):
        with pytest.raises(stego.InputError, match=f"--batch-size {size} must be shared by 2 processes"):
            train_here(monkeypatch, *IMAGES, "--batch-size", size)
    assert not Path("runs").exists()


@pytest.mark.parametrize("device, gpus", [("auto", 1), ("cuda", 1), ("cuda:1", 2), ("cuda:0", 2)])
def test_processes_without_a_gpu_of_their_own_are_refused(device, gpus, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(stego.InputError, match="has no GPU of its own"):
        evaluate.join_processes(device)


def test_the_scripts_run_where_there_is_no_fcntl_and_nothing_to_fork(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(signal, "pthread_sigmask")
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "fork")
    for script in ("stego", "crf", "data", "evaluate", "train"):
        assert len(runpy.run_path(str(ROOT / f"{script}.py"))) > 10  # what it defines
    train_here(monkeypatch, *IMAGES, "--name", "t", "--steps", "2")
    assert Path("runs/t/scores.json").is_file()


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
