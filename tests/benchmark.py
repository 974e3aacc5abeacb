"""Speed and memory, as ratios measured in one run: machines differ and are shared. Not collected by pytest.

    python tests/benchmark.py                        # all rows, about 20 minutes on 2 CPU cores
    python tests/benchmark.py --quick                # seconds each, on smaller inputs
    python tests/benchmark.py --rows crf neighbors --device cuda

Prints one JSON object a line: name, value, unit, baseline (in the same unit), ratio (how many times better than the
baseline, for time and memory alike) and what was compared. Every row runs in a process of its own, so that peak memory
is its own; what is compared takes turns, and the median counts.
"""
import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate
import stego
import train
from crf import dense_crf

ROOT = Path(__file__).parents[1]


def take_turns(runs, *functions):
    """Median seconds of each function; they take turns, so that a busy moment meets all. One warm-up each."""
    seconds = [[] for _ in functions]
    for turn in range(runs + 1):
        for function, taken in zip(functions, seconds):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]


def peak_mb(who=resource.RUSAGE_SELF):
    return resource.getrusage(who).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kB elsewhere


def row(name, value, unit, baseline, what):
    more_is_better = unit.endswith("/s")
    ratio = value / baseline if more_is_better else baseline / value
    return {"name": name, "value": round(value, 3), "unit": unit, "baseline": round(baseline, 3), "ratio": round(ratio, 2),
            "what": what}


def vit_small(device):
    """ViT-S/8 with random weights: they do not change the time."""
    return stego.VisionTransformer(8, 384, 12, 6).to(device).eval().requires_grad_(False)


def train_step_cached_vs_live(quick, device):
    batch, size, n = (4, 112, 16) if quick else (16, 224, 64)
    backbone = vit_small(device)
    model = stego.Stego(backbone, 70, 27, 27).to(device)
    model.head.train()
    preset = stego.PRESETS["cocostuff27-vits8"]
    objective = train.Objective(model, [preset[f"lambda_{term}"] for term in ("self", "knn", "rand")],
                                [preset[f"b_{term}"] for term in ("self", "knn", "rand")])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-4)
    images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(27, (n, size, size), dtype=torch.uint8)

    def step(x, x_knn, labels):
        loss, _ = objective(x, x_knn, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    reader = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))  # as in train.py
    with tempfile.TemporaryDirectory() as folder, reader as ahead:
        maps = np.lib.format.open_memmap(f"{folder}/maps.npy", "w+", np.float16, (n, size // 8, size // 8, 384))
        maps[:] = np.random.default_rng(0).standard_normal(maps.shape)
        maps = torch.from_numpy(np.load(f"{folder}/maps.npy", mmap_mode="c")).permute(0, 3, 1, 2)
        if device == "cuda":
            maps = maps.to(device)
        def read():
            return [source[torch.randint(n, (batch,))] for source in (maps, maps, labels)]
        following = ahead.submit(read)

        def cached():
            nonlocal following
            x, x_knn, y = (tensor.to(device) for tensor in following.result())
            following = ahead.submit(read)
            step(x.float(), x_knn.float(), y)

        def live():
            chosen = torch.randint(n, (3, batch))
            x, x_knn = (model.features(data.normalize(images[indices].to(device))) for indices in chosen[:2])
            step(x, x_knn, labels[chosen[2]].to(device))

        seconds, = take_turns(9, cached)
        reference, = take_turns(1 if device == "cpu" else 9, live)
    yield row("train_step_cached_vs_live", seconds, "s", reference,
              f"ViT-S/8, {size} px, batch {batch}, K 70, 27 classes, against the same step with a float32 backbone")


def extract(quick, device):
    batch, size = (2, 112) if quick else (8, 224)
    backbone = vit_small(device)
    images = torch.randn(batch, 3, size, size, device=device)
    bfloat16 = evaluate.choose_precision("auto", torch.device(device))

    def plain_attention(self, x):
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (D // self.num_heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(N, T, D))

    def plain():
        fast, stego.Attention.forward = stego.Attention.forward, plain_attention
        stego.frozen_features(backbone, images)
        stego.Attention.forward = fast

    ours, reference = take_turns(5, lambda: stego.frozen_features(backbone, images, bfloat16=bfloat16), plain)
    yield row("extract", batch / ours, "images/s", batch / reference,
              f"ViT-S/8, {size} px, {'bfloat16' if bfloat16 else 'float32'} with SDPA, against float32 without")


def neighbors(quick, device):
    n, share = (10_000, 1) if quick else (100_000, 5)
    vectors = torch.randn(n, 384, device=device)
    before = peak_mb()
    ours, = take_turns(1, lambda: data.nearest_neighbors(vectors, 30))
    used = peak_mb() - before if device == "cpu" else torch.cuda.max_memory_allocated() / 1e6

    def plain():  # the whole product would not fit into this memory: a share of its rows at once, and times the share
        unit = torch.nn.functional.normalize(vectors, dim=1)
        (unit[:n // share] @ unit.T).topk(30, dim=1)

    reference = share * take_turns(1, plain)[0]
    yield row("neighbors", ours, "s", reference, f"{n} x 384, k 30, against matmul and topk of {n // share} rows x {share}")
    yield row("neighbors_memory", used, "MB", n * n * 4 / 1e6, "against all similarities at once (computed)")


def crf(quick, device):
    size, n_classes = (96, 9) if quick else (320, 27)
    image = np.asarray(data.square_view(data.Scenes("dev").image(0), size))
    if PHOTO:
        image = np.asarray(data.square_view(data.read_image(PHOTO), size))
    logits = torch.randn(n_classes, size // 8, size // 8, generator=torch.Generator().manual_seed(0)) * 2
    probs = torch.nn.functional.interpolate(logits[None], (size, size), mode="bicubic")[0].softmax(0).numpy()
    what = f"{size} x {size} x {n_classes}, 10 iterations, one thread, {Path(PHOTO).name if PHOTO else 'a scene'}"

    def ours():
        cached.cache_clear()  # the lattice of an image is built once for all its predictions: count it every time
        return dense_crf(image, probs)

    from crf import _bilateral_kernel as cached
    if importlib.util.find_spec("pydensecrf") is None:
        seconds, = take_turns(5, ours)
        yield row("crf", 1e3 * seconds, "ms", float("nan"), f"{what}; pydensecrf is not installed")
    else:
        from pydensecrf.densecrf import DenseCRF2D

        def reference():
            model = DenseCRF2D(size, size, n_classes)
            model.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(probs, 1e-5, 1)).reshape(n_classes, -1)))
            model.addPairwiseGaussian(sxy=1, compat=3)
            model.addPairwiseBilateral(sxy=67, srgb=3, rgbim=np.ascontiguousarray(image[..., ::-1]), compat=4)
            return np.array(model.inference(10)).reshape(probs.shape)

        same = 100 * (ours().argmax(0) == reference().argmax(0)).mean()
        seconds, theirs = take_turns(7, ours, reference)
        yield row("crf", 1e3 * seconds, "ms", 1e3 * theirs, f"{what}, against pydensecrf; same label {same:.3f} % of pixels")
    yield row("crf_memory", peak_mb() - START_MB, "MB", 400, "more than the imports, against the limit set for it")


def evaluation(quick, device):
    n, size = (8, 128) if quick else (16, 320)
    model = stego.Stego(stego.load_backbone("vit_tiny_scenes"), 70, 9, 9).to(device).eval()
    collection, probes = data.Scenes("dev", n), {evaluate.ONLINE: (model.cluster_probe, "codes"),
                                                 evaluate.LINEAR: (model.linear_probe, "codes")}
    workers = os.cpu_count()
    def score(**options):
        return evaluate.evaluate(model, collection, size, probes, **options)
    plain, = take_turns(1, lambda: score(crf=False, workers=workers))
    refined, serial = take_turns(1, lambda: score(crf=True, workers=workers), lambda: score(crf=True, workers=1))
    what = f"{n} scenes at {size} px, 2 probes"
    yield row("evaluate", n / plain, "images/s", n / plain, f"{what}, without CRF")
    yield row("evaluate_crf", n / refined, "images/s", n / serial, f"{what}, with CRF in {workers} processes, against one")


def whole_run(quick, device):
    options = ["--device", device] + ["--steps", "40", "--no-crf"] * quick
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:
        seconds, wall = {}, {}
        for processes, command in ((1, []), (2, torchrun)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command, str(ROOT / "train.py"), "--name", str(processes),
                            "--cache-dir", f"cache{processes}", *options], cwd=folder, check=True, capture_output=True)
            wall[processes] = time.perf_counter() - start
            seconds[processes] = json.loads(Path(folder, "runs", str(processes), "scores.json").read_text())["seconds"]
            if processes == 1:
                memory = peak_mb(resource.RUSAGE_CHILDREN)
    for stage, taken in seconds[1].items():
        if seconds[2][stage]:
            yield row(f"two_processes_{stage}", seconds[2][stage], "s", taken, "train.py by torchrun, against one process")
    yield row("whole_run", wall[1], "s", wall[1], "train.py, the embedded scenes: " + json.dumps(seconds[1]))
    yield row("two_processes", wall[2], "s", wall[1], "the same by torchrun with two processes")
    yield row("peak_memory", memory, "MB", memory, "the largest process of train.py on the embedded scenes")


ROWS = (train_step_cached_vs_live, extract, neighbors, crf, evaluation, whole_run)
PHOTO, START_MB = os.environ.get("BENCHMARK_PHOTO"), peak_mb()


def measured(index, quick, device):
    return list(ROWS[index](quick, device))


def main():
    names = [function.__name__ for function in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller inputs: does it run, not how fast")
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default=str(evaluate.choose_device("auto")))
    parser.add_argument("--photo", help="for the CRF, instead of a scene")
    args = parser.parse_args()
    if args.photo:
        os.environ["BENCHMARK_PHOTO"] = os.path.abspath(args.photo)
    threads = os.environ.get("OMP_NUM_THREADS")
    for name in args.rows:
        if name == "crf":
            os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            for result in fresh.submit(measured, names.index(name), args.quick, args.device).result():
                print(json.dumps(result), flush=True)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.pop(variable, None)
            if threads:
                os.environ[variable] = threads


if __name__ == "__main__":
    main()
