"""train.py and evaluate.py as they are used: whole runs, interruption and resume, settings, mistakes."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, train_here, weights
from PIL import Image

import data
import stego
import train


def run(script, *arguments):
    return subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True, check=False)


# ---- whole runs ----

def test_train_evaluate_and_predict(workplace):
    result = run("train.py", "--data-root", "images", "--name", "t", *SMALL)
    assert result.returncode == 0, result.stderr
    folder = workplace / "runs/t"
    for row in ("k-means on features", "cluster probe", "k-means on codes", "linear probe"):
        assert row in result.stdout
    scores = json.loads((folder / "scores.json").read_text())
    assert len(scores["results"]) == 8 and all(0 <= row["miou"] <= 100 for row in scores["results"].values())
    *rows, health = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows] == [4, 8, 12] and 1 <= health["effective_rank"] <= 5
    assert data.read_image(folder / "diagnostics.png").width > 300
    for name in ("panel.png", "confusion.png", "losses.png"):
        assert data.read_image(folder / name).width > 100

    again = run("evaluate.py", "--checkpoint", "runs/t/checkpoint.pt", "--no-crf", "--device", "cpu", "--workers", "1")
    assert again.returncode == 0, again.stderr
    rescored = json.loads((folder / "eval-val/scores.json").read_text())["results"]
    assert all(rescored[name] == scores["results"][name] for name in rescored) and "linear probe" in rescored

    (workplace / "vit.pth").unlink()  # a checkpoint needs nothing else
    predicted = run("evaluate.py", "--checkpoint", "runs/t", "--predict", "images/imgs/val", "--out", "out",
                    "--device", "cpu")
    assert predicted.returncode == 0, predicted.stderr
    assert sorted(path.name for path in (workplace / "out").iterdir()) == [
        "0.png", "0_overlay.jpg", "1.png", "1_overlay.jpg", "clusters.json", "panel.png"]
    assert data.read_image("out/0.png").size == (60, 40)


def test_without_labels_everything_runs_and_nothing_is_nan(workplace, monkeypatch):
    train_here(monkeypatch, "--data-root", "images/imgs/train", "--name", "t", "--no-crf", *SMALL)
    model, _ = stego.load_checkpoint("runs/t/checkpoint.pt")
    assert model.linear_probe is None and all(torch.isfinite(value).all() for value in model.state_dict().values())
    rows = [json.loads(line) for line in (workplace / "runs/t/log.jsonl").read_text().splitlines()]
    assert rows[-2].keys() == {"step", "self", "knn", "rand", "cluster"} and np.isfinite(rows[-2]["knn"])
    assert rows[-1].keys() == {"step", "effective_rank", "compactness", "largest_cluster",
                               "attract_self", "attract_knn", "attract_rand"}
    assert json.loads((workplace / "runs/t/scores.json").read_text())["results"] == {}
    assert data.read_image("runs/t/panel.png").width > 300


def test_five_crops_and_keys(workplace, monkeypatch):
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", "--crop", "five", "--facet", "key", *SMALL)
    model, config = stego.load_checkpoint("runs/t/checkpoint.pt")
    assert model.facet == "key" and config["crop"] == "five"
    assert len(np.load(next(workplace.glob("cache/*/maps.npy")))) == 60


def test_live_features_give_the_losses_of_cached_ones(workplace, monkeypatch):
    for mode in ("cached", "live"):
        train_here(monkeypatch, "--data-root", "images", "--name", mode, "--no-crf", "--features", mode,
                   *["--same-class", "0.4", "0.4", "0.3"], *SMALL)
    cached, live = ([json.loads(line) for line in (workplace / f"runs/{mode}/log.jsonl").read_text().splitlines()]
                    for mode in ("cached", "live"))
    assert len(live) == 4 and all(row == pytest.approx(other, abs=2e-3) for row, other in zip(live[:3], cached[:3]))


def test_the_same_command_gives_the_same_weights_and_another_seed_others(workplace, monkeypatch, capsys):
    for name, seed in (("a-seed0", "0"), ("b", "0"), ("a-seed1", "1")):
        train_here(monkeypatch, "--data-root", "images", "--name", name, "--no-crf", "--seed", seed, *SMALL)
    a, b, c = (weights(workplace / "runs" / name) for name in ("a-seed0", "b", "a-seed1"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.linear.weight"], c["head.linear.weight"])

    capsys.readouterr()
    train.evaluate.compare(["runs/a-seed0", "runs/a-seed1", "runs/b"])
    ours, other = capsys.readouterr().out.split("runs/")[1:]
    results = [json.loads((workplace / f"runs/a-seed{seed}/scores.json").read_text())["results"] for seed in (0, 1)]
    scored = [result["linear probe"]["miou"] for result in results]
    assert ours.startswith("a, runs: 2\n") and other.startswith("b, runs: 1\n") and "±" not in other
    assert f"{np.mean(scored):.1f} ± {np.std(scored, ddof=1):.1f}" in ours.split("linear probe")[1]


def test_the_probes_teach_the_head_nothing(workplace, monkeypatch):
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", *SMALL,
               *["--lambda-self", "0", "--lambda-knn", "0", "--lambda-rand", "0"])
    after, backbone = weights(workplace / "runs/t"), stego.load_backbone("vit.pth")
    torch.manual_seed(0)
    before = stego.Stego(backbone, 5, 3, 3).state_dict()
    for name in before:
        changed = not torch.equal(before[name], after[name])
        assert changed == name.startswith(("cluster_probe", "linear_probe")), name


# ---- shifts, seeds, baselines ----

def test_shifts_are_quantiles_at_the_shares_of_one_class(workplace, monkeypatch, capsys):
    train_here(monkeypatch, "--data-root", "images", "--name", "known", "--no-crf",
               *["--same-class", "0.5", "0.4", "0.2"], *SMALL)
    train_here(monkeypatch, "--data-root", "images", "--name", "auto", "--no-crf", "--b-knn", "0.125", *SMALL)
    train_here(monkeypatch, "--data-root", "images", "--name", "fixed", "--no-crf", "--preset", "potsdam-vits8",
               "--dataset", "directory", *SMALL)
    _known, auto, fixed = (json.loads((workplace / f"runs/{name}/config.json").read_text())
                          for name in ("known", "auto", "fixed"))
    health = json.loads((workplace / "runs/known/log.jsonl").read_text().splitlines()[-1])
    assert [health[f"attract_{term}"] for term in ("self", "knn", "rand")] == pytest.approx([0.5, 0.4, 0.2], abs=1e-3)
    assert auto["b_knn"] == 0.125 and -1 < auto["b_self"] < 1 and -1 < auto["b_rand"] < 1
    assert [fixed[f"b_{term}"] for term in ("self", "knn", "rand")] == [0.08, 0.02, 0.76]
    assert capsys.readouterr().out.count("shares of pairs of one class, by the labels") == 2


def test_several_seeds_share_the_features_and_are_compared(workplace, monkeypatch, capsys):
    train_here(monkeypatch, "--data-root", "images", "--name", "t-seed3", "--no-crf", "--seed", "3", *SMALL)
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", "--seeds", "2", "--seed", "3", "--resume",
               *SMALL)
    assert "resumed at step 12" in capsys.readouterr().out
    train.evaluate.compare(["runs/t-seed3", "runs/t-seed4"])
    a, b = (weights(workplace / f"runs/t-seed{seed}") for seed in (3, 4))
    assert not torch.equal(a["head.linear.weight"], b["head.linear.weight"])
    assert len(list(workplace.glob("cache/*/maps.npy"))) == 1
    assert " ± " in capsys.readouterr().out.splitlines()[-1]


def test_baselines_and_correspondences_of_a_checkpoint(workplace, monkeypatch, capsys):
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", *SMALL)
    for option in ("--baseline", "--correspondences"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "runs/t", "--no-crf", "--workers", "1", option])
        train.evaluate.main()
    out = capsys.readouterr().out
    results = json.loads((workplace / "runs/t/eval-val/scores.json").read_text())["results"]
    assert {"k-means on features", "k-means on PCA", "k-means on random projections", "linear probe on features",
            "k-means on codes"} < results.keys()
    assert all(data.read_image(workplace / "runs/t/eval-train" / name).width > 300
               for name in ("heatmaps.png", "precision_recall.png"))
    assert out.count("average precision") == 3


@pytest.mark.parametrize("arguments, n_classes", [
    (["--data-root", "images"], 4), (["--dataset", "scenes", "--num-classes", "9"], 9)])
def test_a_linear_probe_of_other_classes_is_left_out_and_clusters_are_scored_by_theirs(
        arguments, n_classes, workplace, monkeypatch, capsys):
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", *SMALL)
    Path("images/classes.txt").write_text("a\nb\nc\nd\n")
    monkeypatch.setattr(data.Scenes, "__len__", lambda self: 4)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "runs/t", "--no-crf", "--workers", "0",
                                      "--eval-resolution", "32", *arguments])
    train.evaluate.main()
    assert "the linear probe is left out" in capsys.readouterr().out
    scores = json.loads(Path("runs/t/eval-val/scores.json").read_text())
    assert "linear probe" not in scores["results"] and len(scores["classes"]) == n_classes


def test_labels_to_train_alone_with_fewer_clusters_than_classes(workplace, monkeypatch):
    for path in (workplace / "images/labels/val").iterdir():
        path.unlink()
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", "--num-clusters", "2", *SMALL)
    assert json.loads((workplace / "runs/t/scores.json").read_text())["results"] == {}
    assert data.read_image("runs/t/panel.png").width > 300


# ---- several processes ----

TRAIN_AND_TELL = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import evaluate, train
evaluate_once = evaluate.evaluate
def tell(model, *arguments, **options):
    confusions, samples = evaluate_once(model, *arguments, **options)
    torch.save((model.state_dict(), confusions, len(samples)), f"told{{os.environ['RANK']}}.pt")
    return confusions, samples
evaluate.evaluate = tell
evaluate.run_main(train.main)
"""


def torchrun(*arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments],
                          capture_output=True, text=True, check=False)


def test_two_processes_share_the_work_and_end_with_one_model(workplace, monkeypatch):
    (workplace / "tell.py").write_text(TRAIN_AND_TELL)
    result = torchrun("tell.py", "--data-root", "images", "--name", "t", "--no-crf", *SMALL)
    assert result.returncode == 0, result.stderr
    (first, confusions, n_samples), (second, others, _) = (torch.load(f"told{rank}.pt") for rank in (0, 1))
    for one, other in ((first, second), (confusions, others)):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert n_samples == 2
    assert result.stdout.count("scores, pictures and checkpoint.pt are in") == 1

    # The checkpoint evaluated by one process; the features extracted and the neighbours found by one.
    model, _ = stego.load_checkpoint("runs/t/checkpoint.pt")
    model.bfloat16 = train.evaluate.choose_precision("auto", torch.device("cpu"))
    probes, _ = train.evaluate.model_probes(model)
    alone, _ = train.evaluate.evaluate(model, data.Directory("images", "val", 3), 32, probes, crf=False, workers=0)
    assert all(torch.equal(alone[name], confusions[name]) for name in alone)
    shared = next(workplace.glob("cache/*/maps.npy")).parent
    train_here(monkeypatch, "--data-root", "images", "--name", "one", "--no-crf", "--cache-dir", "other", *SMALL)
    for name in ("maps", "vectors", "labels", "neighbors_7"):
        a, b = (torch.from_numpy(np.load(folder / f"{name}.npy")) for folder in (shared, workplace / "other" / shared.name))
        torch.testing.assert_close(a.float(), b.float())


def test_two_processes_with_a_batch_that_cannot_be_shared(workplace):
    result = torchrun(ROOT / "train.py", "--data-root", "images", *SMALL, "--batch-size", "3")
    assert result.returncode != 0 and "error: --batch-size 3 must be shared by 2 processes" in result.stderr


# ---- settings ----

def test_explicit_options_win_over_the_preset_and_the_preset_over_the_defaults():
    config = train.resolve({"preset": "cocostuff27-vits8", "dataset": "directory", "code_dim": 12})
    assert config["code_dim"] == 12 and config["b_rand"] == 0.66 and config["lr"] == stego.DEFAULTS["lr"]
    assert train.resolve({})["dataset"] == "scenes"
    assert train.resolve({"data_root": "photos"})["dataset"] == "directory"


def test_every_preset_setting_is_a_setting():
    for preset in stego.PRESETS.values():
        assert preset.keys() <= stego.DEFAULTS.keys()


def test_batches_of_an_epoch_visit_every_view_at_most_once():
    batches = [train.batch_of(step, 14, 4, seed=5) for step in range(6)]
    for epoch in (batches[:3], batches[3:]):
        assert len(torch.cat(epoch).unique()) == 12
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))


def test_linear_loss_ignores_void_and_costs_nothing_without_labels():
    logits, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 8, 8)).byte()
    labels[0, :5] = data.VOID
    up = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    expected = -up.log_softmax(1).gather(1, labels.long().clamp(max=2)[:, None])[:, 0][labels != data.VOID].mean()
    torch.testing.assert_close(stego.linear_probe_loss(logits, labels), expected)
    nothing = stego.linear_probe_loss(logits, torch.full((2, 8, 8), data.VOID, dtype=torch.uint8))
    nothing.backward()
    assert nothing == 0 and (logits.grad == 0).all()


# ---- mistakes ----

def told(monkeypatch, capsys, script, *arguments):
    """The sentence that a mistake ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        train.evaluate.run_main(script.main)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("option, values", {
    "num-classes": "0 -1 256", "num-clusters": "0 256", "resolution": "0 -8", "eval-resolution": "0", "code-dim": "0",
    "dropout": "1 -0.1 nan", "neighbors": "0", "batch-size": "1 0 -4", "lambda-self": "-1 nan", "lambda-knn": "inf",
    "lambda-rand": "-inf", "b-self": "nan", "b-knn": "inf", "b-rand": "30", "steps": "0 -5", "lr": "-0.1 nan inf",
    "probe-lr": "-1", "seed": "-1 99999999999999999999", "seeds": "0 -2", "workers": "-1", "cache-gb": "-1 nan",
    "checkpoint-every": "0", "log-every": "0"}.items())
def test_impossible_values_are_told_with_the_possible_ones(option, values, monkeypatch, capsys):
    for value in values.split():
        error = told(monkeypatch, capsys, train, f"--{option}={value}")
        assert re.match(f".*error: argument --{option}: must be an? .* of at least .* and less than .*, it is {value}", error)


@pytest.mark.parametrize("arguments, message", [
    ("--preset cocostuff27-vitb", "--preset cocostuff27-vitb: not one of scenes, .*mean cocostuff27-vitb8 or "),
    ("--dataset scense", "--dataset scense: not one of .*mean scenes"),
    ("--dataset citiscapes --data-root images", "mean cityscapes"),
    ("--data-root images --num-classes 3 --backbone dino_vitb-8", "backbone dino_vitb-8: neither a file .*mean dino_vitb8 or "),
    ("--backbone nonsense", r"one of [\w, ]*$")])
def test_of_unknown_names_the_nearest_are_offered(arguments, message, workplace, monkeypatch, capsys):
    assert re.search(message, told(monkeypatch, capsys, train, *arguments.split()))


@pytest.mark.parametrize("arguments, message", [
    (["--data-root", "nowhere", "--num-classes", "3"], "nowhere"),
    (["--data-root", "images", "--backbone", "vit.pth"], "--num-classes"),
    (["--dataset", "directory"], "--data-root"),
    (["--data-root", "images", "--num-classes", "3", "--backbone", "resnet50"], "resnet50"),
    (["--data-root", "images", *SMALL, "--batch-size", "13"], "--batch-size 13"),
    (["--data-root", "images", *SMALL, "--resolution", "11"], "--resolution 11 is one patch of 8 pixels"),
    (["--data-root", "images", *SMALL, "--resolution", "16", "--num-clusters", "49"], "--num-clusters 49 is more"),
    (["--data-root", "images/imgs/train/0.png", *SMALL], "--crop five"),
    (["--data-root", "images", "--dataset", "scenes"], "--dataset directory"),
    (["--data-root", "images", *SMALL, "--seed", "4294967295", "--seeds", "2"], "begin lower"),
    (["--data-root", "images", *SMALL, "--same-class", "0.5", "0.4", "1"], "--same-class"),
    (["--data-root", "images", *SMALL, "--same-class", "0.5", "0.4", "0.1", "--b-knn", "0.3"], "leave --b-self"),
    (["--data-root", "images", *SMALL, "--device", "abacus"], "abacus"),
    (["--resume", "--name", "never"], "never")])
def test_mistakes_are_told_in_a_sentence(arguments, message, workplace, monkeypatch, capsys):
    error = told(monkeypatch, capsys, train, *arguments)
    assert "error: " in error and message in error and not (workplace / "runs").exists()


def test_bad_files_stop_a_run_before_it_begins_or_are_left_out_of_all_of_it(workplace, monkeypatch, capsys):
    for name in ("imgs/train/3.png", "labels/train/5.png", "imgs/val/1.png"):
        os.truncate(workplace / "images" / name, 60)
    settings = ["--data-root", "images", "--name", "t", "--no-crf", *SMALL]
    error = told(monkeypatch, capsys, train, *settings)
    assert error.startswith("error: 3 bad files: ") and all(f"{name}: not" in error for name in ("3.png", "5.png", "1.png"))
    assert not (workplace / "runs").exists()
    train_here(monkeypatch, *settings, "--skip-bad")
    assert "10 training images at 32 pixels, labelled; 1 images to evaluate" in capsys.readouterr().out
    train_here(monkeypatch, "--resume", "--name", "t")  # as it began
    for option in ("--baseline", "--correspondences"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "runs/t", "--no-crf", "--workers", "1", option])
        train.evaluate.main()
    out = capsys.readouterr().out
    assert (out.count("left out 3 bad files: "), out.count("left out 2 bad files: ")) == (2, 1)  # --correspondences: of train
    assert len(list(workplace.glob("cache/*/maps.npy"))) == 1


def test_a_few_photos_make_a_smaller_batch_unless_its_size_was_given(workplace, monkeypatch, capsys):
    for i in range(7, 12):
        (workplace / f"images/imgs/train/{i}.png").unlink()
    settings = SMALL[:]
    del settings[settings.index("--batch-size"):settings.index("--batch-size") + 2]
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", *settings)
    assert "batch size 7: there are 7 training views" in capsys.readouterr().out
    assert json.loads((workplace / "runs/t/config.json").read_text())["batch_size"] == 7
    train_here(monkeypatch, "--resume", "--name", "t", "--batch-size", "7")
    assert "batch size" not in capsys.readouterr().out
    error = told(monkeypatch, capsys, train, "--data-root", "images", *settings, "--batch-size", "16")
    assert "--batch-size 16 is more than the 7 training views" in error


@pytest.mark.parametrize("arguments, message", [
    ("", "--checkpoint FILE"), ("--checkpoint nowhere.pt", "nowhere.pt"), ("--checkpoint m.pt --predict images", "--out"),
    ("--checkpoint m.pt --eval-resolution 0", "--eval-resolution: must be an integer of at least 1"),
    ("--checkpoint m.pt --workers -1", "--workers: must be an integer of at least 0"),
    ("--checkpoint m.pt --device abacus", "--device abacus"), ("--checkpoint m.pt --device meta", "--device meta: not usable"),
    ("--checkpoint m.pt --dataset scenes --data-root images", "the scenes are drawn"),
    ("--checkpoint m.pt --predict images --out o --baseline", "--baseline: not allowed with argument --predict"),
    ("--checkpoint m.pt --baseline --correspondences", "--correspondences: not allowed with argument --baseline"),
    ("--checkpoint m.pt --clusters refit", "--clusters refit: m.pt has no clusters of finished codes"),
    ("--checkpoint m.pt --dataset scens", "mean scenes"), ("--checkpoint m.pt --split test", "imgs/test: no images"),
    ("--checkpoint m.pt --data-root nowhere", "nowhere: there is no such folder"),
    ("--compare images", "--compare images: not the folder of a finished run")])
def test_mistakes_in_an_evaluation_are_told_in_a_sentence(arguments, message, workplace, monkeypatch, capsys):
    model = stego.Stego(stego.load_backbone("vit.pth"), 5, 3)
    stego.save_checkpoint("m.pt", model, {**stego.DEFAULTS, "data_root": "images", "num_classes": 3})
    error = told(monkeypatch, capsys, train.evaluate, *arguments.split())
    assert "error: " in error and message in error


def test_a_loss_that_is_no_number_stops_the_run(workplace, monkeypatch):
    monkeypatch.setattr(stego, "linear_probe_loss", lambda logits, labels: logits.mean() * float("nan"))
    with pytest.raises(stego.InputError, match="step 4: the loss linear .* --lr"):
        train_here(monkeypatch, "--data-root", "images", "--name", "t", *SMALL)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 TB")])
def test_a_full_memory_is_told_in_a_sentence(error, capsys):
    def full():
        raise error
    with pytest.raises(SystemExit) as stopped:
        train.evaluate.run_main(full)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: the memory is full")


@pytest.mark.parametrize("log_every", [1, 100])  # seen in the log, or only when the weights are to be saved
def test_weights_that_are_no_numbers_are_never_saved_over_a_good_checkpoint(log_every, workplace, monkeypatch):
    arguments = ["--data-root", "images", "--name", "t", *SMALL, "--log-every", str(log_every)]
    forward, calls = train.Objective.forward, []

    def broken(self, *inputs):
        calls.append(1)
        loss, terms = forward(self, *inputs)
        return (loss * float("nan") if len(calls) == 6 else loss), terms
    monkeypatch.setattr(train.Objective, "forward", broken)
    with pytest.raises(stego.InputError, match=f"step {7 if log_every == 1 else 8}: .* no number.* --lr"):
        train_here(monkeypatch, *arguments)
    model, _ = stego.load_checkpoint("runs/t/checkpoint.pt")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert torch.load("runs/t/checkpoint.pt", weights_only=True)["training"]["step"] == 4


def test_a_collapsed_head_is_told_beside_its_scores(workplace, monkeypatch, capsys):
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", *SMALL, "--lr", "0.05", "--steps", "60",
               *["--b-self", "-2", "--b-knn", "-2", "--b-rand", "-2"])  # everything attracts
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "runs/t", "--no-crf", "--workers", "0"])
    train.evaluate.main()
    for path in ("runs/t/scores.json", "runs/t/eval-val/scores.json"):
        assert "the codes collapsed" in json.loads((workplace / path).read_text())["warnings"][0]
    assert capsys.readouterr().out.split("linear probe").pop().count("warning: the codes collapsed") == 1


def same_image(i, ids):
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def constant_image(i, ids):
    return np.full((40, 60, 3), 90, np.uint8)


@pytest.mark.parametrize("image, more", [(same_image, []), (constant_image, []), (None, ["--num-clusters", "1"]),
                                         (None, ["--num-classes", "1"]), (None, ["--batch-size", "2"])])
def test_alike_or_constant_or_two_images_one_cluster_and_one_class(image, more, workplace, monkeypatch, capsys):
    if "--batch-size" in more:
        for path in sorted(workplace.glob("images/*/train/*.png")):
            if path.stem not in "01":
                path.unlink()
    for i, path in enumerate(sorted(workplace.glob("images/imgs/*/*.png")) if image else ()):
        Image.fromarray(image(i, None)).save(path)
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", *SMALL, *more)
    model, config = stego.load_checkpoint("runs/t/checkpoint.pt")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values()) and config["b_rand"] != "auto"
    for name in ("log.jsonl", "scores.json"):
        assert "NaN" not in (workplace / "runs/t" / name).read_text()
    assert ("collapsed" in capsys.readouterr().out) == (image is constant_image)


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(workplace, monkeypatch):
    train_here(monkeypatch, "--data-root", "images", "--name", "t", "--no-crf", *SMALL)
    with pytest.raises(stego.InputError, match="--resume"):
        train_here(monkeypatch, "--data-root", "images", "--name", "t", *SMALL)
    with pytest.raises(stego.InputError, match="code_dim 6 instead of 5, lr 0.1 instead of 0.0005"):
        train_here(monkeypatch, "--resume", "--name", "t", "--code-dim", "6", "--steps", "12", "--lr", "0.1")
    Path("runs/t/config.json").unlink()  # the checkpoint alone was kept
    with pytest.raises(stego.InputError, match="holds a run already"):
        train_here(monkeypatch, "--data-root", "images", "--name", "t", *SMALL)
    with pytest.raises(stego.InputError, match="config.json: missing .*start another run"):
        train_here(monkeypatch, "--data-root", "images", "--name", "t", *SMALL, "--resume")


def test_a_run_is_resumed_by_the_command_that_began_it(workplace, monkeypatch, capsys):
    command = ["--data-root", "images", "--no-crf", "--precision", "auto", "--seeds", "2", *SMALL]
    train_here(monkeypatch, *command)
    (workplace / "runs/directory-1-seed1/scores.json").unlink()
    capsys.readouterr()
    train_here(monkeypatch, *command, "--resume")
    assert capsys.readouterr().out.count("resumed at step 12") == 2
    assert (workplace / "runs/directory-1-seed1/scores.json").is_file()
    error = told(monkeypatch, capsys, train, "--data-root", "images", *SMALL, "--resume")
    assert "no run in runs/directory-1; give its --name, and --seeds" in error


def test_seeds_that_were_not_begun_get_the_settings_of_the_others_or_none(workplace, monkeypatch, capsys):
    command = ["--data-root", "images", "--no-crf", "--name", "t", *SMALL]
    train_here(monkeypatch, *command[:-2], "--workers", "0", "--name", "t-seed0")
    error = told(monkeypatch, capsys, train, "--resume", "--name", "t", "--seeds", "2")
    assert "runs/t-seed0 was started with other settings: dataset scenes instead of directory" in error
    assert not Path("runs/t-seed1").exists()
    train_here(monkeypatch, *command, "--resume", "--seeds", "2")
    assert Path("runs/t-seed1/scores.json").is_file()
