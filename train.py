"""Train STEGO: frozen features once, a small head on their correspondences, clusters, scores and pictures.

    python train.py                                                     # the embedded scenes, offline
    python train.py --data-root photos --num-classes 20                 # a folder of your own images
    python train.py --preset cocostuff27-vits8 --data-root FOLDER       # the paper's data and settings
    python train.py --preset cocostuff27-vits8 --dataset directory --data-root photos --num-classes 20  # its settings
    python train.py --name mine --resume                                # go on with runs/mine after it was stopped
    torchrun --nproc_per_node=4 train.py ...                            # one run shared by four GPUs, or processes

Everything goes into runs/<name>/: config.json, log.jsonl, losses.png, checkpoint.pt, diagnostics.png, scores.json,
panel.png and confusion.png. Features go into --cache-dir, where every later run with the same images and backbone finds them.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import shlex
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import data
import evaluate
import stego
from stego import InputError, Number


def parse_args():
    """(given, options): the settings typed on the command line, and the options that no result depends on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", metavar="NAME", default=argparse.SUPPRESS, help="all settings of a published result, or of "
                        f"the scenes, where no other option says otherwise: {', '.join(stego.PRESETS)}")
    for title, settings in stego.SETTINGS.items():
        group = parser.add_argument_group(title)
        evaluate.add_settings(group, settings)
    group.add_argument("--name", help="results go into runs/<name> (default: the data set's name, numbered)")
    group.add_argument("--seeds", type=Number(int, 1), default=1, help="train so many heads, with seeds from --seed on, "
                       "and print their mean and spread (default 1)")
    group.add_argument("--resume", action="store_true", help="go on with the run of that name")
    group.add_argument("--features", choices=("auto", "cached", "live"), default="auto", help="cached: kept on disk, the "
                       "backbone sees each view once; live: computed at every step; auto (default): cached if they fit")
    group.add_argument("--cache-gb", type=Number(float, 0), default=100, help="gigabytes that auto may fill (default 100)")
    group.add_argument("--checkpoint-every", type=Number(int, 1), default=500, help="steps between checkpoints (default 500)")
    group.add_argument("--log-every", type=Number(int, 1), default=20, help="steps between lines of log.jsonl (default 20)")
    evaluate.add_machine_options(group)
    options = parser.parse_args()
    given = {name: vars(options).pop(name) for name in ("preset", *stego.DEFAULTS) if name in options}
    for key in ("data_root", "backbone"):  # a run can be resumed and evaluated from another folder
        if os.path.exists(given.get(key, "")) and given[key] not in stego.BACKBONES:
            given[key] = os.path.abspath(given[key])
    return given, options


def resolve(given):
    """The complete settings: the defaults, then those of the preset, then what was given."""
    given = dict(given)
    if given.get("preset", "scenes") not in stego.PRESETS:
        raise InputError(f"--preset {given['preset']}: not {stego.one_of(stego.PRESETS, given['preset'])}")
    if "preset" not in given and given.get("dataset", "directory" if "data_root" in given else "scenes") == "scenes":
        given["preset"] = "scenes"
    config = {**stego.DEFAULTS, **stego.PRESETS.get(given.get("preset"), {}), **given}
    if config["same_class"]:
        if {"b_self", "b_knn", "b_rand"} & given.keys():
            raise InputError("--same-class sets all shifts: leave --b-self, --b-knn and --b-rand out")
        config.update(b_self="auto", b_knn="auto", b_rand="auto")
    return config


def begun(folder):
    """Whether a run began in this folder, or its checkpoint was put there."""
    return (folder / "config.json").is_file() or (folder / "checkpoint.pt").is_file()


def run_folders(name, dataset, resume, seeds):
    """(name, folders): runs/<name>, or runs/<name>-seed<seed> for each of several seeds. Without a name it is the data set's
    with the first number that is free, or to resume the last that is not. Raises InputError where they cannot be begun."""
    def folders(name):
        return [Path("runs") / (f"{name}-seed{seed}" if len(seeds) > 1 else name) for seed in seeds]

    if not name:
        number = 1
        while any(map(begun, folders(f"{dataset}-{number}"))):
            number += 1
        name = f"{dataset}-{max(1, number - resume)}"
    taken = list(filter(begun, folders(name)))
    if taken and not resume:
        raise InputError(f"{taken[0]} holds a run already: add --resume to go on with it, or give another --name")
    if resume and not taken:
        raise InputError(f"--resume: there is no run in {folders(name)[0]}; give its --name, and --seeds if it has several")
    return name, folders(name)


def resumed_settings(path, given):
    """The settings of a run that was stopped, from its config.json. Raises InputError where others were `given`."""
    try:
        config = {**stego.DEFAULTS, **json.loads(path.read_text())}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: missing or damaged ({error}); start another run") from error
    stego.check_settings(config, path)
    different = [f"{key} {value} instead of {config.get(key)}" for key, value in given.items()
                 if config.get(key) != value and value != "auto"]  # which was found out at the start
    if different:
        raise InputError(f"--resume: {path.parent} was started with other settings: {', '.join(different)}; for those "
                         "give another --name, without --resume")
    return config


def fit_batch(config, n, world, given):
    """Makes the batch as small as a collection of n views, unless its size was given. Raises InputError where none fits."""
    size = config["batch_size"]
    if n < 2:
        raise InputError("one training image has no other to compare with: give more, or cut it in five with --crop five")
    if size > n and "batch_size" not in given:
        size = config["batch_size"] = n - n % world
        print(f"batch size {size}: there are {n} training views")
    if size > n:
        raise InputError(f"--batch-size {size} is more than the {n} training views")
    if size % world or size // world < 2:
        raise InputError(f"--batch-size {size} must be shared by {world} processes, at least 2 images each: the negatives "
                         "are the other images of a process")


@functools.lru_cache(maxsize=1)  # one permutation serves all steps of its epoch
def epoch_order(epoch, n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_of(step, n, batch_size, seed):
    """Indices of the batch of one step: epoch after epoch, each a fresh permutation that drops what fills no batch.

    A function of seed and step alone, so that a resumed run needs no stored sampler.
    """
    epoch, position = divmod(step, n // batch_size)
    return epoch_order(epoch, n, seed)[position * batch_size:(position + 1) * batch_size]


def shifts_at(rates, pairs, shifts):
    """The shifts (self, knn, rand), those that are "auto" so that a share `rates` of their pairs attracts; prints them.

    pairs: from evaluate.correspondences.
    """
    shifts = [F.quantile(1 - rate).item() if shift == "auto" else shift
              for (F, _, _), rate, shift in zip(pairs.values(), rates, shifts)]
    print("shifts (self, knn, rand): " + ", ".join(f"{shift:.3f}" for shift in shifts))
    print("shares of pairs that attract: " + ", ".join(
        f"{100 * (F > shift).float().mean():.0f} %" for (F, _, _), shift in zip(pairs.values(), shifts)))
    if pairs["self"][2] is not None:
        print("shares of pairs of one class, by the labels: " + ", ".join(
            f"{100 * same[same >= 0].float().mean():.0f} %" for _, _, same in pairs.values()))
    return shifts


class Objective(torch.nn.Module):
    """All that a step minimises, as one module: what DistributedDataParallel wraps."""

    def __init__(self, model, lambdas, shifts, **switches):
        super().__init__()
        self.head, self.cluster_probe, self.linear_probe = model.head, model.cluster_probe, model.linear_probe
        self.lambdas, self.shifts, self.switches = lambdas, shifts, switches

    def forward(self, x, x_knn, labels):
        """Features x, x_knn (N, D, h, w) and labels (N, H, W), which may be None -> (loss, its terms by name)."""
        codes, codes_knn = self.head(x), self.head(x_knn)
        # as the authors' code, modules.py:115-116: the loss compares features that went through the dropout too
        loss, terms = stego.stego_loss(self.head.dropout(x), self.head.dropout(x_knn), codes, codes_knn,
                                       self.lambdas, self.shifts, **self.switches)
        codes = codes.detach()  # the probes teach the head nothing
        terms["cluster"] = self.cluster_probe.loss(codes)
        if self.linear_probe:
            terms["linear"] = stego.linear_probe_loss(self.linear_probe(codes), labels)
        return loss + terms["cluster"] + terms.get("linear", 0), terms


@contextlib.contextmanager
def interruptions():
    """A list that Ctrl-C makes longer, instead of stopping the process at once."""
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def restore(path, model, optimizers, steps):
    """Puts what save_checkpoint wrote back into model and optimizers. Returns the step and the rows of the log up to it.

    Raises InputError for what does not fit.
    """
    try:
        saved = stego.read_tensors(path, next(model.head.parameters()).device)
        stego.check_weights(saved["model"], path)
        model.load_state_dict({key: value for key, value in saved["model"].items() if not key.startswith("refit_probe")})
        for part, optimizer in optimizers.items():
            state = saved["training"]["optimizers"][part]["state"]
            for moments in state.values():
                stego.check_weights(moments, path)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            if any({key: value.shape for key, value in optimizer.state[parameter].items()} != {
                    "step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                   for parameter in optimizer.param_groups[0]["params"]):
                raise ValueError(f"the optimizer of {part} has another state")
        step, rows = saved["training"]["step"], saved["training"]["rows"]
        if step not in Number(int, 1, steps + 1) or not isinstance(rows, list) or not all(
                row.keys() == rows[0].keys() >= {"step"} and all(value in Number(float, -10 ** 9) for value in row.values())
                for row in rows):
            raise ValueError(f"step {step}, or its log")
    except (InputError, LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())  # torch's takes several lines
        raise InputError(f"--resume: {path} is damaged or of another model ({reason}); delete it, and the run begins at "
                         "step 0") from error
    return step, rows


def run(given, options, folder, resume, held):
    """One run, from settings to pictures. resume: it was begun in this folder, of which `held`, an ExitStack, takes a lock."""
    rank, world = data.process()
    seconds, started = {}, time.perf_counter()

    def stage_done(stage):
        """Notes what the stage took."""
        nonlocal started
        seconds[stage], started = round(time.perf_counter() - started, 1), time.perf_counter()

    # ---- settings ----
    config = resumed_settings(folder / "config.json", given) if resume else resolve(given)
    device = evaluate.choose_device(options.device)

    # ---- data and backbone ----
    train, val = (data.load_collection(config["dataset"], config["data_root"], split, config["num_classes"])
                  for split in ("train", "val"))
    backbone = stego.load_backbone(config["backbone"], device)
    size, eval_size = (data.round_to_patch(config[key], backbone.patch_size) for key in ("resolution", "eval_resolution"))
    if size == backbone.patch_size:
        raise InputError(f"--resolution {config['resolution']} is one patch of {size} pixels, which holds no two points to "
                         f"compare: give {2 * size} or more")
    data.check_files((train, val), options.cache_dir, options.workers, config["skip_bad"])
    views = data.Views(train, size, config["crop"])
    n = len(views) * views.n_views
    fit_batch(config, n, world, given)
    bfloat16 = evaluate.choose_precision(config["precision"], device)
    config["precision"] = "bfloat16" if bfloat16 else "float32"  # a resumed run keeps it, wherever it goes on
    config["num_classes"] = train.n_classes
    config["num_clusters"] = config["num_clusters"] or train.n_classes
    if config["num_clusters"] > n * (size // backbone.patch_size) ** 2:
        raise InputError(f"--num-clusters {config['num_clusters']} is more than the patches of all {n} training views: give "
                         "more images, a larger --resolution or fewer clusters")
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(stego.lock(folder / "lock", f"{folder}: another process is training there; wait for it, or give "
                                      "another --name", wait=False))
        data.write_text(folder / "config.json", json.dumps(config, indent=1))
    print(textwrap.fill(f"{folder} on {device}{f' x {world} processes' * (world > 1)}: "
                        + ", ".join(f"{key} {value}" for key, value in config.items()), 110))
    print(f"{len(train)} training images at {size} pixels, "
          f"{'labelled' if train.has_labels else 'no labels: clusters and pictures only'}; {len(val)} images to evaluate at "
          f"{eval_size}" + " (the training images: there is no val)" * (val.split == "train"))

    # ---- every feature once ----
    features = data.extract_features(backbone, views, config["facet"], bfloat16, options.cache_dir, options.features,
                                     options.cache_gb, workers=options.workers, device=device)
    if (device.type == "cuda" and isinstance(features.maps, torch.Tensor)
            and features.maps.nbytes < torch.cuda.mem_get_info(device)[0] / 2):
        features = features._replace(maps=features.maps.to(device))  # then no step waits for disk or bus
    stage_done("features")
    k = min(config["neighbors"], n - 1)
    neighbors = data.cached_neighbors(features, k, device)
    stage_done("neighbors")

    # ---- model ----
    torch.manual_seed(config["seed"])
    model = stego.Stego(backbone, config["code_dim"], config["num_clusters"], train.n_classes if train.has_labels else None,
                        config["dropout"], config["facet"]).to(device).eval()
    model.bfloat16 = bfloat16
    optimizers = {"head": torch.optim.Adam(model.head.parameters(), lr=config["lr"]),
                  "cluster_probe": torch.optim.Adam(model.cluster_probe.parameters(), lr=config["probe_lr"])}
    if model.linear_probe:
        optimizers["linear_probe"] = torch.optim.Adam(model.linear_probe.parameters(), lr=config["probe_lr"])

    # ---- shifts: the feature correspondence above which a pair attracts ----
    pair_options = {"device": device, "center": config["center"], "dropout": config["dropout"], "seed": config["seed"]}
    shifts = [config["b_self"], config["b_knn"], config["b_rand"]]
    if "auto" in shifts:  # a resumed run has numbers
        pairs = evaluate.correspondences(features, neighbors, model.head, **pair_options)  # F as the loss sees it
        rates = config["same_class"]
        if not rates:
            plain = evaluate.correspondences(features, neighbors, model.head, **{**pair_options, "center": False, "dropout": 0})
            rates = stego.same_class_rates(*(F for F, _, _ in plain.values()), config["num_clusters"])
        shifts = data.gathered(shifts_at(rates, pairs, shifts))[0]
        config.update(zip(("b_self", "b_knn", "b_rand"), shifts))
        if rank == 0:
            data.write_text(folder / "config.json", json.dumps(config, indent=1))
    stage_done("shifts")

    objective = Objective(model, lambdas=(config["lambda_self"], config["lambda_knn"], config["lambda_rand"]),
                          shifts=shifts, **{key: config[key] for key in ("center", "zero_clamp", "stabilize")})
    if world > 1:
        objective = torch.nn.parallel.DistributedDataParallel(objective)  # averages the gradients

    # ---- resume ----
    checkpoint, first_step, rows = folder / "checkpoint.pt", 0, []
    if resume and checkpoint.is_file():
        first_step, rows = restore(checkpoint, model, optimizers, config["steps"])
        print(f"resumed at step {first_step}")

    def write_log(*last):
        if rank == 0:
            data.write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in (*rows, *last)))

    def save(step):
        """The checkpoint, unless its weights were no good to go on with."""
        if not all(torch.isfinite(parameter).all() for parameter in objective.parameters()):
            raise InputError(f"step {step}: the weights are no numbers; lower --lr or --probe-lr (the checkpoint before is "
                             "kept)")
        if rank == 0:
            stego.save_checkpoint(checkpoint, model, config, step=step, rows=rows,
                                  optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()})

    # ---- the loop: reads features, never images. Every random number is a function of seed and step ----
    def read(step):
        """The features of a batch and of its neighbours, and the labels: this process's share of the step."""
        batch = batch_of(step, n, config["batch_size"], config["seed"])
        draw = torch.Generator().manual_seed(config["seed"] * 1_000_003 + step)
        batch_knn = neighbors[batch, torch.randint(k, batch.shape, generator=draw)]
        mine = slice(rank, None, world)
        tensors = [features.maps[batch[mine]], features.maps[batch_knn[mine]]]
        tensors += [features.labels[batch[mine]]] if train.has_labels else []
        return [tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor for tensor in tensors]

    write_log()
    model.head.train()
    recent = []  # losses since the last line of the log
    bar = tqdm(range(first_step, config["steps"]), initial=first_step, total=config["steps"], desc="train", unit="step",
               disable=rank > 0)
    # Reads the next batch while a step is computed; on a CPU more than one thread would take the step's cores.
    quiet = {"initializer": torch.set_num_threads, "initargs": (1,)} if isinstance(features.maps, torch.Tensor) else {}
    with ThreadPoolExecutor(1, **quiet) as ahead, interruptions() as seen:
        following = ahead.submit(read, first_step)
        for step in bar:
            x, x_knn, *labels = (tensor.to(device, non_blocking=True) for tensor in following.result())
            following = ahead.submit(read, step + 1)
            torch.manual_seed((config["seed"] * 1_000_003 + step) * world + rank)
            loss, terms = objective(x.float(), x_knn.float(), labels[0] if labels else None)
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()

            recent.append({name: value.detach() for name, value in terms.items()})
            if (step + 1) % options.log_every == 0 and rank == 0:
                means = {name: round(torch.stack([losses[name] for losses in recent]).mean().item(), 5) for name in terms}
                bad = [name for name, value in means.items() if not math.isfinite(value)]
                if bad:
                    raise InputError(f"step {step + 1}: the loss {', '.join(bad)} is no number; lower --lr or --probe-lr")
                bar.set_postfix(means)
                rows.append({"step": step + 1, **means})
                write_log()
                recent = []
            stop = any(data.gathered(bool(seen)))
            if stop or (step + 1) % options.checkpoint_every == 0 or step + 1 == config["steps"]:
                save(step + 1)
            if stop:
                raise KeyboardInterrupt
    model.eval()
    stage_done("training")

    # ---- clusters from the finished codes, and from the raw features for comparison ----
    found = None
    if rank == 0:
        points = evaluate.sample_positions(features.maps, seed=config["seed"]).to(device)  # (n, D)
        with torch.no_grad():
            codes = model.head(points[:, :, None, None]).flatten(1)  # the head is 1x1: each position stands alone
        refit, raw = (evaluate.fitted_probe(vectors, config["num_clusters"], config["seed"]).cpu()
                      for vectors in (codes, points))
        pairs = evaluate.correspondences(features, neighbors, model.head, **pair_options)
        evaluate.draw_diagnostics(folder / "diagnostics.png", pairs, shifts)
        health, warnings = evaluate.diagnose(codes.cpu(), refit, pairs, shifts)
        write_log({"step": config["steps"], **health})
        print("health: " + ", ".join(f"{name} {value:.2f}" for name, value in health.items()))
        found = refit, raw, warnings
    refit, raw, config["warnings"] = data.gathered(found)[0]
    model.refit_probe = refit.to(device)
    save(config["steps"])
    stage_done("clusters")

    # ---- evaluation ----
    own, prediction = evaluate.model_probes(model)
    probes = {evaluate.RAW: (raw.to(device), "features"), **own}
    confusions, samples = evaluate.evaluate(model, val, eval_size, probes, config["crf"], workers=options.workers)
    stage_done("evaluation")
    if rank:
        return
    summary = evaluate.report(folder, confusions, samples, val, probes, prediction, seconds, config["warnings"])
    # Predictions on photos are painted and named like the classes that the clusters were matched to, if they were.
    config["classes"], config["palette"] = val.names, val.palette.tolist()
    config["assignments"] = {name: result["assignment"] for name, result in summary["results"].items()}
    save(config["steps"])
    if rows:
        evaluate.draw_losses(folder / "losses.png", rows)
    print("seconds:", ", ".join(f"{name} {value}" for name, value in seconds.items()))
    print(f"scores, pictures and checkpoint.pt are in {folder}")


def main():
    given, options = parse_args()
    config = resolve(given)  # mistakes are told at once
    seeds = range(config["seed"], config["seed"] + options.seeds)
    if seeds[-1] not in (allowed := stego.EVERY_SETTING["seed"][1]):
        raise InputError(f"--seed {config['seed']} and {options.seeds} --seeds go beyond {allowed.high - 1}: begin lower")
    data.join_processes()
    rank, world = data.process()
    name, folders = data.gathered(run_folders(options.name, config["dataset"], options.resume, seeds))[0]
    resumed = data.gathered(list(filter(begun, folders)))[0]
    if 0 < len(resumed) < len(folders):  # the seeds that were not begun should be like those that were
        known = {key: value for key, value in config.items() if value is not None and key not in ("seed", "batch_size")}
        resumed_settings(resumed[0] / "config.json", known)
    try:
        with contextlib.ExitStack() as held:
            for folder, seed in zip(folders, seeds):
                run({**given, "seed": seed} if len(seeds) > 1 else given, options, folder, folder in resumed, held)
    except KeyboardInterrupt as interruption:
        if not any(map(begun, folders)):
            raise
        words = [*sys.argv, *([] if "--name" in sys.argv else ["--name", name]),
                 *([] if "--resume" in sys.argv else ["--resume"])]
        raise KeyboardInterrupt(f"go on with: {f'torchrun --nproc_per_node={world}' if world > 1 else 'python'} "
                                f"{shlex.join(words)}") from interruption
    if rank == 0 and len(folders) > 1:
        evaluate.compare(folders)


if __name__ == "__main__":
    evaluate.run_main(main)
