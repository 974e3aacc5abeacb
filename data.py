"""From files to frozen features: images, labels, data sets, what the network sees, the cache, neighbours.

The backbone is frozen and a view of an image never changes, so every feature is computed once:
`extract_features` fills a float16 memory map, where it fits, and training only reads it. An image has one
view (centre crop) or five (five-crop).
"""
import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torchvision.datasets import Cityscapes
from tqdm import tqdm

from assets import scenes
from stego import VOID, InputError, refusing, replacing

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINO models expect
RESIZE = TF.InterpolationMode.NEAREST  # for images, too, as in the authors' code, utils.py:176-180
VIEWS = {"none": 1, "five": 5}  # crop -> views of an image
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
warnings.filterwarnings("ignore", module="PIL")  # about large photos; it refuses over 179 million pixels


# ---- Threads decode, as Pillow and NumPy release the GIL. Nothing is forked, as that can hang ----

def in_parallel(function, items, workers, ahead=64, pool=None):
    """Yields function(item) of all items, in order; threads compute up to `ahead` of them in advance.

    pool: an executor to use instead, of processes.
    """
    with pool or ThreadPoolExecutor(max(1, workers)) as pool:
        futures = (pool.submit(function, item) for item in items)
        pending = collections.deque(itertools.islice(futures, ahead))
        while pending:
            pending.extend(itertools.islice(futures, 1))
            yield pending.popleft().result()


def progress(items, name, unit, total, initial=0, rank=0):
    """tqdm over items, in the first process alone: a bar on a terminal, two lines a minute in a log."""
    log = None if sys.stderr.isatty() else SimpleNamespace(
        flush=sys.stderr.flush, write=lambda text: sys.stderr.write(text.replace("\r", "\n")))
    return tqdm(items, name, total, unit=unit, initial=initial, disable=rank > 0 or total == 0, file=log,
                mininterval=30 if log else 0.1, maxinterval=60)


# ---- Images and labels ----

def read_mat(path, key):
    import scipy.io  # only for Potsdam's files, so it is not among the requirements
    return scipy.io.loadmat(path)[key]


def read_image(path):
    """The image as RGB, upright (EXIF), 16 bits cut to the upper 8. Raises InputError naming the file."""
    with refusing(f"{path}: not a readable image"):
        if Path(path).suffix == ".mat":  # Potsdam's also hold infrared, which the authors leave out
            return Image.fromarray(np.ascontiguousarray(read_mat(path, "img")[..., :3]))
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers")
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            # A palette may hold transparent colours, which only RGBA keeps.
            return image.convert("RGBA" if image.mode == "P" else image.mode).convert("RGB")


def read_label(path):
    """The ids in a label file as they are, (H, W) of some integer type. Raises InputError naming the file."""
    with refusing(f"{path}: not a readable label"):
        if Path(path).suffix == ".mat":
            ids = read_mat(path, "gt")
        else:
            with Image.open(path) as image:
                ids = np.array(image)
        if ids.ndim != 2 or ids.dtype.kind not in "uib":
            raise ValueError(f"it holds {ids.dtype} {ids.shape}, not one class id a pixel")
        return ids


class Collection:
    """Images that are files below `folder`, and labels of some or all of them.

    images: paths. labels: a path or None for each. names, palette ((n, 3) uint8): of the classes. classes:
    the class of each id that a label file may hold, by default the id itself; other ids are VOID.
    """

    def __init__(self, folder, split, images, labels, names, classes=None, palette=None):
        self.folder, self.split, self.images, self.labels = Path(folder), split, images, labels
        self.names, self.n_classes, self.has_labels = list(names), len(names), any(labels)
        self.n_labelled = sum(label is not None for label in labels)
        self.palette = class_palette(len(names)) if palette is None else np.array(palette, np.uint8)
        self.classes = np.full(VOID + 1, VOID, np.uint8)  # by id
        self.classes[:len(classes or names)] = classes or range(len(names))

    def __len__(self):
        return len(self.images)

    def image(self, i):
        """PIL, RGB."""
        return read_image(self.images[i])

    def label(self, i):
        """PIL, L, of classes and VOID; where there is no label, 2 x 2 pixels of VOID."""
        ids = read_label(self.labels[i]) if self.labels[i] else np.full((2, 2), VOID)
        return Image.fromarray(self.classes[np.where((ids >= 0) & (ids < VOID), ids, VOID).astype(np.uint8)])

    def fingerprint(self):
        """Plain values that change whenever a file does."""
        files = [path for path in self.images + self.labels if path]
        stats = [(os.path.relpath(path, self.folder), path.stat()) for path in files]
        return [self.classes.tolist() if self.has_labels else None,
                [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]


def check_files(collections, workers, rank=0):
    """Reads every image and label once, before hours go into them. Raises InputError naming all bad ones."""
    def problem(item):
        collection, i = item
        try:
            image, label = collection.image(i), collection.label(i)
            if collection.labels[i] and label.size != image.size:
                return f"{collection.labels[i]}: {label.size} pixels, but its image has {image.size}"
        except InputError as error:
            return str(error)

    items = [(collection, i) for collection in collections if not isinstance(collection, Scenes)
             for i in range(len(collection))]
    checks = progress(in_parallel(problem, items, workers), "checking files", "image", len(items), rank=rank)
    bad = [sentence for sentence in checks if sentence]
    if bad:
        raise InputError(f"bad files ({len(bad):,}), to be fixed or removed: {'; '.join(bad[:10])}")


def class_palette(n):
    """Colours of n classes, (n, 3) uint8: always the same, all distinct, neither black (= void) nor white."""
    # The first seven are the palette of Okabe and Ito; the others were picked to differ from them and from
    # one another, by lightness where a colour-blind reader cannot tell the hues apart.
    colours = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (86, 180, 233),
               (213, 94, 0), (80, 0, 120), (235, 235, 180), (80, 40, 0), (120, 250, 250), (40, 80, 80),
               (150, 250, 120), (0, 0, 250), (235, 180, 180), (40, 40, 80), (210, 0, 180), (150, 150, 80),
               (150, 20, 40), (130, 130, 130)]
    grid = np.array(list(itertools.product(range(0, 256, 42), repeat=3)))
    apart = np.abs(grid[:, None] - [*colours, (0, 0, 0), (255, 255, 255)]).sum(2).min(1)
    while len(colours) < n:  # then always the one farthest from all so far
        colours.append(tuple(grid[apart.argmax()]))
        apart = np.minimum(apart, np.abs(grid - colours[-1]).sum(1))
    return np.array(colours[:n], np.uint8)


# ---- Data sets ----

def files_below(folder):
    """Sorted paths of all files below a folder but hidden ones. Links are followed, each folder once."""
    files, entered = [], set()
    for top, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]  # .ipynb_checkpoints, for one
        if os.path.realpath(top) in entered:
            folders.clear()
        else:
            entered.add(os.path.realpath(top))
            files += [Path(top, name) for name in names if name[0] != "."]  # macOS puts ._a.jpg beside a.jpg
    return sorted(files)


def directory(root, split, n_classes=None, default_classes=0):
    """imgs/{train,val}/*, optional labels/{train,val}/*.png of equal stems and classes.txt; or only images.

    n_classes defaults to the lines of classes.txt, or without one to default_classes. Without imgs/val, "val"
    is the training images again. Split None is every image below imgs, or below root without one, and no
    labels. root may be a file.
    """
    root = Path(root)
    if not root.exists():
        raise InputError(f"{root}: there is no such folder")
    again = split == "val" and not (root / "imgs/val").is_dir()
    split = "train" if again else split
    folder = root / "imgs" / (split or "") if (root / "imgs").is_dir() else root
    files = [root] if root.is_file() else files_below(folder)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    others = [path.name for path in files if path.suffix.lower() not in SUFFIXES]
    if not images:
        raise InputError(f"{folder}: no images ({' '.join(sorted(SUFFIXES))})")
    if others and not again:  # said once of a folder
        print(f"{folder}: not read as images: {len(others)}, such as {others[0]}")
    folder = root.parent if root.is_file() else folder
    labels = [None] * len(images)
    if split and (root / "labels" / split).is_dir():
        paths = [root / "labels" / split / path.relative_to(folder).with_suffix(".png") for path in images]
        labels = [path if path.is_file() else None for path in paths]
        if not any(labels):
            raise InputError(f"{root}/labels/{split}: no label is called like an image, as {paths[0].name}")
    class_file = root / "classes.txt"
    lines = class_file.read_text("utf-8-sig", errors="replace").splitlines() if class_file.is_file() else []
    names = [line.strip() for line in lines if line.strip()]
    n_classes = n_classes or len(names) or default_classes or 0
    if not 1 <= n_classes <= VOID:
        raise InputError(f"{root}: give --num-clusters, how many clusters to find (1 to {VOID}); for labels, "
                         "also --num-classes, or a classes.txt with the names of the classes, one a line")
    names += [f"class {i}" for i in range(len(names), n_classes)]
    return Collection(folder, split, images, labels, names[:n_classes])


class Layout(NamedTuple):
    """A published data set on disk. image, label: paths below its folder, with {split} and {id} in them."""
    image: str
    label: str
    lists: dict  # split -> file of its ids, one a line; None: every image in the folder
    names: tuple
    classes: tuple  # class of each id that a label file may hold; ids beyond them are void
    source: str
    palette: tuple | None = None


COCO27 = (  # the class of each of CocoStuff 164k's 182 ids, as in the authors' data.py:267-283
    9, 11, 11, 11, 11, 11, 11, 11, 11, 8, 8, 8, 8, 8, 8, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 6, 6, 6, 6, 6, 6, 6, 6,
    10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2,
    3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4, 4,
    17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13, 13, 13,
    13, 22, 26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21, 17, 22, 16,
    21, 21, 25, 21, 26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15, 20, 17, 17, 22,
    14, 18, 18, 18, 18, 18, 18, 18, 26, 26, 19, 19, 24)
CITYSCAPES = [c for c in Cityscapes.classes if c.id >= 7]  # 27 classes, including the benchmark's 19
LAYOUTS = {
    "cocostuff27": Layout(
        "images/{split}2017/{id}.jpg", "annotations/{split}2017/{id}.png",
        {"train": "curated/train2017/Coco164kFull_Stuff_Coarse.txt",  # 49,629 ids
         "val": "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt"},  # 2,175
        ("electronic", "appliance", "food-things", "furniture-things", "indoor", "kitchen", "accessory",
         "animal", "outdoor", "person", "sports", "vehicle", "ceiling", "floor", "food-stuff",
         "furniture-stuff", "raw-material", "textile", "wall", "window", "building", "ground", "plant", "sky",
         "solid", "structural", "water"), COCO27,
        "images are train2017.zip and val2017.zip of cocodataset.org, annotations "
        "stuffthingmaps_trainval2017.zip of github.com/nightrome/cocostuff, curated is in the authors' "
        "cocostuff.zip (download_datasets.py)"),
    "cityscapes": Layout(
        "leftImg8bit/{split}/{id}_leftImg8bit.png", "gtFine/{split}/{id}_gtFine_labelIds.png",
        {"train": None, "val": None}, tuple(c.name for c in CITYSCAPES), (VOID,) * 7 + tuple(range(27)),
        "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com",
        tuple(c.color for c in CITYSCAPES)),
    "potsdam": Layout(  # ids 0 to 5: road, building, low vegetation, tree, car, clutter
        "imgs/{id}.mat", "gt/{id}.mat",
        {"train": "labelled_train.txt", "val": "labelled_test.txt"},  # as in the authors' data.py:129-132
        ("roads and cars", "buildings and clutter", "trees and vegetation"), (0, 1, 2, 2, 0, 1),
        "all is in the authors' potsdam.zip (src/download_datasets.py); reading it takes scipy"),
}
DATASETS = ("directory", "scenes", *LAYOUTS)


def published(dataset, root, split):
    """A data set of LAYOUTS. root: its folder or the one above. Raises InputError if anything is missing."""
    layout = LAYOUTS[dataset]
    if split not in layout.lists:
        raise InputError(f"--split {split}: {dataset} has {', '.join(layout.lists)}")
    folder = Path(root or ".", dataset.rstrip("0123456789"))  # cocostuff27 is in a folder cocostuff
    folder = folder if folder.is_dir() else folder.parent
    if layout.lists[split]:
        path = folder / layout.lists[split]
        ids = path.read_text("utf-8", errors="replace").split() if path.is_file() else []
        ids = [name for name in ids if name.replace("_", "").replace("-", "").isalnum()]  # ../x is no id
    else:
        before, after = layout.image.format(split=split, id="*/*").split("*/*")
        ids = [path.relative_to(folder / before).as_posix().removesuffix(after)
               for path in sorted(folder.glob(f"{before}*/[!.]*{after}"))]  # macOS adds ._a.png
    images, labels = ([folder / path.format(split=split, id=name) for name in ids]
                      for path in (layout.image, layout.label))
    missing = [path for path in images + labels if not path.is_file()]
    if missing or not ids:
        lacking = f"missing files ({len(missing):,}), such as {missing[0]}" if missing else (
            f"{folder}: no images of the split {split}")
        needed = ", ".join(filter(None, (layout.image, layout.label, *layout.lists.values())))
        raise InputError(f"{lacking}; --dataset {dataset} needs --data-root FOLDER with "
                         f"{needed.format(split='{train,val}', id='*')} in it; {layout.source}")
    return Collection(folder, split, images, labels, layout.names, layout.classes, layout.palette)


class Scenes(Collection):
    """The embedded landscapes of assets/scenes.py, 128 x 128, drawn when asked for, with exact labels.

    Splits: train; val, scored once at the end; dev, labelled too, on which to make choices.
    """

    def __init__(self, split):
        seeds = {"train": range(1000), "dev": range(1_000_000, 1_000_200), "val": range(2_000_000, 2_000_200)}
        if split not in seeds:
            raise InputError(f"--split {split}: the scenes have {', '.join(seeds)}")
        super().__init__("scenes", split, seeds[split], seeds[split], scenes.CLASSES, palette=scenes.PALETTE)

    def image(self, i):
        return scenes.draw_scene(self.images[i])[0]

    def label(self, i):
        return scenes.draw_scene(self.images[i])[1]

    def fingerprint(self):
        return ["scenes", scenes.VERSION, self.split, len(self)]


def load_collection(dataset, root, split, n_classes=None, default_classes=0):
    """The collection called `dataset`, one of DATASETS; n_classes and default_classes are for a directory."""
    if dataset == "scenes":
        if root:
            raise InputError("--data-root: the scenes are drawn; for your own images add --dataset directory")
        return Scenes(split)
    if dataset in LAYOUTS:
        return published(dataset, root, split)
    if not root:
        raise InputError("--dataset directory needs --data-root FOLDER")
    return directory(root, split, n_classes, default_classes)


# ---- Views: what the network sees of an image ----

def round_to_patch(size, patch_size):
    """The multiple of patch_size nearest to size, at least one patch."""
    return max(1, round(size / patch_size)) * patch_size


def square_view(image, size):
    """Shorter side to `size`, then the central square. image: PIL."""
    width, height = image.size
    if max(width, height) > 8 * min(width, height):  # 1 x 5000 would become 224 x 1,120,000 before it is cut
        image = TF.center_crop(image, (min(height, 8 * width), min(width, 8 * height)))
    return TF.center_crop(TF.resize(image, size, RESIZE), size)


def views(image, size, crop="none"):
    """Square views of an image or a label, PIL: (v, size, size, 3) or (v, size, size) uint8.

    crop: "none" for the centre; "five", as in the authors' crop_datasets.py but without JPEG in between, for
    the four corners and the centre at half the height and width, each then resized and cropped by itself.
    """
    parts = [image]
    if crop == "five":
        parts = TF.five_crop(image, (max(1, image.height // 2), max(1, image.width // 2)))
    return np.stack([np.asarray(square_view(part, size)) for part in parts])


def normalize(images):
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) with ImageNet's mean and deviation, on the same device."""
    mean, std = torch.tensor([IMAGE_MEAN, IMAGE_STD], device=images.device).reshape(2, 3, 1, 1)
    return (images.permute(0, 3, 1, 2).contiguous().float() / 255 - mean) / std


# ---- Every feature once ----

class Live:
    """Stands in for a memory map that would not fit: its rows are computed whenever they are read."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, indices):
        return self.rows(indices.tolist())


class Features(NamedTuple):
    """Frozen features of N views, v of each image: view n is view n % v of image n // v."""
    maps: torch.Tensor | Live  # (N, D, h, w), a float16 memory map or Live
    vectors: torch.Tensor  # (N, D), the mean feature of each view
    labels: torch.Tensor | Live  # (N, size, size) uint8, all VOID where the collection has none


def cache_key(model, collection, size, crop):
    """A name for features, which changes with every file, weight or setting that they depend on."""
    settings = [3, collection.fingerprint(), size, crop, model.facet, str(model.precision)]  # 3: the version
    key = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in model.backbone.state_dict().items():
        key.update(name.encode() + tensor.cpu().numpy().tobytes())
    return key.hexdigest()[:16]


def extract_features(model, collection, size, crop="none", cache_dir="cache", cache_gb=100, workers=2,
                     rank=0, world=1, key=None):
    """Features of all views of size x size pixels, from the cache where it has them.

    The maps are kept if they take no more than cache_gb (10^9 bytes) and the disk has room; otherwise a map
    is computed whenever it is read. All is written into `<cache_dir>/<key>.partial`, which is renamed once
    complete: a killed extraction goes on where it stopped, and runs that fill one cache write the same bytes.
    Each of `world` processes extracts every world-th image. key: the cache_key, where it is known already.
    """
    device, v = next(model.head.parameters()).device, VIEWS[crop]
    n, D, side = len(collection) * v, model.backbone.embed_dim, size // model.backbone.patch_size
    # Maps lie channels last, as the ViT gives them, which makes sampling several times faster.
    arrays = {"vectors": ((n, D), np.float32), "maps": ((n, side, side, D), np.float16)}
    if collection.has_labels:
        arrays["labels"] = ((n, size, size), np.uint8)
    folder = Path(cache_dir, key or cache_key(model, collection, size, crop))
    folder.parent.mkdir(parents=True, exist_ok=True)
    gigabytes = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values()) / 1e9
    free = shutil.disk_usage(cache_dir).free / 1e9
    live = gigabytes > min(cache_gb, free) and not folder.is_dir() and not Path(f"{folder}.partial").is_dir()
    if live:
        print(f"features are computed at every step: all would take {gigabytes:.1f} GB, more than --cache-gb "
              f"{cache_gb:g} or the {free:.0f} GB that are free in {cache_dir}")
        arrays, folder = {"vectors": arrays["vectors"]}, Path(f"{folder}-vectors")

    def compute(images):
        return model.features(normalize(torch.from_numpy(images).to(device)))

    if not folder.is_dir():
        fill_cache(folder, arrays, compute, collection, size, crop, workers, rank, world)
    if world > 1:
        dist.barrier()
    with contextlib.suppress(OSError):  # it has its name already, or another process was faster
        if not np.load(f"{folder}.partial/done.npy").all():
            raise InputError(f"{folder}.partial lacks the features of other processes: --cache-dir must be a "
                             "folder that the machines share")
        os.rename(f"{folder}.partial", folder)
    found = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in arrays}
    if not live:
        labels = found.get("labels", torch.full((1, 1, 1), VOID, dtype=torch.uint8).expand(n, size, size))
        return Features(found["maps"].permute(0, 3, 1, 2), found["vectors"], labels)

    def rows(read, numbers):
        return np.stack([*in_parallel(lambda j: views(read(j // v), size, crop)[j % v], numbers, workers)])

    maps = Live(lambda numbers: compute(rows(collection.image, numbers)))
    labels = Live(lambda numbers: torch.from_numpy(rows(collection.label, numbers)))
    return Features(maps, found["vectors"], labels)


def fill_cache(folder, arrays, compute, collection, size, crop, workers, rank, world, views_at_once=32):
    """Computes what is missing of the arrays, name -> (shape, dtype), in `<folder>.partial`."""
    partial = Path(f"{folder}.partial")
    if not partial.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            os.mkdir(f"{made}/arrays")
            for name, (shape, dtype) in {**arrays, "done": ((len(collection),), bool)}.items():
                np.lib.format.open_memmap(f"{made}/arrays/{name}.npy", "w+", dtype, shape)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(f"{made}/arrays", partial)
    out = {name: np.load(partial / f"{name}.npy", mmap_mode="r+") for name in arrays}
    done = np.load(partial / "done.npy", mmap_mode="r+")
    mine, v = np.arange(rank, len(collection), world), VIEWS[crop]
    todo = mine[~done[mine]]

    def read(i):
        rows = np.arange(i * v, (i + 1) * v)
        return rows, views(collection.image(i), size, crop), views(collection.label(i), size, crop)

    # Writing a batch takes a few hundredths of a second, so only decoding runs beside the network.
    decoded = in_parallel(read, todo, workers)
    with progress(None, "features", "image", len(mine), len(mine) - len(todo), rank) as bar:
        while batch := list(itertools.islice(decoded, max(1, views_at_once // v))):
            rows, pixels, labels = map(np.concatenate, zip(*batch))
            maps = compute(pixels)
            half = maps.half().permute(0, 2, 3, 1)  # (N, h, w, D)
            if not torch.isfinite(half).all():
                raise InputError(f"{collection.images[rows[0] // v]} or the {len(batch) - 1} images after "
                                 "it: the backbone gives features that are not finite in float16")
            values = {"vectors": maps.mean((2, 3)).cpu(), "maps": half.cpu(), "labels": labels}
            if "maps" in out and shutil.disk_usage(folder.parent).free < 2 * world * half.nbytes + 1e6:
                raise InputError(f"{partial}: the disk is full, where writing would end in a bus error; with "
                                 "more room, --resume or the same command goes on")
            for name, array in out.items():
                array[rows] = values[name]
            done[rows // v] = True
            bar.update(len(batch))


@torch.no_grad()
def nearest_neighbors(vectors, k):
    """The k nearest others of each vector by cosine, nearest first. (N, D) -> (N, min(k, N - 1)) int64.

    In blocks of rows, so that the N x N similarities never exist together.
    """
    n, neighbors = len(vectors), []
    vectors = nnf.normalize(vectors.float(), dim=1)
    for block in torch.arange(n, device=vectors.device).split(max(1, 2 ** 25 // n)):
        similarity = vectors[block] @ vectors.T  # (rows, N), 128 MB at a time
        similarity.scatter_(1, block[:, None], -torch.inf)  # the vector itself
        neighbors.append(similarity.topk(min(k, n - 1), dim=1).indices.cpu())
    return torch.cat(neighbors)


def write_text(path, text):
    """Writes a text file that never exists half-written."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, "utf-8")
