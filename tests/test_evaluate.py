"""evaluate.py: matching, scores, k-means, probabilities, prediction of photos, pictures."""
import itertools
import json
import os
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import evaluate
import stego

GOLDEN = np.load(ROOT / "tests/golden_stego.npz")


# ---- confusion matrix, Hungarian matching, scores ----

def test_confusion_matrix_equals_a_slow_count_and_leaves_void_out():
    pred, label = torch.randint(0, 5, (3, 8, 8)), torch.randint(-1, 5, (3, 8, 8))
    label[0, 0, :3] = 255
    expected = np.zeros((5, 4), int)
    for p, c in zip(pred.flatten().tolist(), label.flatten().tolist()):
        if 0 <= c < 4:
            expected[p, c] += 1
    counts = evaluate.confusion_matrix(pred, label, 5, 4)
    assert counts.dtype == torch.int64 and np.array_equal(counts, expected)


def test_confusion_matrix_of_uint8_maps_does_not_overflow():
    counts = evaluate.confusion_matrix(torch.full((4, 4), 25, dtype=torch.uint8), np.full((4, 4), 26, np.uint8), 27, 27)
    assert counts[25, 26] == 16 and counts.sum() == 16


@pytest.mark.parametrize("pred, label", [(torch.zeros(3), torch.zeros(4)), (torch.tensor([7]), torch.tensor([0])),
                                         (torch.tensor([-1]), torch.tensor([0]))])
def test_confusion_matrix_refuses_what_it_cannot_count(pred, label):
    with pytest.raises(ValueError):
        evaluate.confusion_matrix(pred, label, 3, 3)


def total(score, assignment):
    return sum(score[k, c] for k, c in enumerate(assignment) if c >= 0)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (6, 6), (3, 6), (6, 3), (1, 5), (5, 1)])
def test_hungarian_equals_brute_force(shape):
    generator = np.random.default_rng(0)
    for trial in range(20):
        score = generator.integers(0, 10, shape) if trial % 2 else generator.normal(size=shape)  # with and without ties
        n, m = shape
        if n <= m:
            best = max(sum(score[k, c] for k, c in enumerate(p)) for p in itertools.permutations(range(m), n))
        else:
            best = max(sum(score[k, c] for c, k in enumerate(p)) for p in itertools.permutations(range(n), m))
        assignment = evaluate.hungarian(score)
        used = assignment[assignment >= 0]
        assert len(assignment) == n and len(used) == len(set(used.tolist())) == min(n, m)
        assert total(score, assignment) == pytest.approx(best)


def test_hungarian_equals_scipy_on_large_matrices():
    optimize = pytest.importorskip("scipy.optimize")
    for shape in ((27, 27), (60, 40), (40, 60)):
        score = np.random.default_rng(1).integers(0, 10 ** 9, shape)
        assert total(score, evaluate.hungarian(score)) == score[optimize.linear_sum_assignment(score, maximize=True)].sum()


def test_hungarian_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        evaluate.hungarian([[np.nan, 1.0], [0.0, 1.0]])


def test_matched_scores_equal_golden():
    counts = evaluate.confusion_matrix(GOLDEN["metrics0_pred"], GOLDEN["metrics0_label"], 7, 7)
    assignment = evaluate.hungarian(counts)
    assert assignment.tolist() == GOLDEN["metrics0_assignment"].tolist()
    result = evaluate.scores(counts, assignment)
    assert result["miou"] == pytest.approx(float(GOLDEN["metrics0_miou"]), abs=1e-5)
    assert result["accuracy"] == pytest.approx(float(GOLDEN["metrics0_acc"]), abs=1e-5)


def test_linear_scores_equal_golden():
    result = evaluate.scores(evaluate.confusion_matrix(GOLDEN["linear_pred"], GOLDEN["linear_label"], 7, 7), np.arange(7))
    assert result["miou"] == pytest.approx(float(GOLDEN["linear_miou"]), abs=1e-5)
    assert result["accuracy"] == pytest.approx(float(GOLDEN["linear_acc"]), abs=1e-5)


def test_pixels_of_an_unmatched_cluster_are_errors():
    counts = np.array([[6, 0], [0, 6], [2, 2]])
    result = evaluate.scores(counts, evaluate.hungarian(counts))
    assert result["accuracy"] == pytest.approx(100 * 12 / 16)
    assert result["iou"] == pytest.approx([75.0, 75.0])


def test_a_class_that_never_occurs_is_not_in_the_mean():
    result = evaluate.scores(np.array([[5, 0, 0], [5, 10, 0], [0, 0, 0]]), np.arange(3))
    assert result["iou"][:2] == pytest.approx([50.0, 200 / 3]) and np.isnan(result["iou"][2])
    assert result["miou"] == pytest.approx((50 + 200 / 3) / 2)


@pytest.mark.filterwarnings("error")
def test_without_a_labelled_pixel_there_is_no_score_and_no_warning():
    assert np.isnan(evaluate.scores(np.zeros((2, 2)), np.arange(2))["miou"])


# ---- k-means ----

def blobs(n=300):
    centers = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    labels = torch.arange(n) % 4
    return (centers[labels] + 0.05 * torch.randn(n, 8)) * (0.1 + 5 * torch.rand(n, 1)), labels  # lengths must not matter


def test_kmeans_finds_separated_directions():
    codes, labels = blobs()
    centroids = evaluate.kmeans(codes, 4, restarts=3, seed=0)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4))
    counts = evaluate.confusion_matrix((codes @ centroids.T).argmax(1), labels, 4, 4)
    assert evaluate.scores(counts, evaluate.hungarian(counts))["accuracy"] == 100


def test_kmeans_is_deterministic_per_seed_and_more_restarts_are_never_worse():
    codes = torch.randn(400, 6)
    def objective(centroids):
        return (torch.nn.functional.normalize(codes, dim=1) @ centroids.T).amax(1).mean()
    assert torch.equal(evaluate.kmeans(codes, 9, 2, seed=3), evaluate.kmeans(codes, 9, 2, seed=3))
    assert objective(evaluate.kmeans(codes, 9, 8, seed=3)) >= objective(evaluate.kmeans(codes, 9, 1, seed=3))


def test_kmeans_fills_every_cluster_and_survives_identical_codes():
    codes = torch.cat([torch.ones(50, 3), torch.randn(6, 3)])
    nearest = (torch.nn.functional.normalize(codes, dim=1) @ evaluate.kmeans(codes, 6, 3, seed=0).T).argmax(1)
    assert len(nearest.unique()) == 6
    assert torch.isfinite(evaluate.kmeans(torch.ones(20, 3), 4, 2, seed=0)).all()
    with pytest.raises(ValueError, match="clusters"):
        evaluate.kmeans(codes, 57)


def test_sampled_positions_are_positions_of_the_maps():
    maps = torch.randn(10, 3, 4, 5).half()
    points = evaluate.sample_positions(maps, n_points=60)
    everything = {tuple(v) for v in maps.float().permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert len(points) == 60 and len({tuple(v) for v in points.tolist()} & everything) == 60


# ---- probabilities and prediction ----

@pytest.fixture
def model():
    torch.manual_seed(2)
    vit = stego.VisionTransformer(8, 16, 1, 1, image_size=32)
    model = stego.Stego(vit, 6, 5, n_classes=3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.refit_probe = stego.ClusterProbe(6, 5)
    return model


def test_baselines_of_fewer_points_than_code_dimensions():
    features = data.Features(torch.randn(2, 16, 2, 2).half(), None, None, None)
    probes = evaluate.baseline_probes(features, 10, 3, None, steps=1, seed=0, device="cpu")
    assert probes["k-means on PCA"][0].centroids.shape == (3, 8) and len(probes) == 3


# ---- correspondences ----

def test_correspondences_know_the_classes_of_their_points():
    """Maps whose channel is the class, left of an edge one and right of it another, 16 pixels a patch."""
    classes = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 3]]).repeat_interleave(8, 1)[:, None].repeat(1, 16, 1)  # (4, 16, 16)
    maps = torch.nn.functional.one_hot(classes, 4).permute(0, 3, 1, 2).half()
    labels = classes.repeat_interleave(16, 1).repeat_interleave(16, 2).byte()
    labels[labels == 3] = data.VOID
    features, neighbors = data.Features(maps, None, labels, None), torch.tensor([[1], [2], [3], [0]])
    found = evaluate.correspondences(features, neighbors, torch.nn.Identity(), False, "cpu")
    for F, S, same in found.values():
        assert F.shape == S.shape == same.shape and torch.equal(F, S)
        assert 0.1 < (same == -1).float().mean() < 0.5  # pairs with a void point
        assert ((F > 0.5) == same)[same >= 0].float().mean() > 0.97  # but for points right at an edge
    found = evaluate.correspondences(features._replace(labels=None), neighbors, torch.nn.Identity(), True, "cpu", n_batches=1)
    assert all(same is None and len(F) == 4 * 121 ** 2 for F, _, same in found.values())


def test_average_precision_equals_a_slow_loop():
    similarity, same = torch.rand(40), (torch.rand(40) < 0.3).char()
    order = similarity.argsort(descending=True).tolist()
    precisions = [same[order[:i + 1]].float().mean().item() for i in range(40) if same[order[i]]]
    with_void = torch.cat([similarity, torch.ones(9)]), torch.cat([same, torch.full((9,), -1, dtype=torch.int8)])
    recall, precision, average = evaluate.precision_recall(*with_void, n_points=40)
    assert average == pytest.approx(np.mean(precisions)) and recall[-1] == 1
    assert precision[-1] == pytest.approx(same.float().mean().item())
    assert evaluate.precision_recall(similarity, torch.full((40,), -1)) == ([], [], 0.0)  # no pair is labelled


def test_health_tells_collapsed_and_scattered_codes_from_good_ones():
    torch.manual_seed(0)
    pairs = {term: (torch.linspace(-1, 1, 101), None, None) for term in ("self", "knn", "rand")}

    def health(codes):
        return evaluate.diagnose(codes, evaluate.fitted_probe(codes, 4, seed=0), pairs, [0.0, 0.5, 0.9])

    good = torch.eye(8)[:4].repeat(50, 1) + 0.05 * torch.randn(200, 8)
    found, wrong = health(good)
    assert not wrong and 3.5 < found["effective_rank"] < 5 and found["largest_cluster"] == 0.25 and found["compactness"] > 0.95
    assert [found[f"attract_{term}"] for term in pairs] == pytest.approx([0.5, 0.25, 0.05], abs=0.01)
    assert "collapsed" in health(torch.ones(200, 8) + 0.01 * torch.randn(200, 8))[1][0]
    assert "hardly cluster" in health(torch.randn(200, 64))[1][0]


def test_flip_averaging_is_equivariant_to_mirroring(model):
    images = torch.randn(2, 3, 32, 48)
    features, codes = evaluate.flip_averaged(model, images)
    torch.testing.assert_close(evaluate.flip_averaged(model, images.flip(3))[1], codes.flip(3))
    expected = (model(images) + model(images.flip(3)).flip(3)) / 2
    torch.testing.assert_close(codes, expected)
    torch.testing.assert_close(features, (model.features(images) + model.features(images.flip(3)).flip(3)) / 2)


def test_log_probabilities_are_of_upsampled_codes(model):
    codes = torch.randn(1, 6, 4, 4)
    up = torch.nn.functional.interpolate(codes, (32, 32), mode="bilinear", align_corners=False)
    clusters = evaluate.log_probabilities(model.cluster_probe, codes, (32, 32))
    torch.testing.assert_close(clusters, (2 * model.cluster_probe(up)).log_softmax(1))
    torch.testing.assert_close(evaluate.log_probabilities(model.linear_probe, codes, (32, 32)),
                               model.linear_probe(up).log_softmax(1))
    torch.testing.assert_close(clusters.exp().sum(1), torch.ones(1, 32, 32))


@pytest.mark.parametrize("width, height", [(70, 33), (5, 400), (1, 1)])
@pytest.mark.parametrize("crf", [True, False])
def test_photos_of_any_size_are_segmented_at_their_own_size(model, width, height, crf):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    ids = evaluate.predict(model, model.refit_probe, image, 32, crf)
    assert ids.shape == (height, width) and ids.dtype == np.uint8 and ids.max() < 5


def test_predicted_folder_keeps_names_sizes_and_colours(model, tmp_path):
    for name, size in (("a.jpg", (50, 40)), ("sub/b.png", (33, 71))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
    palette, out = data.class_palette(5), tmp_path / "out"
    names = [f"cluster {k}" for k in range(5)]
    assert evaluate.predict_folder(model, model.refit_probe, tmp_path / "photos", out, 32, palette, names, crf=False) == (2, [])
    with Image.open(out / "sub/b.png") as segmented:
        assert segmented.mode == "P" and segmented.size == (33, 71)
        ids, colours = np.asarray(segmented), np.asarray(segmented.convert("RGB"))
    assert np.array_equal(colours, palette[ids])
    with Image.open(out / "sub/b_overlay.jpg") as overlay:
        assert overlay.size == (33, 71)
    assert (out / "panel.png").is_file()
    assert json.loads((out / "clusters.json").read_text())["3"] == {"name": "cluster 3", "color": palette[3].tolist()}
    photo = tmp_path / "photos/a.jpg"
    assert evaluate.predict_folder(model, model.refit_probe, photo, tmp_path / "one", 32, palette, names) == (1, [])
    assert (tmp_path / "one/a.png").is_file()
    with pytest.raises(stego.InputError, match="inside"):
        evaluate.predict_folder(model, model.refit_probe, tmp_path / "photos", tmp_path / "photos/out", 32, palette, names)


def predicted(model, photos, out):
    return evaluate.predict_folder(model, model.refit_probe, photos, out, 32, data.class_palette(5), list("abcde"), crf=False)


def test_photos_that_cannot_be_read_are_told_when_the_others_are_done(model, tmp_path, monkeypatch):
    resize, sizes = evaluate.TF.resize, []
    monkeypatch.setattr(evaluate.TF, "resize", lambda image, size, *how: sizes.append((image.size, size)) or resize(
        image.resize((4, 4)), size, *how))
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a.jpg", "c\nd.png"):
        (photos / name).write_bytes(b"")
    with pytest.raises(stego.InputError, match=r"^2 bad files: .*a.jpg.*c\\nd.png"):
        predicted(model, photos, out)
    Image.new("RGB", (1, 5000)).save(photos / "line.png")
    Image.new("RGB", (66_000, 3)).save(photos / "long.png")  # more than a JPEG can hold
    n, bad = predicted(model, photos, out)
    assert n == 1 and len(bad) == 3 and "long.png: a side of more than 65,500 pixels" in bad[2]
    assert sizes == [((1, 5000), (128, 32))] + 3 * [((1, 8), 320)]  # 320 x 1,600,000 pixels would be gigabytes
    assert sorted(path.name for path in out.iterdir()) == [
        "clusters.json", "line.png", "line_overlay.jpg", "panel.png"]


@pytest.mark.parametrize("names, message", [(["a.jpg", "a.png"], "a.png: its result would replace another picture"),
                                            (["panel.jpg"], "panel.jpg: its result would replace another picture"),
                                            (["a.webp", "a.png/b.jpg"], "a.webp: its result would replace another picture")])
def test_no_result_replaces_another(names, message, model, tmp_path):
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "photos" / name)
    with pytest.raises(stego.InputError, match=message):
        predicted(model, tmp_path / "photos", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_go_into_a_folder_of_their_own_where_they_may_replace_older_ones(model, tmp_path):
    photo = tmp_path / "photos/a.jpg"
    photo.parent.mkdir()
    Image.new("RGB", (40, 30)).save(photo)
    with pytest.raises(stego.InputError, match="photos holds other files"):
        predicted(model, photo, photo.parent)
    for _ in range(2):
        assert predicted(model, photo, tmp_path / "out") == (1, [])
    with pytest.raises(stego.InputError, match="results of another model"):
        evaluate.predict_folder(model, model.refit_probe, photo, tmp_path / "out", 32, data.class_palette(5), list("vwxyz"))


class Made:
    """Two random images, with labels or without."""
    names, n_classes, palette, root, split = ["a", "b", "c"], 3, data.class_palette(3), "made", "val"

    def __init__(self, has_labels):
        self.has_labels = has_labels

    def __len__(self):
        return 2

    def image(self, i):
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8))

    def label(self, i):
        return np.random.default_rng(i).integers(0, 4, (40, 60)).astype(np.uint8) if self.has_labels else None


def test_evaluation_equals_a_straight_computation(model, tmp_path):
    probes, prediction = evaluate.model_probes(model)
    confusions, samples = evaluate.evaluate(model, Made(True), 32, probes, crf=True, batch_size=2, workers=1)
    assert prediction == evaluate.REFIT and list(confusions) == [name + crf for name in probes for crf in ("", " + CRF")]
    expected = {name: 0 for name in confusions}
    for i in range(2):
        images, labels = data.Views(Made(True), 32)[i]
        codes = evaluate.flip_averaged(model, data.normalize(images))[1]
        for name, (probe, _) in probes.items():
            log_p = evaluate.log_probabilities(probe, codes, (32, 32))[0]
            n = log_p.shape[0]
            expected[name] += evaluate.confusion_matrix(log_p.argmax(0), labels[0], n, 3)
            refined = evaluate.dense_crf(images[0].permute(1, 2, 0).numpy(), log_p.exp().detach().numpy())
            expected[name + " + CRF"] += evaluate.confusion_matrix(refined.argmax(0), labels[0], n, 3)
    for name in confusions:
        assert torch.equal(confusions[name], expected[name])
    summary = evaluate.report(tmp_path, confusions, samples, Made(True), probes, prediction)
    assert json.loads((tmp_path / "scores.json").read_text())["results"][prediction]["miou"] == pytest.approx(
        summary["results"][prediction]["miou"])
    assert data.read_image(tmp_path / "panel.png").width > 300 and data.read_image(tmp_path / "confusion.png").width > 100


def test_without_labels_there_are_pictures_and_no_scores(model, tmp_path):
    model.linear_probe = None
    probes, prediction = evaluate.model_probes(model)
    confusions, samples = evaluate.evaluate(model, Made(False), 32, probes, crf=False, workers=0)
    summary = evaluate.report(tmp_path, confusions, samples, Made(False), probes, prediction)
    assert summary["results"] == {} and not (tmp_path / "confusion.png").exists()
    assert data.read_image(tmp_path / "panel.png").width > 300


def test_a_dying_crf_process_is_an_error_and_no_hang(model, monkeypatch):
    monkeypatch.setattr(evaluate, "crf_labels", die)
    with pytest.raises(BrokenProcessPool):
        evaluate.evaluate(model, Made(True), 32, evaluate.model_probes(model)[0], crf=True, workers=1)


def die(image, probabilities):
    os._exit(1)


def test_rows_of_a_confusion_matrix_have_the_colours_of_their_classes(tmp_path):
    palette = data.class_palette(4)
    evaluate.draw_confusion(tmp_path / "c.png", np.eye(3, 4), [1, 3, -1], "abc", ["w", "x", "y", "z"], palette)
    pixels = np.asarray(data.read_image(tmp_path / "c.png")).reshape(-1, 3)
    times = [int((pixels == colour).all(1).sum()) for colour in palette]
    assert times[0] == times[2] > 100 and times[1] == times[3] == 2 * times[0]  # once down the side, once below


def test_pairs_without_any_of_the_same_class_leave_their_plot_empty(tmp_path):
    F = torch.linspace(-1, 1, 50)
    pairs = {"knn": (F, -F, (F > 0).long()), "rand": (F, -F, torch.zeros(50).long())}  # the latter: recall is 0 / 0
    average = evaluate.draw_precision_recall(tmp_path / "p.png", pairs)
    assert average["knn"]["F"] == 1 and data.read_image(tmp_path / "p.png").width > 600


@pytest.mark.parametrize("bfloat16, float32, chosen", [(1.0, 2.0, True), (1.0, 1.0, False), (2.0, 1.0, False)])
def test_bfloat16_is_chosen_where_it_is_clearly_faster(bfloat16, float32, chosen, monkeypatch):
    times = iter([bfloat16, float32])
    monkeypatch.setattr(evaluate.timeit, "repeat", lambda *args, **kwargs: [next(times), 9.0])
    assert evaluate.choose_precision("auto", torch.device("cpu")) == chosen
    assert evaluate.choose_precision("bfloat16", torch.device("cpu")) and not evaluate.choose_precision("float32", "cpu")
