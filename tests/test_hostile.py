"""Files that mean harm, beside test_published.py's and test_datasets.py's: refused in a sentence, nothing in them runs."""
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, PngImagePlugin
from test_published import Call

import data
import evaluate
import stego
import train


def write_zip(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")


# ---- pickles ----

@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.ckpt"])
def test_a_bare_pickle_is_no_checkpoint_and_does_not_run(name, tmp_path):
    for protocol in (0, 2, 5):
        (tmp_path / name).write_bytes(pickle.dumps({"model": Call(os.mkdir, str(tmp_path / "executed"))}, protocol))
        for load in (stego.load_checkpoint, stego.load_backbone):
            with pytest.raises(stego.InputError, match=f"{name}: "):
                load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["maps", "vectors", "labels", "neighbors_2"])
def test_a_pickle_in_the_cache_is_refused_and_does_not_run(name, folder, backbone, tmp_path):
    train_set = data.Directory(folder, "train", 4)

    def read():
        features = data.extract_features(backbone, data.Views(train_set, 16), cache_dir=tmp_path / "cache", workers=0)
        return data.cached_neighbors(features, 2)

    read()
    path = next((tmp_path / "cache").glob(f"*/{name}.npy"))
    bomb = Call(os.mkdir, str(tmp_path / "executed"))
    np.save(path, np.array([bomb], object))
    contents = [path.read_bytes(), pickle.dumps(bomb)]
    out = io.BytesIO()
    np.savez(out, a=np.array([bomb], object))
    for content in (*contents, out.getvalue()):
        path.write_bytes(content)
        with pytest.raises(stego.InputError, match=f"{name}.npy: damaged .*delete"):
            read()
    assert not (tmp_path / "executed").exists()


def test_a_pickle_as_the_progress_of_an_extraction_is_refused(folder, backbone, tmp_path):
    train_set = data.Directory(folder, "train", 4)
    def extract():
        return data.extract_features(backbone, data.Views(train_set, 16), cache_dir=tmp_path / "cache", workers=0)
    home = extract().folder
    home.rename(f"{home}.partial")
    np.save(f"{home}.partial/done.npy", np.array([Call(os.mkdir, str(tmp_path / "executed"))] * 3, object))
    with pytest.raises(stego.InputError, match="done.npy: damaged"):
        extract()
    assert not (tmp_path / "executed").exists()


def test_neighbors_that_do_not_exist_are_refused(folder, backbone, tmp_path):
    views = data.Views(data.Directory(folder, "train", 4), 16)
    features = data.extract_features(backbone, views, cache_dir=tmp_path, workers=0)
    neighbors = data.cached_neighbors(features, 2).numpy()
    for wrong in (neighbors - 3, neighbors + 1):
        np.save(features.folder / "neighbors_2.npy", wrong)
        with pytest.raises(stego.InputError, match="neighbors_2.npy: damaged"):
            data.cached_neighbors(features, 2)


def test_a_mat_file_with_objects_is_data(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    savemat(tmp_path / "o.mat", {"img": np.array([{"a": 1}, "os.system('true')"], object)})
    for read in (data.read_image, lambda path: data.read_label(path, 3)):
        with pytest.raises(stego.InputError, match="o.mat"):
            read(tmp_path / "o.mat")


# ---- files that ask for more than there is ----

PICKLES = [
    b"Nr\xff\xff\xff\x7f.",  # an object of number 2^31
    b"\x8e" + struct.pack("<Q", 1 << 62) + b"x.", b"\x8e" + struct.pack("<Q", 1 << 36) + b"x.",  # bytes that do not follow
    b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".", b"\x95" + struct.pack("<Q", 1 << 40) + b"x.",
    b"cbuiltins\nbytes\n\x8a\x05\xff\xff\xff\xff\x7f\x85R."]
READ_THEM = f"""
import resource, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
import stego
warnings.simplefilter("ignore")
for path in sys.argv[1:]:
    print(path, flush=True)
    try:
        stego.load_checkpoint(path)
    except stego.InputError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_no_pickle_ends_the_process_or_fills_its_memory(tmp_path):
    paths = []
    for i, pickled in enumerate(PICKLES):
        for first in (b"\x80\x04", b"\x80\x04cargparse\nNamespace\n)R0"):
            paths += [tmp_path / f"{i}{len(first)}.pt", tmp_path / f"{i}{len(first)}-old.pt"]
            write_zip(paths[-2], first + pickled)
            old = io.BytesIO()
            torch.save({}, old, _use_new_zipfile_serialization=False)
            magic = old.getvalue().partition(b"\x80\x02}q\x00.")[0]  # the three pickles before the object
            paths[-1].write_bytes(magic + first + pickled)
    result = subprocess.run([sys.executable, "-c", READ_THEM, *paths], capture_output=True, text=True, check=False,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (40 * 10 ** 9,) * 2))
    assert result.returncode == 0, result.stdout[-100:] + result.stderr[-1000:]
    assert int(result.stdout.split()[-1]) < 2 * 10 ** 6  # kilobytes


def test_what_is_larger_than_its_file_is_refused(tmp_path):
    state = stego.VisionTransformer(4, 16, 1, 1, image_size=8).state_dict()
    side = 10 ** 6
    torch.save({**state, "pos_embed": torch.zeros(1).expand(1, 1 + side ** 2, 16)}, tmp_path / "wide.pth")
    torch.save({**state, f"blocks.{10 ** 9}.norm1.weight": torch.zeros(16)}, tmp_path / "deep.pth")
    for name, message in (("wide", "larger than the file"), ("deep", "Missing key.*blocks.1")):
        with pytest.raises(stego.InputError, match=message):
            stego.load_backbone(tmp_path / f"{name}.pth")


def test_a_picture_with_a_text_of_100_megabytes_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 10 ** 8, zip=True)
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert os.path.getsize(tmp_path / "a.png") < 2 * 10 ** 5
    for read in (data.read_image, lambda path: data.read_label(path, 3)):
        with pytest.raises(stego.InputError, match="a.png: not a readable"):
            read(tmp_path / "a.png")


# ---- settings and scores of others ----

def write_run(folder, config="{}", scores='{"results": {}, "prediction": "x"}'):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("scores.json", scores)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


BROKEN_JSON = ["", "[]", "3", "null", "[" * 10 ** 5, b"\xff\xfe{\0}\0", b"\x80", '{"a": ']


@pytest.mark.parametrize("scores", [*BROKEN_JSON, "{}", '{"results": [1], "prediction": "x"}',
                                    '{"results": {"x": {"miou": 1}}, "prediction": "x"}',
                                    '{"results": {"x": {"miou": "x", "accuracy": []}}, "prediction": "x"}',
                                    '{"results": {"x": 5}, "prediction": "x"}'])
def test_compare_refuses_scores_that_are_none(scores, tmp_path):
    with pytest.raises(stego.InputError, match="--compare .*t: not the folder of a finished run"):
        evaluate.compare([write_run(tmp_path / "t", scores=scores)])


def test_compare_takes_runs_without_labels(tmp_path, capsys):
    folders = [write_run(tmp_path / name, config=json.dumps({"dataset": name})) for name in "ab"]
    evaluate.compare(folders)
    assert capsys.readouterr().out.count("runs: 1\n") == 2


@pytest.mark.parametrize("config", [*BROKEN_JSON, '{"steps": "12"}', '{"steps": null}', '{"lr": NaN}', '{"lr": 1e999}',
                                    '{"seed": 1.5}', '{"lr": -1}', '{"crop": "six"}', '{"backbone": 3}', '{"b_knn": [1, 2]}',
                                    '{"same_class": 1}', '{"center": "yes"}', '{"resolution": [[[1]]]}', '{"data_root": {}}',
                                    '{"code_dim": true}', '{"code_dim": ' + "9" * 400 + "}", '{"dataset": "other"}'])
def test_resume_refuses_settings_that_are_none(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/t", config=config)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--name", "t", "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        evaluate.run_main(train.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("name, value", [
    ("num_heads", -1), ("num_heads", 0.5), ("facet", "query"), ("config", []), ("config", {"lr": [1]}), ("dropout", "x"),
    ("dropout", float("nan")), ("config", {"eval_resolution": "x"}), ("model", {1: torch.ones(1)}), ("model", [1])])
def test_a_checkpoint_with_settings_that_are_none_is_refused(name, value, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    stego.save_checkpoint(path, stego.Stego(stego.VisionTransformer(4, 16, 1, 1, image_size=8), 3, 2), {})
    torch.save({**torch.load(path, weights_only=True), name: value}, path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(path), "--device", "cpu"])
    with pytest.raises(stego.InputError, match="checkpoint.pt: "):
        evaluate.main()
