"""From files to frozen features: image collections, the views the network sees, the feature cache, neighbours.

The backbone is frozen and a view of an image never changes, so every feature is computed once: `extract_features`
fills a float16 memory map and training only reads it. One image has one view (centre crop) or five (five-crop).
"""
import contextlib
import datetime
import functools
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import parent_process
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from assets import scenes
from stego import VOID, InputError, frozen_features, lock, one_of, replacing

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every DINO model expects
RESIZE = InterpolationMode.NEAREST  # as the authors' code, utils.py:176-180, images too: their checkpoints saw this
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
warnings.filterwarnings("ignore", module="PIL")  # what it reads we take, up to 179 million pixels; beyond, it refuses


# ---- Several processes: torchrun --nproc_per_node=K train.py ----

def join_processes():
    """Joins the processes that torchrun started, if it did: one GPU each, or the CPU."""
    if dist.is_torchelastic_launched():
        if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The first process may work alone for long, on k-means or pictures, while the others wait.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=1))
        if dist.get_rank():  # the first speaks for all
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def process():
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value):
    """The `value` of every process, in order; waits for all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def follow_parent(*_):
    """Ends this process, a worker, as soon as its parent is dead: if that was killed, it would wait for work for ever."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


# ---- Collections of images ----
# Each has len(), .image(i) -> PIL RGB, .label(i) -> (H, W) uint8 or None, .name(i) for messages, .root, .split,
# .names of the .n_classes classes, .palette, .has_labels, and .fingerprint(), a string that changes whenever a file does

@contextlib.contextmanager
def opened(path, kind):
    """Pillow's image of a file. Raises InputError naming the file, and whatever is wrong with it here or in the body."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's plugins complain in a dozen ways
        reason = (str(error) or repr(error)).partition(f"{str(path)!r}")[0].rstrip(": ")  # the path is told already
        raise InputError(f"{path}: not a readable {kind} ({reason})") from error


def read_image(path, draft=False):
    """The image as RGB, upright (EXIF). 16-bit grey keeps its upper 8 bits. Raises InputError naming the file.

    draft: a JPEG comes as small as it can be decoded, several times faster; as much is found to be wrong with it.
    """
    if Path(path).suffix == ".mat":  # Potsdam's are RGB and infrared, which the authors leave out
        pixels = read_mat(path, "img")
        if pixels.ndim != 3 or pixels.shape[2] < 3 or pixels.dtype != np.uint8:
            raise InputError(f"{path}: an image is uint8 (H, W, 3 or more), this is {pixels.dtype} {pixels.shape}")
        return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    with opened(path, "image") as image:
        if draft:
            image.draft(None, (1, 1))
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        # by way of RGBA where a palette may have transparent colours, of which Pillow would warn
        return image.convert("RGBA" if image.mode == "P" else image.mode).convert("RGB")


def read_ids(path):
    """The ids in a label file as they are, (H, W) of some integer type. Raises InputError naming the file."""
    if Path(path).suffix == ".mat":
        ids = read_mat(path, "gt")
    else:
        with opened(path, "label") as image:
            ids = np.array(image)
    if ids.ndim != 2:
        raise InputError(f"{path}: a label holds one class id a pixel, this is a picture of {ids.shape[-1]} channels")
    if ids.dtype.kind == "f":
        raise InputError(f"{path}: a label holds one class id a pixel, this holds floating-point numbers")
    return ids


def read_label(path, n_classes):
    """Class ids (H, W) uint8; ids outside 0..n_classes-1 become VOID. Raises InputError naming the file."""
    ids = read_ids(path)
    return np.where((ids >= 0) & (ids < n_classes), ids, VOID).astype(np.uint8)


def check_size(collection, i, image, label):
    """Raises InputError where image i and its label (H, W) differ in size."""
    if label.shape != (image.height, image.width):
        raise InputError(f"{collection.name(i)}: the image is {image.width} x {image.height} pixels, its label "
                         f"{label.shape[1]} x {label.shape[0]}")


def read_mat(path, key):
    """Array `key` of a MATLAB file (.mat up to version 7). Raises InputError naming the file."""
    import scipy.io  # for Potsdam's files alone, so it is not among the requirements
    try:
        return scipy.io.loadmat(path)[key]
    except Exception as error:  # of what is no such file, scipy complains in a dozen ways
        raise InputError(f"{path}: not a readable .mat file with an array {key!r} ({error!r})") from error


class Files:
    """Images, and labels of the same length or None in their place, that are files below root: what all but Scenes share.

    names: of the classes. classes: the class of each id that a label file may hold; ids beyond them are VOID.
    """

    def __init__(self, root, split, images, labels, names, classes, palette=None):
        self.root, self.split, self.images, self.labels = root, split, images, labels
        self.names, self.n_classes, self.has_labels = list(names), len(names), any(labels)
        self.palette = class_palette(len(names)) if palette is None else np.array(palette, np.uint8)
        self.classes, self.n_ids = np.full(VOID + 1, VOID, np.uint8), len(classes)
        self.classes[:len(classes)] = classes

    def __len__(self):
        return len(self.images)

    def image(self, i):
        return read_image(self.images[i])

    def label(self, i):
        return None if self.labels[i] is None else self.classes[read_label(self.labels[i], VOID)]

    def name(self, i):
        return str(self.images[i])

    def check(self, i):
        """Reads image i and its label. Returns what is wrong with them or None, and the pixels of each class, [VOID] of
        void and [VOID + 1] of ids that the data set does not know."""
        pixels = np.zeros(VOID + 2, np.int64)
        try:
            if self.labels[i] is None:
                read_image(self.images[i], draft=True)
            else:
                ids = read_ids(self.labels[i])
                check_size(self, i, self.image(i), ids)
                known = np.where((ids >= 0) & (ids < self.n_ids), ids, VOID)
                pixels[:VOID + 1] = np.bincount(self.classes[known].ravel(), minlength=VOID + 1)
                pixels[VOID + 1] = ((ids >= self.n_ids) & (ids != VOID)).sum()
        except InputError as error:
            return str(error), pixels
        return None, pixels

    def leave_out(self, indices):
        for i in sorted(indices, reverse=True):
            del self.images[i], self.labels[i]
        self.has_labels = any(self.labels)

    def fingerprint(self):
        """Of files that are missing, like the target of a link, only the name."""
        stats = [(str(path.relative_to(self.root)), path.stat() if path.exists() else None)
                 for path in self.images + self.labels if path is not None]
        return json.dumps([self.classes.tolist() if self.has_labels else None] + [
            (name, stat and stat.st_size, stat and stat.st_mtime_ns) for name, stat in stats])


def files_below(folder):
    """Sorted paths of all files below a folder, if there is one. Raises InputError naming one that cannot be listed."""
    def refuse(error):  # os.walk, and Path.rglob always, would leave it out without a word
        if not isinstance(error, FileNotFoundError):
            raise InputError(f"{error.filename}: {error.strerror}; mend its permissions")
    files, seen = [], set()
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (here := os.path.realpath(top)) in seen:  # a link in a circle, or to what is below anyway
            folders.clear()
        else:
            seen.add(here)
            files += [Path(top, name) for name in names]
    return sorted(files)


class Directory(Files):
    """imgs/{train,val}/*, optional labels/{train,val}/*.png paired by stem and classes.txt; or a folder of images, or one.

    n_classes defaults to the lines of classes.txt. Where there is no imgs/val, "val" is the training images again;
    split None is every image below imgs, or below root where there is no imgs, without labels.
    """

    def __init__(self, root, split, n_classes=None):
        root = Path(root)
        if not root.exists():
            raise InputError(f"{root}: there is no such folder")
        self.folder, label_folder = root.parent if root.is_file() else root, None
        if split == "val" and not (root / "imgs/val").is_dir():
            split = "train"
        if (root / "imgs").is_dir():
            self.folder = root / "imgs" / (split or "")
            label_folder = root / "labels" / split if split else None
        images = [path for path in ([root] if root.is_file() else files_below(self.folder))
                  if path.suffix.lower() in SUFFIXES
                  and (path.is_file() or path.is_symlink() and not path.exists())]  # a broken link is told, not overlooked
        if not images:
            raise InputError(f"{self.folder}: no images ({' '.join(sorted(SUFFIXES))})")
        stems = [path.relative_to(self.folder).with_suffix("") for path in images]
        label_files = files_below(label_folder) if label_folder else []
        label_of = {path.relative_to(label_folder).with_suffix(""): path for path in label_files
                    if path.suffix.lower() == ".png"}
        strays = [path for path in (root / "labels").glob("*") if path.is_file()] if label_folder else []
        if not label_of and label_files + strays:
            raise InputError(f"{(label_files + strays)[0]}: no label; they are {label_folder}/*.png, named like the images")
        if label_of and len(set(stems)) < len(stems):
            path = next(path for i, path in enumerate(images) if stems[i] in stems[:i])
            raise InputError(f"{path}: another image has the same name up to its ending, and so the same label; rename one")
        if label_of and not label_of.keys() & set(stems):
            raise InputError(f"{label_folder}: no label has the name of an image up to its ending, like {stems[0]}.png; rename "
                             "them, or do without this folder")
        class_file = root / "classes.txt"
        try:
            lines = class_file.read_text("utf-8-sig").split("\n") if class_file.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{class_file}: not a readable text file ({error}); save it as UTF-8") from error
        names = [line.strip() for line in lines if line.strip()]
        n_classes = n_classes or len(names)
        if not 1 <= n_classes <= VOID:
            raise InputError(f"{root}: say with --num-classes how many kinds of things to tell apart (1 to {VOID}), or name "
                             "them in a classes.txt, one a line")
        names = (names + [f"class {i}" for i in range(len(names), n_classes)])[:n_classes]
        super().__init__(root, split, images, [label_of.get(stem) for stem in stems], names, range(n_classes))


class Layout(NamedTuple):
    """A published data set on disk. image, label: paths below `folder`, with {split} and {id} to be filled in."""
    folder: str
    image: str
    label: str
    lists: dict  # split -> file of its ids, one a line; None: all images there are
    id: str  # what an id looks like, a regular expression (so that no ../x is one), or a glob where there are no lists
    names: tuple
    classes: tuple  # class of each id that a label file may hold; ids beyond them are void
    source: str
    palette: tuple | None = None


# CocoStuff 164k: ids 0 to 181 in 27 classes, as in the authors' data.py:267-283. The things, 0 to 90, come in runs (class,
# length); the stuff is in alphabetical order, where classes alternate, so each takes a letter: a = 12 to o = 26.
COCO_THINGS = ((9, 1), (11, 8), (8, 6), (7, 10), (6, 8), (10, 10), (5, 8), (2, 10), (3, 10), (0, 6), (1, 6), (4, 8))
COCO_STUFF = "ffkiikdnebaafflddfdjdnbbbbbkoccdkjjmikdfedkmjfnejfkejjnjojmifcjodlijmdmkndiffkcgggggggoohhm"
COCO27 = tuple(np.repeat(*np.transpose(COCO_THINGS)).tolist()) + tuple(ord(letter) - ord("a") + 12 for letter in COCO_STUFF)
COCO_NAMES = ("electronic", "appliance", "food-things", "furniture-things", "indoor", "kitchen", "accessory", "animal",
              "outdoor", "person", "sports", "vehicle", "ceiling", "floor", "food-stuff", "furniture-stuff", "raw-material",
              "textile", "wall", "window", "building", "ground", "plant", "sky", "solid", "structural", "water")
COCO = Layout(
    "cocostuff", "images/{split}2017/{id}.jpg", "annotations/{split}2017/{id}.png",
    {"train": "curated/train2017/Coco164kFull_Stuff_Coarse.txt",  # 49,629 ids
     "val": "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt"},  # 2,175
    "[0-9]{12}", COCO_NAMES, COCO27,
    "images are train2017.zip and val2017.zip of cocodataset.org, annotations stuffthingmaps_trainval2017.zip of "
    "github.com/nightrome/cocostuff, curated is in the authors' cocostuff.zip (their src/download_datasets.py)")


def coco_part(kept, list_name):
    """CocoStuff of a few of its 27 classes, the others void, and of the images in other lists."""
    return COCO._replace(lists={split: f"curated/{split}2017/{list_name}" for split in ("train", "val")},
                         names=tuple(COCO_NAMES[c] for c in kept),
                         classes=tuple(kept.index(c) if c in kept else VOID for c in COCO27))


LAYOUTS = {
    "cocostuff27": COCO,
    "cocostuff15": coco_part(range(12, 27), "Coco164kFull_Stuff_Coarse_7.txt"),  # the stuff
    "cocostuff3": coco_part((23, 22, 21), "Coco164kFew_Stuff_6.txt"),  # sky, plant, ground
    # labelId 7 to 33 (cityscapesScripts, labels.py), of which the 19 of the benchmark are a part
    "cityscapes": Layout(
        "cityscapes", "leftImg8bit/{split}/{id}_leftImg8bit.png", "gtFine/{split}/{id}_gtFine_labelIds.png",
        {"train": None, "val": None}, "*/*",
        ("road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole",
         "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
         "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
        (VOID,) * 7 + tuple(range(27)),
        "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com",
        ((128, 64, 128), (244, 35, 232), (250, 170, 160), (230, 150, 140), (70, 70, 70), (102, 102, 156), (190, 153, 153),
         (180, 165, 180), (150, 100, 100), (150, 120, 90), (153, 153, 153), (153, 153, 153), (250, 170, 30), (220, 220, 0),
         (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
         (0, 0, 90), (0, 0, 110), (0, 80, 100), (0, 0, 230), (119, 11, 32))),
    # ids 0 to 5: road, building, low vegetation, tree, car, clutter. The authors train on the labelled part (data.py:129).
    "potsdam": Layout(
        "potsdam", "imgs/{id}.mat", "gt/{id}.mat",
        {"train": "labelled_train.txt", "val": "labelled_test.txt", "unlabelled_train": "unlabelled_train.txt"},
        "[A-Za-z0-9_-]+",
        ("roads and cars", "buildings and clutter", "trees and vegetation"), (0, 1, 2, 2, 0, 1),
        "all is in the authors' potsdam.zip (their src/download_datasets.py), and read with scipy"),
    "voc": Layout(
        "VOCdevkit/VOC2012", "JPEGImages/{id}.jpg", "SegmentationClass/{id}.png",
        {split: f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val")}, "[0-9]{4}_[0-9]{6}",
        ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
         "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"), tuple(range(21)),
        "all is in VOCtrainval_11-May-2012.tar of host.robots.ox.ac.uk/pascal/VOC/voc2012"),
}


class Published(Files):
    """A data set of LAYOUTS. root: its folder, or the one that holds its folder.

    Raises InputError for an unknown split, what is missing of the layout, and a list that holds anything but ids.
    """

    def __init__(self, dataset, root, split):
        layout = LAYOUTS[dataset]
        if split not in layout.lists:
            raise InputError(f"--split {split}: {dataset} has {', '.join(layout.lists)}")
        anything = {"split": "{train,val}", "id": layout.id if layout.id == "*/*" else "*"}
        needed = [layout.image.format(**anything), layout.label.format(**anything), *filter(None, layout.lists.values())]
        needs = (f"--dataset {dataset} needs --data-root FOLDER with {', '.join(needed)} in it or in its folder "
                 f"{layout.folder}; {layout.source}")
        if not root:
            raise InputError(needs)
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root}: there is no such folder; {needs}")
        if (root / layout.folder).is_dir():
            root = root / layout.folder
        if layout.image.endswith(".mat"):
            try:
                importlib.import_module("scipy.io")  # missed here, once, and not in every image
            except ImportError as error:
                raise InputError(f"--dataset {dataset}: its .mat files take scipy to read: pip install scipy") from error

        if layout.lists[split] is None:
            before, _, after = layout.image.format(split=split, id="|").partition("|")
            ids = [path.relative_to(root / before).as_posix().removesuffix(after)
                   for path in sorted(root.glob(before + layout.id + after))]
            if not ids:
                raise InputError(f"{root / before}: no images *{after}; {needs}")
        else:
            path = root / layout.lists[split]
            try:
                ids = path.read_text("utf-8", errors="replace").split()  # what is replaced is no id
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; {needs}") from error
            bad = [id for id in ids if not re.fullmatch(layout.id, id)]
            if bad or not ids:
                raise InputError(f"{path}: {ascii(bad[0]) if bad else 'nothing'} where ids, {layout.id}, should be; {needs}")
        images, labels = ([root / path.format(split=split, id=id) for id in ids] for path in (layout.image, layout.label))
        if split.startswith("unlabelled"):
            labels = [None] * len(ids)
        missing = [path for path in images + labels if path and not path.is_file()]
        if missing:
            count = f", the first of {len(missing):,} such files" if len(missing) > 1 else ""
            raise InputError(f"{missing[0]} is missing{count}; {needs}")
        super().__init__(root, split, images, labels, layout.names, layout.classes, layout.palette)


class Scenes:
    """The embedded procedural landscapes of assets/scenes.py, 128 x 128, drawn when asked for, with exact labels.

    Splits: train; val, scored once at the end; dev, labelled too, for every choice that somebody makes.
    """

    FIRST_SEED: ClassVar = {"train": 0, "dev": 1_000_000, "val": 2_000_000}
    has_labels, root = True, "scenes"
    draw = staticmethod(functools.lru_cache(maxsize=1)(scenes.draw_scene))  # an image and its label are one drawing

    def __init__(self, split, n_images=None):
        self.split, self.n_images = split, n_images or (1000 if split == "train" else 200)
        self.names, self.n_classes = list(scenes.CLASSES), len(scenes.CLASSES)
        self.palette = np.array(scenes.PALETTE, np.uint8)

    def __len__(self):
        return self.n_images

    def image(self, i):
        return self.draw(self.FIRST_SEED[self.split] + i)[0]

    def label(self, i):
        return np.array(self.draw(self.FIRST_SEED[self.split] + i)[1])

    def name(self, i):
        return f"scene {self.FIRST_SEED[self.split] + i}"

    def fingerprint(self):
        return f"scenes {scenes.VERSION} {self.split} {self.n_images}"


@functools.cache
def class_palette(n):
    """Colours of n classes, (n, 3) uint8: always the same, all distinct, neither black (= void) nor white."""
    # The first seven are the palette of Okabe and Ito; the rest were picked to stay apart from them
    # and from each other, by lightness where a colour-blind reader cannot tell the hues.
    colours = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167),
               (86, 180, 233), (213, 94, 0), (80, 0, 120), (235, 235, 180), (80, 40, 0),
               (120, 250, 250), (40, 80, 80), (150, 250, 120), (0, 0, 250), (235, 180, 180),
               (40, 40, 80), (210, 0, 180), (150, 150, 80), (150, 20, 40), (130, 130, 130)]
    grid = np.array(list(itertools.product(range(0, 256, 42), repeat=3)))
    apart = np.abs(grid[:, None] - [*colours, (0, 0, 0), (255, 255, 255)]).sum(2).min(1)
    while len(colours) < n:  # then always the one that is farthest from all there are
        colours.append(tuple(grid[apart.argmax()]))
        apart = np.minimum(apart, np.abs(grid - colours[-1]).sum(1))
    return np.array(colours[:n], np.uint8)


DATASETS = ("directory", "scenes", *LAYOUTS)


def load_collection(dataset, root, split, n_classes=None):
    """The collection called `dataset`; root is for those that live on disk. n_classes is for "directory" to be told, the
    others have their own: raises InputError where it differs."""
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset}: not {one_of(DATASETS, dataset)}")
    if dataset == "directory":
        if not root:
            raise InputError("--dataset directory needs --data-root FOLDER")
        return Directory(root, split, n_classes)
    if dataset == "scenes" and root:
        raise InputError("--data-root: the scenes are drawn, not read; for images of yours add --dataset directory")
    if dataset == "scenes" and split not in Scenes.FIRST_SEED:
        raise InputError(f"--split {split}: the scenes have {', '.join(Scenes.FIRST_SEED)}")
    collection = Scenes(split) if dataset == "scenes" else Published(dataset, root, split)
    if n_classes not in (None, collection.n_classes):
        raise InputError(f"{dataset} has {collection.n_classes} classes, not {n_classes}: leave --num-classes out, and "
                         "score only models that were trained on as many")
    return collection


def listed(bad):
    """What is wrong with some files, the first ten of them, in one sentence."""
    more = f"; and {len(bad) - 10:,} more" * (len(bad) > 10)
    return f"{len(bad):,} bad file{'s' * (len(bad) > 1)}: {'; '.join(bad[:10])}{more}"


def check_files(collections, cache_dir, workers, skip_bad=False):
    """Reads every file of the collections once, before hours go into them, and tells what is odd about their labels.

    All bad files are named in one InputError, or left out (skip_bad). What is found is kept in cache_dir, the numbers of the
    bad files and the pixels of each class in the others: while the files stay the same, only bad ones are read again, which
    may have become readable. Of several processes each reads its share.
    """
    (rank, world), bad, told = process(), [], []
    for collection in collections:
        if not isinstance(collection, Files):
            continue  # drawn, not read
        digest = hashlib.sha256(collection.fingerprint().encode()).hexdigest()[:16]
        path = Path(cache_dir) / f"{digest}.checked.json"
        try:
            unread, pixels = json.loads(path.read_text())
            if not (set(unread) <= set(range(len(collection))) and len(pixels) == VOID + 2
                    and all(type(n) is int and 0 <= n < 2 ** 60 for n in unread + pixels)):
                raise ValueError
        except (OSError, ValueError, TypeError, RecursionError):  # not there, or damaged
            unread, pixels = list(range(len(collection))), [0] * (VOID + 2)
        unread, pixels = gathered((unread, pixels))[0]
        wrong, counted, mine = {}, np.zeros(VOID + 2, np.int64), unread[rank::world]
        with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow lets several threads decode
            checks = tqdm(pool.map(collection.check, mine), "checking files", len(mine), unit="image",
                          disable=rank > 0 or not unread)
            for (error, one), i in zip(checks, mine):
                counted += one
                if error:
                    wrong[i] = error
        found = gathered((wrong, counted))
        wrong = {i: error for part, _ in found for i, error in part.items()}
        pixels = pixels + sum(counted for _, counted in found)
        if rank == 0 and unread:
            path.parent.mkdir(parents=True, exist_ok=True)
            with lock(f"{path}.lock", f"waiting for another run, which is writing {path}"):
                write_text(path, json.dumps([sorted(wrong), pixels.tolist()]))
        bad += [wrong[i] for i in sorted(wrong)]
        collection.leave_out(wrong)
        labelled, where = sum(label is not None for label in collection.labels), f"{collection.root}, {collection.split}"
        if 0 < labelled < len(collection):
            told.append(f"{where}: labels: {labelled:,} of {len(collection):,} images")
        if pixels[VOID + 1]:
            told.append(f"warning: {where}: {pixels[VOID + 1]:,} pixels of the labels have ids of {collection.n_ids} and more, "
                        "which are no classes: taken as void")
        if collection.has_labels and not pixels[:VOID].any():
            told.append(f"warning: {where}: all labels are void: as good as none")
            collection.has_labels = False
        elif collection.has_labels and not pixels[:collection.n_classes].all():
            absent = [name for name, n in zip(collection.names, pixels) if n == 0]
            told.append(f"warning: {where}: no label shows {', '.join(absent)}")
    bad = listed(list(dict.fromkeys(bad))) if bad else None  # once, where two collections are the same
    if bad and not all(map(len, collections)):
        raise InputError(f"{bad}; nothing else is there: mend them")
    if bad and not skip_bad:
        raise InputError(f"{bad}; mend or remove them, or leave them out with --skip-bad")
    for sentence in dict.fromkeys([f"left out {bad}"] * bool(bad) + told):
        print(sentence)


# ---- Views: what the network sees of an image ----

def round_to_patch(size, patch_size):
    """The multiple of patch_size nearest to size, at least one patch."""
    return max(1, round(size / patch_size)) * patch_size


def square_view(image, size, interpolation=RESIZE):
    """Shorter side to `size`, then the central square. image: PIL."""
    if max(image.size) > 8 * min(image.size):  # 1 x 5000 pixels would become 224 x 1,120,000 before they are cut
        image = TF.center_crop(image, (min(image.height, 8 * image.width), min(image.width, 8 * image.height)))
    return TF.center_crop(TF.resize(image, size, interpolation), size)


def views(image, size, crop):
    """Square views of a PIL image: the centre ("none"), or the authors' five-crop ("five"): the four corners and the
    centre of the full-size image, half as high and wide, each resized and cropped on its own (crop_datasets.py)."""
    if crop == "none":
        return [square_view(image, size)]
    half = max(1, image.height // 2), max(1, image.width // 2)
    return [square_view(part, size) for part in TF.five_crop(image, half)]


def normalize(images):
    """uint8 (N, 3, H, W) -> float32 with ImageNet's mean and standard deviation, on the same device."""
    return TF.normalize(images.float() / 255, IMAGE_MEAN, IMAGE_STD)


class Views(torch.utils.data.Dataset):
    """Item i: (views (v, 3, size, size), labels (v, size, size)), uint8, of image i, or the InputError of a bad file.

    An error is returned, not raised: a DataLoader's worker would wrap it into its own traceback. n_views: v.
    """

    def __init__(self, collection, size, crop="none"):
        self.collection, self.size, self.crop, self.n_views = collection, size, crop, 5 if crop == "five" else 1

    def __len__(self):
        return len(self.collection)

    def __getitem__(self, i):
        try:
            image, label = self.collection.image(i), self.collection.label(i)
            if label is None:
                label = np.full((image.height, image.width), VOID, np.uint8)
            check_size(self.collection, i, image, label)
        except InputError as error:
            return error
        label = Image.fromarray(label)
        return (torch.stack([TF.pil_to_tensor(view) for view in views(image, self.size, self.crop)]),
                torch.cat([TF.pil_to_tensor(view) for view in views(label, self.size, self.crop)]))


def raise_bad(items):
    """Raises one InputError that names all bad files among items of a Views."""
    bad = [str(item) for item in items if isinstance(item, InputError)]
    if bad:
        raise InputError("; ".join(bad))


def batches(dataset, batch_size, workers):
    """(images, labels) of `batch_size` images of a Views at a time, decoded ahead in `workers` processes."""
    for items in torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers, collate_fn=list,
                                             worker_init_fn=follow_parent):
        raise_bad(items)
        images, labels = zip(*items)
        yield torch.cat(images), torch.cat(labels)


# ---- Every feature once ----

class Features(NamedTuple):
    """Frozen features of every view. maps: (N, D, h, w) float16 and labels: (N, size, size) uint8 are memory maps, or
    Live where those would not fit; vectors: (N, D) float32, the mean feature of each view. labels is None where the
    collection has none."""
    maps: "torch.Tensor | Live"
    vectors: torch.Tensor
    labels: "torch.Tensor | Live | None"
    folder: Path


class Live:
    """Stands for a memory map that would not fit: its rows are computed whenever they are read."""

    def __init__(self, shape, rows):
        self.shape, self.rows = shape, rows

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        return self.rows(indices.tolist())


def cache_key(backbone, views, facet, bfloat16):
    """Names a feature cache: a change of the weights, the files (name, size, time), the views, ... changes it."""
    digest = hashlib.sha256(json.dumps([2, views.collection.fingerprint(), views.size, views.crop, facet, bfloat16]).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_array(path, mode, shape, dtype):
    """A .npy file as a memory map. Raises InputError for one that is damaged, or not of this shape and type."""
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
        if array.shape != tuple(shape) or array.dtype != dtype:
            raise ValueError(f"{array.dtype} {array.shape} instead of {np.dtype(dtype)} {tuple(shape)}")
    except Exception as error:  # of damaged files, NumPy complains in many ways
        raise InputError(f"{path}: damaged ({error}); delete the folder {Path(path).parent}, and the next run fills it "
                         "again") from error
    return array


def open_map(path, shape, dtype):
    """A .npy file as a tensor over its read-only memory map: only what is indexed is read. See load_array."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes
        return torch.from_numpy(load_array(path, "r", shape, dtype))


def filling(path):
    """Keeps other runs from making `path`, of a cache, while the body of a with does; where one does so, waits for it."""
    if process()[0] or path.exists():
        return contextlib.nullcontext()
    return lock(f"{path}.lock", f"waiting for another run, which is making {path}")


def fill_cache(folder, layout, views, compute, batch_size, workers):
    """Computes the arrays of `layout`, name -> (shape, dtype), in `<folder>.partial`, which gets its name when all is there."""
    (rank, world), partial = process(), Path(f"{folder}.partial")
    if rank == 0 and not (partial / "done.npy").is_file():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            for name, (shape, dtype) in layout.items():
                np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape)
                if hasattr(os, "posix_fallocate"):  # a map that meets a full disk later would kill the process
                    with open(partial / f"{name}.npy", "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
        except OSError as error:
            shutil.rmtree(partial)
            raise InputError(f"{folder.parent}: no room for the features ({error.strerror}); give another disk with "
                             "--cache-dir, or --features live") from error
        with replacing(partial / "done.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, np.zeros(len(views), bool))  # which images are on the disk
    gathered(None)
    out = {name: load_array(partial / f"{name}.npy", "r+", *kind) for name, kind in layout.items()}
    done = load_array(partial / "done.npy", "r+", (len(views),), bool)
    todo = gathered(np.flatnonzero(~done))[0][rank::world]
    n_read, n_saved, saved = 0, 0, time.monotonic()
    loader = batches(torch.utils.data.Subset(views, todo), batch_size, workers)
    with tqdm(total=len(views), initial=int(done.sum()), desc="features", unit="image", disable=rank > 0) as bar:
        for images, labels in loader:
            maps = compute(images)
            chosen = todo[n_read:n_read + len(images) // views.n_views]
            half = maps.half()
            if not torch.isfinite(half).all():
                raise InputError(f"{views.collection.name(chosen[0])} or one of the {len(chosen) - 1} images after it: the "
                                 "backbone gives features that are no numbers, or too large for float16; are its weights good?")
            rows = (chosen[:, None] * views.n_views + np.arange(views.n_views)).ravel()
            computed = {"vectors": maps.mean((2, 3)), "maps": half.permute(0, 2, 3, 1), "labels": labels}
            for name, array in out.items():
                array[rows] = computed[name].cpu().numpy()
            n_read += len(chosen)
            bar.update(min(len(chosen) * world, bar.total - bar.n))
            if time.monotonic() - saved > 5 or n_read == len(todo):
                for array in out.values():
                    array.flush()
                done[todo[n_saved:n_read]] = True
                n_saved, saved = n_read, time.monotonic()
    gathered(None)
    if rank == 0:
        os.replace(partial, folder)


def extract_features(backbone, views, facet="token", bfloat16=False, cache_dir="cache", mode="auto", cache_gb=100,
                     batch_size=32, workers=2, device="cpu"):
    """Features of all Views, from the cache where it has them. Item n is view n % v of image n // v.

    mode: "cached" keeps the maps of all views; "live" keeps only their mean vectors and computes a map whenever it is
    read; "auto" is cached if that takes no more than `cache_gb` (10^9 bytes) and the disk has room, or was begun.

    Writes into `<cache_dir>/<key>.partial` and renames the folder when it is complete. A killed extraction goes on
    with the images that are not done. Of several processes each extracts its share. Another run that fills the same
    cache is waited for. Raises InputError for bad images and a full disk.
    """
    def compute(images):
        return frozen_features(backbone, normalize(images.to(device)), facet, bfloat16)

    n, D, side = len(views) * views.n_views, backbone.embed_dim, views.size // backbone.patch_size
    # maps channels last: as the ViT gives them, and several times faster to sample
    layout = {"vectors": ((n, D), np.float32), "maps": ((n, side, side, D), np.float16)}
    if views.collection.has_labels:
        layout["labels"] = (n, views.size, views.size), np.uint8
    cache_dir, key = Path(cache_dir), cache_key(backbone, views, facet, bfloat16)
    if process()[0] == 0:
        cache_dir.mkdir(parents=True, exist_ok=True)
        needed = sum(np.prod(shape, dtype=float) * np.dtype(dtype).itemsize for shape, dtype in layout.values()) / 1e9
        free = shutil.disk_usage(cache_dir).free / 1e9
        begun = (cache_dir / key).is_dir() or (cache_dir / f"{key}.partial").is_dir()
        if mode == "auto":
            mode = "cached" if begun or needed < min(cache_gb, free) else "live"
            print(f"features {mode}: all take {needed:.2g} GB, with {free:.0f} GB free and --cache-gb {cache_gb:g}")
        if mode == "cached" and not begun and needed > free:
            raise InputError(f"{cache_dir}: the features need {needed:.1f} GB and {free:.1f} GB are free; give another "
                             "disk with --cache-dir, or --features live")
    mode = gathered(mode)[0]
    if mode == "live":
        key, layout = f"{key}-vectors", {"vectors": layout["vectors"]}
    folder = cache_dir / key
    with filling(folder):
        if not gathered(folder.is_dir())[0]:
            fill_cache(folder, layout, views, compute, batch_size, workers)
            gathered(None)

    arrays = {name: open_map(folder / f"{name}.npy", *kind) for name, kind in layout.items()}
    if mode == "cached":
        return Features(arrays["maps"].permute(0, 3, 1, 2), arrays["vectors"], arrays.get("labels"), folder)
    read = functools.lru_cache(maxsize=128)(views.__getitem__)  # one decoding, image and label
    pool = ThreadPoolExecutor(max(1, workers))

    def live(part, indices):
        items = list(pool.map(read, [n // views.n_views for n in indices]))
        raise_bad(items)
        return torch.stack([item[part][n % views.n_views] for item, n in zip(items, indices)])

    labels = Live((n, views.size, views.size), functools.partial(live, 1)) if views.collection.has_labels else None
    return Features(Live((n, D, side, side), lambda indices: compute(live(0, indices))), arrays["vectors"], labels, folder)


def write_text(path, text):
    """Writes a text file that never exists half-written."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text)


@torch.no_grad()
def nearest_neighbors(vectors, k, rows=slice(None)):
    """The k nearest others of each vector by cosine, nearest first. (N, D) -> (N, k) int64, or only these `rows` of it.

    Works through blocks of rows, so the N x N similarities never exist together. Raises ValueError for k >= N.
    """
    n = len(vectors)
    if not 1 <= k < n:
        raise ValueError(f"{k} neighbours of {n} vectors: k must be 1 to {n - 1}")
    vectors = nnf.normalize(vectors.float(), dim=1)
    neighbors = []
    for block in torch.arange(*rows.indices(n), device=vectors.device).split(max(1, 2 ** 25 // n)):
        similarity = vectors[block] @ vectors.T  # (rows, N), 128 MB at a time
        similarity.scatter_(1, block[:, None], -torch.inf)  # the vector itself
        neighbors.append(similarity.topk(k, dim=1).indices.cpu())
    return torch.cat(neighbors)


def cached_neighbors(features, k, device="cpu"):
    """nearest_neighbors of the features' vectors, computed once and kept beside them. Each process computes its rows."""
    path = features.folder / f"neighbors_{k}.npy"
    with filling(path):
        if not gathered(path.is_file())[0]:
            rank, world = process()
            n = len(features.vectors)
            rows = slice(n * rank // world, n * (rank + 1) // world)
            neighbors = torch.cat(gathered(nearest_neighbors(features.vectors.to(device), k, rows)))
            if rank == 0:
                with replacing(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, neighbors.numpy())
            gathered(None)
    neighbors = open_map(path, (len(features.vectors), k), np.int64)
    if not 0 <= neighbors.min() <= neighbors.max() < len(features.vectors):
        raise InputError(f"{path}: damaged (there is no such neighbour); delete it, and the next run finds them again")
    return neighbors
