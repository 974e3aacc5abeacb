"""Speed and memory. Ratios are measured in one run, since machines differ and are shared. Not a test.

    python tests/benchmark.py                          # all rows, some minutes on 2 CPU cores
    python tests/benchmark.py --quick                  # smaller inputs: does it run, not how fast
    python tests/benchmark.py --rows crf neighbors --device cuda

Prints a JSON object a line: name, value, unit, baseline (same unit), ratio (how many times better; null
without one), what was measured. Every row has a process, and so a peak of memory, of its own. What is
compared takes turns; the median counts.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate
import stego
import train
from crf import dense_crf


def take_turns(runs, device, *functions):
    """Median seconds of each function, after one call of each that is not counted."""
    seconds = [[] for _ in functions]
    for _ in range(runs + 1):
        for function, taken in zip(functions, seconds):
            start = time.perf_counter()
            function()
            if device.type != "cpu":  # its work is queued, and may still go on
                getattr(torch, device.type).synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]


def peak_mb(device=None):
    """The most memory that this process has held so far, there or on a GPU (on MPS: that it holds)."""
    if device and device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if device and device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kB elsewhere


def row(name, value, unit, baseline, what):
    ratio = (value / baseline if unit.endswith("/s") else baseline / value) if baseline and value else None
    value, baseline, ratio = (number and round(number, 4) for number in (value, baseline, ratio))
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, "what": what}


def small_model(device):
    """ViT-S/8, a head and probes of CocoStuff with random weights: they do not change the time."""
    model = stego.Stego(stego.VisionTransformer(8, 384, 12, 6), 70, 27, 27).to(device).eval()
    model.precision = evaluate.choose_precision("auto", device)
    return model


def train_step(quick, device):
    batch, size, n = (4, 112, 8) if quick else (16, 224, 64)
    model, preset = small_model(device), train.PRESETS["cocostuff27-vits8"]
    lambdas, shifts = ([preset[f"{kind}_{term}"] for term in ("self", "knn", "rand")]
                       for kind in ("lambda", "b"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-4)
    images, labels = torch.randint(256, (n, size, size, 3)).byte(), torch.randint(27, (n, size, size)).byte()
    maps = torch.randn(n, size // 8, size // 8, 384, device=device).half().permute(0, 3, 1, 2)
    model.head.train()

    def step(read):
        chosen, chosen_knn = torch.randint(n, (2, batch))
        x, x_knn = read(chosen), read(chosen_knn)
        codes, dropout = model.head(x), model.head.dropout
        loss, _ = stego.stego_loss(dropout(x), dropout(x_knn), codes, model.head(x_knn), lambdas, shifts)
        codes = codes.detach()
        logits, y = model.linear_probe(codes), labels[chosen].to(device)
        loss = loss + model.cluster_probe.loss(codes) + stego.linear_probe_loss(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ours, reference = take_turns(3 if device.type == "cpu" else 20, device, *(lambda read=read: step(read) for
        read in (lambda i: maps[i].float(), lambda i: model.features(data.normalize(images[i].to(device))))))
    yield row("train_step", ours, "s", reference,
              f"ViT-S/8, {size} px, batch {batch}, K 70, 27 classes, against a backbone at every step")


def extract(quick, device):
    n, size = (8, 112) if quick else (64, 224)
    workers, model, random = os.cpu_count(), small_model(device), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            pixels = random.integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).resize((1600, 1200), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg")
        images = data.load_collection("directory", folder, "train", 27)
        threads, one = take_turns(1, device, *(lambda workers=workers: data.extract_features(
            model, images, size, cache_dir=tempfile.mkdtemp(dir=folder), workers=workers)
            for workers in (workers, 1)))
    yield row("extract", n / threads, "images/s", n / one,
              f"JPEGs of 2 megapixels, ViT-S/8, {size} px, {model.precision}, {workers} threads against one")


def neighbors(quick, device):
    n, share = (10_000, 1) if quick else (100_000, 20)  # all similarities at once may not fit
    vectors = torch.randn(n, 384, device=device)
    before, start = peak_mb(device), time.perf_counter()
    data.nearest_neighbors(vectors, 30)  # its result is on the CPU, and so complete
    seconds, used = time.perf_counter() - start, peak_mb(device) - before
    part, = take_turns(1, device, lambda: (vectors[:n // share] @ vectors.T).topk(30, dim=1))
    yield row("neighbors", seconds, "s", share * part,
              f"{n} x 384, k 30, against matmul and topk of {n // share} rows, times {share}")
    yield row("neighbors_memory", used, "MB", n * n * 4 / 1e6, "against all similarities (computed)")


def kmeans(quick, device):
    n = 5_000 if quick else 50_000
    codes = torch.randn(n, 70, device=device)
    seconds, = take_turns(1, device, lambda: evaluate.kmeans(codes, 27, restarts=2 if quick else 20))
    yield row("kmeans", seconds, "s", None, f"{n} codes of 70, 27 clusters, {2 if quick else 20} restarts")


def crf(quick, device):
    size, n_classes = (96, 9) if quick else (320, 27)
    image = np.asarray(data.square_view(data.Scenes("dev").image(0), size))
    logits = torch.randn(1, n_classes, size // 8, size // 8, generator=torch.Generator().manual_seed(0)) * 2
    probs = torch.nn.functional.interpolate(logits, (size, size), mode="bicubic")[0].softmax(0).numpy()
    other, before = image ^ np.uint8(1), peak_mb()  # in turns, as the lattice of the last image is kept
    seconds, _ = take_turns(3, device, lambda: dense_crf(image, probs), lambda: dense_crf(other, probs))
    yield row("crf", seconds, "s", None, f"{size} x {size} x {n_classes}, 10 iterations, one thread")
    yield row("crf_memory", peak_mb() - before, "MB", None, "of the same, beyond the image and its classes")


def evaluation(quick, device):
    n, size, workers = (8, 128, os.cpu_count()) if quick else (32, 320, os.cpu_count())
    model, scenes = stego.Stego(stego.load_backbone("vit_tiny_scenes"), 70, 9, 9), data.Scenes("dev")
    model, scenes.images = model.to(device).eval(), scenes.images[:n]
    plain, refined = take_turns(1, device, *(lambda crf=crf: evaluate.evaluate(
        model, scenes, size, evaluate.model_probes(model), crf, workers) for crf in (False, True)))
    yield row("evaluate", n / plain, "images/s", None, f"{n} scenes, {size} px, 2 probes, without CRF")
    yield row("evaluate_crf", n / refined, "images/s", n / plain,
              f"with CRF in {workers} processes and their start, against without")


def predict(quick, device):
    width, size, model = 1000 if quick else 4000, 112 if quick else 320, small_model(device)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    photo, before = Image.fromarray(pixels).resize((width, 3 * width // 4)), peak_mb()
    seconds, = take_turns(1, device, lambda: evaluate.predict(model, model.cluster_probe, photo, size))
    yield row("predict", seconds, "s", None, f"a photo of {width} x {3 * width // 4}, ViT-S/8 at {size} px, "
              "27 clusters, CRF")
    yield row("predict_memory", peak_mb() - before, "MB", None, "of the same, beyond model and photo")


ROWS = {function.__name__: function for function in
        (train_step, extract, neighbors, kmeans, crf, evaluation, predict)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller inputs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: the first that works")
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    device = evaluate.choose_device(args.device)
    if args.here:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for name in args.rows:
            for result in ROWS[name](args.quick, device):
                print(json.dumps(result), flush=True)
        return
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    for name in args.rows:
        command = [__file__, "--here", "--rows", name, "--device", str(device), *["--quick"] * args.quick]
        subprocess.run([sys.executable, *command], check=True,
                       env={**os.environ, **(one_thread if name == "crf" else {})})


if __name__ == "__main__":
    main()
