"""train.py: its settings, whole runs, the step against one that is written out by hand, and mistakes."""
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import IMAGES, ROOT, same_weights, train_here, weights
from PIL import Image

import data
import evaluate
import stego
import train

TERMS = ("self", "knn", "rand")


def scores_of(name):
    return json.loads(Path(f"runs/{name}/scores.json").read_text(), parse_constant=pytest.fail)  # of NaN


def log_of(name):
    lines = Path(f"runs/{name}/log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def settings(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return train.parse_args()


def test_what_is_typed_goes_over_the_preset_and_the_preset_over_the_defaults(monkeypatch):
    typed = settings(monkeypatch, "--code-dim", "12", "--preset", "cocostuff27-vits8", "--data-root", "coco")
    assert (typed.code_dim, typed.data_root) == (12, os.path.abspath("coco"))
    assert (typed.dataset, typed.b_rand, typed.center, typed.steps) == ("cocostuff27", 0.66, True, 5000)
    assert (typed.lr, typed.probe_lr, typed.resolution, typed.eval_resolution) == (5e-4, 5e-3, 224, 320)
    for arguments in ([], ["--dataset", "scenes"], ["--seed", "7"]):  # the default only without a folder
        found = settings(monkeypatch, *arguments)
        assert (found.dataset, found.backbone, found.steps) == ("scenes", "vit_tiny_scenes", 400)
    found = settings(monkeypatch, "--data-root", "photos")
    assert (found.dataset, found.backbone, found.steps) == ("directory", "dino_vits8", 2000)


def test_presets_hold_nothing_that_is_no_option(monkeypatch):
    options = vars(settings(monkeypatch, "--data-root", "folder"))
    for name, preset in train.PRESETS.items():
        found = settings(monkeypatch, "--preset", name, "--data-root", "folder")
        assert vars(found).items() >= preset.items() and options.keys() >= preset.keys()
    numbers = [[preset[f"{of}_{term}"] for of in ("lambda", "b") for term in TERMS]
               for preset in [*train.PRESETS.values()][1:]]
    assert numbers == [  # of the authors' configs/train_config.yml
        [0.1, 1.0, 0.1538476246415498, 0.12, 0.2, 1.0], [0.67, 0.25, 0.63, 0.08, 0.02, 0.66],
        [1.0, 0.577453483136995, 0.9058762625226623, 0.45828472207, 0.1754346515479633, 0.31361241889448443],
        [0.67, 0.25, 0.63, 0.08, 0.02, 0.76]]


def test_batches_are_permutations_by_epoch_and_a_function_of_seed_and_step():
    neighbors = (torch.arange(14)[:, None] + torch.arange(1, 4)) % 14
    drawn = [train.draw_batch(step, neighbors, 4, seed=5) for step in range(90)]  # 3 steps an epoch
    for epoch in range(30):
        assert len(torch.cat([batch for batch, _ in drawn[3 * epoch:3 * epoch + 3]]).unique()) == 12
    assert not torch.equal(drawn[0][0], drawn[3][0])
    places = torch.cat([(knn - batch) % 14 for batch, knn in drawn])  # which of its neighbours each view got
    assert set(places.tolist()) == {1, 2, 3} and torch.bincount(places)[1:].min() > 90
    for step in (50, 3, 88):
        again = train.draw_batch(step, neighbors, 4, seed=5)
        assert all(torch.equal(one, other) for one, other in zip(again, drawn[step]))
        other = train.draw_batch(step, neighbors, 4, seed=6)
        assert not torch.equal(again[0], other[0])
        assert not torch.equal((again[1] - again[0]) % 14, (other[1] - other[0]) % 14)


def test_a_run_forks_nothing_and_leaves_scores_a_checkpoint_and_pictures(workplace, monkeypatch, capsys):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked, which can hang"))
    train_here(monkeypatch, "--name", "t", *IMAGES, "--crf")
    folder, rows = workplace / "runs/t", log_of("t")
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt", "clusters.json", "clusters.png", "confusion.png", "diagnostics.png", "log.jsonl",
        "losses.png", "panel.png", "scores.json"]
    assert all(data.read_image(picture).width > 250 for picture in folder.glob("*.png"))
    results, crf = scores_of("t")["results"], evaluate.CRF
    assert list(results) == [evaluate.RAW, evaluate.REFIT, evaluate.ONLINE, evaluate.LINEAR,
                             evaluate.REFIT + crf, evaluate.LINEAR + crf, evaluate.BY_TRAINING]
    assert all(0 < row["miou"] <= row["accuracy"] * 3 <= 300 for row in results.values())
    assert [row["step"] for row in rows] == [10] and rows[0].keys() == {"step", *TERMS, "cluster", "linear"}
    assert 1 <= scores_of("t")["health"]["effective_rank"] <= 5
    assert "12 training images at 32 pixels, 12 with labels; 2 images to" in capsys.readouterr().out


def test_runs_are_deterministic_share_features_and_are_prolonged(workplace, monkeypatch):
    for arguments in (["--name", "a"], ["--name", "b"], ["--name", "long", "--steps", "24"],
                      ["--name", "other", "--seed", "1"]):
        train_here(monkeypatch, *IMAGES, *arguments)
    assert same_weights("a", "b") and log_of("a") == log_of("b")
    assert scores_of("a")["results"] == scores_of("b")["results"]
    assert not same_weights("a", "other")
    assert len(list(workplace.glob("cache/*/maps.npy"))) == 1
    checked = []
    monkeypatch.setattr(data, "check_files", lambda collections, *_: checked.extend(collections))
    monkeypatch.setattr(data, "fill_cache", lambda *_: pytest.fail("features were there"))
    train_here(monkeypatch, "--resume", "a", "--steps", "24")  # the other settings are the run's
    assert [collection.split for collection in checked] == ["val"]  # as its files may be others by now
    assert same_weights("a", "long")
    assert log_of("a") == log_of("long") and [row["step"] for row in log_of("a")] == [10, 20]
    train_here(monkeypatch, "--resume", "runs/a/", "--steps", "12")  # all after training is done again
    assert same_weights("a", "long") and scores_of("a")["config"]["steps"] == 24
    assert scores_of("a")["config"]["precision"] in ("float32", "bfloat16")  # and not auto any more


def test_without_labels_everything_but_scores_is_there(workplace, monkeypatch, capsys):
    train_here(monkeypatch, *IMAGES, "--name", "t", "--data-root", "images/imgs/train")
    model, _ = stego.load_checkpoint("runs/t/checkpoint.pt")
    assert model.linear_probe is None
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert log_of("t")[0].keys() == {"step", *TERMS, "cluster"} and scores_of("t")["results"] == {}
    assert Path("runs/t/panel.png").exists() and not Path("runs/t/confusion.png").exists()
    out = capsys.readouterr().out
    assert "0 with labels; 12 images to evaluate" in out and "the training images, as there is no val" in out
    evaluate.compare(["runs/t"])
    assert capsys.readouterr().out == "runs/t: left out, as it holds no scores\n"


def test_typed_names_of_clusters_outlive_a_resume_and_are_kept_aside_where_clusters_are_new(
        workplace, monkeypatch, capsys):
    def names(file):
        return [entry["name"] for entry in json.loads(Path("runs/t", file).read_text()).values()]
    train_here(monkeypatch, *IMAGES, "--name", "t")
    typed = Path("runs/t/clusters.json").read_text().replace("class", "thing")
    Path("runs/t/clusters.json").write_text(typed)
    for file in ("checkpoint.pt", "log.jsonl"):
        os.link(f"runs/t/{file}", file)
    train_here(monkeypatch, "--resume", "t")
    for file in ("checkpoint.pt", "log.jsonl"):  # another one took its place, when it was whole
        assert not os.path.samefile(f"runs/t/{file}", file)
    assert "thing" in names("clusters.json")[0] and not list(Path("runs/t").glob("clusters-*.json"))
    train_here(monkeypatch, "--resume", "t", "--steps", "14")
    aside, = Path("runs/t").glob("clusters-12-*.json")
    assert "thing" in names(aside.name)[0] and "class" in names("clusters.json")[0]
    assert f"the names of those before are in {aside}" in capsys.readouterr().out
    for seed in "1", "2":  # other clusters after the same step
        monkeypatch.setattr(train.time, "time", lambda: int(seed))
        train_here(monkeypatch, "--resume", "t", "--seed", seed)
    assert len([*Path("runs/t").glob("clusters-14-*.json")]) == 2 and "thing" in names(aside.name)[0]


def test_live_features_of_five_crops_give_the_weights_of_cached_ones(workplace, monkeypatch, capsys):
    five = [*IMAGES, "--crop", "five", "--facet", "key"]
    train_here(monkeypatch, *five, "--name", "cached")
    train_here(monkeypatch, *five, "--name", "live", "--cache-gb", "0", "--cache-dir", "empty")
    assert "features are computed at every step" in capsys.readouterr().out
    assert len(np.load(next(workplace.glob("cache/*/maps.npy")))) == 60
    assert not list(workplace.glob("empty/*/maps.npy"))
    assert stego.load_checkpoint("runs/live/checkpoint.pt")[0].facet == "key"
    cached, live = (weights(name) for name in ("cached", "live"))
    for name in cached:
        torch.testing.assert_close(live[name], cached[name], atol=1e-4, rtol=0, msg=name)


def test_shifts_are_given_or_quantiles_at_shares_of_one_class(workplace, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "random_pair_rate", lambda *given: asked.append(given[1]) or 0.1)
    monkeypatch.setattr(stego, "same_class_rates", lambda *given: (0.6, 0.5, given[3]))
    train_here(monkeypatch, *IMAGES, "--name", "some", "--b-knn", "0.125", "--num-clusters", "4")
    shifts, shares = scores_of("some")["shifts"], scores_of("some")["attract"]
    assert asked == [4] and shifts[1] == 0.125
    assert (shares[0], shares[2]) == pytest.approx((0.6, 0.1), abs=1e-3)
    train_here(monkeypatch, *IMAGES, "--name", "all", "--b-self", "0.1", "--b-knn", "0.2", "--b-rand", "0.3")
    assert asked == [4] and scores_of("all")["shifts"] == [0.1, 0.2, 0.3]
    train_here(monkeypatch, *IMAGES, "--name", "rates", "--same-class", "0.5", "0.4", "0.2")
    assert scores_of("rates")["attract"] == pytest.approx([0.5, 0.4, 0.2], abs=1e-3)
    rates = ["--same-class", "0.5", "0.4", "0.2", "--dropout", "0.5"]  # as the loss sees F, which it lowers
    train_here(monkeypatch, *IMAGES, "--name", "dropout", *rates)
    assert scores_of("dropout")["shifts"][2] < scores_of("rates")["shifts"][2]


@pytest.mark.parametrize("n_clusters", [2, 7])  # of 3 classes
def test_fewer_and_more_clusters_than_classes(n_clusters, workplace, monkeypatch):
    train_here(monkeypatch, *IMAGES, "--name", "t", "--num-clusters", str(n_clusters))
    found = weights("t")
    n_left = len(found["refit_probe.centroids"])  # those that nearly coincide become one
    assert len(found["cluster_probe.centroids"]) == n_clusters >= n_left
    assert len(found["linear_probe.weight"]) == 3
    assignment = scores_of("t")["results"][evaluate.REFIT]["assignment"]
    assert len(assignment) == n_left and assignment.count(-1) == max(0, n_left - 3)
    legend = json.loads((workplace / "runs/t/clusters.json").read_text())
    assert len(legend) == n_left and sum(entry["share"] for entry in legend.values()) == pytest.approx(1)


def test_the_step_equals_one_written_out_by_hand(workplace, monkeypatch):
    typed = ["--name", "t", "--steps", "4", "--center", "--seed", "3", "--lambda-rand", "2"]
    train_here(monkeypatch, *IMAGES, *typed)
    cache, found = next(workplace.glob("cache/*")), weights("t")
    maps = torch.from_numpy(np.load(cache / "maps.npy")).float().permute(0, 3, 1, 2)
    neighbors = data.nearest_neighbors(torch.from_numpy(np.load(cache / "vectors.npy")), 7)
    labels = torch.from_numpy(np.load(cache / "labels.npy"))
    shifts, lambdas = scores_of("t")["shifts"], (1.0, 0.577453483136995, 2.0)
    torch.manual_seed(3)
    model = stego.Stego(stego.load_backbone("vit.pth"), 5, 3, 3)
    head, centroids, linear = model.head.train(), model.cluster_probe.centroids, model.linear_probe
    optimizers = [torch.optim.Adam(head.parameters(), 5e-4), torch.optim.Adam([centroids], 5e-3),
                  torch.optim.Adam(linear.parameters(), 5e-3)]

    def cosines(a, b):
        a, b = (nnf.normalize(maps.flatten(2), dim=1) for maps in (a, b))
        return torch.einsum("ncx,ncy->nxy", a, b)

    def pair_loss(f_a, f_b, s_a, s_b, shift):
        F, S = cosines(f_a, f_b), cosines(s_a, s_b)
        F = F - F.mean(2, keepdim=True) + F.mean()
        return -(S.clamp(min=0) * (F - shift)).mean()

    def at(values, points):
        return nnf.grid_sample(values, points, padding_mode="border", align_corners=True)

    for step in range(4):
        batch, batch_knn = train.draw_batch(step, neighbors, 4, seed=3)
        torch.manual_seed(3 * 1_000_003 + step)
        s, s_knn = head(maps[batch]), head(maps[batch_knn])
        f, f_knn = nnf.dropout2d(maps[batch], 0.1), nnf.dropout2d(maps[batch_knn], 0.1)
        a, b = (2 * torch.rand(4, 11, 11, 2) - 1 for _ in range(2))
        losses = [pair_loss(at(f, a), at(f, a), at(s, a), at(s, a), shifts[0]),
                  pair_loss(at(f, a), at(f_knn, b), at(s, a), at(s_knn, b), shifts[1]), 0]
        for rand in [stego.derangement(4) for _ in range(5)]:
            losses[2] += pair_loss(at(f, a), at(f[rand], b), at(s, a), at(s[rand], b), shifts[2]) / 5
        s = s.detach()
        cosine = torch.einsum("nchw,kc->nkhw", nnf.normalize(s, dim=1), nnf.normalize(centroids, dim=1))
        logits = nnf.interpolate(linear(s), (32, 32), mode="bilinear", align_corners=False)
        loss = sum(weight * term for weight, term in zip(lambdas, losses))
        loss = loss - cosine.amax(1).mean() + nnf.cross_entropy(logits, labels[batch].long())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, value in model.state_dict().items():  # the head has moved by 2e-3, the probes by 2e-2
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("kind, n_images, n_views", [("equal", 12, 12), ("random", 2, 2), ("random", 1, 5)])
def test_few_or_equal_images_make_smaller_batches_and_no_nan(kind, n_images, n_views, workplace, monkeypatch):
    for i, path in enumerate(sorted(workplace.glob("images/imgs/train/*.png"))):
        if kind == "equal":
            Image.new("RGB", (60, 40), "gray").save(path)
            Image.new("L", (60, 40), stego.VOID).save(str(path).replace("imgs", "labels"))
        if i >= n_images:
            path.unlink()
    more = ["--crop", "five", "--num-clusters", "1"] if n_images == 1 else []
    train_here(monkeypatch, *IMAGES, "--name", "t", "--batch-size", "16", *more)
    assert all(torch.isfinite(value).all() for value in weights("t").values())
    assert scores_of("t")["config"]["batch_size"] == n_views and len(log_of("t")) == 1
    assert ("the codes collapsed" in str(scores_of("t")["warnings"])) == (kind == "equal")
    assert kind == "random" or scores_of("t")["config"]["commonest"] == [-1]  # one cluster, all of it void


@pytest.fixture
def told(monkeypatch, capsys):
    """Calls a script as its command line does, and returns the sentence that it must end with."""
    def sentence(*arguments, script="train.py"):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and "Traceback" not in error
        return error[-1]
    return sentence


@pytest.mark.parametrize("arguments, words", [
    ("--data-root nowhere --num-classes 3", "nowhere: there is no such folder"),
    ("--data-root images --backbone vit.pth", "--num-classes"), ("--dataset directory", "--data-root FOLDER"),
    ("--data-root images --num-classes 256", "1 to 255"), ("--data-root images --num-clusters 0", "1 to 255"),
    ("--data-root images --num-classes 3 --backbone resnet50", "neither a file nor one of vit_tiny_scenes"),
    ("--data-root images --num-classes 3 --backbone images/imgs/val/0.png", "not a readable file of weights"),
    ("--dataset scenes --data-root images", "--dataset directory"),
    ("--preset cityscapes-vitb8 --data-root images", "no images of the split train"),
    ("--preset unknown", "invalid choice: 'unknown'"), ("--b-self high", "argument --b-self: invalid"),
    ("--same-class 40 20 10", "argument --same-class: 40 is not between 0 and 1"),
    ("--resume never", "runs/never/checkpoint.pt: not a readable file"),
    ("IMAGES --device abacus", "--device abacus: not usable"),
    ("IMAGES --resolution 11", "--resolution 11 is one patch"),
    ("IMAGES --batch-size 1", "at least 2 images"), ("IMAGES --num-clusters 193", "than the patches"),
    ("IMAGES --data-root images/imgs/train/0.png", "add --crop five")])
def test_mistakes_are_named_before_anything_is_written(arguments, words, workplace, told):
    before = IMAGES if arguments.startswith("IMAGES") else []
    error = told(*before, *arguments.removeprefix("IMAGES").split())
    assert "error: " in error and words in error and not (workplace / "runs").exists()


def test_bad_files_are_named_together_before_anything_is_written(workplace, told):
    os.truncate("images/imgs/train/3.png", 60)
    Image.new("L", (7, 7)).save("images/labels/train/5.png")
    Image.new("RGB", (60, 40)).save("images/labels/train/6.png")
    error = told(*IMAGES)
    assert error.startswith("error: bad files (3)") and not list(workplace.glob("[rc]*"))  # runs, cache
    for name in ("imgs/train/3.png: not a readable image", "labels/train/5.png: (7, 7) pixels",
                 "labels/train/6.png: not a readable label"):
        assert name in error


def test_a_run_is_not_overwritten_and_goes_on_with_a_model_of_its_own_shape(workplace, monkeypatch, told):
    (workplace / "runs/t").mkdir(parents=True)  # a run that never got to its first checkpoint does not count
    train_here(monkeypatch, *IMAGES, "--name", "t", "--steps", "0")
    assert "go on with it by --resume t" in told(*IMAGES, "--name", "t")
    for other in ("--num-clusters=2", "--code-dim=3"):
        assert "must stay as they were" in told("--resume", "t", other)
    other = {name: value + 1 for name, value in torch.load("vit.pth", weights_only=True).items()}
    torch.save(other, "other.pth")  # its features would get those of the run's own backbone
    assert "the backbone has other weights" in told("--resume", "t", "--backbone", "other.pth")
    for number in (1, 2):  # without a name each run gets a folder of its own
        train_here(monkeypatch, *IMAGES, "--steps", "0")
        assert (workplace / f"runs/directory-{number}/scores.json").is_file()


def test_a_run_without_numbers_stops_and_keeps_its_checkpoint(workplace, monkeypatch, told):
    error = told(*IMAGES, "--name", "t", "--lr", "inf")
    assert "step 12: the weights are not finite" in error and "lower --lr" in error and not log_of("t")
    assert all(torch.isfinite(value).all() for value in weights("t").values())
    train_here(monkeypatch, "--resume", "t", "--lr", "0.0005", "--steps", "12")
    train_here(monkeypatch, *IMAGES, "--name", "good")
    assert same_weights("t", "good")


def test_a_finished_run_keeps_its_clusters_if_going_on_is_interrupted_at_once(workplace, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    train_here(monkeypatch, *IMAGES, "--name", "t")
    finished = Path("runs/t/checkpoint.pt").read_bytes()
    monkeypatch.setattr(train.stego, "stego_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_here(monkeypatch, "--resume", "t", "--steps", "24")
    assert Path("runs/t/checkpoint.pt").read_bytes() == finished


def test_names_of_old_clusters_are_never_beside_a_checkpoint_with_new_ones(workplace, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    train_here(monkeypatch, *IMAGES, "--name", "t")
    typed = Path("runs/t/clusters.json").read_text().replace("class", "thing")
    Path("runs/t/clusters.json").write_text(typed)
    monkeypatch.setattr(train.evaluate, "merge_near", interrupted)  # right after the last step
    with pytest.raises(KeyboardInterrupt):
        train_here(monkeypatch, "--resume", "t", "--steps", "14")
    saved = torch.load("runs/t/checkpoint.pt", weights_only=True)
    assert saved["training"]["step"] == 14 and saved["config"]["commonest"] is None  # of old clusters
    assert not Path("runs/t/clusters.json").exists()
    assert next(Path("runs/t").glob("clusters-12-*.json")).read_text() == typed
