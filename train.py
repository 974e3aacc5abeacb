"""Train STEGO: frozen features once, a small head on their correspondences, clusters, scores and pictures.

    python train.py                                                # the embedded scenes, offline
    python train.py --data-root photos --num-clusters 24           # a folder of your own images
    python train.py --preset cocostuff27-vits8 --data-root FOLDER  # the paper's data and settings
    python train.py --resume NAME                                  # go on with runs/NAME, which was stopped
    python train.py --resume NAME --steps 4000                     # train it for longer
    torchrun --nproc_per_node=4 train.py ...                       # one run shared by four GPUs or processes

Results go into runs/<name>/, and features into --cache-dir, which keeps them for later runs.
"""
import argparse
import functools
import itertools
import json
import os
import textwrap
import time
from pathlib import Path

import torch
import torch.distributed as dist

import data
import evaluate
import stego
from stego import InputError, refusing

# The settings of the paper's results, checked against the authors' configs/train_config.yml and checkpoints
# (for Potsdam, line 70 of the file has a b_rand of 0.46). "scenes" is ours, the embedded default.
PRESETS = {
    "scenes": {
        "dataset": "scenes", "backbone": "vit_tiny_scenes", "resolution": 128, "eval_resolution": 128,
        "steps": 400},
    "cocostuff27-vitb8": {
        "dataset": "cocostuff27", "backbone": "dino_vitb8", "crop": "five", "code_dim": 90, "batch_size": 32,
        "steps": 7000, "center": True, "lambda_self": 0.1, "lambda_knn": 1.0,
        "lambda_rand": 0.1538476246415498, "b_self": 0.12, "b_knn": 0.2, "b_rand": 1.0},
    "cocostuff27-vits8": {
        "dataset": "cocostuff27", "backbone": "dino_vits8_300ep", "crop": "five", "code_dim": 70,
        "batch_size": 16, "steps": 5000, "center": True, "lambda_self": 0.67, "lambda_knn": 0.25,
        "lambda_rand": 0.63, "b_self": 0.08, "b_knn": 0.02, "b_rand": 0.66},
    "cityscapes-vitb8": {
        "dataset": "cityscapes", "backbone": "dino_vitb8", "crop": "five", "code_dim": 100, "batch_size": 32,
        "steps": 7000, "center": False, "lambda_self": 1.0, "lambda_knn": 0.577453483136995,
        "lambda_rand": 0.9058762625226623, "b_self": 0.45828472207, "b_knn": 0.1754346515479633,
        "b_rand": 0.31361241889448443},
    "potsdam-vits8": {
        "dataset": "potsdam", "backbone": "dino_vits8_300ep", "code_dim": 70, "batch_size": 16, "steps": 5000,
        "center": True, "lambda_self": 0.67, "lambda_knn": 0.25, "lambda_rand": 0.63,
        "b_self": 0.08, "b_knn": 0.02, "b_rand": 0.76},
}


def parse_args():
    """The settings: what is typed overrides the resumed run or the preset, which overrides the defaults."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def shift(text):  # its name is in argparse's error message, as is the next one's
        return text if text == "auto" else float(text)

    def share(text):
        if not 0 <= float(text) <= 1:
            raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
        return float(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--preset", choices=PRESETS,
        help="all settings of a published result, or of the scenes, the default without --data-root")
    add("--resume", metavar="NAME", type=lambda text: text.removeprefix("runs/").rstrip("/"),
        help="go on with runs/NAME, with its settings where none are typed")
    add("--name", help="results go into runs/<name>; the data set's name and a number if not given")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=data.DATASETS, help="if not given: directory, or scenes without --data-root")
    add("--data-root", type=os.path.abspath,  # as a run can be evaluated from another folder
        help="where the images are: imgs/{train,val}, or just images; see README.md")
    add("--num-classes", type=int, help="classes of the labels, in a directory without classes.txt")
    add("--resolution", type=int, default=224, help="side of the training views in pixels")
    add("--eval-resolution", type=int, default=320, help="side of the evaluated views in pixels")
    add("--crop", choices=data.VIEWS, default="none",
        help="none: training sees the centre square of an image; five: its corners and centre at half size")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="dino_vits8", help=f"{', '.join(stego.BACKBONES)}, or a file, folder, URL")
    add("--facet", choices=("token", "key"), default="token", help="the backbone's last tokens, or keys")
    add("--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the backbone; auto: bfloat16 where the hardware has it, else float32")
    add("--code-dim", type=int, default=70, help="numbers in a code, the paper's K")
    add("--dropout", type=share, default=0.1, help="share of the feature channels that are dropped")
    add("--num-clusters", type=int, help="clusters to find at most; as many as classes if not given")

    add = parser.add_argument_group("objective").add_argument  # weights as in the paper's Cityscapes model
    add("--lambda-self", type=float, default=1.0, help="weight of self pairs (image, itself)")
    add("--lambda-knn", type=float, default=0.577453483136995, help="weight of knn pairs (image, neighbour)")
    add("--lambda-rand", type=float, default=0.9058762625226623, help="weight of rand pairs (image, another)")
    add("--b-self", type=shift, default="auto", help="shift of self pairs: they attract where F is larger")
    add("--b-knn", type=shift, default="auto", help="of knn pairs: codes collapse if low, scatter if high")
    add("--b-rand", type=shift, default="auto", help="of rand pairs; auto, for each shift: from the features")
    add("--same-class", type=share, nargs=3, metavar=("SELF", "KNN", "RAND"),
        help="instead of shifts: the shares (0 to 1) of pairs that show one class and so attract")
    add("--center", action=switch, default=False, help="centre F spatially")
    add("--zero-clamp", action=switch, default=True, help="clamp S at zero")
    add("--stabilize", action=switch, default=False, help="clamp S at 0.8 from above, too")
    add("--neighbors", type=int, default=7, help="how many nearest neighbours to draw the knn image from")

    add = parser.add_argument_group("run").add_argument
    add("--steps", type=int, default=2000, help="training steps in all")
    add("--batch-size", type=int, default=16, help="images in a step, of all processes together")
    add("--lr", type=float, default=5e-4, help="Adam's rate for the head")
    add("--probe-lr", type=float, default=5e-3, help="Adam's rate for the probes")
    add("--seed", type=int, default=0, help="of weights, batches, points and k-means")
    evaluate.add_machine_options(add)

    given, _ = parser.parse_known_args()
    if given.resume:
        with refusing(f"--resume {given.resume}: no run to go on with"):
            parser.set_defaults(**stego.read_tensors(Path("runs", given.resume, "checkpoint.pt"))["config"])
    elif given.preset:
        parser.set_defaults(**PRESETS[given.preset])
    elif not given.data_root and given.dataset in (None, "scenes"):
        parser.set_defaults(**PRESETS["scenes"])
    args = parser.parse_args()
    args.dataset = args.dataset or "directory"
    return args


def draw_batch(step, neighbors, batch_size, seed):
    """The views of one step, and one of the k nearest neighbours of each: indices (batch_size,), twice.

    Each epoch is a fresh permutation without its last, incomplete batch, which the authors keep. All is a
    function of seed and step, so that a resumed run needs no stored sampler. neighbors: (N, k).
    """
    n, k = neighbors.shape
    epoch, position = divmod(step, n // batch_size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    batch = order[position * batch_size:(position + 1) * batch_size]
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return batch, neighbors[batch, torch.randint(k, batch.shape, generator=draw)]


def main():
    args = parse_args()
    device, rank, world = evaluate.join_processes(args.device)
    started = time.perf_counter()

    # ---- data and model ----
    train, val = (data.load_collection(args.dataset, args.data_root, split, args.num_classes,
                                       args.num_clusters) for split in ("train", "val"))
    args.num_classes, args.num_clusters = train.n_classes, args.num_clusters or train.n_classes
    args.commonest = None  # the class that each cluster shows most in training, known at the end
    precision = evaluate.choose_precision(args.precision, device)
    args.precision = str(precision).removeprefix("torch.")  # a resumed run keeps it, wherever it goes on
    backbone = stego.load_backbone(args.backbone, device)
    torch.manual_seed(args.seed)
    model = stego.Stego(backbone, args.code_dim, args.num_clusters,
                        train.n_classes if train.has_labels else None, args.dropout, args.facet, precision)
    model = model.to(device).eval()
    parts = (model.head, args.lr), (model.cluster_probe, args.probe_lr), (model.linear_probe, args.probe_lr)
    optimizer = torch.optim.Adam([{"params": part.parameters(), "lr": lr} for part, lr in parts if part])
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    size, eval_size = (data.round_to_patch(side, model.backbone.patch_size)
                       for side in (args.resolution, args.eval_resolution))
    n = len(train) * data.VIEWS[args.crop]
    args.batch_size = min(args.batch_size, n)
    if size == model.backbone.patch_size:
        raise InputError(f"--resolution {args.resolution} is one patch, with no two points to compare: give "
                         f"{2 * size} or more")
    if n < 2:
        raise InputError("one training image has no other to compare with: give more, or add --crop five")
    if args.batch_size % world or args.batch_size < 2 * world:
        raise InputError(f"--batch-size {args.batch_size} must be shared by {world} processes, at least 2 "
                         "images each: the negatives are the other images of a process")
    if args.num_clusters > min(stego.VOID, n * (size // model.backbone.patch_size) ** 2):
        raise InputError(f"--num-clusters {args.num_clusters} is more than {stego.VOID}, or than the patches "
                         "of all training views")
    key = data.cache_key(model, train, size, args.crop)
    checked = any(Path(args.cache_dir).glob(f"{key}*"))  # a cache is begun only with files that were checked
    unchecked = ([] if checked else [train]) + ([val] if val.split == "val" else [])
    data.check_files(unchecked, args.workers, rank)

    # ---- the run's folder ----
    number = next(i for i in itertools.count(1) if not Path("runs", f"{args.dataset}-{i}").exists())
    folder = Path("runs", args.resume or args.name or f"{args.dataset}-{number}")
    checkpoint, legend_file = folder / "checkpoint.pt", folder / "clusters.json"  # a person may edit it
    first_step, rows, old_centroids = 0, [], torch.empty(0)
    if args.resume:
        saved = stego.read_tensors(checkpoint)
        state, training = saved["model"], saved["training"]
        old_centroids = state.pop("refit_probe.centroids", old_centroids)
        with refusing("--resume: backbone, --code-dim, --num-clusters and classes must stay as they were"):
            if not all(torch.equal(value.cpu(), state[f"backbone.{name}"])
                       for name, value in backbone.state_dict().items()):
                raise ValueError("the backbone has other weights")  # its features would go by a wrong key
            model.load_state_dict(state)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": training["optimizer"]["state"]})
        first_step, rows = training["step"], training["rows"]
        args.steps = max(args.steps, first_step)  # what was trained stays so
        for left in folder.glob("*.tmp") if rank == 0 else ():  # by a process killed while writing
            left.unlink()
        print(f"resumed at step {first_step}")
    elif rank == 0 and checkpoint.exists():
        raise InputError(f"{folder} holds a run: go on with it by --resume {args.name}, or give another name")

    def save(step):
        """Writes the checkpoint and the log. Raises InputError if the weights are not finite."""
        if not all(torch.isfinite(parameter).all() for parameter in trained):
            raise InputError(f"step {step}: the weights are not finite; lower --lr or --probe-lr (the last "
                             "checkpoint is kept)")
        if rank == 0:  # the only one that writes into the folder
            folder.mkdir(parents=True, exist_ok=True)
            found = model.refit_probe.centroids.cpu() if model.refit_probe else torch.empty(0)
            if legend_file.is_file() and not torch.equal(old_centroids, found):  # it names other clusters
                aside = folder / f"clusters-{first_step}-{time.time():.0f}.json"  # a new name each time
                os.replace(legend_file, aside)
                print(f"the clusters are new; the names of those before are in {aside}")
            state = optimizer.state_dict()
            stego.save_checkpoint(checkpoint, model, vars(args), step=step, rows=rows, optimizer=state)
            data.write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    if not args.resume:  # a resumed run keeps its checkpoint, clusters included, until training has moved on
        save(first_step)  # from here on the run can be resumed
    settings = ", ".join(f"{key} {value}" for key, value in vars(args).items() if value is not None)
    print(textwrap.fill(f"{folder} on {world} x {device}: {settings}", 110))
    source = ", the training images, as there is no val" if val.split == "train" else ""
    print(f"{len(train)} training images at {size} pixels, {train.n_labelled} with labels; {len(val)} images "
          f"to evaluate at {eval_size} pixels{source}")

    # ---- every feature once ----
    features = data.extract_features(model, train, size, args.crop, args.cache_dir, args.cache_gb,
                                     args.workers, rank, world, key)
    if device.type == "cuda" and isinstance(features.maps, torch.Tensor):
        torch.cuda.empty_cache()
        if features.maps.nbytes < torch.cuda.mem_get_info(device)[0] / 2:  # so no step waits for disk or bus
            features = features._replace(maps=features.maps.to(device))
    neighbors = data.nearest_neighbors(features.vectors.to(device), args.neighbors)

    # ---- shifts: the feature correspondence above which a pair attracts ----
    sample_pairs = functools.partial(evaluate.correspondences, features, neighbors, model.head, device,
                                     seed=args.seed)
    pairs = sample_pairs(args.center, args.dropout)  # F as the loss sees it
    shifts = [args.b_self, args.b_knn, args.b_rand]
    if args.same_class:
        shifts, rates = ["auto"] * 3, args.same_class
    elif "auto" in shifts:
        vectors = evaluate.sample_positions(features, 20_000, args.seed)
        pi_rand = evaluate.random_pair_rate(vectors, args.num_clusters, args.seed)
        rates = stego.same_class_rates(*(F for F, _, _ in sample_pairs().values()), pi_rand)
    for i, (F, _, _) in enumerate(pairs.values()):
        if shifts[i] == "auto":
            shifts[i] = F.quantile(1 - rates[i]).item()
    if world > 1:
        dist.broadcast_object_list(shifts)
    attract = [(F > shift).float().mean().item() for (F, _, _), shift in zip(pairs.values(), shifts)]
    print(f"shifts (self, knn, rand): {', '.join(f'{shift:.3f}' for shift in shifts)}")
    print(f"shares of pairs that attract: {', '.join(f'{share:.0%}' for share in attract)}")
    if train.has_labels:
        true = [same[same >= 0].float().mean() for _, _, same in pairs.values()]
        print(f"shares of pairs of one class, by the labels: {', '.join(f'{share:.0%}' for share in true)}")

    # ---- the loop: reads features, never images. Every random number is a function of seed and step ----
    def read(step):
        """x and x^knn (N, D, h, w) and the labels of x (N, H, W): this process's share of a batch."""
        if isinstance(features.maps, torch.Tensor):  # reading needs one thread; more would disturb the step
            torch.set_num_threads(1)  # for this thread alone
        batch, batch_knn = draw_batch(step, neighbors, args.batch_size, args.seed)
        batch, batch_knn = batch[rank::world], batch_knn[rank::world]
        tensors = [features.maps[batch], features.maps[batch_knn], features.labels[batch]]
        if device.type == "cuda":  # pinned memory is copied to the GPU while it computes
            tensors = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
        return tensors

    model.head.train()
    lambdas, saved_at = (args.lambda_self, args.lambda_knn, args.lambda_rand), time.monotonic()
    batches = data.in_parallel(read, range(first_step, args.steps), workers=1, ahead=1)
    bar = data.progress(batches, "train", "step", args.steps, first_step, rank)
    for step, batch in enumerate(bar, first_step):
        x, x_knn, labels = (tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch)
        x, x_knn = x.float(), x_knn.float()
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)

        # correspondences; as in the authors' code, modules.py:115-116, the features compared get dropout, too
        codes, codes_knn = model.head(x), model.head(x_knn)
        loss, terms = stego.stego_loss(model.head.dropout(x), model.head.dropout(x_knn), codes, codes_knn,
                                       lambdas, shifts, args.center, args.zero_clamp, args.stabilize)
        # cluster probe
        codes = codes.detach()  # the probes teach the head nothing
        terms["cluster"] = model.cluster_probe.loss(codes)
        loss = loss + terms["cluster"]
        # linear probe
        if model.linear_probe:
            terms["linear"] = stego.linear_probe_loss(model.linear_probe(codes), labels)
            loss = loss + terms["linear"]

        optimizer.zero_grad()
        (loss / world).backward()  # so that the sum over the processes is the mean
        if world > 1:
            for parameter in trained:
                dist.all_reduce(parameter.grad)
        optimizer.step()

        if (step + 1) % 10 == 0:
            values = {term: round(value.item(), 5) for term, value in terms.items()}
            rows.append({"step": step + 1, **values})
            bar.set_postfix(values, refresh=False)
        if time.monotonic() - saved_at > 45 or step + 1 == args.steps:
            save(step + 1)
            saved_at = time.monotonic()
    model.eval()

    # ---- clusters from the finished codes, and from the raw features for comparison ----
    points = evaluate.sample_positions(features, seed=args.seed).to(device)  # (n, D)
    with torch.no_grad():
        codes = model.head(points[:, :, None, None]).flatten(1)  # (n, K), as the head is 1x1
    centroids = [evaluate.kmeans(vectors, args.num_clusters, seed=args.seed).cpu()
                 for vectors in (points, codes)]
    centroids[1] = evaluate.merge_near(centroids[1])
    if world > 1:  # k-means may differ where GPUs do
        dist.broadcast_object_list(centroids)
    raw, model.refit_probe = (stego.ClusterProbe(found.shape[1], len(found)) for found in centroids)
    for probe, found in zip((raw, model.refit_probe), centroids):
        probe.to(device).requires_grad_(False).centroids.copy_(found)
    if rank == 0:
        views, clusters, labels = evaluate.survey(model, features)
        pairs = sample_pairs(args.center, args.dropout)  # with S of the finished codes
        evaluate.draw_diagnostics(folder / "diagnostics.png", pairs, shifts)
        health, warnings = evaluate.diagnose(codes, model.refit_probe, clusters)
        warnings = warnings if args.num_clusters > 1 else []  # one cluster is what was asked for
        print("health: " + ", ".join(f"{quantity} {value:.2f}" for quantity, value in health.items()))
        n_clusters = len(centroids[1])
        if n_clusters < args.num_clusters:
            print(f"{n_clusters} of {args.num_clusters} clusters are left, as the others nearly coincided")
        if train.has_labels:
            counts = evaluate.confusion_matrix(clusters, labels, n_clusters, train.n_classes)
            args.commonest = counts.argmax(1).masked_fill(counts.sum(1) == 0, -1).tolist()
    save(args.steps)

    # ---- evaluation ----
    probes = {evaluate.RAW: raw, **evaluate.model_probes(model)}
    confusions, samples = evaluate.evaluate(model, val, eval_size, probes, args.crf, args.workers, rank,
                                            world)
    if rank == 0:
        legend = evaluate.read_legend(legend_file, n_clusters)
        matched = evaluate.report(folder, confusions, samples, val, legend, vars(args), warnings,
                                  health=health, shifts=shifts, attract=attract)
        legend = legend if legend_file.is_file() else matched  # what someone typed stays
        shares = evaluate.draw_clusters(folder / "clusters.png", train, views, clusters, legend, size,
                                        args.crop)
        evaluate.write_legend(legend_file, legend, shares)
        if rows:  # there is one for every ten steps
            steps = [row["step"] for row in rows]
            plots = {term: {"loss": (steps, [row[term] for row in rows])} for term in [*rows[0]][1:]}
            evaluate.draw_curves(folder / "losses.png", plots, "step")
        seconds = time.perf_counter() - started
        print(f"scores.json, pictures and checkpoint.pt are in {folder}, after {seconds:.0f} seconds")
        print(f"next: look at clusters.png there, type names into clusters.json, and segment photos with\n"
              f"    python evaluate.py {folder} --predict PHOTOS --out FOLDER")


if __name__ == "__main__":
    evaluate.run_main(main)
