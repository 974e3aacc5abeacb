"""data.py: the published data sets, each on a small folder in its own layout that holds every id there can be."""
import sys
import types

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from conftest import save_image, save_label
from PIL import Image

import data
import stego
import train

ALL_IDS = np.arange(256, dtype=np.uint8).reshape(16, 16)

# CocoStuff's ids by class, the other way round than in data.py
COCO27 = {
    "electronic": "71-76", "appliance": "77-82", "food-things": "51-60", "furniture-things": "61-70", "indoor": "83-90",
    "kitchen": "43-50", "accessory": "25-32", "animal": "15-24", "outdoor": "9-14", "person": "0", "sports": "33-42",
    "vehicle": "1-8", "ceiling": "101-102", "floor": "100 113-117", "food-stuff": "120-121 152 169",
    "furniture-stuff": "97 106-107 109 111 122 129 132 155 160 164", "raw-material": "99 131 138 142",
    "textile": "91-92 103-104 108 130 136 140 151 166-167", "wall": "170-176", "window": "179-180",
    "building": "94-95 127 150 157 165", "ground": "110 124-125 135 139 143-144 146 148 153 158",
    "plant": "93 96 118 123 128 133 141 162 168", "sky": "105 156", "solid": "126 134 149 159 161 181",
    "structural": "98 112 137 145 163", "water": "119 147 154 177-178"}


def expected_classes(table):
    """{name: "0 3-5"} -> class of each id 0 to 255."""
    classes = np.full(256, data.VOID)
    for i, ids in enumerate(table.values()):
        for span in ids.split():
            first, _, last = span.partition("-")
            classes[int(first):int(last or first) + 1] = i
    return classes


def classes_read(collection):
    """Class that the collection gives to each id 0 to 255, from the label of its first image."""
    label = collection.label(0)
    assert label.shape == (16, 16) and label.dtype == np.uint8
    return label.ravel()


def write_coco(folder, splits):
    """The lists named by splits: {split: (list, number of ids)}, and their files. Every label is ALL_IDS."""
    for split, (list_name, n) in splits.items():
        ids = [f"{1000 * i + 9:012}" for i in range(n)]
        path = folder / f"curated/{split}2017/{list_name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(ids) + "\n")
        for i, name in enumerate(ids):
            save_image(folder / f"images/{split}2017/{name}.jpg", 16, 16, "L" if i else "RGB", seed=i)  # a few are grey
            save_label(folder / f"annotations/{split}2017/{name}.png", ALL_IDS)


@pytest.fixture
def coco(tmp_path):
    write_coco(tmp_path / "cocostuff", {"train": ("Coco164kFull_Stuff_Coarse", 3),
                                        "val": ("Coco164kFull_Stuff_Coarse_7", 2)})
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path):
    for split, cities in (("train", ("ulm_000001_000019", "aachen_000002_000019", "aachen_000000_000019")),
                          ("val", ("lindau_000000_000019",))):
        for name in cities:
            city = name.split("_")[0]
            save_image(tmp_path / f"cityscapes/leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", 16, 16)
            for kind in ("labelIds", "instanceIds", "color"):
                save_label(tmp_path / f"cityscapes/gtFine/{split}/{city}/{name}_gtFine_{kind}.png", ALL_IDS)
    return tmp_path


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "VOCdevkit/VOC2012"
    for split, names in (("train", ("2007_000032", "2011_003276")), ("val", ("2007_000033",))):
        path = folder / f"ImageSets/Segmentation/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))
        for name in names:
            save_image(folder / f"JPEGImages/{name}.jpg", 16, 16)
            label = Image.fromarray(ALL_IDS).convert("P")
            label.putpalette(list(range(255, -1, -1)) * 3)
            (folder / "SegmentationClass").mkdir(exist_ok=True)
            label.putdata(ALL_IDS.ravel().tolist())
            label.save(folder / f"SegmentationClass/{name}.png")
    return tmp_path


@pytest.fixture(params=["scipy", "stand-in"])
def potsdam(request, tmp_path, monkeypatch):
    """Written and read by scipy where there is one, and by NumPy in its place."""
    if request.param == "scipy":
        savemat = pytest.importorskip("scipy.io").savemat
    else:
        scipy = types.ModuleType("scipy")
        scipy.io = types.ModuleType("scipy.io")
        scipy.io.loadmat = np.load
        monkeypatch.setitem(sys.modules, "scipy", scipy)
        monkeypatch.setitem(sys.modules, "scipy.io", scipy.io)

        def savemat(path, arrays):
            with open(path, "wb") as file:
                np.savez(file, **arrays)
    folder = tmp_path / "potsdam"
    for kind in ("imgs", "gt"):
        (folder / kind).mkdir(parents=True)
    for name, ids in (("labelled_train", (7, 19)), ("labelled_test", (3,)), ("unlabelled_train", (4, 5, 6))):
        (folder / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
        for i in ids:
            savemat(folder / f"imgs/{i}.mat", {"img": np.random.default_rng(i).integers(0, 256, (16, 16, 4), np.uint8)})
            if name != "unlabelled_train":
                savemat(folder / f"gt/{i}.mat", {"gt": ALL_IDS})
    return types.SimpleNamespace(root=tmp_path, folder=folder, savemat=savemat)


# ---- CocoStuff ----

def test_cocostuff27_gives_every_id_its_class(coco):
    train_set, val = (data.load_collection("cocostuff27", coco, split) for split in ("train", "val"))
    assert (len(train_set), len(val)) == (3, 2) and train_set.n_classes == 27 and train_set.has_labels
    assert train_set.names == list(COCO27) and train_set.palette.shape == (27, 3)
    assert train_set.name(1).endswith("cocostuff/images/train2017/000000001009.jpg")
    expected = expected_classes(COCO27)
    assert (expected < 27).sum() == 182
    for collection in (train_set, val):
        assert np.array_equal(classes_read(collection), expected)
        assert all(collection.image(i).mode == "RGB" for i in range(len(collection)))


def test_cocostuff15_is_the_stuff_and_cocostuff3_sky_plant_ground(coco):
    write_coco(coco / "cocostuff", {"train": ("Coco164kFull_Stuff_Coarse_7", 1), "val": ("Coco164kFull_Stuff_Coarse_7", 2)})
    write_coco(coco / "cocostuff", {"train": ("Coco164kFew_Stuff_6", 2), "val": ("Coco164kFew_Stuff_6", 1)})
    stuff = {name: ids for name, ids in COCO27.items() if int(ids.split()[0].split("-")[0]) > 90}
    few = {name: COCO27[name] for name in ("sky", "plant", "ground")}
    for dataset, table, counts in (("cocostuff15", stuff, (1, 2)), ("cocostuff3", few, (2, 1))):
        collections = [data.load_collection(dataset, coco, split) for split in ("train", "val")]
        assert tuple(map(len, collections)) == counts
        for collection in collections:
            assert collection.names == list(table) and collection.n_classes == len(table) == len(collection.palette)
            assert np.array_equal(classes_read(collection), expected_classes(table))


def test_the_same_files_in_other_classes_are_another_cache(coco):
    fingerprints = {data.load_collection(dataset, coco, "val").fingerprint() for dataset in ("cocostuff27", "cocostuff15")}
    before = data.load_collection("cocostuff27", coco, "val")
    save_label(before.labels[0], ALL_IDS[:8])
    assert len({*fingerprints, before.fingerprint()}) == 3


def test_five_crops_are_those_of_the_full_image_and_its_classes(coco):
    collection = data.load_collection("cocostuff27", coco, "train")
    images, labels = data.Views(collection, 8, "five")[0]  # half of 16: the crops are not resized
    for image, label, view, classes in zip(TF.five_crop(collection.image(0), (8, 8)),
                                           TF.five_crop(Image.fromarray(collection.label(0)), (8, 8)), images, labels):
        assert torch.equal(TF.pil_to_tensor(image), view) and torch.equal(TF.pil_to_tensor(label)[0], classes)


# ---- Cityscapes, VOC ----

def test_cityscapes_is_torchvisions_with_27_classes(cityscapes):
    published = torchvision.datasets.Cityscapes
    classes = [kind for kind in published.classes if kind.id >= 7]
    for split, n in (("train", 3), ("val", 1)):
        collection = data.load_collection("cityscapes", cityscapes, split)
        theirs = published(cityscapes / "cityscapes", split, target_type="semantic")
        assert sorted(zip(theirs.images, theirs.targets)) == [
            (str(image), [str(label)]) for image, label in zip(collection.images, collection.labels)]
        assert len(collection) == n and collection.n_classes == 27
        assert collection.names == [kind.name for kind in classes]
        assert [tuple(colour) for colour in collection.palette.tolist()] == [kind.color for kind in classes]
        expected = expected_classes({kind.name: str(kind.id) for kind in classes})
        assert (expected < 27).sum() == 27 and expected[7] == 0 and expected[255] == data.VOID  # 255: the licence plate's -1
        assert np.array_equal(classes_read(collection), expected)


def test_cityscapes_ids_of_minus_one_are_void(cityscapes):
    collection = data.load_collection("cityscapes", cityscapes, "val")
    collection.labels[0] = cityscapes / "signed.tif"  # a PNG has no -1
    save_label(collection.labels[0], np.array([[-1, 0, 6, 7, 33, 34]], np.int32))
    assert collection.label(0).tolist() == [[255, 255, 255, 0, 26, 255]]


def test_voc_is_torchvisions_with_the_border_void(voc):
    for split, n in (("train", 2), ("val", 1)):
        collection = data.load_collection("voc", voc, split)
        theirs = torchvision.datasets.VOCSegmentation(voc, image_set=split)
        assert theirs.images == [str(path) for path in collection.images] and len(collection) == n
        assert theirs.masks == [str(path) for path in collection.labels]
        assert collection.n_classes == 21 and collection.names[0] == "background" and collection.names[20] == "tvmonitor"
        assert np.array_equal(classes_read(collection), expected_classes({str(i): str(i) for i in range(21)}))


# ---- Potsdam ----

def test_potsdam_in_three_classes_without_infrared(potsdam):
    expected = expected_classes({"road, car": "0 4", "building, clutter": "1 5", "vegetation, tree": "2 3"})
    for split, ids in (("train", (7, 19)), ("val", (3,))):
        collection = data.load_collection("potsdam", potsdam.root, split)
        assert len(collection) == len(ids) and collection.n_classes == 3 and collection.has_labels
        assert collection.names == ["roads and cars", "buildings and clutter", "trees and vegetation"]
        assert np.array_equal(classes_read(collection), expected)
        pixels = np.random.default_rng(ids[0]).integers(0, 256, (16, 16, 4), np.uint8)
        assert np.array_equal(np.asarray(collection.image(0)), pixels[..., :3])
    images, labels = data.Views(collection, 8)[0]
    assert images.shape == (1, 3, 8, 8) and labels.shape == (1, 8, 8)
    unlabelled = data.load_collection("potsdam", potsdam.root, "unlabelled_train")
    assert len(unlabelled) == 3 and not unlabelled.has_labels and unlabelled.label(0) is None
    assert unlabelled.fingerprint()


@pytest.mark.parametrize("kind, arrays, message", [
    ("imgs", {"picture": ALL_IDS}, "'img'"), ("imgs", {"img": ALL_IDS}, r"uint8 \(16, 16\)"),
    ("imgs", {"img": np.zeros((4, 4, 3))}, "float64"), ("imgs", None, "not a readable .mat"),
    ("gt", {"img": ALL_IDS}, "'gt'"), ("gt", {"gt": np.zeros((4, 4, 3), np.uint8)}, "channels"),
    ("gt", None, "not a readable .mat")])
def test_a_bad_mat_file_is_named(kind, arrays, message, potsdam):
    if arrays is None:
        (potsdam.folder / kind / "3.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b" " * 300)
    else:
        potsdam.savemat(potsdam.folder / kind / "3.mat", arrays)
    collection = data.load_collection("potsdam", potsdam.root, "val")
    with pytest.raises(stego.InputError, match=f"3.mat.*{message}"):
        collection.image(0), collection.label(0)


def test_potsdam_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(stego.InputError, match="potsdam.*pip install scipy"):
        data.load_collection("potsdam", tmp_path, "train")


# ---- what is missing, and what does not belong ----

@pytest.mark.parametrize("dataset", data.LAYOUTS)
def test_without_a_folder_the_whole_layout_is_told(dataset, tmp_path):
    layout = data.LAYOUTS[dataset]
    told = [layout.folder, *filter(None, layout.lists.values()), layout.image.rpartition("}")[2], layout.source]
    for root in (None, tmp_path / "nowhere"):
        with pytest.raises(stego.InputError) as error:
            data.load_collection(dataset, root, "train")
        assert all(part in str(error.value) for part in ["--data-root FOLDER", *told]) and "\n" not in str(error.value)
        assert root is None or str(error.value).startswith(f"{root}: ")
    with pytest.raises(stego.InputError, match=f"--split test: {dataset} has train, val"):
        data.load_collection(dataset, tmp_path, "test")


def test_the_first_missing_file_is_named_and_the_others_counted(coco, cityscapes):
    def load(split):
        return data.load_collection("cocostuff27", coco, split)
    (coco / "cocostuff/annotations/val2017/000000001009.png").unlink()
    with pytest.raises(stego.InputError, match="annotations/val2017/000000001009.png is missing; --dataset cocostuff27"):
        load("val")
    for i in (1, 2):
        (coco / f"cocostuff/images/train2017/00000000{i}009.jpg").unlink()
    with pytest.raises(stego.InputError, match="images/train2017/000000001009.jpg is missing, the first of 2 such files"):
        load("train")
    path = coco / "cocostuff/curated/val2017/Coco164kFull_Stuff_Coarse_7.txt"
    for content, message in ((b"", "nothing where ids"), (b"\xff\xfe", ".* where ids"), (None, "No such file")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(stego.InputError, match=f"Coarse_7.txt: {message}"):
            load("val")

    next((cityscapes / "cityscapes/gtFine/train/ulm").glob("*labelIds.png")).unlink()
    with pytest.raises(stego.InputError, match="ulm_000001_000019_gtFine_labelIds.png is missing"):
        data.load_collection("cityscapes", cityscapes, "train")
    (cityscapes / "cityscapes/leftImg8bit/val").rename(cityscapes / "cityscapes/leftImg8bit/elsewhere")
    with pytest.raises(stego.InputError, match=r"leftImg8bit/val: no images \*_leftImg8bit.png"):
        data.load_collection("cityscapes", cityscapes, "val")


@pytest.mark.parametrize("line", ["../x", "../../000000000009", "/etc/passwd", "9", "0000000000090", "00000000000a",
                                  "000000000009/../000000000009", "000000000009.jpg", "\u0660" * 12, "000000000\0009"])
def test_a_list_that_leads_elsewhere_is_refused(line, coco):
    with open(coco / "cocostuff/curated/train2017/Coco164kFull_Stuff_Coarse.txt", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(stego.InputError, match="Coarse.txt: .* where ids"):
        data.load_collection("cocostuff27", coco, "train")


@pytest.mark.parametrize("line", ["../3", "a/b", "..", "3.mat"])
def test_so_it_is_for_the_other_lists(line, potsdam, voc):
    for dataset, path in (("potsdam", potsdam.folder / "labelled_test.txt"),
                          ("voc", voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt")):
        path.write_text(line)
        with pytest.raises(stego.InputError, match=f"{path.name}: '{line}' where ids"):
            data.load_collection(dataset, potsdam.root, "val")


def test_the_root_may_be_the_data_sets_own_folder(coco, cityscapes, voc):
    for dataset, root in (("cocostuff27", coco), ("cityscapes", cityscapes), ("voc", voc)):
        inside = root / data.LAYOUTS[dataset].folder
        outer, inner = (data.load_collection(dataset, folder, "train") for folder in (str(root), str(inside)))
        assert outer.images == inner.images and outer.fingerprint() == inner.fingerprint()


def test_the_classes_are_the_data_sets_own(coco):
    assert data.load_collection("cocostuff27", coco, "val", 27).n_classes == 27
    for dataset, root in (("cocostuff27", coco), ("scenes", None)):
        with pytest.raises(stego.InputError, match=f"{dataset} has .* classes, not 5"):
            data.load_collection(dataset, root, "val", 5)


# ---- what is typed ----

def test_a_preset_brings_its_data_set():
    for preset, dataset in (("cocostuff27-vitb8", "cocostuff27"), ("cocostuff27-vits8", "cocostuff27"),
                            ("cityscapes-vitb8", "cityscapes"), ("potsdam-vits8", "potsdam"), ("scenes", "scenes")):
        assert train.resolve({"preset": preset})["dataset"] == dataset
        if preset != "scenes":
            assert train.resolve({"preset": preset, "data_root": "d"})["dataset"] == dataset
        config = train.resolve({"preset": preset, "data_root": "d", "dataset": "directory"})
        assert config["dataset"] == "directory" and config["data_root"] == "d"
    with pytest.raises(stego.InputError, match="--data-root.*--dataset directory"):
        data.load_collection("scenes", "d", "train")


def test_a_preset_without_its_data_says_what_to_get(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "cocostuff27-vits8", "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        train.evaluate.run_main(train.main)
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert error.startswith("error: --dataset cocostuff27 needs --data-root FOLDER with images/") and error.count("\n") == 1
