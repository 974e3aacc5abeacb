"""Score a trained run on labelled images, or segment a folder of your own photos.

    python evaluate.py runs/scenes-1                                  # scores of its own data set
    python evaluate.py runs/mine --predict photos --out segmented     # a run on photos, as in README.md
    python evaluate.py runs/scenes-1 --correspondences                # what corresponds to what
    python evaluate.py cocostuff27_vit_base_5.ckpt --data-root data   # the authors' released model
    python evaluate.py --compare runs/*                               # mean and spread over seeds

Clusters have no names: the Hungarian method matches each to at most one class, on one confusion matrix over
the whole data set, and only then are they scored. The linear probe names its classes itself.
"""
import argparse
import collections
import datetime
import itertools
import json
import math
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
import stego
from crf import dense_crf
from stego import VOID, ClusterProbe, InputError, refusing

# Rows of the table: k-means on features and on finished codes, and the probes trained beside the head.
RAW, REFIT, ONLINE, LINEAR = "k-means on features", "k-means on codes", "cluster probe", "linear probe"
BY_TRAINING, BY_NAME = "by training labels", "as named"  # other readings of the predicted clusters
CRF = " + CRF"  # after the name of a row: its probabilities, refined


# ---- Scores: everything from one confusion matrix ----

def confusion_matrix(pred, label, n_clusters, n_classes):
    """counts[k, c] = pixels of class c that were given cluster k. (n_clusters, n_classes) int64.

    pred, label: integer tensors of one shape. Labels outside 0..n_classes-1 are void, their pixels left out.
    """
    pred, label = torch.as_tensor(pred).long(), torch.as_tensor(label).long()
    valid = (label >= 0) & (label < n_classes)
    counts = torch.bincount(pred[valid] * n_classes + label[valid], minlength=n_clusters * n_classes)
    return counts.reshape(n_clusters, n_classes)


def hungarian(score):
    """The one-to-one matching of clusters to classes with the largest total score (Kuhn 1955).

    score: (n_clusters, n_classes), finite. Returns (n_clusters,) int64: the class of each cluster, or -1 for
    one left over because clusters outnumber classes. Raises ValueError for values that are not finite.
    """
    cost = -np.asarray(score, dtype=np.float64)
    if not np.isfinite(cost).all():  # the search would never end
        raise ValueError("the scores must be finite")
    n, m = cost.shape
    size = max(n, m)
    cost = np.pad(cost, ((0, size - n), (0, size - m)))  # what is matched to the padding is left over
    row_potential, column_potential = np.zeros(size), np.zeros(size)
    row_of = np.full(size, -1)  # the row matched to each column
    for start in range(size):
        # Cheapest path (Dijkstra) from the unmatched row `start` to a free column, over matched pairs.
        distance, previous, reached = np.full(size, np.inf), np.full(size, -1), np.zeros(size, bool)
        row, column, length = start, -1, 0.0
        while row >= 0:
            through = length + cost[row] - row_potential[row] - column_potential
            shorter = ~reached & (through < distance)
            distance[shorter], previous[shorter] = through[shorter], column
            column = int(np.argmin(np.where(reached, np.inf, distance)))
            length, reached[column], row = distance[column], True, row_of[column]
        gain = np.where(reached, length - distance, 0)  # keeps the costs of matched pairs at zero
        row_potential[start] += length
        row_potential[row_of[row_of >= 0]] += gain[row_of >= 0]
        column_potential -= gain
        while column >= 0:  # shift every pair on the path by one
            row_of[column] = row_of[previous[column]] if previous[column] >= 0 else start
            column = previous[column]
    assignment = np.argsort(row_of)[:n]  # the column of each row
    return np.where(assignment < m, assignment, -1)


def scores(confusion, assignment):
    """Mean IoU and pixel accuracy, in percent, of clusters read as classes.

        IoU_c = tp_c / (tp_c + fp_c + fn_c)    accuracy = sum_c tp_c / all labelled pixels

    confusion: (n_clusters, n_classes) counts. assignment: (n_clusters,) class of each cluster, -1 for none.
    Returns {"miou", "accuracy", "iou" per class}. A class neither labelled nor predicted is NaN and not in
    the mean; without any labelled pixel all are NaN.
    """
    # differs from the authors' code, utils.py:223: pixels of clusters left over are errors, not ignored.
    confusion, assignment = np.asarray(confusion), np.asarray(assignment)
    as_class = np.zeros((confusion.shape[1],) * 2)  # [predicted class, true class]
    np.add.at(as_class, assignment[assignment >= 0], confusion[assignment >= 0])
    hit, predicted, actual = np.diag(as_class), as_class.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        iou = 100 * hit / (predicted + actual - hit)
        accuracy = 100 * hit.sum() / np.float64(actual.sum())
    miou = np.nanmean(iou) if np.isfinite(iou).any() else np.nan
    return {"miou": float(miou), "accuracy": float(accuracy), "iou": iou.tolist()}


# ---- Clusters: cosine k-means on finished codes ----

@torch.no_grad()
def kmeans(codes, n_clusters, restarts=20, seed=0, iterations=100):
    """Spherical k-means: unit centroids that maximise mean_n max_k cos(code_n, centroid_k).

    codes: (N, C) of any length. Keeps the best of several restarts from greedy k-means++ (Arthur and
    Vassilvitskii 2007): on the embedded scenes most single runs are up to 10 points of mIoU worse, and their
    objective shows it. Deterministic per seed. Returns (n_clusters, C).
    """
    codes = nnf.normalize(codes.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    best, best_objective = None, -torch.inf
    for _ in range(restarts):
        centroids = codes[torch.randint(len(codes), (1,), generator=generator).to(codes.device)]
        distance = 1 - codes @ centroids[0]  # half the squared distance to the nearest centroid so far
        for _ in range(n_clusters - 1):
            chance = distance.clamp(min=1e-12).cpu().cumsum(0)  # a GPU sums in another order each time
            draws = torch.rand(2 + int(math.log(n_clusters)), generator=generator) * chance[-1]
            candidates = codes[torch.searchsorted(chance, draws).to(codes.device)]  # (draws, C)
            distances = torch.minimum(distance[:, None], 1 - codes @ candidates.T)  # (N, draws)
            best_draw = distances.sum(0).argmin()
            centroids, distance = torch.cat([centroids, candidates[best_draw, None]]), distances[:, best_draw]
        objective = -torch.inf
        for _ in range(iterations):
            similarity, nearest = (codes @ centroids.T).max(1)
            previous, objective = objective, similarity.mean().item()
            if objective - previous < 1e-6:
                break
            if codes.is_cuda:  # where index_add_ sums in another order each time; on a CPU it is faster
                sums = nnf.one_hot(nearest, n_clusters).float().T @ codes  # (n_clusters, C)
            else:
                sums = torch.zeros_like(centroids).index_add_(0, nearest, codes)
            empty = torch.bincount(nearest, minlength=n_clusters) == 0
            sums[empty] = codes[similarity.topk(int(empty.sum()), largest=False).indices]  # the farthest
            centroids = nnf.normalize(sums, dim=1)
        if objective > best_objective:
            best, best_objective = centroids, objective
    return best


@torch.no_grad()
def sample_positions(features, n_points=50_000, seed=0):
    """About n_points features, (n, D) float32, or all, at random positions of random views: for k-means."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(features.vectors), generator=generator)[:2000].sort().values  # enough views
    per_map, vectors = math.ceil(n_points / len(chosen)), []
    for indices in chosen.split(32):
        maps = features.maps[indices].float().flatten(2).transpose(1, 2)  # (n, h w, D)
        positions = torch.rand(maps.shape[:2], generator=generator).argsort(1)[:, :per_map].to(maps.device)
        vectors.append(maps.take_along_dim(positions[..., None], 1).flatten(0, 1))  # (n per_map, D)
    return torch.cat(vectors)


def random_pair_rate(vectors, n_classes, seed=0):
    """Share of pairs of random points that show the same of n classes, sum_c share_c^2, by features (N, D).

    The classes are what linkage makes of 8n small clusters. It goes by the mean cosine of the pairs of points
    in two groups and hardly by their sizes; Ward's method, or k-means with n clusters, would even out the
    sizes and so find the 1 / n of even classes.
    """
    vectors = nnf.normalize(vectors.float().cpu(), dim=1)
    n_clusters = min(8 * n_classes, 120, len(vectors))
    centroids = kmeans(vectors, n_clusters, restarts=1, seed=seed, iterations=20)
    members = nnf.one_hot((vectors @ centroids.T).argmax(1), n_clusters).float()  # (N, n_clusters)
    members = members[:, members.any(0)]  # without empty clusters
    group = stego.linkage(members.T @ vectors, members.sum(0), n_classes)
    return torch.bincount(group, members.mean(0)).square().sum().clamp(max=1).item()  # 1.0000002 by rounding


def merge_near(centroids, threshold=0.9):
    """Merges unit centroids (n, C) whose mean cosine is above the threshold.

    K-means splits a compact cluster when asked for more clusters than there are.
    """
    group = stego.linkage(centroids, torch.ones(len(centroids)), 1, threshold)
    return nnf.normalize(nnf.one_hot(group).float().T @ centroids, dim=1)


# ---- Correspondences: what the loss sees, and how well it tells classes apart ----

@torch.no_grad()
def correspondences(features, neighbors, head, device, center=False, dropout=0.0, seed=0):
    """F, S and equality of class for pairs of points like those that the three terms of the loss compare.

    features, neighbors: of the training views. dropout: of the feature channels that F is computed from, as
    in training; it lowers F. Returns {"self", "knn", "rand"} -> (F, S, same), each flat; same is 1 or 0, or
    -1 where a point is void or there are no labels.
    """
    generator, found = torch.Generator().manual_seed(seed), {"self": [], "knn": [], "rand": []}
    torch.manual_seed(seed)  # for the dropout
    n, k = neighbors.shape
    for _ in range(10):  # batches of 16
        images = torch.randint(n, (min(16, n),), generator=generator)
        images_knn = neighbors[images, torch.randint(k, images.shape, generator=generator)]
        images_rand = (images + torch.randint(1, n, images.shape, generator=generator)) % n
        for term, indices in zip(found, (images, images_knn, images_rand)):
            points = 2 * torch.rand(len(images), 11, 11, 2, generator=generator) - 1
            maps, at = features.maps[indices].to(device).float(), points.to(device)
            f_b, s_b = stego.sample(nnf.dropout2d(maps, dropout), at), stego.sample(head(maps), at)
            labels = features.labels[indices][:, None].float()  # (N, 1, H, W)
            # In labels, -1 and 1 are the edges; in maps, the centres of the outermost patches.
            points = points * (1 - 1 / torch.tensor([maps.shape[3], maps.shape[2]]))
            label_b = nnf.grid_sample(labels, points, mode="nearest", align_corners=False)
            if term == "self":
                f_a, s_a, label_a = f_b, s_b, label_b
            F, S = stego.feature_correspondence(f_a, f_b, center), stego.correlation(s_a, s_b)
            a = label_a[:, 0, :, :, None, None]  # (N, p, p, 1, 1)
            b = label_b[:, 0, None, None]  # (N, 1, 1, p, p)
            same = (a == b).char().masked_fill((a == VOID) | (b == VOID), -1)  # (N, p, p, p, p), as F and S
            found[term].append((F.cpu().flatten(), S.cpu().flatten(), same.flatten()))
    return {term: tuple(map(torch.cat, zip(*parts))) for term, parts in found.items()}


def precision_recall(similarity, same, n_points=200):
    """(recall, precision, average precision) of "similar points have one class", at n_points ranks.

    similarity: (N,). same: (N,) of 1 and 0, or -1 for pairs to leave out. Average precision is the mean, over
    the same-class pairs, of the precision among all pairs that are at least as similar.
    """
    similarity, same = similarity[same >= 0], same[same >= 0]
    if not len(same):  # no pair has two labelled points
        return [0, 1], [0, 0], math.nan
    hit = same[similarity.argsort(descending=True)].double()
    precision, recall = hit.cumsum(0) / torch.arange(1, len(hit) + 1), hit.cumsum(0) / hit.sum().clamp(min=1)
    average = (precision * hit).sum() / hit.sum().clamp(min=1)
    shown = torch.linspace(0, len(hit) - 1, n_points).long()
    return recall[shown].tolist(), precision[shown].tolist(), average.item()


@torch.no_grad()
def survey(model, features, n_views=500):
    """Evenly spaced training views (m,), their predicted clusters and labels at patch centres, (m, h, w)."""
    n = len(features.vectors)
    views = torch.linspace(0, n - 1, min(n_views, n)).long()
    device = model.refit_probe.centroids.device
    clusters = [model.refit_probe(model.head(features.maps[part].to(device).float())).argmax(1).cpu()
                for part in views.split(32)]
    labels, patch = features.labels[views], model.backbone.patch_size
    return views, torch.cat(clusters), labels[:, patch // 2::patch, patch // 2::patch]


@torch.no_grad()
def diagnose(codes, probe, clusters):
    """Health of trained codes (n, K), judged without labels, and a sentence for what is wrong.

    effective_rank: exp of the entropy of the codes' principal variances. compactness: mean cosine of a code
    with its centroid of `probe`. largest_cluster: share of the largest in clusters (m, h, w) of views.
    largest_in_view: the same within a view, on average. Returns (dict, sentences).
    """
    variances = torch.linalg.svdvals(nnf.normalize(codes, dim=1).cpu()).square()
    share = variances / variances.sum().clamp(min=1e-12)
    in_view = nnf.one_hot(clusters.flatten(1), len(probe.centroids)).float().mean(1)  # (m, n_clusters)
    health = {"effective_rank": torch.special.entr(share).sum().exp().item(),
              "compactness": probe(codes[:, :, None, None]).amax(1).mean().item(),
              "largest_cluster": in_view.mean(0).max().item(),
              "largest_in_view": in_view.amax(1).mean().item()}
    warnings = []
    if health["effective_rank"] < 1.5 or health["largest_cluster"] > 0.9:
        warnings.append("the codes collapsed: nearly all look alike; raise the shifts (--b-self, --b-knn, "
                        "--b-rand), so that fewer pairs attract")
    elif health["largest_in_view"] > 0.9:
        warnings.append("nearly every image is one cluster: raise --b-self, so that less in it attracts")
    elif health["compactness"] < 0.5:
        warnings.append("the codes hardly cluster: train longer (--steps), or lower the shifts (--b-self, "
                        "--b-knn), so that more pairs attract")
    return {name: round(value, 4) for name, value in health.items()}, warnings


# ---- From images to clusters ----

def model_probes(model):
    """Row of the table -> probe on the codes, for the probes that the model has."""
    probes = {REFIT: model.refit_probe, ONLINE: model.cluster_probe, LINEAR: model.linear_probe}
    return {row: probe for row, probe in probes.items() if probe is not None}


def prediction_row(rows):
    """The row whose clusters are the prediction: k-means on the finished codes, if that was done."""
    return REFIT if REFIT in rows else ONLINE


@torch.no_grad()
def flip_averaged(model, images):
    """(features, codes) of normalised images (N, 3, H, W), averaged with those of their mirror images."""
    features, mirrored = model.features(images), model.features(images.flip(3))
    codes = (model.head(features) + model.head(mirrored).flip(3)) / 2
    return (features + mirrored.flip(3)) / 2, codes


@torch.no_grad()
def log_probabilities(probe, codes, size):
    """Class log-probabilities (N, n, H, W) of codes (N, K, h, w) upsampled to size = (H, W).

    Clusters: log-softmax of 2 x cosine (2 as in the authors' code, eval_segmentation.py:131). Linear probe:
    of its logits, which are upsampled in place of the codes, as both steps are linear.
    """
    if isinstance(probe, ClusterProbe):
        return (2 * probe(nnf.interpolate(codes, size, mode="bilinear"))).log_softmax(1)
    return nnf.interpolate(probe(codes), size, mode="bilinear").log_softmax(1)


def refine(prediction):
    """(image, ids), after the CRF has made ids of the probabilities, row -> (n, H, W)."""
    # differs from the authors' code, crf.py:23: rounding makes many of their image's values smaller by 1.
    image, ids, probabilities = prediction
    for row, values in probabilities.items():
        ids[row] = dense_crf(image, values).argmax(0).astype(np.uint8)
    return image, ids


def start_crf_process():
    """Runs in each new process of the pool: leaves Ctrl-C to the parent and ends when the parent does."""
    def end_with_parent():
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


@torch.no_grad()
def segment(model, collection, size, probes, refined=(), workers=2, rank=0, world=1, batch_size=8):
    """What each probe makes of each image: yields (image, ids), all uint8.

    image: (size, size, 3). ids: "label" -> (size, size), row -> the clusters, and for the rows in `refined`
    also row + CRF -> the same after the CRF. The probe RAW reads features, the others codes. Each of `world`
    processes yields every world-th image.
    """
    device, mine = next(model.head.parameters()).device, range(rank, len(collection), world)
    pool, threads = None, torch.get_num_threads()
    if refined:  # spawned processes of one BLAS thread each, as more would fight for the cores
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        pool = ProcessPoolExecutor(max(1, workers), get_context("spawn"), start_crf_process)
        torch.set_num_threads(max(1, threads // 2))

    def read(i):
        return data.views(collection.image(i), size)[0], data.views(collection.label(i), size)[0]

    def predictions():
        decoded = data.in_parallel(read, mine, workers)
        while batch := list(itertools.islice(decoded, batch_size)):
            pixels = torch.from_numpy(np.stack([image for image, _ in batch])).to(device)
            features, codes = flip_averaged(model, data.normalize(pixels))
            for i, (image, label) in enumerate(batch):
                values = {row: log_probabilities(probe, codes[i:i + 1], (size, size))[0]  # (n, size, size)
                          for row, probe in probes.items() if row != RAW}
                if RAW in probes:  # ours: cosines are upsampled, as features have many channels
                    cosine = probes[RAW](features[i:i + 1])
                    values[RAW] = nnf.interpolate(cosine, (size, size), mode="bilinear")[0]
                ids = {row: values[row].argmax(0).byte().cpu().numpy() for row in probes}
                probabilities = {row + CRF: values[row].exp().half().cpu().numpy() for row in refined}
                yield image, {"label": label, **ids}, probabilities

    try:  # the CRFs of some images run beside the network's next batch
        yield from data.in_parallel(refine, predictions(), workers, 2 * batch_size, pool)
    finally:
        torch.set_num_threads(threads)


def evaluate(model, collection, size, probes, crf=True, workers=2, rank=0, world=1, n_samples=5):
    """(confusions, samples): row -> confusion matrix over the collection, and some of what `segment` yields.

    crf: also refine the prediction and the linear probe. The confusion is with the labels or, without labels,
    with the predicted clusters. All processes return the same confusions, but evenly spaced samples of their
    own images.
    """
    n, samples, best = len(range(rank, len(collection), world)), [], prediction_row(probes)
    n_classes = collection.n_classes if collection.has_labels else len(probes[best].centroids)
    refined = [row for row in (best, LINEAR) if crf and row in probes]
    confusions = {row: torch.zeros(len(next(probe.parameters())), n_classes, dtype=torch.int64)
                  for row, probe in probes.items()}  # whose first parameter has a row per cluster or class
    confusions.update({row + CRF: confusions[row].clone() for row in refined})
    wanted = np.linspace(0, n - 1, min(n_samples, n)).round().astype(int)
    segmented = segment(model, collection, size, probes, refined, workers, rank, world)
    for i, (image, ids) in enumerate(data.progress(segmented, "evaluate", "image", n, rank=rank)):
        reference = ids["label" if collection.has_labels else best]
        for row, confusion in confusions.items():
            confusion += confusion_matrix(ids[row], reference, *confusion.shape)
        if i in wanted:
            samples.append((image, ids))
    for confusion in confusions.values() if world > 1 else ():
        dist.all_reduce(confusion)
    return confusions, samples


# ---- Results: a table, scores.json, pictures ----

def report(folder, confusions, samples, collection, legend, config, warnings=(), **more):
    """Prints the table; writes scores.json, panel.png and, with labels, confusion.png into `folder`.

    legend: (name, colour) of each predicted cluster. config: of the run; stored, as are warnings and more.
    With labels, clusters are also read as the class that each showed most in training, config["commonest"]
    if there, and by their own names, where those are names of classes. Returns the legend by the matching.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labelled, best = collection.has_labels, prediction_row(confusions)
    assignments = {row: np.arange(len(counts)) if labelled and row.startswith(LINEAR) else hungarian(counts)
                   for row, counts in confusions.items()}
    classes = [*zip(collection.names, collection.palette.tolist())] if labelled else legend
    extra = data.class_palette(300).tolist()[len(classes):]  # for clusters left over
    legends, results = {}, {}
    for row, assignment in assignments.items():
        # A cluster matched to a class that it never met, as one without labels, is not called by its name.
        own = not labelled or row.startswith(LINEAR)
        legends[row] = [classes[c] if c >= 0 and (own or confusions[row][k][c] > 0) else
                        (f"cluster {k}", extra[k % len(extra)]) for k, c in enumerate(assignment)]
    if labelled:
        n_pixels = samples[0][0][..., 0].size * collection.n_labelled
        if confusions[best].sum() < n_pixels:  # often by mistake, as when ids begin at 1
            print(f"{confusions[best].sum() / n_pixels:.1%} of the labelled images' pixels show a class; the "
                  f"others are void, that is, no id from 0 to {collection.n_classes - 1}")
        legends["label"], names = classes, collection.names
        named, matched = ([names.index(name) if name in names else -1 for name, _ in entries]
                          for entries in (legend, legends[best]))
        readings = [(row, confusions[row], assignment.tolist()) for row, assignment in assignments.items()]
        if config.get("commonest"):
            readings.append((BY_TRAINING, confusions[best], config["commonest"]))
        if max(named) >= 0 and named != matched:
            readings.append((BY_NAME, confusions[best], named))
        for row, confusion, assignment in readings:
            results[row] = {**scores(confusion, assignment), "assignment": assignment}
        if RAW in results and results[best]["miou"] < results[RAW]["miou"]:
            warnings = [*warnings, "the codes score below k-means on the features: train longer (--steps), "
                        "give other shifts (--same-class), or look at evaluate.py RUN --correspondences"]
        print()
        print_table([results])
        order = np.argsort(assignments[best] % (VOID + 1), kind="stable")  # by class, those without one last
        rows = [legends[best][k][0] for k in order]
        draw_confusion(folder / "confusion.png", confusions[best][order], rows, names)
    for sentence in warnings:
        print(f"warning: {sentence}")

    shown = [row for row in ("label", RAW, best, best + CRF, LINEAR) if row in legends]
    pictures = [[Image.fromarray(image), *(paint(ids[row], legends[row]) for row in shown)]
                for image, ids in samples]
    # The CRF has a matching of its own, which may leave over other clusters.
    colours = dict([*classes, *legends[best], *legends.get(best + CRF, ())])
    draw_panel(folder / "panel.png", ["image", *shown], pictures, colours)
    summary = {"data": str(collection.folder), "split": collection.split, "images": len(collection),
               "classes": collection.names, "prediction": best, "warnings": [*warnings],
               "results": results, "config": config}
    summary = json.loads(json.dumps({**summary, **more}), parse_constant=lambda _: None)  # JSON has no NaN
    data.write_text(folder / "scores.json", json.dumps(summary, indent=1))
    return legends[best]


def print_table(runs):
    """Prints a line a row: scores of one run, or mean ± deviation of several. runs: row -> `scores` each."""
    print(f"{'mIoU':>38}{'accuracy':>14}")
    for row in dict.fromkeys(itertools.chain(*runs)):
        line = f"{row:24}"
        for score in ("miou", "accuracy"):
            values = [run[row][score] for run in runs if row in run and run[row][score] is not None]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            line += f"{np.mean(values):.1f}{spread}".rjust(14) if values else " " * 14
        print(line + ("   <- the prediction" if row == prediction_row(runs[0]) else ""))


def compare(folders):
    """Prints a table, mean ± deviation, for each group of finished runs that differ only in their seed."""
    varying = {"seed", "name", "resume", "preset", "device", "workers", "cache_dir", "cache_gb", "commonest"}
    groups = {}
    for folder in map(Path, folders):
        path = folder / "scores.json"
        summary = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if not summary.get("results"):
            print(f"{folder}: left out, as it holds no scores")
            continue
        settings = {key: value for key, value in summary["config"].items() if key not in varying}
        same = json.dumps([settings, *map(summary.get, ("data", "split", "classes"))], sort_keys=True)
        groups.setdefault(same, {})[str(folder)] = summary["results"]
    for runs in groups.values():
        print(f"\n{len(runs)} runs: {', '.join(runs)}")
        print_table([*runs.values()])


# ---- Your own photos ----

def write_legend(path, legend, share=()):
    """Writes clusters.json: id -> name, colour and, where given, the share of each cluster."""
    rows = [{"name": name, "color": colour} for name, colour in legend]
    for row, value in zip(rows, share):
        row["share"] = value
    data.write_text(path, json.dumps(dict(enumerate(rows)), indent=1))


def read_legend(path, n_clusters):
    """(name, colour) of each cluster from clusters.json, which a person may edit, or else by number.

    Clusters of one name are one class, in the colour of the first.
    """
    legend = [(f"cluster {k}", colour) for k, colour in enumerate(data.class_palette(n_clusters).tolist())]
    with refusing(f"{path}: not a list of clusters as training writes it"):
        for k, entry in json.loads(path.read_text("utf-8-sig")).items() if path.is_file() else ():
            red, green, blue = bytes(entry["color"])  # three numbers from 0 to 255, or an error
            legend[int(k)] = " ".join(str(entry["name"]).split()), [red, green, blue]
    first = dict(reversed(legend))  # name -> colour of its first cluster
    return [(name, first[name]) for name, _ in legend]


@torch.no_grad()
def predict(model, probe, image, size, crf=True):
    """Clusters of one PIL image of any size, as (H, W) uint8 at its own size. model: in eval mode.

    The network sees the whole image, its shorter side resized to `size` and the longer to at most four times
    that, both rounded to patches. The CRF works at that resolution; then the probabilities are upsampled.
    """
    image, patch = image.convert("RGB"), model.backbone.patch_size
    scale, device = size / min(image.size), next(model.head.parameters()).device
    h, w = (data.round_to_patch(min(side * scale, 4 * size), patch) for side in (image.height, image.width))
    pixels = np.array(TF.resize(image, (h, w), data.RESIZE))  # (h, w, 3)
    codes = flip_averaged(model, data.normalize(torch.from_numpy(pixels)[None].to(device)))[1]
    probabilities = log_probabilities(probe, codes, (h, w))[0].exp().cpu()  # (n_clusters, h, w)
    if crf:
        probabilities = torch.from_numpy(dense_crf(pixels, probabilities.numpy()))
    # Class by class, as all classes of a photo of 12 megapixels would take gigabytes.
    full_size = image.height, image.width
    highest, ids = torch.full(full_size, -1.0), torch.zeros(full_size, dtype=torch.uint8)
    for k, probability in enumerate(probabilities):
        full = nnf.interpolate(probability[None, None], full_size, mode="bilinear")[0, 0]
        ids[full > highest] = k
        highest = torch.maximum(highest, full)
    return ids.numpy()


def predict_folder(model, probe, folder, out, size, legend, crf=True):
    """Segments every image below `folder`, or below its imgs/ if there, or the one image it is, into `out`.

    legend: (name, colour) of each cluster; those of one name are one class. Writes for each photo a palette
    PNG of class ids, of the same stem and size, and <stem>_overlay.jpg, with a legend below; for all,
    classes.json (name and colour of each id) and panel.png. At the end, one InputError names the bad photos.
    """
    photos, out = data.directory(folder, None, n_classes=1), Path(out)
    enclosing = out.resolve(), *(out.resolve().parents if Path(folder).is_dir() else ())
    if photos.folder.resolve() in enclosing:
        raise InputError(f"--out {out} lies inside {photos.folder}: the next run would segment its pictures")
    targets = [out / path.relative_to(photos.folder).with_suffix(".png") for path in photos.images]
    taken = collections.Counter([out / "panel.png", *targets])
    for path, target in zip(photos.images, targets):
        if taken[target] > 1:
            raise InputError(f"{path}: its result, {target}, would have the name of another; rename it")
    classes = [*dict(legend).items()]
    class_of = np.array([classes.index(entry) for entry in legend], np.uint8)  # by cluster
    out.mkdir(parents=True, exist_ok=True)
    write_legend(out / "classes.json", classes)
    thumbnails, bad = [], []
    for i, target in enumerate(data.progress(targets, "predict", "image", len(targets))):
        try:
            image = photos.image(i)
        except InputError as error:
            bad.append(str(error))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        segmented = paint(class_of[predict(model, probe, image, size, crf)], classes)
        overlay = Image.blend(image, segmented.convert("RGB"), 0.5)
        segmented.save(target)
        shown = dict(classes[k] for k in np.unique(segmented))
        page = with_legend(overlay, shown, max(16, image.width // 60))
        page.save(target.with_name(f"{target.stem}_overlay.jpg"), quality=90)
        if len(thumbnails) < 5:
            thumbnails.append([ImageOps.contain(picture, (320, 320))
                               for picture in (image, overlay, segmented)])
    if thumbnails:
        draw_panel(out / "panel.png", ("photo", "overlay", "classes"), thumbnails, dict(classes))
    print(f"{len(targets) - len(bad)} images segmented into {out}")
    if bad:
        raise InputError(f"images that could not be read ({len(bad)}): {'; '.join(bad[:10])}")


# ---- Pictures ----

def paint(ids, legend):
    """Ids (H, W) uint8 as a palette image in the colours of a legend, void black."""
    picture = Image.fromarray(ids)
    picture.putpalette(np.array([colour for _, colour in legend], np.uint8).tobytes())
    return picture


def with_legend(picture, legend, size=16):
    """A picture with `legend`, name -> colour, in columns below it. size: of the text."""
    font, names = ImageFont.load_default(size), [name[:40] for name in legend]
    step_x, step_y = math.ceil(max(map(font.getlength, names))) + 3 * size, round(1.7 * size)
    per_line = max(1, (picture.width + size) // step_x)  # the last one needs no gap
    wider, higher = max(0, step_x - picture.width), math.ceil(len(names) / per_line) * step_y
    page = ImageOps.expand(picture, (0, 0, wider, higher), "white")
    draw = ImageDraw.Draw(page)
    for i, (name, colour) in enumerate(zip(names, legend.values())):
        x, y = i % per_line * step_x, picture.height + i // per_line * step_y + step_y // 2
        draw.rectangle((x, y - size // 2, x + size, y + size // 2), tuple(colour), "gray")
        draw.text((x + 1.5 * size, y), name, "black", font, "lm")
    return page


def draw_panel(path, titles, rows, legend):
    """Save a grid of pictures with column titles above and a legend of the classes below, as PNG.

    titles: of the columns. rows: of PIL images. legend: name -> colour. Pictures are padded to squares, and
    shrunk by averaging or enlarged by nearest neighbour.
    """
    side, gap, top = min(320, 1400 // len(titles)), 6, 30
    width, height = len(titles) * (side + gap) - gap, top + len(rows) * (side + gap) + gap
    grid = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(18)
    for i, title in enumerate(titles):
        x = i * (side + gap)
        draw.text((x + side / 2, 10), title, "black", font, "mm")
        for j, row in enumerate(rows):
            square = ImageOps.pad(row[i].convert("RGB"), (side, side), Image.Resampling.BOX, "white")
            grid.paste(square, (x, top + j * (side + gap)))
    ImageOps.expand(with_legend(grid, legend), 20, "white").save(path)


def draw_confusion(path, confusion, row_names, names):
    """Save a confusion matrix as PNG, true classes down, predictions across, in percent of the true class.

    confusion: (n_rows, n_classes) counts of pixels, drawn transposed, as is usual. row_names: of its rows,
    the clusters; names: of the classes. The line of a class that never occurs is grey.
    """
    counts = np.asarray(confusion, float).T  # (n_classes, n_rows)
    total, cell, font = counts.sum(1, keepdims=True), 44, ImageFont.load_default(16)
    shares, turned = counts / np.maximum(total, 1), ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)
    names, row_names = [name[:40] for name in names], [name[:40] for name in row_names]
    left, below = (max(150, round(max(map(font.getlength, texts))) + 30) for texts in (names, row_names))
    bottom = 20 + cell * len(names)
    canvas = Image.new("RGB", (left + cell * len(row_names) + 20, bottom + below), "white")
    draw = ImageDraw.Draw(canvas)
    for i, j in np.ndindex(shares.shape):
        x, y, share = left + j * cell, 20 + i * cell, shares[i, j]
        blue = tuple(int(light + share * (dark - light)) for light, dark in ((236, 8), (243, 81), (251, 156)))
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), blue if total[i] else "lightgray")
        if share > 0.005:
            ink = "white" if share > 0.7 else "black"
            draw.text((x + cell / 2, y + cell / 2), f"{100 * share:.0f}", ink, font, "mm")
    for i, name in enumerate(names):
        draw.text((left - 10, 20 + (i + 0.5) * cell), name, "black", font, "rm")
    for j, name in enumerate(row_names):
        draw.text((left + (j + 0.5) * cell - turned.getbbox(name)[2] / 2, bottom + 10), name, "black", turned)
    draw.text((left - 10, bottom + 10), "down: true class\nacross: prediction", "dimgray", font, "ra")
    canvas.save(path)


def draw_curves(path, plots, x_label):
    """Save line plots, side by side, as PNG.

    plots: title -> {name of line: (x, y)}, two lists of numbers of one length; every plot has the same names,
    three at most.
    """
    colours = (0, 114, 178), (213, 94, 0), (0, 0, 0)  # blue and vermilion of Okabe and Ito, black
    corner, extent = np.array([190, 790]), np.array([680, -760])  # of the axes, in 960 x 960 pixels
    (left, bottom), (right, top) = corner, corner + extent
    font, pictures = ImageFont.load_default(42), []
    for curves in plots.values():
        pictures.append(Image.new("RGB", (960, 960), "white"))  # the panel makes it small, the lines smooth
        draw = ImageDraw.Draw(pictures[-1])
        lines = [np.transpose(curve) for curve in curves.values()]  # of points, each (n, 2)
        low, high = np.concatenate(lines).min(0), np.concatenate(lines).max(0) + 1e-9
        for share in np.linspace(0, 1, 5):
            (x, y), (x_value, y_value) = corner + share * extent, low + share * (high - low)
            draw.line((x, top, x, bottom), "lightgray", 3)
            draw.line((left, y, right, y), "lightgray", 3)
            draw.text((x, bottom + 45), f"{round(x_value, 4):.4g}", "black", font, "mm")
            draw.text((left - 24, y), f"{round(y_value, 6):.3g}", "black", font, "rm")
        draw.text(((left + right) / 2, bottom + 115), x_label, "black", font, "mm")
        for line, colour in zip(lines, colours):
            places = corner + (line - low) / (high - low) * extent  # (n, 2)
            draw.line(places.ravel().tolist(), colour, 6, "curve")
    draw_panel(path, list(plots), [pictures], dict(zip(curves, colours)))


def draw_clusters(path, collection, views, clusters, legend, size, crop, n_shown=6):
    """Save, for each cluster, largest first, the views that show it most, with all but the cluster dimmed.

    views (m,), clusters (m, h, w): of a survey. Returns the share of each cluster.
    """
    in_view = nnf.one_hot(clusters.flatten(1), len(legend)).float().mean(1)  # (m, n_clusters)
    shares, rows = in_view.mean(0), []
    for k in shares.argsort(descending=True).tolist():
        name, colour = legend[k]
        swatch = Image.new("RGB", (200, 200), tuple(colour))
        ImageDraw.Draw(swatch).text((100, 100), f"{k}: {name}\n{shares[k]:.1%}", "white",
                                    ImageFont.load_default(22), "mm", stroke_width=2, stroke_fill="black")
        rows.append([swatch])
        for i in in_view[:, k].topk(min(n_shown, len(views))).indices.tolist():
            image, which = divmod(int(views[i]), data.VIEWS[crop])
            view = Image.fromarray(data.views(collection.image(image), size, crop)[which])
            mask = Image.fromarray((clusters[i] == k).numpy()).resize(view.size)
            rows[-1].append(Image.composite(view, view.point(lambda value: 0.35 * value), mask))
    titles = ["cluster", *(f"view {i + 1}" for i in range(len(rows[0]) - 1))]
    draw_panel(path, titles, rows, dict(legend))
    return shares.tolist()


def draw_diagnostics(path, pairs, shifts):
    """Save the distributions of F and S over each term's pairs (see correspondences) and its shift."""
    plots, cosines = {}, np.linspace(-0.9875, 0.9875, 80)
    for (term, (F, S, _)), shift in zip(pairs.items(), shifts):
        f, s = (np.histogram(values.clamp(-1, 1), 80, (-1, 1), density=True)[0] for values in (F, S))
        plots[f"{term}: {(F > shift).float().mean():.0%} attract"] = {
            "F, features": (cosines, f), "S, codes": (cosines, s),
            "shift b": ([shift, shift], [0, max(*f, *s)])}
    draw_curves(path, plots, "cosine (up: density of pairs)")


def draw_precision_recall(path, pairs):
    """Save precision over recall of F and S as predictors of one class; print their average precisions."""
    plots = {}
    for term, (F, S, same) in pairs.items():
        *f, average_f = precision_recall(F, same)
        *s, average_s = precision_recall(S, same)
        plots[f"{term}: AP of F {average_f:.2f}, of S {average_s:.2f}"] = {"F, features": f, "S, codes": s}
        print(f"average precision, {term} pairs: F {average_f:.3f}, S {average_s:.3f}")
    draw_curves(path, plots, "recall of same-class pairs (up: precision)")


@torch.no_grad()
def draw_heatmaps(path, model, collection, neighbors, size, crop, n_images=5):
    """Save views and their nearest neighbours, dark where they do not correspond to the view's centre.

    neighbors: (N, k) of the views of the collection. Shows n_images evenly spaced views.
    """
    device, v, rows = next(model.head.parameters()).device, len(neighbors) // len(collection), []
    for n in np.linspace(0, len(neighbors) - 1, min(n_images, len(neighbors))).round().astype(int).tolist():
        pair = [data.views(collection.image(m // v), size, crop)[m % v] for m in (n, int(neighbors[n, 0]))]
        pixels = torch.from_numpy(np.stack(pair))  # (2, size, size, 3)
        features = model.features(data.normalize(pixels.to(device)))  # (2, D, h, h)
        h, r = features.shape[2], max(3, size // 40)
        x = (h // 2 + 0.5) * size / h  # across and down, the centre of the central patch
        rows.append([Image.fromarray(view) for view in pair])
        ImageDraw.Draw(rows[-1][0]).ellipse((x - r, x - r, x + r, x + r), "white", "black", r // 3)
        for maps in (features, model.head(features)):
            point = maps[:1, :, h // 2, h // 2, None, None].expand(2, -1, -1, -1)
            cosine = stego.correlation(point, maps)[:, 0].clamp(min=0)  # (2, 1, h, h)
            cosine = nnf.interpolate(cosine, (size, size), mode="bilinear")[:, 0, :, :, None].cpu()
            rows[-1].extend(Image.fromarray(view) for view in (pixels * cosine).byte().numpy())
    titles = ("view and point", "neighbour", "F in view", "F in neighbour", "S in view", "S in neighbour")
    draw_panel(path, titles, rows, {"cosine 1": (255, 255, 255), "0 or less": (0, 0, 0)})


# ---- Command line ----

def add_machine_options(add):
    """Options of both scripts, on the machine and the CRF."""
    add("--crf", action=argparse.BooleanOptionalAction, default=True,
        help="refine by the CRF; scores are also given without it, photos are not")
    add("--cache-dir", default="cache", help="where features are kept; they can be large")
    add("--cache-gb", type=float, default=100, help="features that take more GB are computed at every step")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that works")
    add("--workers", type=int, default=max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        help="threads that decode images, and processes that run CRFs")


def gradient_of_sample(device):
    """The gradient of a `stego.sample` on a device, of maps that lie channels last, as features do."""
    maps = torch.arange(24.0).reshape(1, 3, 4, 2).to(device).permute(0, 3, 1, 2).requires_grad_()
    points = torch.linspace(-1.2, 0.7, 8).reshape(1, 2, 2, 2).to(device)
    stego.sample(maps, points).square().sum().backward()
    return maps.grad.cpu()


def choose_device(name, local_rank=None):
    """The torch.device called `name`; for "auto", the first of cuda, mps and cpu that computes correctly."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = [kind for kind in there if there[kind]] if name == "auto" else [name]
    for kind in kinds:
        try:
            device = torch.device(kind)
            if device.type == "cuda" and device.index is None:  # "cuda" would be the first GPU in a thread
                index = torch.cuda.current_device() if local_rank is None else local_rank
                device = torch.device("cuda", index)
            if not torch.allclose(gradient_of_sample(device), gradient_of_sample("cpu"), atol=1e-3):
                raise RuntimeError("this version of PyTorch computes wrong gradients there")
            return device
        except Exception as error:  # each kind of device raises its own
            reason = str(error).partition("\n")[0]  # which may be empty
            if name != "auto":
                raise InputError(f"--device {name}: not usable here ({reason})") from error
            print(f"{kind} is not used: {reason}")


def choose_precision(name, device):
    """The torch.dtype called `name`; "auto" is bfloat16 where the hardware computes in it, else float32."""
    if name == "auto":
        cpuinfo = Path("/proc/cpuinfo")
        fast = device.type == "cpu" and cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def join_processes(name):
    """(device, rank, world): the device to use, and the place of this process among those of torchrun."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return choose_device(name), 0, 1
    world, rank, local = (int(os.environ[key]) for key in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    gpus = torch.cuda.device_count()
    if ":" in name or name != "cpu" and 0 < gpus <= local:
        raise InputError(f"--device {name}: process {local} of this machine has no GPU of its own among "
                         f"{gpus}: start fewer processes, or give --device cpu")
    device = choose_device(name, local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A process may work alone for long, on its features or on pictures, while the others wait.
    dist.init_process_group(timeout=datetime.timedelta(days=1))
    if rank > 0:  # the first speaks for all
        sys.stdout = open(os.devnull, "w")
    return device, rank, world


def run_main(main):
    """Runs main(); what a user can put right becomes a sentence and exit status 2; 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may be unable to show some file names
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; a training run goes on with train.py --resume NAME", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        full = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if isinstance(error, MemoryError) or any(words in str(error) for words in full):
            reason = (f"the memory is full ({reason:.100}); give a smaller --resolution, --eval-resolution "
                      "or --batch-size")
        elif isinstance(error, RuntimeError):
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse_args():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("run", nargs="?", help="a run's name or folder; or a checkpoint, also the authors'")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--predict", metavar="PHOTOS", help="segment this image, or all below this folder, into --out")
    add("--correspondences", action="store_true", help="draw what corresponds to a point (heatmaps.png) "
        "and, with labels, how well that tells classes apart (precision_recall.png)")
    add("--compare", nargs="+", metavar="RUN", help="print the scores of runs, mean ± deviation over seeds")
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="where results go; needed by --predict, else eval-<split> in the run")
    add("--split", help="train, val or, of scenes, dev; if not given val, or train for --correspondences")
    add("--dataset", choices=data.DATASETS, help="this and the next four are as in training if not given")
    add("--data-root")
    add("--num-classes", type=int)
    add("--eval-resolution", type=int)
    add("--precision", choices=("auto", "float32", "bfloat16", "float16"))
    add_machine_options(add)
    args = parser.parse_args()
    if bool(args.run) == bool(args.compare):
        parser.error("give either a run or --compare RUN RUN ...")
    if args.predict and not args.out:
        parser.error("--predict needs --out FOLDER for the results")
    return args


def main():
    args = parse_args()
    runs = [Path("runs", run) if Path("runs", run).exists() else Path(run)  # by name or path
            for run in args.compare or [args.run]]
    if args.compare:
        compare(runs)
        return
    path = runs[0] / "checkpoint.pt" if runs[0].is_dir() else runs[0]
    device, rank, world = join_processes(args.device)
    model, config = stego.load_checkpoint(path, device)
    probes, patch = model_probes(model), model.backbone.patch_size
    with refusing(f"{path}: its settings are not those of a run"):
        config["precision"] = args.precision or config.get("precision", "auto")  # for scores.json, too
        config["eval_resolution"] = args.eval_resolution or config["eval_resolution"]
        model.precision = choose_precision(config["precision"], device)
        size = data.round_to_patch(config["eval_resolution"], patch)
    probe = probes[prediction_row(probes)]
    legend = read_legend(path.with_name("clusters.json"), len(probe.centroids))
    if args.predict:
        predict_folder(model, probe, args.predict, args.out, size, legend, args.crf)
        return

    data_root, dataset, n_classes = args.data_root, args.dataset or config["dataset"], args.num_classes
    if not args.data_root and not args.dataset:  # the images of training
        data_root = config["data_root"]
        if LINEAR in probes:  # without labels, num_classes was only the number of clusters
            n_classes = n_classes or config["num_classes"]
    split = args.split or ("train" if args.correspondences else "val")
    collection = data.load_collection(dataset, data_root, split, n_classes, config["num_classes"])
    data.check_files([collection], args.workers, rank)
    folder = path.with_suffix("") if path.suffix == ".ckpt" else path.parent  # the authors' share one folder
    out = Path(args.out or folder / f"eval-{collection.split}")
    if args.correspondences:
        view_size, crop = data.round_to_patch(config["resolution"], patch), config["crop"]
        if len(collection) * data.VIEWS[crop] < 2:
            raise InputError("--correspondences: one image has no other to compare with")
        features = data.extract_features(model, collection, view_size, crop, args.cache_dir, args.cache_gb,
                                         args.workers)
        neighbors = data.nearest_neighbors(features.vectors.to(device), config["neighbors"])
        out.mkdir(parents=True, exist_ok=True)
        draw_heatmaps(out / "heatmaps.png", model, collection, neighbors, view_size, crop)
        if collection.has_labels:
            pairs = correspondences(features, neighbors, model.head, device, config["center"])
            draw_precision_recall(out / "precision_recall.png", pairs)
        print(f"pictures are in {out}")
        return

    if collection.n_classes != config["num_classes"] or dataset not in (config["dataset"], "directory"):
        config["commonest"] = None  # as these are classes of training
        if probes.pop(LINEAR, None):
            print("the linear probe is left out: it was taught other classes than these images have")
    print(f"{len(collection)} images of {collection.folder}, split {collection.split}, at {size} pixels")
    confusions, samples = evaluate(model, collection, size, probes, args.crf, args.workers, rank, world)
    if rank == 0:
        report(out, confusions, samples, collection, legend, config)
        print(f"scores.json and pictures are in {out}")


if __name__ == "__main__":
    run_main(main)
