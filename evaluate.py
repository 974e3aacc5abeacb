"""Score a trained checkpoint on labelled images, or segment a folder of your own photos.

    python evaluate.py --checkpoint runs/scenes-1                                   # scores of its own data set
    python evaluate.py --checkpoint runs/scenes-1 --predict photos --out segmented
    python evaluate.py --checkpoint cocostuff27_vit_base_5.ckpt --data-root data    # the authors' released model
    python evaluate.py --compare runs/*                                             # mean and spread over seeds

Clusters carry no names: each is matched to one class by the Hungarian method on a single confusion matrix over the
whole data set, and only then scored. The linear probe is read as it is.
"""
import argparse
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import timeit
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import stego
from crf import dense_crf
from stego import VOID, ClusterProbe, InputError, Number

RAW, ONLINE, REFIT, LINEAR = "k-means on features", "cluster probe", "k-means on codes", "linear probe"  # table rows
CRF = " + CRF"  # behind the name of a probe: its probabilities, sharpened

# ---- Scores: everything from one confusion matrix ----

def confusion_matrix(pred, label, n_clusters, n_classes):
    """counts[k, c] = pixels of class c that were given cluster k. (n_clusters, n_classes) int64.

    pred, label: integer tensors of one shape. Pixels whose label is outside 0..n_classes-1 are void and left out.
    Raises ValueError for different shapes or a prediction outside 0..n_clusters-1.
    """
    pred, label = torch.as_tensor(pred), torch.as_tensor(label)
    if pred.shape != label.shape:
        raise ValueError(f"predictions of shape {tuple(pred.shape)} against labels of {tuple(label.shape)}")
    pred, label = pred.flatten().long(), label.flatten().long()
    valid = (label >= 0) & (label < n_classes)
    pred, label = pred[valid], label[valid]
    if len(pred) and not 0 <= int(pred.min()) <= int(pred.max()) < n_clusters:
        raise ValueError(f"a prediction is outside 0..{n_clusters - 1}")
    return torch.bincount(pred * n_classes + label, minlength=n_clusters * n_classes).reshape(n_clusters, n_classes)


def hungarian(score):
    """The one-to-one matching of clusters to classes with the largest total score (Kuhn 1955; Jonker, Volgenant 1987).

    score: (n_clusters, n_classes), finite. Returns (n_clusters,) int64: the class of each cluster, -1 where there are
    more clusters than classes and this one is left over. Raises ValueError for other shapes or NaN.
    """
    cost = -np.asarray(score, dtype=np.float64)
    if cost.ndim != 2 or not np.isfinite(cost).all():
        raise ValueError("score must be a finite matrix (n_clusters, n_classes)")
    n, m = cost.shape
    assignment = np.full(n, -1)
    if n > m:  # the other way round: to each class its cluster
        assignment[hungarian(-cost.T)] = np.arange(m)
        return assignment
    row_potential, column_potential = np.zeros(n), np.zeros(m)
    row_of = np.full(m, -1)  # the row matched to each column
    for start in range(n):
        # Cheapest path from the unmatched row `start` to a free column, alternating over matched pairs (Dijkstra).
        distance, previous, reached = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        row, column, length = start, -1, 0.0
        while True:
            through = length + cost[row] - row_potential[row] - column_potential
            shorter = ~reached & (through < distance)
            distance[shorter], previous[shorter] = through[shorter], column
            column = int(np.argmin(np.where(reached, np.inf, distance)))
            length = distance[column]
            if row_of[column] < 0:
                break
            reached[column] = True
            row = row_of[column]
        row_potential[start] += length
        row_potential[row_of[reached]] += length - distance[reached]
        column_potential[reached] -= length - distance[reached]
        while column >= 0:  # shift every pair on the path by one
            row_of[column] = row_of[previous[column]] if previous[column] >= 0 else start
            column = previous[column]
    assignment[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    return assignment


def scores(confusion, assignment):
    """Mean IoU and pixel accuracy in percent of clusters read as classes.

        IoU_c = tp_c / (tp_c + fp_c + fn_c)    accuracy = sum_c tp_c / all labelled pixels

    confusion: (n_clusters, n_classes) counts. assignment: (n_clusters,) class of each cluster, -1 for none.
    Returns {"miou", "accuracy", "iou" per class}. A class that is neither in the labels nor predicted is NaN and not
    in the mean; without any labelled pixel all are NaN.
    # differs from the authors' code: pixels of an unmatched cluster are errors; theirs ignores those of clusters n_classes
    # and above (utils.py:223).
    """
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

def n_outputs(probe):
    """How many clusters, or classes, a cluster or a linear probe tells apart."""
    return len(probe.centroids) if isinstance(probe, ClusterProbe) else probe.out_channels


@torch.no_grad()
def kmeans(codes, n_clusters, restarts=20, seed=0, iterations=100):
    """Spherical k-means: unit centroids that maximise mean_n max_k cos(code_n, centroid_k), best of some restarts.

    codes: (N, C), any length. Each restart begins with greedy k-means++ (Arthur, Vassilvitskii 2007); an empty cluster
    continues at the code that fits worst. Restarts matter: most single runs on the embedded scenes end in an optimum
    that is up to 10 points of mIoU worse, and shows it in the objective. Deterministic per seed. Returns
    (n_clusters, C). Raises ValueError where there are fewer codes than clusters.
    """
    if not 1 <= n_clusters <= len(codes) or restarts < 1:
        raise ValueError(f"{n_clusters} clusters of {len(codes)} codes, from {restarts} restarts")
    codes = nnf.normalize(codes.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    best, best_objective = None, -torch.inf
    for _ in range(restarts):
        centroids = codes[torch.randint(len(codes), (1,), generator=generator).to(codes.device)]
        distance = 1 - codes @ centroids[0]  # half the squared distance to the nearest centroid so far
        for _ in range(n_clusters - 1):
            chance = distance.clamp(min=1e-12).cumsum(0)
            draws = torch.rand(2 + int(math.log(n_clusters)), generator=generator).to(codes.device) * chance[-1]
            chosen = codes[torch.searchsorted(chance, draws).clamp(max=len(codes) - 1)]  # (draws, C)
            distances = torch.minimum(distance[:, None], 1 - codes @ chosen.T)
            best_draw = distances.sum(0).argmin()
            centroids, distance = torch.cat([centroids, chosen[best_draw, None]]), distances[:, best_draw]
        objective = -torch.inf
        for _ in range(iterations):
            similarity, nearest = (codes @ centroids.T).max(1)
            previous, objective = objective, similarity.mean().item()
            if objective - previous < 1e-6:
                break
            sums = torch.zeros_like(centroids).index_add_(0, nearest, codes)
            empty = torch.bincount(nearest, minlength=n_clusters) == 0
            sums[empty] = codes[similarity.topk(int(empty.sum()), largest=False).indices]
            centroids = nnf.normalize(sums, dim=1)
        if objective > best_objective:
            best, best_objective = centroids, objective
    return best


@torch.no_grad()
def sample_positions(maps, n_points=50_000, seed=0):
    """About n_points vectors at random positions of random maps: what k-means is fitted on.

    maps: (N, D, h, w). Returns (n, D) float32.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(maps), generator=generator)[:2000].sort().values  # enough maps, and quick to read
    per_map, vectors = -(-n_points // len(chosen)), []
    for indices in chosen.split(32):
        read = maps[indices].float().flatten(2).transpose(1, 2)  # (n, h w, D)
        positions = torch.rand(read.shape[:2], generator=generator).argsort(1)[:, :per_map].to(read.device)  # distinct
        vectors.append(read.gather(1, positions[..., None].expand(-1, -1, read.shape[2])).flatten(0, 1))
    return torch.cat(vectors)


def fitted_probe(vectors, n_clusters, seed):
    """A ClusterProbe whose centroids are k-means of `vectors` (N, C)."""
    probe = ClusterProbe(vectors.shape[1], n_clusters).to(vectors.device).requires_grad_(False)
    probe.centroids.copy_(kmeans(vectors, n_clusters, seed=seed))
    return probe


def baseline_probes(features, code_dim, n_clusters, n_classes, steps, seed, device):
    """What STEGO is to be better than, as probes of the features alone: k-means on them, on their `code_dim` principal
    components and on as many random projections, and a linear probe taught by the labels (n_classes None: none)."""
    points = sample_positions(features.maps, seed=seed).to(device)  # (n, D)
    mean, D = points.mean(0), points.shape[1]
    torch.manual_seed(seed)
    components = torch.pca_lowrank(points, min(code_dim, *points.shape), center=True, niter=5)[2].T  # (code_dim, D)
    probes = {RAW: (fitted_probe(points, n_clusters, seed), "features")}
    for name, rows, offset in (("k-means on PCA", components, -components @ mean),
                               ("k-means on random projections", torch.randn(code_dim, D, device=device), torch.zeros(()))):
        projection = torch.nn.Conv2d(D, len(rows), 1).to(device).requires_grad_(False)
        projection.weight.copy_(rows[:, :, None, None])
        projection.bias.copy_(offset)
        probes[name] = fitted_probe(projection(points[:, :, None, None]).flatten(1), n_clusters, seed), projection
    if n_classes:
        linear = torch.nn.Conv2d(D, n_classes, 1).to(device)
        optimizer = torch.optim.Adam(linear.parameters(), lr=5e-3)
        for _ in tqdm(range(steps), desc="linear probe on features", unit="step"):
            batch = torch.randint(len(features.maps), (16,))
            loss = stego.linear_probe_loss(linear(features.maps[batch].to(device).float()), features.labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        probes["linear probe on features"] = linear.requires_grad_(False), "features"
    return probes


# ---- Correspondences: what the loss sees, and how well it tells classes apart ----

@torch.no_grad()
def correspondences(features, neighbors, head, center, device, dropout=0.0, n_batches=10, batch_size=16, n_points=11,
                    seed=0):
    """F, S and equality of class of the pairs of points that the three terms of the loss compare.

    features, neighbors: of the training views. dropout: of the channels of the features that F is computed from, as in
    training; it lowers F. Returns {"self", "knn", "rand"} -> (F, S, same), each flat; same is 1, 0, or -1 where a point is
    void, and None without labels.
    """
    generator, found = torch.Generator().manual_seed(seed), {"self": [], "knn": [], "rand": []}
    torch.manual_seed(seed)  # for the dropout
    n, k = neighbors.shape
    for _ in range(n_batches):
        images = torch.randint(n, (min(batch_size, n),), generator=generator)
        indices = {"self": images, "knn": neighbors[images, torch.randint(k, images.shape, generator=generator)],
                   "rand": (images + torch.randint(1, n, images.shape, generator=generator)) % n}
        read = {}
        for term, chosen in indices.items():
            points = 2 * torch.rand(len(images), n_points, n_points, 2, generator=generator) - 1
            maps, at, labels = features.maps[chosen].to(device).float(), points.to(device), None
            if features.labels is not None:  # where -1 and 1 are not the centres of patches, but the edges of the image
                points = points * (1 - 1 / torch.tensor([maps.shape[3], maps.shape[2]]))
                labels = nnf.grid_sample(features.labels[chosen][:, None].float(), points, mode="nearest", align_corners=False)
            read[term] = stego.sample(nnf.dropout2d(maps, dropout), at), stego.sample(head(maps), at), labels
        f, s, label = read["self"]
        for term, (f_other, s_other, label_other) in read.items():
            F, S = stego.feature_correspondence(f, f_other, center).cpu(), stego.correlation(s, s_other).cpu()
            same = None
            if label is not None:
                a, b = label[:, 0, :, :, None, None], label_other[:, :, None]
                same = (a == b).char().masked_fill((a == VOID) | (b == VOID), -1).flatten()
            found[term].append((F.flatten(), S.flatten(), same))
    return {term: tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts))
            for term, parts in found.items()}


def precision_recall(similarity, same, n_points=200):
    """(recall, precision, average precision) of "similar points have the same class", at n_points evenly spaced ranks.

    similarity: (N,). same: (N,) of 1, 0 and -1 for pairs to leave out. Average precision: sum over the same-class pairs,
    ranked by falling similarity, of the precision down to each, divided by their number.
    """
    similarity, same = similarity[same >= 0], same[same >= 0]
    if not same.any():
        return [], [], 0.0
    hit = same[similarity.argsort(descending=True)].double()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    average = (precision * hit).sum() / hit.sum()
    chosen = torch.linspace(0, len(hit) - 1, n_points).long()
    return (hit.cumsum(0) / hit.sum())[chosen].tolist(), precision[chosen].tolist(), average.item()


@torch.no_grad()
def diagnose(codes, probe, pairs, shifts):
    """Health of trained codes (n, K), from unlabelled evidence alone, and a sentence for each thing that is wrong.

    effective_rank: exp of the entropy of the codes' principal variances, how many directions they really use.
    compactness: mean cosine of a code with its centroid of `probe`. largest_cluster: the share of the largest one.
    attract: shares of the pairs (see correspondences) whose F is above the shift. Returns (dict, sentences).
    """
    variances = torch.linalg.svdvals(nnf.normalize(codes, dim=1)).square()
    share = variances / variances.sum().clamp(min=1e-12)
    similarity, nearest = probe(codes[:, :, None, None]).flatten(1).max(1)
    health = {"effective_rank": torch.exp(-(share * share.clamp(min=1e-12).log()).sum()).item(),
              "compactness": similarity.mean().item(),
              "largest_cluster": torch.bincount(nearest).max().item() / len(codes)}
    health.update({f"attract_{term}": (F > shift).float().mean().item()
                   for (term, (F, _, _)), shift in zip(pairs.items(), shifts)})
    wrong = []
    if len(probe.centroids) > 1 and (health["effective_rank"] < 1.5 or health["largest_cluster"] > 0.9):
        wrong.append("the codes collapsed, nearly all look alike: raise the shifts (--b-self, --b-knn, --b-rand), so that "
                     "fewer pairs attract")
    elif health["compactness"] < 0.5:
        wrong.append("the codes hardly cluster: train longer (--steps), or lower the shifts (--b-self, --b-knn), so that "
                     "more pairs attract")
    return {name: round(value, 4) for name, value in health.items()}, wrong


# ---- From images to class probabilities ----

@torch.no_grad()
def flip_averaged(model, images):
    """(features, codes) of normalised images (N, 3, H, W), averaged with those of the mirrored images."""
    features, mirrored = model.features(images), model.features(images.flip(3))
    codes = (model.head(features) + model.head(mirrored).flip(3)) / 2
    return (features + mirrored.flip(3)) / 2, codes


@torch.no_grad()
def log_probabilities(probe, maps, size):
    """Class log-probabilities at (H, W) = size from maps (N, C, h, w) that are upsampled bilinearly: (N, n, H, W).

    Clusters: log-softmax of 2 x cosine, 2 as the authors' code (eval_segmentation.py:131). Linear probe: log-softmax of
    its logits. Products with weights and upsampling commute, so the upsampled C channels are never made.
    """
    upsample = functools.partial(nnf.interpolate, mode="bilinear", align_corners=False)
    if not isinstance(probe, ClusterProbe):
        return upsample(probe(maps), size).log_softmax(1)
    dots = upsample(torch.einsum("nchw,kc->nkhw", maps, nnf.normalize(probe.centroids, dim=1)), size)
    # The length of the upsampled vectors: rows are upsampled first, and along a row a pixel is (1 - q) u + q v of the columns
    # u and v beside it, so that of the columns only u.u, v.v and u.v are needed.
    w, W = maps.shape[3], size[1]
    rows = upsample(maps, (size[0], w))  # (N, C, H, w)
    squares = rows.square().sum(1)
    products = torch.cat([(rows[..., :-1] * rows[..., 1:]).sum(1), squares[..., -1:]], 2)  # past the last: itself
    position = ((torch.arange(W, device=maps.device) + 0.5) * w / W - 0.5).clamp(0, w - 1)
    u = position.long()
    q = position - u
    v = (u + 1).clamp(max=w - 1)
    length = (1 - q) ** 2 * squares[..., u] + q ** 2 * squares[..., v] + 2 * q * (1 - q) * products[..., u]
    return (2 * dots / length.clamp(min=1e-24).sqrt()[:, None]).log_softmax(1)


def crf_labels(image, predictions):
    """argmax of dense_crf, (H, W) uint8, for each of several probabilities (n, H, W) of one image (H, W, 3) uint8."""
    return [dense_crf(image, probabilities).argmax(0).astype(np.uint8) for probabilities in predictions]


def crf_pool(workers):
    """Processes for crf_labels, one BLAS thread each: several would fight for the cores the processes share."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # read by the children when they start; this process has long read its own
    pool = ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn"), initializer=data.follow_parent)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they never see Ctrl-C: they end with this process
    for _ in range(workers):
        pool.submit(int)  # starts a process
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def evaluate(model, collection, size, probes, crf=True, batch_size=8, workers=2, n_samples=5):
    """Predictions of several probes for one collection, each with and without CRF.

    probes: name -> (probe, what it reads): "features", "codes", or a module that maps the features. Returns (confusions,
    samples): name -> confusion matrix, "<name> + CRF" likewise; samples: n_samples evenly spaced images as dicts of
    "index", "image" (size, size, 3), "label" (None without labels) and one uint8 map of clusters for every name. Of
    several processes each takes its share of the images, and all return the same.
    """
    device, (rank, world) = next(model.head.parameters()).device, data.process()
    mine = range(rank, len(collection), world)
    names = [name + suffix for name in probes for suffix in (("", CRF) if crf else ("",))]
    confusions, samples, pending = {}, [], []
    for name in names if collection.has_labels else ():
        n_clusters = n_outputs(probes[name.removesuffix(CRF)][0])
        confusions[name] = torch.zeros(n_clusters, collection.n_classes, dtype=torch.int64)
    wanted = set(np.linspace(0, len(collection) - 1, min(n_samples, len(collection))).round().astype(int).tolist())

    def finish(entry):
        """Scores one image, once its CRFs are done."""
        index, image, label, predictions, refined = entry
        if crf:
            predictions.update(zip((name + CRF for name in probes), refined.result()))
        for name, confusion in confusions.items():
            confusion += confusion_matrix(predictions[name], label, *confusion.shape)
        if index in wanted:
            label = label if collection.has_labels else None
            samples.append({"index": index, "image": image, "label": label, **predictions})

    pool, threads = crf_pool(workers) if crf else None, torch.get_num_threads()
    if crf:
        torch.set_num_threads(max(1, threads - workers))  # the CRF processes have the other cores
    try:
        indices = iter(mine)
        views = data.batches(torch.utils.data.Subset(data.Views(collection, size), mine), batch_size, workers)
        for images, labels in tqdm(views, "evaluate", -(-len(mine) // batch_size), unit="batch", disable=rank > 0):
            maps = dict(zip(("features", "codes"), flip_averaged(model, data.normalize(images.to(device)))))
            read = {name: maps[source] if source in maps else source(maps["features"])
                    for name, (_, source) in probes.items()}
            for i in range(len(images)):
                image = images[i].permute(1, 2, 0).numpy()
                log_p = {name: log_probabilities(probe, read[name][i:i + 1], (size, size))[0].cpu()
                         for name, (probe, _) in probes.items()}
                predictions = {name: value.argmax(0).byte().numpy() for name, value in log_p.items()}
                refined = pool.submit(crf_labels, image, [value.exp().numpy() for value in log_p.values()]) if crf else None
                pending.append((next(indices), image, labels[i].numpy(), predictions, refined))
            while len(pending) > 2 * batch_size:  # bounds the memory, and lets the CRFs run beside the next batch
                finish(pending.pop(0))
        for entry in pending:
            finish(entry)
    finally:
        torch.set_num_threads(threads)
        if pool:
            pool.shutdown(cancel_futures=True)
    confusions = {name: sum(data.gathered(confusion)) for name, confusion in confusions.items()}
    return confusions, sorted(itertools.chain(*data.gathered(samples)), key=lambda sample: sample["index"])


# ---- Results: a table, scores.json, pictures ----

def report(folder, confusions, samples, collection, probes, prediction, seconds=None, warnings=()):
    """Prints the table and writes scores.json, panel.png and, with labels, confusion.png into `folder`.

    prediction: the name of the probe whose clusters are the result. seconds: stage -> time, stored. warnings: what is
    wrong with the codes, printed below the table and stored. Returns what it stored.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, confusion in confusions.items():
        clusters = isinstance(probes[name.removesuffix(CRF)][0], ClusterProbe)
        assignment = hungarian(confusion) if clusters else np.arange(len(confusion))
        results[name] = {**scores(confusion, assignment), "assignment": assignment.tolist()}
        results[name]["iou"] = [None if math.isnan(iou) else iou for iou in results[name]["iou"]]  # JSON has no NaN

    confusion_png = folder / "confusion.png"
    if results:
        print("\n" + table({name: [result] for name, result in results.items()}, prediction))
        matched = results[prediction]["assignment"]
        order = sorted(range(len(matched)), key=lambda k: (matched[k] < 0, matched[k], k))
        draw_confusion(confusion_png, np.asarray(confusions[prediction])[order], [matched[k] for k in order],
                       cluster_names(matched, collection.names, order), collection.names, collection.palette)
    else:
        confusion_png.unlink(missing_ok=True)  # of an earlier evaluation
    for sentence in warnings:
        print(f"warning: {sentence}")

    columns, unmatched = [("image", [sample["image"] for sample in samples])], False
    if collection.has_labels:
        columns.append(("label", [paint(sample["label"], collection.palette) for sample in samples]))
    n_clusters = len(probes[prediction][0].centroids)
    for name in (RAW, prediction, prediction + CRF, LINEAR):
        if name in samples[0]:
            if results:
                matched = results[name]["assignment"]
            else:  # without classes: the colours of the predicted clusters that they share most pixels with
                shape = n_outputs(probes[name.removesuffix(CRF)][0]), n_clusters
                matched = hungarian(sum(confusion_matrix(sample[name], sample[prediction], *shape) for sample in samples))
            colours = cluster_palette(matched, collection.palette)
            unmatched = unmatched or min(matched) < 0
            columns.append((name, [paint(sample[name], colours) for sample in samples]))
    names = collection.names if results else [f"cluster {k}" for k in range(n_clusters)]
    palette = cluster_palette(range(len(names)), collection.palette)
    if results and unmatched:
        names, palette = [*names, "other colours: no class"], np.append(palette, [[255] * 3], 0)
    draw_panel(folder / "panel.png", columns, names, palette)

    summary = {"data": str(collection.root), "split": collection.split, "images": len(collection),
               "classes": collection.names, "prediction": prediction, "warnings": list(warnings), "results": results,
               "seconds": seconds}
    data.write_text(folder / "scores.json", json.dumps(summary, indent=1))
    return summary


def table(results, prediction=None):
    """Scores as text, a line a probe; of several runs their mean and standard deviation.

    results: name of a probe, with " + CRF" or without -> the `scores` of each run.
    """
    names = [name for name in results if not name.endswith(CRF)]
    width = max(map(len, names), default=0)  # without labels there are no scores
    suffixes = [suffix for suffix in ("", CRF) if any(name + suffix in results for name in names)]
    lines = [" " * width + "".join(f"{'mIoU' + suffix:>14}{'accuracy':>14}" for suffix in suffixes)]
    for name in names:
        line = f"{name:{width}}"
        for runs in (results.get(name + suffix, []) for suffix in suffixes):
            for values in ([run["miou"] for run in runs], [run["accuracy"] for run in runs]):
                cell = f"{np.mean(values):.1f}" if values else ""
                cell += f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                line += f"{cell:>14}"
        lines.append(line + "   <- the prediction" * (name == prediction))
    return "\n".join(lines)


def compare(folders):
    """Prints a table for each group of runs, of the same data, whose folders differ in -seedN alone: mean ± deviation."""
    groups = {}
    for folder in map(Path, folders):
        if (folder / "config.json").is_file() and not (folder / "scores.json").exists():
            print(f"{folder}: left out, it has not ended")
            continue
        try:
            summary = json.loads((folder / "scores.json").read_text())
            scored = {name: {score: float(result[score]) for score in ("miou", "accuracy")}
                      for name, result in summary["results"].items()}
            same = json.dumps([summary["prediction"], *(summary.get(key) for key in ("data", "split", "classes"))])
        except Exception as error:  # whatever it is that other files lead to
            raise InputError(f"--compare {folder}: not the folder of a finished run ({error!r:.200})") from error
        groups.setdefault((re.sub(r"-seed\d+", "", str(folder)), same), []).append(scored)
    for (name, same), runs in groups.items():
        print(f"\n{name}, runs: {len(runs)}")
        rows = dict.fromkeys(row for run in runs for row in run)
        print(table({row: [run[row] for run in runs if row in run] for row in rows}, json.loads(same)[0]))


def cluster_names(assignment, names, order):
    """What to call the clusters in `order`: their class, or their number where no class was left for them."""
    return [names[assignment[k]] if assignment[k] >= 0 else f"cluster {k}" for k in order]


def cluster_palette(assignment, palette):
    """Colours of clusters, (n, 3) uint8: those of their classes, further ones for clusters without a class."""
    extra = iter(data.class_palette(256)[len(palette):])
    return np.array([palette[c] if 0 <= c < len(palette) else next(extra) for c in assignment], np.uint8)


def paint(ids, palette):
    """Class ids (H, W) uint8 as colours (H, W, 3) uint8, void black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(palette)] = palette
    return colours[ids]


# ---- Your own photos ----

@torch.no_grad()
def predict(model, probe, image, size, crf=True):
    """Clusters of one PIL image of any size, as (H, W) uint8 at its own size. model: in eval mode.

    The network sees the whole image, its shorter side resized to `size` and the longer to at most four times that,
    both rounded to patches. CRF at that resolution, then the probabilities are upsampled.
    """
    image, patch = image.convert("RGB"), model.backbone.patch_size
    scale = size / min(image.size)
    h, w = (data.round_to_patch(min(side * scale, 4 * size), patch) for side in (image.height, image.width))
    pixels = TF.pil_to_tensor(TF.resize(image, (h, w), data.RESIZE))
    device = next(model.head.parameters()).device
    codes = flip_averaged(model, data.normalize(pixels[None].to(device)))[1]
    probabilities = log_probabilities(probe, codes, (h, w))[0].exp().cpu()
    if crf:
        probabilities = torch.from_numpy(dense_crf(pixels.permute(1, 2, 0).numpy(), probabilities.numpy()))
    # Class by class: a photo of 12 megapixels times all classes would be gigabytes.
    highest, ids = torch.full((image.height, image.width), -1.0), torch.zeros(image.height, image.width).byte()
    for k, probability in enumerate(probabilities):
        full = nnf.interpolate(probability[None, None], (image.height, image.width), mode="bilinear")[0, 0]
        ids[full > highest] = k
        highest = torch.maximum(highest, full)
    return ids.numpy()


def predict_folder(model, probe, folder, out, size, palette, names, crf=True):
    """Segments every image below `folder` (or the one image that it is) into `out`.

    For each: a palette PNG of cluster ids, of the same stem and size, and beside it <stem>_overlay.jpg. For all:
    clusters.json, the name and colour of each id, and panel.png, a few of them with the legend. Returns the number of
    images, and what is wrong with those that could not be read. Raises InputError where none could.
    """
    folder, out = Path(folder), Path(out)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"--out {out} lies inside {folder}: the next run would segment its pictures")
    legend = json.dumps({k: {"name": name, "color": palette[k].tolist()} for k, name in enumerate(names)}, indent=1)
    legend_file = out / "clusters.json"
    if out.is_dir() and any(out.iterdir()) and not (legend_file.is_file() and legend_file.read_bytes() == legend.encode()):
        raise InputError(f"--out {out} holds other files, or results of another model: give a folder for these results alone")
    photos, thumbnails, bad = data.Directory(folder, None, n_classes=1), [], []
    targets = [out / path.relative_to(photos.folder).with_suffix(".png") for path in photos.images]
    taken = {out / "panel.png", *(parent for target in targets for parent in target.parents)}
    for i, target in enumerate(targets):
        if target in taken:
            raise InputError(f"{photos.name(i)}: its result would replace another picture, {target}; rename it")
        taken.add(target)
    out.mkdir(parents=True, exist_ok=True)
    data.write_text(legend_file, legend)
    for i, target in enumerate(tqdm(targets, desc="predict", unit="image")):
        try:
            image = photos.image(i)
            if max(image.size) > 65_500:
                raise InputError(f"{photos.name(i)}: a side of more than 65,500 pixels is too long for the overlay, a JPEG")
        except InputError as error:  # told when the others are done
            bad.append(str(error))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        segmented = Image.fromarray(predict(model, probe, image, size, crf))
        segmented.putpalette(palette.tobytes())
        overlay = Image.blend(image, segmented.convert("RGB"), 0.5)
        save_picture(segmented, target)
        save_picture(overlay, target.with_name(f"{target.stem}_overlay.jpg"))
        if len(thumbnails) < 5:
            thumbnails.append([np.asarray(data.square_view(picture, 320, TF.InterpolationMode.BILINEAR))
                               for picture in (image, overlay, segmented.convert("RGB"))])
    if not thumbnails:
        raise InputError(data.listed(bad))
    draw_panel(out / "panel.png", list(zip(("image", "overlay", "clusters"), zip(*thumbnails))), names, palette)
    return len(photos) - len(bad), bad


# ---- Pictures ----

def save_picture(image, path):
    """Writes a PIL image, PNG or JPEG by the ending of `path`, so that it never exists half-written."""
    with stego.replacing(path) as temporary:
        image.save(temporary, format="JPEG" if Path(path).suffix == ".jpg" else "PNG", quality=90)


def shortened(names):
    """`names` on one line each, of at most 40 characters."""
    names = [" ".join(name.split()) for name in names]
    return [name if len(name) <= 40 else name[:39] + "…" for name in names]


def draw_legend(names, colours, width, size=16):
    """A picture with a coloured square and a name of each class, in columns that fill `width` px. size: of the text, in px."""
    names, font = shortened(names), ImageFont.load_default(size)
    step_x, step_y = math.ceil(max(map(font.getlength, names))) + 3 * size, round(1.7 * size)
    per_line = max(1, (width + size) // step_x)  # the last one needs no gap
    legend = Image.new("RGB", (max(width, step_x), math.ceil(len(names) / per_line) * step_y), "white")
    draw = ImageDraw.Draw(legend)
    for i, (name, colour) in enumerate(zip(names, colours)):
        x, y = i % per_line * step_x, i // per_line * step_y + step_y // 2
        draw.rectangle((x, y - size // 2, x + size, y + size // 2), tuple(colour), "gray")
        draw.text((x + 1.5 * size, y), name, "black", font, "lm")
    return legend


def draw_panel(path, columns, names, palette):
    """Save a grid of square images with column titles above and a legend of the classes below, as PNG.

    columns: list of (title, images), images a list of (S, S, 3) uint8 RGB arrays, one per row of the grid. names: n class
    names; palette: (n, 3) uint8. Nearest neighbour brings the images to one size, so that label colours stay exact.
    """
    side, gap, pad, top = min(320, 1400 // len(columns)), 6, 20, 50
    width, bottom = len(columns) * (side + gap) - gap, top + len(columns[0][1]) * (side + gap) + gap
    legend = draw_legend(names, palette, width)
    canvas = Image.new("RGB", (legend.width + 2 * pad, bottom + legend.height + pad), "white")
    canvas.paste(legend, (pad, bottom))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for i, (title, images) in enumerate(columns):
        x = pad + i * (side + gap)
        draw.text((x + side / 2, top - 20), title, "black", font, "mm")
        for j, image in enumerate(images):
            cell = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(cell, (x, top + j * (side + gap)))
    save_picture(canvas, path)


def draw_confusion(path, confusion, assignment, row_names, names, palette):
    """Save a confusion matrix, true classes down and predictions across, as PNG.

    confusion: (n_rows, n_classes) counts of pixels. assignment: the class of each row, a cluster, or -1. row_names: n_rows
    labels; names: n_classes labels; palette: (n_classes, 3) uint8. Drawn transposed, as is usual: a line shows what became
    of one true class, in percent of its pixels. The line of a class that never occurs is grey.
    """
    counts = np.asarray(confusion, float).T
    total = counts.sum(1, keepdims=True)
    percent = 100 * counts / np.maximum(total, 1)
    cell, pad, strip = min(72, max(28, 960 // len(row_names))), 20, 12
    font, figures = ImageFont.load_default(16), ImageFont.load_default(min(20, cell // 2))
    turned = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)
    names, row_names = shortened(names), shortened(row_names)
    left, below = (math.ceil(max(map(font.getlength, texts))) + strip + 36 for texts in (names, row_names))
    left, below = max(left, 200), max(below, 90)  # room for the explanation, in the corner between the names

    light, dark = np.array([(236, 243, 251), (8, 81, 156)])
    cells = np.where(total[..., None] > 0, light + percent[..., None] / 100 * (dark - light), 225)
    cells = cells.astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    cells[::cell] = cells[:, ::cell] = 255  # thin white lines between the cells
    bottom = pad + len(cells)
    canvas = Image.new("RGB", (left + cells.shape[1] + pad, bottom + below), "white")
    canvas.paste(Image.fromarray(cells), (left, pad))
    canvas.paste(Image.fromarray(palette.repeat(cell, 0)[:, None].repeat(strip, 1)), (left - strip - 4, pad))
    palette = np.append(palette, np.full((1, 3), 255, np.uint8), 0)  # white at -1: unmatched clusters have no colour
    canvas.paste(Image.fromarray(palette[assignment].repeat(cell, 0)[None].repeat(strip, 0)), (left, bottom + 4))
    draw = ImageDraw.Draw(canvas)
    for i, j in np.argwhere(percent > 0.5):
        at = left + (j + 0.5) * cell, pad + (i + 0.5) * cell
        draw.text(at, f"{percent[i, j]:.0f}", "white" if percent[i, j] > 70 else "black", figures, "mm")
    for i, name in enumerate(names):
        draw.text((left - strip - 10, pad + (i + 0.5) * cell), name, "black", font, "rm")
    for j, name in enumerate(row_names):
        x = left + (j + 0.5) * cell - turned.getbbox(name)[2] / 2
        draw.text((x, bottom + strip + 10), name, "black", turned)
    text = "down: true class\nacross: prediction\nin % of the true class"
    draw.text((left - strip - 10, bottom + 8), text, "dimgray", font, "ra", align="right")
    save_picture(canvas, path)


def axis_of(values):
    """Limits of an axis that shows `values` (1-D), and about 3 to 6 round positions on it to label."""
    low, high = (values.min(), values.max()) if len(values) else (0, 1)
    room = max((high - low) / 20, abs(low) / 1000, abs(high) / 1000) or 1  # constants have no extent of their own
    low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10(high - low))
    step = min(power * np.array([0.2, 0.5, 1, 2]), key=lambda step: abs((high - low) / step - 4))
    return (low, high), np.arange(math.ceil(low / step), high / step) * step


def draw_curves(path, plots, x_label, colours=((0, 114, 178), (213, 94, 0)), marks=(), mark_name=""):
    """Save line plots, up to three side by side, as PNG.

    plots: dict of title -> {name of line: (x, y)}, two equally long lists of numbers; points that are not finite are left
    out; every plot has the same names. colours: of the lines, Okabe and Ito's blue and vermilion. marks: an x for each
    plot, where a black line called mark_name stands, or none.
    """
    wide, high, step_x, step_y, margin = 990, 570, 1290, 850, 240  # three times the final size, against jagged lines
    font, title_font = ImageFont.load_default(42), ImageFont.load_default(51)
    lines = math.ceil(len(plots) / 3)
    per_line = math.ceil(len(plots) / lines)  # equally full lines: four plots are 2 x 2
    names, colours = list(next(iter(plots.values()))), list(colours)
    legend = draw_legend(names + [mark_name] * bool(marks), colours + [(0, 0, 0)], per_line * step_x - margin, 42)
    canvas = Image.new("RGB", (per_line * step_x + 120, lines * step_y + legend.height + 75), "white")
    canvas.paste(legend, (margin, lines * step_y + 30))
    draw = ImageDraw.Draw(canvas)
    for i, (title, plot_lines) in enumerate(plots.items()):
        left, top = i % per_line * step_x + margin, i // per_line * step_y + 130
        right, bottom = left + wide, top + high
        draw.text((left + wide / 2, top - 50), title, "black", title_font, "mm")
        draw.text((left + wide / 2, bottom + 115), x_label, "black", font, "mm")
        points = [np.array(line, float) for line in plot_lines.values()]
        points = [line[:, np.isfinite(line).all(0)] for line in points]
        (x_limits, x_marks), (y_limits, y_marks) = map(axis_of, np.concatenate(points, 1))
        for v, x in zip(x_marks, np.interp(x_marks, x_limits, (left, right))):
            draw.line((x, top, x, bottom), (230, 230, 230), 3)
            draw.text((x, bottom + 45), f"{v:.10g}", "black", font, "mm")
        for v, y in zip(y_marks, np.interp(y_marks, y_limits, (bottom, top))):
            draw.line((left, y, right, y), (230, 230, 230), 3)
            draw.text((left - 24, y), f"{v:.10g}", "black", font, "rm")
        if marks:
            x = np.interp(marks[i], x_limits, (left, right))
            draw.line((x, top, x, bottom), "black", 4)
        for (x, y), colour in zip(points, colours):
            line = list(zip(np.interp(x, x_limits, (left, right)), np.interp(y, y_limits, (bottom, top))))
            draw.line(line, colour, 6)
            r = 3 if len(line) > 1 else 10  # round corners, but a single point must be seen
            for x, y in line:
                draw.ellipse((x - r, y - r, x + r, y + r), colour)
        draw.line((left, top, left, bottom, right, bottom), "black", 3)
    save_picture(canvas.reduce(3), path)


def draw_losses(path, rows):
    """Save the columns of log.jsonl, dicts with "step", as curves: the values and, over them, their mean over a centred
    window of a tenth of them, where there is a whole one."""
    plots, steps, half = {}, [row["step"] for row in rows], len(rows) // 20
    window = np.ones(2 * half + 1) / (2 * half + 1)
    for name in [name for name in rows[0] if name != "step"]:
        values = [row[name] for row in rows]
        mean = np.convolve(values, window, "valid")
        plots[name] = {"values": (steps, values), "moving average": (steps[half:len(steps) - half], mean)}
    draw_curves(path, plots, "step", colours=((246, 208, 130), (0, 114, 178)))  # the values pale, the mean over them


def draw_diagnostics(path, pairs, shifts):
    """Save the distributions of F and S of each term's pairs, with its shift, as PNG. pairs: from correspondences."""
    plots = {}
    for (term, (F, S, _)), shift in zip(pairs.items(), shifts):
        plots[f"{term}: {100 * (F > shift).float().mean():.0f} % attract"] = {
            name: (np.linspace(-0.9875, 0.9875, 80), np.histogram(values.clamp(-1, 1), 80, (-1, 1), density=True)[0])
            for name, values in (("F, features", F), ("S, codes", S))}
    draw_curves(path, plots, "cosine (up: density of pairs)", marks=shifts, mark_name="shift b")


def draw_precision_recall(path, pairs):
    """Save precision over recall of F and S as predictors of the same class, as PNG, and return the average precisions."""
    plots, average = {}, {}
    for term, (F, S, same) in pairs.items():
        f, s = (precision_recall(values, same) for values in (F, S))
        average[term] = {"F": round(f[2], 4), "S": round(s[2], 4)}
        plots[f"{term}: AP of F {f[2]:.2f}, of S {s[2]:.2f}"] = {"F, features": f[:2], "S, codes": s[:2]}
    draw_curves(path, plots, "recall of same-class pairs (up: precision)")
    return average


@torch.no_grad()
def draw_heatmaps(path, model, views, neighbors, n_images=5):
    """Save what corresponds to one point of an image, in the image itself and in its nearest neighbour, as PNG.

    views: a data.Views. neighbors: (N, k) of its views. Of n_images evenly spaced images, at the centre.
    """
    device, n_views = next(model.head.parameters()).device, views.n_views
    scale = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.uint8)  # viridis
    rows = []
    for i in np.linspace(0, len(neighbors) - 1, min(n_images, len(neighbors))).round().astype(int).tolist():
        images = torch.stack([views[j // n_views][0][j % n_views] for j in (i, neighbors[i, 0].item())])
        features = model.features(data.normalize(images.to(device)))
        image, neighbor = map(TF.to_pil_image, images)
        (h, w), r = features.shape[2:], max(3, image.width // 40)
        x, y = (w // 2 + 0.5) * image.width / w, (h // 2 + 0.5) * image.height / h  # the centre of the patch that is compared
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), "white", "black", r // 3)
        row = [np.asarray(image), np.asarray(neighbor)]
        for maps in (features, model.head(features)):
            point = maps[:1, :, maps.shape[2] // 2, maps.shape[3] // 2, None, None]
            similarity = stego.correlation(point.expand(2, -1, -1, -1), maps)[:, 0]  # (2, 1, h, w)
            similarity = nnf.interpolate(similarity, images.shape[2:], mode="bilinear")[:, 0].cpu().numpy()
            row.extend(np.stack([np.interp(similarity, np.linspace(0, 1, 5), c) for c in scale.T], -1).astype(np.uint8))
        rows.append(row)
    titles = "image and point", "neighbour", "F in the image", "F in the neighbour", "S in the image", "S in the neighbour"
    legend = [f"cosine {value}" for value in ("0 or less", "0.25", "0.5", "0.75", "1")]
    draw_panel(path, list(zip(titles, zip(*rows))), legend, scale)


# ---- Command line ----

def model_probes(model):
    """name -> (probe, what it reads) of a trained model, and the name of the probe whose clusters are the prediction: of
    k-means on the finished codes, whose mean cosine is higher and does not depend on luck, if that was done."""
    probes = {ONLINE: (model.cluster_probe, "codes"), REFIT: (model.refit_probe, "codes"),
              LINEAR: (model.linear_probe, "codes")}
    probes = {name: entry for name, entry in probes.items() if entry[0] is not None}
    return probes, REFIT if REFIT in probes else ONLINE


def cluster_legend(config, prediction, n_clusters, path):
    """(colours, names) of the clusters of a probe: those of the classes that training on labelled images matched them to, if
    it did. config: from the checkpoint `path`, which is named in the InputError that damaged ones raise."""
    try:
        matched = config.get("assignments", {}).get(prediction)
        palette = np.array(config.get("palette", data.class_palette(n_clusters)), np.uint8).reshape(-1, 3)
        return (cluster_palette(matched or range(n_clusters), palette),
                cluster_names(matched or [-1] * n_clusters, list(map(str, config.get("classes", ()))), range(n_clusters)))
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: the names or colours of its classes are damaged ({error})") from error


def choose_device(name):
    """The torch.device called `name`, or for "auto" the first there is of cuda, mps, cpu."""
    if name != "auto":
        try:
            torch.zeros(1, device=name).tolist()
        except Exception as error:  # each device has its own
            raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from error
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(name, device):
    """Whether the backbone runs in bfloat16: if asked to, or for "auto" where that is clearly faster."""
    def seconds(dtype):
        matrix = torch.ones(1024, 1024, dtype=dtype)
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=8))

    if name != "auto":
        return name == "bfloat16"
    if device.type == "cpu":  # measured, as some processors have instructions for it and are slower with them
        return data.gathered(seconds(torch.bfloat16) < 0.8 * seconds(torch.float32))[0]
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def add_settings(parser, settings):
    """Options for these settings, in stego.SETTINGS' form; those that nobody types are not in what the parser returns."""
    for name, (default, kind, advice) in settings.items():
        how = ({"action": argparse.BooleanOptionalAction} if kind is bool else {"choices": kind} if type(kind) is tuple else
               {"type": kind, "nargs": 3 if name == "same_class" else None})
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **how,
                            help=advice if default is None else f"{advice} (default {default})")


def add_machine_options(parser):
    parser.add_argument("--cache-dir", default="cache", help="where features are kept, which can be large, and which files "
                        "were found readable (default cache)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    parser.add_argument("--workers", type=Number(int, 0), default=max(1, min(8, cores)),
                        help="processes that decode images and run CRFs (default: one a core, at most 8)")


def run_main(main):
    """main(), with what goes wrong as one sentence: exit status 2, or 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes may be what a terminal cannot show
    try:
        main()
    except KeyboardInterrupt as interruption:
        if data.process()[0] == 0:
            print(f"\ninterrupted; {interruption or 'the same command starts again'}", file=sys.stderr)
        sys.exit(130)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        print(f"error: the memory is full ({error!r:.200}); give a smaller --resolution, --eval-resolution, --batch-size or "
              "--code-dim, or --device cpu if that of the GPU is meant", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a missing permission; without a file it is none of those
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror or error.args[0]}; what was written before is whole, and a training "
              "run goes on with --resume", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="checkpoint.pt of a training run, the run's folder, or the authors' .ckpt")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--predict", metavar="PHOTOS", help="segment this image, or all below this folder, of any size")
    modes.add_argument("--baseline", action="store_true", help="also score what needs no head: k-means on the features, on "
                       "their principal components and on random projections, and a linear probe on them")
    modes.add_argument("--correspondences", action="store_true", help="only draw what corresponds to a point (heatmaps.png) "
                       "and, with labels, how well that tells classes apart (precision_recall.png)")
    modes.add_argument("--compare", nargs="+", metavar="RUN", help="only print the scores of these runs, mean and standard "
                       "deviation over those whose names differ in -seedN alone")
    parser.add_argument("--out", metavar="FOLDER", help="where results go (default: eval-<split> beside checkpoint.pt, or in a "
                        "folder named like the .ckpt)")
    parser.add_argument("--split", default="val", help="val (default) or train; dev of the scenes; unlabelled_train of potsdam")
    parser.add_argument("--clusters", choices=("refit", "online"), help="k-means on the finished codes, or the probe that was "
                        "trained beside the head (default: the former where there is one)")
    add_settings(parser, {name: ("as in training", *stego.EVERY_SETTING[name][1:])
                          for name in ("dataset", "data_root", "num_classes", "skip_bad", "eval_resolution")})
    add_settings(parser, {name: stego.EVERY_SETTING[name] for name in ("precision", "crf")})
    add_machine_options(parser)
    args = parser.parse_args()
    if not (args.checkpoint or args.compare):
        raise InputError("give --checkpoint FILE, or --compare RUN RUN ...")
    if args.predict and not args.out:
        raise InputError("--predict needs --out FOLDER for the results")
    return args


def main():
    args = parse_args()
    if args.compare:
        compare(args.compare)
        return
    path = Path(args.checkpoint)
    path = path / "checkpoint.pt" if path.is_dir() else path
    data.join_processes()
    rank, world = data.process()
    device = choose_device(args.device)
    model, config = stego.load_checkpoint(path, device)
    config = {**stego.DEFAULTS, **config}
    stego.check_settings(config, path)
    if vars(args).get("dataset", config["dataset"]) != config["dataset"]:
        config["data_root"] = None  # was of the other
    config.update({"precision": "auto", "crf": True, **{name: vars(args)[name] for name in stego.DEFAULTS if name in args}})
    model.bfloat16 = choose_precision(config["precision"], device)
    size = data.round_to_patch(config["eval_resolution"], model.backbone.patch_size)
    probes, prediction = model_probes(model)
    if args.clusters == "refit" and not model.refit_probe:
        raise InputError(f"--clusters refit: {path} has no clusters of finished codes, only those of the online probe")
    if args.clusters:
        prediction = {"refit": REFIT, "online": ONLINE}[args.clusters]
    if world > 1 and (args.predict or args.baseline or args.correspondences):
        raise InputError("--predict, --baseline and --correspondences are for one process: start it without torchrun")
    if args.predict:
        probe = probes[prediction][0]
        palette, names = cluster_legend(config, prediction, n_outputs(probe), path)
        n, bad = predict_folder(model, probe, args.predict, args.out, size, palette, names, config["crf"])
        print(f"{n} images segmented into {args.out}")
        if bad and not config["skip_bad"]:
            raise InputError(f"{data.listed(bad)}; all others are segmented")
        if bad:
            print(f"left out {data.listed(bad)}")
        return
    splits = ["train"] if args.correspondences else [args.split, "train"] if args.baseline else [args.split]
    # Other images may have other classes, and of a training without labels it is the clusters that were counted.
    tell = config["dataset"] != "directory" or (Path(config["data_root"] or "") / "classes.txt").is_file()
    if "num_classes" not in args and tell and ("data_root" in args or not model.linear_probe):
        config["num_classes"] = None
    collections = [data.load_collection(config["dataset"], config["data_root"], split, config["num_classes"])
                   for split in splits]
    data.check_files(collections, args.cache_dir, args.workers, config["skip_bad"])
    collection, train = collections[0], collections[-1]
    if LINEAR in probes and (n_outputs(model.linear_probe) != collection.n_classes
                             or config.get("classes", collection.names) != collection.names):
        print("the linear probe is left out: it was taught other classes than those of these images")
        del probes[LINEAR]
    folder = path.with_suffix("") if path.suffix == ".ckpt" else path.parent  # several of the authors' lie side by side
    out = Path(args.out or folder / f"eval-{splits[0]}")
    if args.baseline or args.correspondences:
        views = data.Views(train, data.round_to_patch(config["resolution"], model.backbone.patch_size), config["crop"])
        features = data.extract_features(model.backbone, views, model.facet, model.bfloat16, args.cache_dir,
                                         workers=args.workers, device=device)
    if args.correspondences:
        neighbors = data.cached_neighbors(features, min(config["neighbors"], len(features.vectors) - 1), device)
        out.mkdir(parents=True, exist_ok=True)
        draw_heatmaps(out / "heatmaps.png", model, views, neighbors)
        if train.has_labels:
            pairs = correspondences(features, neighbors, model.head, config["center"], device)
            average = draw_precision_recall(out / "precision_recall.png", pairs)
            data.write_text(out / "precision_recall.json", json.dumps(average, indent=1))
            for term, values in average.items():
                print(f"average precision, {term} pairs: F {values['F']:.3f}, S {values['S']:.3f}")
        print(f"pictures of {train.root}, split train, are in {out}")
        return
    if args.baseline:
        baselines = baseline_probes(features, config["code_dim"], len(probes[prediction][0].centroids),
                                    train.n_classes if train.has_labels else None, config["steps"], config["seed"], device)
        probes = {**baselines, **probes}
    print(f"{len(collection)} images of {collection.root}, split {collection.split}, at {size} pixels")
    confusions, samples = evaluate(model, collection, size, probes, config["crf"], workers=args.workers)
    if rank:
        return
    report(out, confusions, samples, collection, probes, prediction, warnings=list(map(str, config.get("warnings") or ())))
    print(f"scores and pictures are in {out}")


if __name__ == "__main__":
    run_main(main)
