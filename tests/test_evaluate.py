"""evaluate.py: scores, k-means, correspondences, prediction, reports, pictures, its command line."""
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import IMAGES, ROOT, fill_workplace, save_image, save_label, train_here
from PIL import Image

import data
import evaluate
import stego
from crf import dense_crf
from evaluate import CRF, LINEAR, ONLINE, RAW, REFIT

GOLDEN = np.load(ROOT / "tests/golden_stego.npz")


def test_confusion_matrix_equals_a_slow_count_and_leaves_void_out():
    pred, label = torch.randint(0, 30, (3, 8, 8)).byte(), torch.randint(-1, 28, (3, 8, 8))
    label[0, 0, :3] = 255
    expected = np.zeros((30, 27), int)
    for p, c in zip(pred.flatten().tolist(), label.flatten().tolist()):
        if 0 <= c < 27:
            expected[p, c] += 1  # 30 x 27 is more than a byte holds
    assert evaluate.confusion_matrix(pred, label, 30, 27).tolist() == expected.tolist()


@pytest.mark.parametrize("n, m", [(1, 1), (4, 4), (6, 6), (3, 6), (6, 3), (1, 5), (5, 1)])
def test_hungarian_equals_brute_force(n, m):
    generator = np.random.default_rng(0)
    for trial in range(20):  # with many ties, and with negative numbers
        score = generator.integers(0, 4, (n, m)) if trial % 2 else generator.normal(-1, 2, (n, m))
        rows, columns = range(n), range(m)
        pairings = ([zip(rows, p) for p in itertools.permutations(columns, n)] if n <= m else
                    [zip(p, columns) for p in itertools.permutations(rows, m)])
        best = max(sum(score[k, c] for k, c in pairing) for pairing in pairings)
        assignment = evaluate.hungarian(score)
        matched = [(k, c) for k, c in enumerate(assignment) if c >= 0]
        assert len(assignment) == n and len({c for _, c in matched}) == len(matched) == min(n, m)
        assert sum(score[pair] for pair in matched) == pytest.approx(best)
    with pytest.raises(ValueError, match="finite"):  # and does not search for ever
        evaluate.hungarian(np.full((n, m), np.nan))


@pytest.mark.parametrize("name", ["metrics0", "linear"])
def test_scores_equal_golden(name):
    counts = evaluate.confusion_matrix(GOLDEN[f"{name}_pred"], GOLDEN[f"{name}_label"], 7, 7)
    assignment = evaluate.hungarian(counts) if name == "metrics0" else np.arange(7)
    found = evaluate.scores(counts, assignment)
    assert found["miou"] == pytest.approx(float(GOLDEN[f"{name}_miou"]), abs=1e-5)
    assert found["accuracy"] == pytest.approx(float(GOLDEN[f"{name}_acc"]), abs=1e-5)
    assert name == "linear" or assignment.tolist() == GOLDEN["metrics0_assignment"].tolist()


@pytest.mark.filterwarnings("error")
def test_unmatched_clusters_are_errors_and_classes_that_never_occur_do_not_count():
    counts = np.array([[6, 0], [2, 2], [0, 6]])
    found = evaluate.scores(counts, evaluate.hungarian(counts))
    assert found["accuracy"] == pytest.approx(100 * 12 / 16) and found["iou"] == pytest.approx([75.0, 75.0])
    found = evaluate.scores(np.array([[5, 0, 0], [5, 10, 0], [0, 0, 0]]), np.arange(3))
    assert found["iou"] == pytest.approx([50.0, 200 / 3, np.nan], nan_ok=True)
    assert found["miou"] == pytest.approx((50 + 200 / 3) / 2)
    found = evaluate.scores(np.zeros((2, 2)), np.arange(2))  # without a labelled pixel
    assert np.isnan(found["miou"]) and np.isnan(found["accuracy"])


def test_kmeans_is_the_best_of_its_restarts_and_a_function_of_directions_and_seed():
    codes, lengths = nnf.normalize(torch.randn(400, 6), dim=1), 0.1 + 5 * torch.rand(400, 1)
    def objective(restarts, seed=3):
        return (codes @ evaluate.kmeans(codes, 9, restarts, seed).T).amax(1).mean().item()
    torch.testing.assert_close(evaluate.kmeans(codes, 9, 2, 3), evaluate.kmeans(codes * lengths, 9, 2, 3))
    assert objective(8) > max(objective(1), objective(2)) and objective(1) != objective(1, seed=4)
    found = evaluate.kmeans(codes, 9, 1)
    means = nnf.one_hot((codes @ found.T).argmax(1)).float().T @ codes
    torch.testing.assert_close(nnf.normalize(means, dim=1), found, atol=0.02, rtol=0)  # it has come to rest
    few = evaluate.kmeans(codes[:3].repeat(50, 1), 5)  # an empty cluster gets a code
    torch.testing.assert_close((few @ codes[:3].T).amax(1), torch.ones(5))


def test_the_rate_of_random_pairs_is_that_of_uneven_classes():
    """Classes of 60, 30 and 10 %: even ones would have 0.33, and k-means would split the largest."""
    directions = nnf.normalize(torch.randn(3, 16), dim=1)
    classes = torch.tensor([0] * 6 + [1] * 3 + [2]).repeat(300)
    vectors = directions[classes] + 0.15 * torch.randn(len(classes), 16)
    rate = evaluate.random_pair_rate(7 * vectors, 3)
    assert rate == pytest.approx(0.36 + 0.09 + 0.01, abs=0.02)
    assert evaluate.random_pair_rate(directions.repeat(2, 1), 3) == pytest.approx(1 / 3)  # of few points


def test_centroids_that_nearly_coincide_become_one():
    apart = torch.eye(4)[:3]
    near = nnf.normalize(torch.stack([apart[0] + 0.2 * apart[1], apart[0] - 0.2 * apart[1], apart[2]]), dim=1)
    merged = evaluate.merge_near(torch.cat([apart, near]))
    assert len(merged) == 3 and (merged @ apart.T).amax(1).min() > 0.999
    assert torch.allclose(evaluate.merge_near(apart), apart)


def test_correspondences_know_the_classes_of_their_points():
    """The channel of the maps is the class, one left of an edge and one right of it; 16 pixels a patch."""
    classes = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 3]])[:, [0] * 2 + [1] * 14, None].mT.repeat(1, 16, 1)
    maps = nnf.one_hot(classes, 4).permute(0, 3, 1, 2).half()  # (4, 4, 16, 16)
    labels = classes.repeat_interleave(16, 1).repeat_interleave(16, 2).byte()
    labels[labels == 3] = data.VOID
    features, neighbors = data.Features(maps, None, labels), torch.tensor([[1], [2], [3], [0]])
    found = evaluate.correspondences(features, neighbors, lambda maps: -maps, "cpu")
    for F, S, same in found.values():
        assert len(F) == len(same) == 10 * 4 * 121 ** 2 and torch.equal(F, S)
        assert 0.1 < (same == -1).float().mean() < 0.5  # pairs with a void point
        assert ((F > 0.5 ** 0.5) == same)[same >= 0].float().mean() > 0.99  # but for points right at an edge
    assert [*found] == ["self", "knn", "rand"]
    apart = features._replace(maps=torch.eye(4)[:, :, None, None].expand(4, 4, 16, 16))  # one channel each
    found, again = (evaluate.correspondences(apart, neighbors, torch.neg, "cpu", dropout=0.5) for _ in "ab")
    assert found["rand"][0].max() == 0 and 0.2 < found["self"][0].mean() < 0.8
    assert torch.equal(found["self"][0], again["self"][0])
    void = features._replace(labels=torch.full_like(labels, data.VOID))
    found = evaluate.correspondences(void, neighbors, torch.neg, "cpu", center=True)
    for F, _, same in found.values():
        assert (same == -1).all() and abs(F.mean()) < 0.9


def test_precision_and_recall_equal_a_slow_loop():
    similarity, same = torch.rand(40), (torch.rand(40) < 0.3).char()
    ranked = same[similarity.argsort(descending=True)].tolist()
    precision = [sum(ranked[:i + 1]) / (i + 1) for i in range(40)]
    with_void = torch.cat([similarity, torch.ones(9)]), torch.cat([same, -torch.ones(9).char()])
    recall, found, average = evaluate.precision_recall(*with_void, n_points=40)
    assert found == pytest.approx(precision)
    assert recall == pytest.approx([sum(ranked[:i + 1]) / sum(ranked) for i in range(40)])
    assert average == pytest.approx(np.mean([precision[i] for i in range(40) if ranked[i]]))
    assert evaluate.precision_recall(similarity, torch.zeros(40).char())[2] == 0
    recall, found, average = evaluate.precision_recall(similarity, -torch.ones(40).char())  # nothing to rank
    assert len(recall) == len(found) and np.isnan(average)


def test_health_warns_of_collapsed_and_of_scattered_codes():
    def warnings(codes, all_clusters=1):
        probe = stego.ClusterProbe(codes.shape[1], 4)
        probe.centroids.data = evaluate.kmeans(codes, 4)
        clusters = (codes @ probe.centroids.T).argmax(1).reshape(4, 5, 10) * all_clusters  # four views
        return " ".join(evaluate.diagnose(codes, probe, clusters)[1])
    codes = torch.eye(8)[:4].repeat(50, 1) + 0.05 * torch.randn(200, 8)
    assert not warnings(codes)
    assert "every image is one cluster" in warnings(codes.reshape(50, 4, 8).transpose(0, 1).reshape(200, 8))
    assert "collapsed" in warnings(torch.ones(200, 8) + 0.01 * torch.randn(200, 8))
    assert "collapsed" in warnings(codes, 0)  # nothing but cluster 0
    assert "hardly cluster" in warnings(torch.randn(200, 64))


class Made(data.Collection):
    """Four random images of blocks, with labels."""

    def __init__(self):
        super().__init__("made", "val", range(4), range(4), "abc")

    def image(self, i):
        blocks = np.random.default_rng(i).integers(0, 256, (5, 8, 3), np.uint8)
        return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))

    def label(self, i):
        return Image.fromarray(np.random.default_rng(i).integers(0, 4, (40, 64), np.uint8))


@pytest.fixture
def model(backbone):
    model = stego.Stego(backbone, 6, 5, n_classes=3).eval().requires_grad_(False)
    model.refit_probe = stego.ClusterProbe(6, 5).requires_grad_(False)
    views = torch.from_numpy(np.concatenate([data.views(Made().image(i), 32) for i in range(4)]))
    codes = model(data.normalize(views)).permute(1, 0, 2, 3).flatten(1).T
    model.refit_probe.centroids.copy_(evaluate.kmeans(codes, 5))  # so that all clusters occur
    return model


def test_flip_averaging_and_probabilities_equal_a_straight_computation(model):
    images, codes = torch.randn(2, 3, 32, 48), torch.randn(1, 6, 4, 4)
    for found, f in zip(evaluate.flip_averaged(model, images), (model.features, model)):
        torch.testing.assert_close(found, (f(images) + f(images.flip(3)).flip(3)) / 2)
    labels = torch.randint(0, 9, (2, 32, 48)).byte()
    surveyed = evaluate.survey(model, data.Features(torch.randn(2, 16, 4, 6), torch.ones(2), labels))
    assert torch.equal(surveyed[2], labels[:, 4::8, 4::8])  # at the centres of patches
    for size in ((32, 24), (4, 4)):
        large = nnf.interpolate(codes, size, mode="bilinear", align_corners=False)
        for probe, scale in ((model.cluster_probe, 2), (model.linear_probe, 1)):
            found = evaluate.log_probabilities(probe, codes, size)
            torch.testing.assert_close(found, (scale * probe(large)).log_softmax(1))


def test_evaluation_equals_a_straight_computation(model):
    collection, raw = Made(), stego.ClusterProbe(16, 5).requires_grad_(False)
    probes = {RAW: raw, **evaluate.model_probes(model)}
    confusions, samples = evaluate.evaluate(model, collection, 32, probes, crf=True, workers=1, n_samples=3)
    expected, refined_pixels = dict.fromkeys([*probes, REFIT + CRF, LINEAR + CRF], 0), 0
    for i in range(4):
        image, label = data.views(collection.image(i), 32), data.views(collection.label(i), 32)[0]
        features, codes = evaluate.flip_averaged(model, data.normalize(torch.from_numpy(image)))
        clusters = {RAW: nnf.interpolate(raw(features), (32, 32), mode="bilinear")[0].argmax(0)}
        for row, probe in evaluate.model_probes(model).items():
            p = evaluate.log_probabilities(probe, codes, (32, 32))[0].exp()
            clusters[row] = p.argmax(0)
            if row != ONLINE:  # as float16, as the probabilities go to another process
                clusters[row + CRF] = dense_crf(image[0], p.half().numpy()).argmax(0)
                refined_pixels += (clusters[row + CRF] != clusters[row].numpy()).sum()
        for row, found in clusters.items():
            n_clusters = 3 if row.startswith(LINEAR) else 5
            expected[row] = expected[row] + evaluate.confusion_matrix(found, label, n_clusters, 3)
    assert confusions.keys() == expected.keys() and refined_pixels > 0
    assert all(torch.equal(confusions[row], expected[row]) for row in expected)
    assert len(samples) == 3 and np.array_equal(samples[2][0], image[0])


def test_a_report_names_clusters_by_their_classes_and_holds_no_nan(tmp_path, capsys):
    palette = data.class_palette(3)
    ids = {row: np.zeros((32, 32), np.uint8) for row in ("label", RAW, REFIT, REFIT + CRF, LINEAR)}
    samples = [(np.zeros((32, 32, 3), np.uint8), ids)] * 2
    counts = np.array([[0, 0, 0], [1, 9, 0], [0, 0, 0], [8, 0, 0], [2, 0, 0]])
    confusions = {REFIT: counts, REFIT + CRF: counts, LINEAR: np.diag([0, 1, 1])}
    legend = list(zip("bbxaa", data.class_palette(5).tolist()))
    config = {"commonest": [0, 1, 0, 0, 0], "num_classes": 3}
    found_legend = evaluate.report(tmp_path, confusions, samples, Made(), legend, config)
    summary = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)  # of NaN
    found = summary["results"][REFIT]
    assert found["iou"] == pytest.approx([800 / 11, 90, None]) and found["accuracy"] == pytest.approx(85)
    assert found["assignment"][1::2] == [1, 0] and sorted(found["assignment"])[:2] == [-1, -1]
    assert summary["results"]["by training labels"]["accuracy"] == 95  # one of 20 pixels is in a cluster of b
    assert summary["results"]["as named"]["assignment"] == [1, 1, -1, 0, 0]
    assert found_legend[3] == ("a", palette[0].tolist())
    assert len({tuple(colour) for _, colour in found_legend}) == 5
    assert "c" not in dict(found_legend)  # which never occurs, though a cluster was matched to it
    pixels = np.asarray(data.read_image(tmp_path / "panel.png"))
    for left in (320, 1180):  # the label, and the linear probe, are all of class 0
        assert (pixels[60:290, left:left + 250] == palette[0]).all()
    out = capsys.readouterr().out
    assert "0.5% of the labelled images' pixels show a class" in out  # 20 of 4 x 32 x 32
    line, = [line for line in out.splitlines() if line.endswith("<- the prediction")]
    assert line.split()[:5] == ["k-means", "on", "codes", "81.4", "85.0"]
    confusions[RAW] = np.eye(3, dtype=int)  # better
    evaluate.report(tmp_path / "again", confusions, samples, Made(), found_legend, config)
    again = json.loads((tmp_path / "again/scores.json").read_text())
    assert "as named" not in again["results"] and "score below k-means" in str(again["warnings"])


def test_the_panel_names_all_clusters_that_the_prediction_or_its_crf_leave_over(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "draw_panel", lambda path, titles, rows, legend: drawn.extend(legend))
    monkeypatch.setattr(evaluate, "draw_confusion", lambda path, counts, rows, names: drawn.extend(rows))
    ids = {row: np.zeros((8, 8), np.uint8) for row in ("label", REFIT, REFIT + CRF)}
    counts = np.diag([5, 5, 5, 0])[:, :3] + [[0], [0], [0], [1]]
    legend = list(zip("abcd", data.class_palette(4).tolist()))
    evaluate.report(tmp_path, {REFIT: counts, REFIT + CRF: counts[[0, 1, 3, 2]]},
                    [(np.zeros((8, 8, 3), np.uint8), ids)], Made(), legend, {})
    assert drawn == [*"abc", "cluster 3", *"abc", "cluster 3", "cluster 2"]


def test_without_labels_clusters_keep_their_names_and_other_rows_are_painted_like_them(model, tmp_path):
    collection, legend = Made(), list(zip("abcde", data.class_palette(5).tolist()))
    collection.has_labels, probes = False, {REFIT: model.refit_probe, ONLINE: model.cluster_probe}
    confusions, samples = evaluate.evaluate(model, collection, 32, probes, crf=False, workers=1)
    counts = torch.stack([torch.from_numpy(ids[REFIT]).flatten() for _, ids in samples])
    assert torch.equal(confusions[REFIT].sum(0), torch.bincount(counts.flatten(), minlength=5))
    assert torch.equal(confusions[REFIT], confusions[REFIT].diag().diag())
    confusions[REFIT] = torch.diag(torch.tensor([0, 0, 5, 0, 1]))  # of clusters that do not occur
    assert evaluate.report(tmp_path, confusions, samples, collection, legend, {}) == legend
    probes, legend = {REFIT: stego.ClusterProbe(6, 2), LINEAR: model.linear_probe}, legend[:2]
    confusions, samples = evaluate.evaluate(model, collection, 32, probes, crf=False, workers=1)
    assert evaluate.report(tmp_path, confusions, samples, collection, legend, {}) == legend


def test_compare_groups_runs_by_their_settings(tmp_path, capsys):
    for name, seed, steps, miou in (("a", 0, 9, 10), ("b", 1, 9, 14), ("c", 0, 8, 50), ("d", 2, 9, 50),
                                    ("e", 3, 9, 50)):
        summary = {"config": {"seed": seed, "steps": steps, "name": name, "commonest": [seed]},
                   "data": "d", "split": "dev" if name == "e" else "val",
                   "prediction": REFIT, "results": {REFIT: {"miou": miou, "accuracy": 2 * miou}},
                   "classes": ["sky", "sea"] if name == "d" else ["sky"]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps(summary))
    evaluate.compare([tmp_path / name for name in "abcdex"])
    out = capsys.readouterr().out
    assert "x: left out" in out and f"2 runs: {tmp_path}/a, {tmp_path}/b\n" in out
    rows = [line[len(REFIT):].split()[:6] for line in out.splitlines() if line.startswith(REFIT)]
    alone = ["50.0", "100.0", "<-", "the", "prediction"]
    assert rows == [["12.0", "±", "2.8", "24.0", "±", "5.7"], alone, alone, alone]


def test_photos_of_any_size_are_segmented_at_their_own_size(model):
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append([*inputs[0].shape[2:]]))
    for size, crf in (((70, 33), True), ((5, 400), False), ((1, 1), True)):
        ids = evaluate.predict(model, model.refit_probe, Made().image(0).resize(size), 32, crf)
        assert ids.shape == size[::-1] and ids.dtype == np.uint8 and ids.max() < 5
    assert seen[::2] == [[32, 64], [128, 32], [32, 32]]  # the longer side is at most four times the shorter


def test_a_prediction_is_of_the_whole_image(model):
    image = Made().image(0)  # 64 x 40, multiples of the patch
    pixels = data.normalize(torch.tensor(np.asarray(image))[None])
    codes = evaluate.flip_averaged(model, pixels)[1]
    p = evaluate.log_probabilities(model.refit_probe, codes, (40, 64))[0].exp().numpy()
    for crf, expected in ((False, p), (True, dense_crf(np.asarray(image), p))):
        assert np.array_equal(evaluate.predict(model, model.refit_probe, image, 40, crf), expected.argmax(0))
    assert (p.argmax(0) != expected.argmax(0)).any()


def predict_here(model, photos, out):
    legend = evaluate.read_legend(out / "none", 5)
    evaluate.predict_folder(model, model.refit_probe, photos, out, 32, legend, crf=False)


def test_a_folder_of_photos_is_predicted_under_its_names_and_in_its_colours(model, tmp_path, capsys):
    save_image(tmp_path / "photos/a.jpg", 50, 40)
    save_image(tmp_path / "photos/sub/b.png", 33, 71)
    (tmp_path / "photos/c\nd.png").write_bytes(b"")
    with pytest.raises(stego.InputError, match=r"^images that could not be read \(1\): .*c\\nd.png: not a"):
        predict_here(model, tmp_path / "photos", tmp_path / "out")
    assert "2 images segmented" in capsys.readouterr().out
    files = {path.relative_to(tmp_path / "out").as_posix() for path in data.files_below(tmp_path / "out")}
    assert files == {"a.png", "a_overlay.jpg", "sub/b.png", "sub/b_overlay.jpg", "panel.png", "classes.json"}
    with Image.open(tmp_path / "out/sub/b.png") as segmented:
        assert segmented.mode == "P" and segmented.size == (33, 71)
        ids, colours = np.asarray(segmented), np.asarray(segmented.convert("RGB"))
    photo = data.read_image(tmp_path / "photos/sub/b.png")
    assert np.array_equal(ids, evaluate.predict(model, model.refit_probe, photo, 32, False))
    assert np.array_equal(colours, data.class_palette(5)[ids])
    overlay = np.asarray(data.read_image(tmp_path / "out/sub/b_overlay.jpg"))  # and names below it
    expected = (np.asarray(photo) / 2 + colours / 2).mean((0, 1))
    assert len(overlay) > 71 and overlay[:71, :33].mean((0, 1)) == pytest.approx(expected, abs=3)
    legend = json.loads((tmp_path / "out/classes.json").read_text())
    assert legend["3"] == {"name": "cluster 3", "color": data.class_palette(5)[3].tolist()}
    predict_here(model, tmp_path / "photos/a.jpg", tmp_path / "photos/one")  # below its own folder
    assert (tmp_path / "photos/one/a.png").is_file()


@pytest.mark.parametrize("photos, out, message", [
    ("photos/a.png", "photos", "photos lies inside .*photos"),  # a.png would be replaced
    ("photos/panel.jpg", "out", "panel.jpg: its result"),  # panel.png is that of all photos
    ("photos", "out", "a.jpg: its result, .*a.png, would have the name of another")])
def test_no_result_replaces_another_file(photos, out, message, model, tmp_path):
    for name in ("a.jpg", "a.png", "panel.jpg"):
        save_image(tmp_path / "photos" / name)
    with pytest.raises(stego.InputError, match=message):
        predict_here(model, tmp_path / photos, tmp_path / out)
    assert len(data.files_below(tmp_path)) == 3


def test_a_person_may_edit_names_and_colours_of_clusters(tmp_path):
    path, palette = tmp_path / "clusters.json", data.class_palette(4).tolist()
    evaluate.write_legend(path, zip(["sky", "tree", "sea", "road"], palette), share=[0.4, 0.3, 0.2, 0.1])
    assert json.loads(path.read_text())["2"] == {"name": "sea", "color": palette[2], "share": 0.2}
    path.write_text(path.read_text().replace("sea", "sky\\n above").replace("road", "tree"))
    palette[3] = palette[1]  # clusters of one name have the colour of the first
    assert evaluate.read_legend(path, 4) == list(zip(["sky", "tree", "sky above", "tree"], palette))
    path.write_text(path.read_text(), "utf-8-sig")  # as Windows' editors write it
    assert evaluate.read_legend(path, 4)[1] == ("tree", palette[1])
    for bad in ("{", "[1]", '{"9": {"name": "a", "color": [1, 2, 3]}}', '{"0": {"name": "a"}}',
                '{"0": {"name": "a", "color": "red"}}', '{"0": {"name": "a", "color": [1, 2, 300]}}'):
        path.write_text(bad)
        with pytest.raises(stego.InputError, match="clusters.json: not a list of clusters"):
            evaluate.read_legend(path, 4)


def test_a_confusion_matrix_is_drawn_in_shares_of_the_true_class(tmp_path):
    evaluate.draw_confusion(tmp_path / "c.png", [[9, 1, 0], [0, 3, 0]], ["one line", "y" * 99], "abc")
    pixels = np.asarray(data.read_image(tmp_path / "c.png"))
    corner = pixels[22::44, 152::44][:3, :2].tolist()  # the upper left corner of each cell
    assert corner == [[[8, 81, 156], [236, 243, 251]], [[179, 202, 227], [65, 121, 179]], 2 * [[211] * 3]]


def test_curves_run_through_their_points(tmp_path):
    lines = {"up": ([0, 4], [0, 1]), "down": ([0, 4], [1, 0]), "mark": ([1, 1], [0, 1])}
    evaluate.draw_curves(tmp_path / "c.png", {"a": lines, "b": lines}, "x")
    pixels = np.asarray(data.read_image(tmp_path / "c.png")).astype(int)
    def near(x, y, colour):  # of the first plot, whose lower left is at (83, 313), upper right at (310, 60)
        part = pixels[round(57 + y * 253):, round(80 + x * 227):][:7, :7]
        return np.abs(part - colour).sum(2).min() < 60
    assert near(0.1, 0.9, (0, 114, 178)) and near(0.1, 0.1, (213, 94, 0))
    assert not near(0.1, 0.1, (0, 114, 178))
    assert near(0.25, 0.9, (0, 0, 0)) and not near(0.5, 0.9, (0, 0, 0))


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
            raise RuntimeError("no kernel image is available\nmore")
        return 0.1 if kind == "mps" else 0
    pretended(error)
    assert evaluate.choose_device("auto") == torch.device("cpu")
    assert capsys.readouterr().out.splitlines() == [
        "cuda is not used: no kernel image is available",
        "mps is not used: this version of PyTorch computes wrong gradients there"]
    for name, reason in (("cuda:1", "no kernel image"), ("mps", "wrong gradients"), ("abacus", "abacus")):
        with pytest.raises(stego.InputError, match=f"--device {name}: not usable here .*{reason}"):
            evaluate.choose_device(name)


def test_the_device_is_the_first_that_works_and_processes_have_a_gpu_each(pretended, monkeypatch):
    pretended(lambda kind: 0)
    assert evaluate.choose_device("auto") == evaluate.choose_device("cuda") == torch.device("cuda", 3)
    assert evaluate.choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    begun = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", begun.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **_: begun.append("group"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which all but the first process close
    for name in ("auto", "cuda"):
        assert evaluate.join_processes(name) == (torch.device("cuda", 1), 3, 4)
    assert begun == [torch.device("cuda", 1), "group"] * 2
    pretended(lambda kind: kind == "cuda")
    assert evaluate.choose_device("auto") == torch.device("mps")
    for capability, precision in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert evaluate.choose_precision("auto", torch.device("cuda")) == precision


@pytest.mark.parametrize("error, status, sentence", [
    (stego.InputError("no images"), 2, "error: no images"), (OSError(28, "disk full"), 2, "error: .*disk f"),
    (MemoryError(), 2, "memory is full"), (RuntimeError("CUDA error: out of memory\n"), 2, "--batch-size"),
    (KeyboardInterrupt(), 130, "--resume"), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when"), 2, "memory is"),
    (RuntimeError("shapes do not match"), None, None), (ValueError("a mistake of ours"), None, None)])
def test_what_goes_wrong_is_one_sentence_but_our_mistakes_are_raised(error, status, sentence, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit if status else type(error)) as stopped:
        evaluate.run_main(main)
    if status:
        assert stopped.value.code == status
        assert re.fullmatch(f".*{sentence}.*", capsys.readouterr().err.strip())  # . is no line break


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images, and runs/t that was trained on them."""
    path = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        fill_workplace(path)
        train_here(patch, "--name", "t", *IMAGES)
    return path


@pytest.fixture
def evaluate_here(trained, monkeypatch):
    def evaluate_here(*typed):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *typed, "--device=cpu", "--workers=1", "--no-crf"])
        evaluate.main()
    monkeypatch.chdir(trained)
    return evaluate_here


def test_evaluation_from_the_command_line_gives_the_scores_of_training(evaluate_here, capsys):
    Path("images/classes.txt").write_text("a\nb\nc\nd\n")  # one more than --num-classes in training
    evaluate_here("runs/t")
    Path("images/classes.txt").unlink()
    ours, again = (json.loads(Path("runs/t", file).read_text())["results"]
                   for file in ("scores.json", "eval-val/scores.json"))
    del ours[RAW]  # its centroids are not in a checkpoint
    assert again == ours and {*again} == {REFIT, ONLINE, LINEAR, "by training labels"}
    evaluate_here("t/checkpoint.pt", "--split", "train", "--out", "there", "--eval-resolution=19",
                  "--precision=bfloat16")
    there = json.loads(Path("there/scores.json").read_text())
    assert there["images"] == 12 and there["config"]["eval_resolution"] == 19
    assert there["config"]["precision"] == "bfloat16"
    Path("of.ckpt").write_bytes(Path("runs/t/checkpoint.pt").read_bytes())  # as the authors' are called
    evaluate_here("of.ckpt")
    assert Path("of/eval-val/scores.json").is_file()
    evaluate_here("--compare", "runs/t", "t", "there")  # which differs by its split and resolution
    out = capsys.readouterr().out
    assert "split train, at 16 pixels" in out and "\n1 runs: runs/t\n" in out
    for typed in (["nowhere"], [], ["runs/t", "--predict", "."]):  # no run, no run, no --out
        with pytest.raises((stego.InputError, SystemExit)):
            evaluate_here(*typed)


def test_predictions_merge_clusters_of_one_name(evaluate_here):
    legend = Path("runs/t/clusters.json")
    whole = legend.read_text()
    legend.write_text(re.sub('"name": ".*"', '"name": "all"', whole))
    evaluate_here("runs/t", "--predict", "images/imgs/val", "--out", "segmented")
    legend.write_text(whole)
    assert np.asarray(Image.open("segmented/1.png")).tolist() == [[0] * 60] * 40
    legend = json.loads(Path("segmented/classes.json").read_text())
    assert [entry["name"] for entry in legend.values()] == ["all"]


def test_correspondences_are_drawn(evaluate_here, capsys):
    evaluate_here("runs/t", "--correspondences")
    heatmaps, curves = (data.read_image(f"runs/t/eval-train/{name}.png")
                        for name in ("heatmaps", "precision_recall"))
    assert heatmaps.width == 6 * (233 + 6) - 6 + 40 and curves.width == 3 * 326 - 6 + 40
    view, neighbour = (np.asarray(heatmaps)[60:280, x:x + 70] for x in (30, 269))  # left of the point
    assert view.std() > 20 and neighbour.std() > 20 and (view != neighbour).any()
    assert capsys.readouterr().out.count("average precision") == 3
    with pytest.raises(stego.InputError, match="one image has no other"):
        evaluate_here("runs/t", "--correspondences", "--data-root", "images/imgs/val/0.png")


def test_images_of_other_classes_leave_the_linear_probe_out(evaluate_here, folder, monkeypatch):
    save_label(folder / "labels/val/v.png", np.zeros((30, 40), np.uint8))
    (folder / "classes.txt").write_text("sky\nsea\n")
    evaluate_here("runs/t", "--data-root", str(folder), "--out", str(folder / "out"))
    summary = json.loads((folder / "out/scores.json").read_text())
    assert summary["classes"] == ["sky", "sea"] and {*summary["results"]} == {REFIT, ONLINE}
    assert summary["data"] == f"{folder}/imgs/val" and summary["images"] == 1
    monkeypatch.setattr(data, "load_collection", lambda *_: data.directory("images", "val", 3))
    evaluate_here("runs/t", "--dataset", "potsdam", "--out", str(folder / "out"))  # 3 classes, but others
    assert {*json.loads((folder / "out/scores.json").read_text())["results"]} == {REFIT, ONLINE}
