"""Faults: runs that are killed, interrupted, out of disk, two at a time, or find damaged files."""
import contextlib
import functools
import itertools
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, train_here, weights
from PIL import Image

import data
import evaluate
import stego
import train

# ---- kills, Ctrl-C and a full disk, at random moments of every stage ----

STAGES = [(data, "extract_features"), (data, "cached_neighbors"), (stego, "same_class_rates"), (train.Objective, "forward"),
          (stego, "save_checkpoint"), (evaluate, "fitted_probe"), (evaluate, "evaluate"), (evaluate, "report")]
SETTINGS = ["--data-root", "images", "--no-crf", *SMALL, "--steps", "60", "--checkpoint-every", "10"]


def forked(arguments, stage=None, fault=None, occurrence=0, delay=0.0):
    """train.py in a fork of this process, which spares it the imports. The fault comes `delay` seconds after the stage's
    function is called for so many times: a signal, or a number of bytes that no file may then exceed. Returns the exit
    status and the output."""
    reached, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with open("out.txt", "w") as out:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
        warnings.simplefilter("ignore", ResourceWarning)  # a file that Ctrl-C meets between open and with
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
        calls = itertools.count()
        data.time = types.SimpleNamespace(monotonic=itertools.count(0, 10).__next__)  # an extraction notes every batch
        data.extract_features = functools.partial(data.extract_features, batch_size=4)
        if stage:
            function = getattr(*stage)

            def faulty(*arguments, **options):
                if next(calls) == occurrence:
                    if fault > 100:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (fault, resource.RLIM_INFINITY))
                    os.write(tell, b"!")
                return function(*arguments, **options)
            setattr(*stage, faulty)
        sys.argv, status = ["train.py", *arguments], 1
        try:
            evaluate.run_main(train.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:  # noqa: BLE001, whatever it is belongs into the output
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush(), os._exit(status)
    os.close(tell)
    if os.read(reached, 1) and fault < 100:
        time.sleep(delay)
        os.kill(child, fault)
    os.close(reached)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, Path("out.txt").read_text(errors="replace")


def check_whole(folder):
    """Reads every file below folder, those under a temporary name left out."""
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".npy" and (path.name == "done.npy" or path.parent.suffix != ".partial"):
            np.load(path, mmap_mode="r")
        elif path.suffix == ".png":
            Image.open(path).load()


def suffer(lives, seed):
    """Runs, each of which meets its fault at one stage after the other and is resumed. Says what happened, as JSON.

    lives: (fault, numbers of stages) of each run.
    """
    draw, counts = random.Random(seed), {}
    assert forked([*SETTINGS, "--name", "undisturbed", "--cache-dir", "other"])[0] == 0
    for life, (fault, stages) in enumerate(lives):
        shutil.rmtree("cache", ignore_errors=True)
        name, folder, command = f"t{life}", Path(f"runs/t{life}"), None
        for stage in [STAGES[i] for i in stages]:
            occurrence = draw.randrange({"forward": 9, "fitted_probe": 2}.get(stage[1], 1)) + (stage[1] == "save_checkpoint")
            arguments = command or [*SETTINGS, "--name", name, *["--resume"] * (folder / "config.json").is_file()]
            if fault == signal.SIGINT:  # Python drops a Ctrl-C that arrives in the instant when a worker is forked
                arguments += ["--workers", "0"]
            # a kill may come late, when the stage is done; an interruption must not, or the run ends before it
            delay = 10 ** draw.uniform(-4, -0.5 if fault == signal.SIGKILL else -2)
            status, out = forked(arguments, stage, fault, occurrence, delay)
            kind = "killed" if status == -signal.SIGKILL else {130: "interrupted", 2: "no room", 0: "ended"}[status]
            counts[f"{stage[1]} {kind}"] = counts.get(f"{stage[1]} {kind}", 0) + 1
            for place in (Path("runs"), Path("cache")):
                check_whole(place)
            assert kind == "killed" or "Traceback" not in out, out  # a killed one's workers may complain
            last, command = out.strip().splitlines()[-1] if out.strip() else "", None
            if kind == "interrupted":
                assert last.startswith("interrupted; go on with: python train.py "), last
                command = shlex.split(last)[6:]
                assert "--resume" in command
                if stage[1] == "forward":  # the step under way was finished
                    assert torch.load(folder / "checkpoint.pt", weights_only=True)["training"]["step"] > 0
            if kind == "no room":
                assert last.startswith("error: ") and "File too large" in last, last
                assert {"extract_features": "cache", "save_checkpoint": "checkpoint.pt", "report": ".png"}[stage[1]] in last
                left = [path for place in ("runs", "cache") for path in Path(place).rglob("*")
                        if path.suffix in (".tmp", ".partial")]
                assert not left, left
                if stage[1] == "save_checkpoint":  # the last checkpoint is there
                    assert torch.load(folder / "checkpoint.pt", weights_only=True)["training"]["step"] == 10 * occurrence
        status, out = forked([*SETTINGS, "--name", name, "--resume"])
        assert status == 0, out
        same_end(name)
    print(json.dumps(counts))


def same_end(name):
    one, other = (weights(Path("runs") / name) for name in (name, "undisturbed"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    logs = [[json.loads(line) for line in Path(f"runs/{name}/log.jsonl").read_text().splitlines()]
            for name in (name, "undisturbed")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] and logs[0][-1] == logs[1][-1]
    for ours in Path("cache").glob("*/*.npy"):
        assert ours.read_bytes() == Path("other", *ours.parts[1:]).read_bytes()
    assert not [path for path in (*Path("cache").rglob("*"), *Path("runs").rglob("*")) if path.suffix in (".tmp", ".partial")]


def in_another_process(call):
    """Of what other tests did to this one's threads a fork might hang, and sums are rounded in another order."""
    result = subprocess.run([sys.executable, "-c", f"import test_faults; test_faults.{call}"], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}, check=False)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return json.loads(result.stdout.splitlines()[-1])


def test_after_any_fault_at_any_moment_a_run_goes_on_to_the_end_of_an_undisturbed_one(workplace, long):
    """Killed at every stage; stopped by Ctrl-C, and continued with the command it then prints; out of room on the disk."""
    kill, interrupt = int(signal.SIGKILL), int(signal.SIGINT)
    seed = random.SystemRandom().randrange(10 ** 6) if long else 0
    counts = in_another_process(f"suffer({[(kill, range(len(STAGES)))] * (12 if long else 1)} + "
                                f"{[(interrupt, (0, 3, 6)), (8000, (0, 4, 7))]}, {seed})")
    assert sum(n for name, n in counts.items() if name.endswith("killed")) >= (30 if long else 5)
    assert {**{f"{name} interrupted": 1 for name in ("extract_features", "forward", "evaluate")},
            **{f"{name} no room": 1 for name in ("extract_features", "save_checkpoint", "report")}}.items() <= counts.items()


# ---- two at a time ----

HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"


@contextlib.contextmanager
def locked_by_another(path, seconds=60.0, then=lambda: None):
    """Another process holds the lock `path`, and is killed after so many seconds, once `then` was called."""
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        killer = threading.Timer(seconds, lambda: (then(), holder.kill()))
        killer.start()
        yield
        killer.cancel(), holder.kill()


def test_a_second_run_in_the_folder_of_a_live_one_is_refused_and_of_a_dead_one_not(workplace, monkeypatch):
    Path("runs/t").mkdir(parents=True)
    with locked_by_another("runs/t/lock"), pytest.raises(stego.InputError, match="runs/t: another process"):
        train_here(monkeypatch, "--data-root", "images", "--name", "t", *SMALL)
    assert not Path("runs/t/config.json").exists()
    with stego.lock("runs/t/lock", "nobody holds it", wait=False):
        pass


def test_a_run_waits_for_another_that_fills_its_cache_and_then_reads_it(workplace, monkeypatch, capsys):
    backbone, train_set = stego.load_backbone("vit.pth"), data.Directory("images", "train", 3)
    features = data.extract_features(backbone, data.Views(train_set, 32), workers=0)
    expected, folder = data.cached_neighbors(features, 3), features.folder
    folder.rename("ready")
    monkeypatch.setattr(data, "batches", lambda *_: pytest.fail("extracted"))
    with locked_by_another(f"{folder}.lock", 0.3, then=lambda: Path("ready").rename(folder)):
        features = data.extract_features(backbone, data.Views(train_set, 32), workers=0)
    found = folder / "neighbors_3.npy"
    found.rename("ready.npy")
    monkeypatch.setattr(data, "nearest_neighbors", lambda *_: pytest.fail("computed"))
    with locked_by_another(f"{found}.lock", 0.3, then=lambda: Path("ready.npy").rename(found)):
        assert torch.equal(data.cached_neighbors(features, 3), expected)
    assert capsys.readouterr().out.count(f"waiting for another run, which is making {folder}") == 2


def test_a_run_waits_for_another_that_downloads_its_weights(workplace, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("downloaded"))
    Path("hub/checkpoints").mkdir(parents=True)
    with locked_by_another("hub/checkpoints/x.pth.lock", 0.3, then=lambda: shutil.copy("vit.pth", "hub/checkpoints/x.pth")):
        assert stego.download("https://nowhere/x.pth").is_file()
    assert "waiting for another run, which is downloading" in capsys.readouterr().out


# ---- damaged files ----

def test_a_file_that_somebody_cut_is_named_with_a_mend(workplace, monkeypatch):
    arguments = ["--data-root", "images", "--name", "t", "--no-crf", *SMALL]
    train_here(monkeypatch, *arguments)
    for name, mend in (("checkpoint.pt", "delete it"), ("config.json", "start another run"), ("maps.npy", "delete the folder"),
                       ("neighbors_7.npy", "delete the folder")):
        path = next(workplace.glob(f"*/*/{name}"))
        content = path.read_bytes()
        os.truncate(path, len(content) // 2)
        with pytest.raises(stego.InputError, match=f"{name}.* damaged.*{mend}|{name}: damaged.*{mend}"):
            train_here(monkeypatch, *arguments, "--resume")
        path.write_bytes(content)


def test_a_damaged_log_is_written_again(workplace, monkeypatch):
    arguments = ["--data-root", "images", "--name", "t", "--no-crf", *SMALL]
    train_here(monkeypatch, *arguments)
    log = Path("runs/t/log.jsonl")
    whole = log.read_text()
    log.write_bytes(b"\xff[]\n7\n{")
    train_here(monkeypatch, *arguments, "--resume")
    assert log.read_text() == whole and whole.count("\n") == 4


def test_a_checkpoint_of_another_model_is_not_resumed(workplace, monkeypatch):
    for name, code_dim in (("t", 5), ("other", 6)):
        train_here(monkeypatch, "--data-root", "images", "--name", name, "--no-crf", *SMALL, "--code-dim", str(code_dim))
    shutil.copy("runs/other/checkpoint.pt", "runs/t/checkpoint.pt")
    with pytest.raises(stego.InputError, match="checkpoint.pt.* of another model .*delete it"):
        train_here(monkeypatch, "--name", "t", "--resume")


@pytest.mark.parametrize("start", [
    "worker = evaluate.crf_pool(1).submit(os.getpid).result()",
    "worker = iter(data.batches(Slow(), 1, 1)); next(worker)"])
def test_workers_end_with_a_parent_that_was_killed(start, workplace):
    script = f"""
import os, data, evaluate
class Slow(data.torch.utils.data.Dataset):
    __len__ = lambda self: 2
    def __getitem__(self, i):
        print(os.getpid(), flush=True)
        data.time.sleep(i * 100)
        return data.torch.zeros(1), data.torch.zeros(1)
if __name__ == "__main__":
    {start}
    print(worker if isinstance(worker, int) else "", flush=True)
    os.kill(os.getpid(), 9)
"""
    Path("pool.py").write_text(script)
    result = subprocess.run([sys.executable, "pool.py"], capture_output=True, text=True, check=False,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(int(result.stdout.split()[0]), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("it lives on")
