"""data.py and assets/scenes.py: images and labels, data sets, views, every feature once, neighbours."""
import os
import shutil
import sys
import threading
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
import torchvision.transforms.functional as TF
from conftest import save_image, save_label
from PIL import Image

import data
import stego
from assets import scenes

VOID = data.VOID
ALL_IDS = np.arange(256, dtype=np.uint8).reshape(16, 16)  # a label with every id that a byte can hold


@pytest.mark.parametrize("mode, name", [
    ("RGB", "x.jpg"), ("RGB", "x.webp"), ("RGB", "zo\u00eb\n\u5199.bmp"), ("L", "x.jpg"), ("P", "x.png"),
    ("P", "x.gif"), ("RGBA", "x.png"), ("LA", "x.png"), ("1", "x.png"), ("CMYK", "x.jpg"), ("CMYK", "x.tif")])
def test_every_kind_of_image_becomes_rgb(mode, name, tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    Image.fromarray(pixels).convert(mode).save(tmp_path / name)
    image = data.read_image(tmp_path / name)
    assert image.mode == "RGB" and np.abs(np.asarray(image) - pixels.astype(int)).max() <= 3


def test_images_are_upright_of_8_bits_and_keep_transparent_colours(tmp_path):
    grey = Image.new("RGB", (40, 30), (51, 51, 51)).convert("P")
    grey.save(tmp_path / "through.png", transparency=bytes(range(256)))
    assert (np.asarray(data.read_image(tmp_path / "through.png")) == 51).all()
    Image.fromarray(np.array([[0, 256 * 7, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(data.read_image(tmp_path / "deep.png"))[0, :, 2].tolist() == [0, 7, 255]
    exif, photo = Image.Exif(), Image.new("L", (16, 8))
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    photo.paste(255, (0, 0, 8, 8))  # white on the left, which is the upper half of what was seen
    photo.save(tmp_path / "turned.jpg", exif=exif)
    upright = np.asarray(data.read_image(tmp_path / "turned.jpg"))
    assert upright.shape == (16, 8, 3) and upright[:8].min() > 250 and upright[8:].max() < 5


def test_an_unreadable_image_or_label_is_named_on_one_line(tmp_path):
    bad = tmp_path / "b\nad.tif"
    Image.fromarray(np.zeros((99, 99), np.float32)).save(bad)
    for content in (bad.read_bytes(), bad.read_bytes()[:999], b"a picture of a cat", b""):
        bad.write_bytes(content)
        for read, name in ((data.read_image, "image"), (data.read_label, "label")):
            with pytest.raises(stego.InputError, match=rf"b\\nad.tif: not a readable {name} \(.+\)$"):
                read(bad)


@pytest.mark.parametrize("name, ids, expected", [
    ("l.png", np.array([[0, 3, 4, 259]], np.uint16), [0, 3, VOID, VOID]),  # 259 is no 3 in 8 bits
    ("l.tif", np.array([[-1, -253, 3, 70_000]], np.int32), [VOID, VOID, 3, VOID]),
    ("l.png", np.array([[True, False]]), [1, 0])])
def test_ids_outside_the_classes_are_void(name, ids, expected, tmp_path):
    save_label(tmp_path / name, ids)
    label = data.Collection(tmp_path, "val", [None], [tmp_path / name], "abcd").label(0)
    assert np.asarray(label).tolist() == [expected] and label.mode == "L"


def test_a_label_may_have_a_palette_but_not_colours(tmp_path):
    label = Image.fromarray(ALL_IDS)
    label.putpalette(bytes(range(255, -1, -1)) * 3)
    label.save(tmp_path / "l.png")
    assert np.array_equal(data.read_label(tmp_path / "l.png"), ALL_IDS)
    save_image(tmp_path / "rgb.png")
    with pytest.raises(stego.InputError, match="rgb.png: .*not one class id a pixel"):
        data.read_label(tmp_path / "rgb.png")


def test_directory_pairs_labels_by_stem_and_reads_class_names(folder):
    (folder / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\n\n  road \r\n\xe4\n")  # Latin-1
    train, val = (data.directory(folder, split) for split in ("train", "val"))
    assert (len(train), len(val), train.split, val.split) == (3, 1, "train", "val")
    assert train.names == ["sky", "road", "\ufffd"] and train.n_classes == 3 and train.palette.shape == (3, 3)
    assert train.has_labels and not val.has_labels and not any(val.labels)
    for i in range(3):
        ids = np.random.default_rng(i).integers(0, 4, (30, 40), np.uint8)
        assert np.array_equal(train.label(i), np.where(ids < 3, ids, VOID))
    assert data.directory(folder, "train", 5).names == [*train.names, "class 3", "class 4"]
    assert data.directory(folder, "train", 2).names == ["sky", "road"]


def test_some_labels_may_be_missing_but_not_all(folder):
    (folder / "labels/train/b.png").unlink()
    train = data.directory(folder, "train", 4)
    assert [label is not None for label in train.labels] == [True, False, True] and train.has_labels
    assert (data.views(train.label(1), 16) == VOID).all()
    for path in (folder / "labels/train").rglob("*.png"):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    with pytest.raises(stego.InputError, match="labels/train: no label is called like an image, as a.png"):
        data.directory(folder, "train", 4)


def test_which_images_are_read_where_there_is_no_imgs_no_val_or_no_split(folder, tmp_path, capsys):
    def names(*arguments):
        found = data.directory(*arguments, 4)
        return [path.name for path in found.images], found.split, found.has_labels
    for name in ("deep/er/one.jpg", "two.PNG", ".hidden/three.jpg", "deep/.ipynb_checkpoints/one.jpg"):
        save_image(tmp_path / "photos" / name)
    for name in ("notes.txt", ".notes", "._two.PNG"):
        (tmp_path / "photos" / name).write_text("no image")
    (tmp_path / "photos/deep/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/.deep").symlink_to(tmp_path / "photos/deep")  # is not what deep is entered by
    for split, read in (("train", "train"), ("val", "train"), (None, None)):
        assert names(tmp_path / "photos", split) == (["one.jpg", "two.PNG"], read, False)
    assert capsys.readouterr().out.count("photos: not read as images: 1, such as notes.txt\n") == 2
    assert names(tmp_path / "photos/two.PNG", None) == (["two.PNG"], None, False)
    (tmp_path / "photos").rename(tmp_path / ".photos")  # the folder that was asked for may be hidden
    assert names(tmp_path / ".photos", None) == (["one.jpg", "two.PNG"], None, False)
    assert names(folder, None) == (["a.png", "b.jpg", "c.png", "v.png"], None, False)
    (folder / "imgs/val").rename(folder / "imgs/test")
    assert names(folder, "val") == (["a.png", "b.jpg", "c.png"], "train", True)


def checksum(values):
    return zlib.crc32(bytes(values))


@pytest.fixture
def coco(tmp_path):
    for split, list_name, n_images in (("train", "Coarse", 3), ("val", "Coarse_7", 2)):
        folder = tmp_path / f"cocostuff/curated/{split}2017"
        folder.mkdir(parents=True)
        numbers = [f"{i:012}" for i in range(n_images)]
        (folder / f"Coco164kFull_Stuff_{list_name}.txt").write_text("\n".join(numbers))
        for number in numbers:
            mode = "RGB" if number == numbers[0] else "L"
            save_image(tmp_path / f"cocostuff/images/{split}2017/{number}.jpg", 16, 16, mode)
            save_label(tmp_path / f"cocostuff/annotations/{split}2017/{number}.png", ALL_IDS)
    return tmp_path


def test_cocostuff_gives_every_id_its_class(coco):
    for root in (coco, coco / "cocostuff"):  # the folder around it, or its own
        for split, n in (("train", 3), ("val", 2)):
            collection = data.load_collection("cocostuff27", root, split)
            assert len(collection) == n and collection.image(1).mode == "RGB" and collection.n_classes == 27
    whole = np.array(collection.label(1)).ravel()
    assert checksum(whole[:182]) == 471586216 and (whole[182:] == VOID).all()  # of the authors' map
    assert whole[[0, 1, 90, 105, 181]].tolist() == [9, 11, 4, 23, 24]
    assert checksum(",".join(collection.names).encode()) == 3426968315


def test_cityscapes_has_the_27_classes_from_id_7_on_in_its_own_colours(tmp_path):
    for name in ("train/ulm/ulm_1", "train/aachen/aachen_2", "val/lindau/lindau_0"):
        save_image(tmp_path / f"cityscapes/leftImg8bit/{name}_leftImg8bit.png", 16, 16)
        for kind in ("labelIds", "instanceIds", "color"):
            save_label(tmp_path / f"cityscapes/gtFine/{name}_gtFine_{kind}.png", ALL_IDS)
    (tmp_path / "cityscapes/leftImg8bit/train/ulm/._ulm_1_leftImg8bit.png").touch()  # by macOS
    for split, stems in (("train", ["aachen_2", "ulm_1"]), ("val", ["lindau_0"])):
        collection = data.load_collection("cityscapes", tmp_path, split)
        assert [path.name for path in collection.images] == [f"{stem}_leftImg8bit.png" for stem in stems]
        assert [path.name for path in collection.labels] == [f"{stem}_gtFine_labelIds.png" for stem in stems]
    assert np.ravel(collection.label(0)).tolist() == [VOID] * 7 + [*range(27)] + [VOID] * 222
    assert checksum(collection.palette.ravel()) == 3971115397
    assert checksum(",".join(collection.names).encode()) == 1700818842


def test_potsdam_in_three_classes_without_infrared(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy.io", None)  # as if it were not installed
        for read, name in ((data.read_image, "image"), (data.read_label, "label")):
            with pytest.raises(stego.InputError, match=rf"^1\.mat: not a readable {name} \(.*scipy"):
                read("1.mat")
    monkeypatch.setattr(data, "read_mat", lambda path, key: {"img": pixels, "gt": ALL_IDS}[key])
    pixels = np.stack([ALL_IDS, ALL_IDS // 2, ALL_IDS // 3, ALL_IDS], 2)
    for name, ids in (("labelled_train", (7, 19)), ("labelled_test", (3,))):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
        for path in (tmp_path / folder / f"{i}.mat" for folder in ("imgs", "gt") for i in ids):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    for split, n in (("train", 2), ("val", 1)):
        collection = data.load_collection("potsdam", tmp_path, split)
        assert len(collection) == n and np.array_equal(np.asarray(collection.image(0)), pixels[..., :3])
        # 0 roads and 4 cars, 1 buildings and 5 clutter, 2 and 3 plants
        assert np.ravel(collection.label(0)).tolist() == [0, 1, 2, 2, 0, 1] + [VOID] * 250


@pytest.mark.parametrize("dataset", data.LAYOUTS)
def test_without_its_files_it_says_what_to_get_and_where_to_put_it(dataset, tmp_path):
    layout, nowhere = data.LAYOUTS[dataset], tmp_path / "nowhere"
    for root, start in ((None, ""), (nowhere, f"{nowhere}: "), (tmp_path, f"{tmp_path}: no images")):
        with pytest.raises(stego.InputError, match=f"^{start}") as raised:
            data.load_collection(dataset, root, "train")
        for part in ("--data-root FOLDER", *filter(None, layout.lists.values()), layout.source):
            assert part in str(raised.value)
    with pytest.raises(stego.InputError, match=f"--split test: {dataset} has train, val"):
        data.load_collection(dataset, tmp_path, "test")


def test_missing_files_are_named_and_a_list_cannot_lead_out_of_the_folder(coco):
    (coco / "cocostuff/annotations/val2017/000000000001.png").unlink()
    with pytest.raises(stego.InputError, match=r"^missing files \(1\), such as .*/000000000001.png; --da"):
        data.load_collection("cocostuff27", coco, "val")
    save_image(coco / "cocostuff/images/x.jpg")
    save_label(coco / "cocostuff/annotations/x.png", ALL_IDS)
    path = coco / "cocostuff/curated/train2017/Coco164kFull_Stuff_Coarse.txt"
    path.write_text(f"../x\n\n{coco}/cocostuff/images/x\n..\n000000000001\n")
    images = data.load_collection("cocostuff27", coco, "train").images
    assert [path.stem for path in images] == ["000000000001"]


def test_a_seed_is_a_scene_and_no_two_splits_share_one():
    splits = [data.Scenes(split) for split in ("train", "dev", "val")]
    assert [len(split) for split in splits] == [1000, 200, 200] and splits[2].n_classes == 9
    assert len({seed for split in splits for seed in split.images}) == 1400
    np.random.seed(1)  # the global state plays no part
    image, label = scenes.draw_scene(splits[2].images[5])
    assert splits[2].image(5).tobytes() == image.tobytes() and image.size == label.size == (128, 128)
    assert np.array_equal(splits[2].label(5), np.asarray(label))
    assert len({str(split.fingerprint()) for split in splits}) == 3


def test_five_crops_are_cut_from_the_full_image_before_they_are_resized():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    found = data.views(image, 32, "five")
    assert found.shape == (5, 32, 32, 3)
    for i, part in enumerate(TF.five_crop(image, (45, 60))):
        expected = np.asarray(part.resize((42, 32), Image.Resampling.NEAREST).crop((5, 0, 37, 32)))
        assert np.array_equal(found[i], expected)
    assert np.array_equal(data.views(image.getchannel("R"), 32, "five"), found[..., 0])  # as of a label
    whole = image.resize((42, 32), Image.Resampling.NEAREST).crop((5, 0, 37, 32))
    assert np.array_equal(data.views(image, 32), np.asarray(whole)[None])


def test_views_of_odd_sizes_are_square_and_that_of_a_line_takes_no_gigabytes(monkeypatch):
    for size in ((1, 1), (1, 50), (301, 7)):
        assert data.views(Image.new("RGB", size), 32, "five").shape == (5, 32, 32, 3)
    sizes, resize = [], TF.resize
    monkeypatch.setattr(data.TF, "resize", lambda image, *to: sizes.append(image.size) or resize(image, *to))
    data.square_view(Image.new("L", (1, 5000)), 32)
    assert sizes == [(1, 8)]  # in place of 32 x 160,000 pixels


def test_normalize_is_torchvisions_and_sizes_are_rounded_to_patches():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    expected = TF.normalize(images.permute(0, 3, 1, 2) / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(data.normalize(images), expected)
    assert [data.round_to_patch(size, 14) for size in (224, 320, 1)] == [224, 322, 14]


def test_threads_keep_the_order_run_a_little_ahead_and_end_when_nobody_reads_on():
    started, threads = [], threading.active_count()
    results = data.in_parallel(lambda i: started.append(i) or i * i, iter(range(10 ** 9)), 3, ahead=5)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()  # waits for what was begun
    assert sorted(started) == list(range(8)) and threading.active_count() == threads
    results = data.in_parallel(lambda i: 12 // i, [3, 0, 1], 2)
    assert next(results) == 4
    with pytest.raises(ZeroDivisionError):  # where its result would come
        next(results)


def extract(backbone, collection, size=16, crop="none", facet="token", precision=torch.float32, **options):
    model = stego.Stego(backbone, 5, 3, facet=facet, precision=precision).eval()
    return data.extract_features(model, collection, size, crop, workers=1, **options)


@pytest.mark.parametrize("crop, v", [("none", 1), ("five", 5)])
@pytest.mark.parametrize("facet", ["token", "key"])
def test_features_live_and_cached_are_those_of_a_straight_pass(folder, backbone, crop, v, facet, monkeypatch):
    train = data.directory(folder, "train", 4)
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))  # too little
        live = extract(backbone, train, 16, crop, facet)
    assert {path.name for path in Path("cache").glob("*/*")} == {"vectors.npy", "done.npy"}
    cached, found = (extract(backbone, train, 16, crop, facet, cache_gb=gb) for gb in (1, 0))
    assert torch.equal(found.maps, cached.maps)  # they are there now, whatever they take
    assert cached.maps.shape == live.maps[torch.arange(3 * v)].shape == (3 * v, 16, 2, 2)
    for i in range(3):
        views, rows = torch.tensor(data.views(train.image(i), 16, crop)), torch.arange(i * v, (i + 1) * v)
        expected = backbone(data.normalize(views), facet)
        for features, rounding in ((live, 1e-5), (cached, 2 ** -11 + 1e-5)):  # that of float16
            torch.testing.assert_close(features.maps[rows].float(), expected, rtol=rounding, atol=1e-5)
            torch.testing.assert_close(features.vectors[rows], expected.mean((2, 3)), rtol=0, atol=1e-5)
            assert np.array_equal(features.labels[rows], data.views(train.label(i), 16, crop))


def test_a_disk_that_fills_during_the_extraction_is_an_error_and_no_bus_error(folder, backbone, monkeypatch):
    train, free = data.directory(folder, "train", 4), iter([1e9, 100])  # at the start, before the first batch
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=next(free)))
        with pytest.raises(stego.InputError, match="the disk is full"):
            extract(backbone, train)
    assert torch.isfinite(extract(backbone, train, cache_gb=0).maps).all()  # it goes on once there is room


def test_of_two_runs_that_fill_one_cache_the_slower_one_goes_on(folder, backbone, monkeypatch):
    train, normalize = data.directory(folder, "train", 4), data.normalize

    def while_the_other_run_ends(images):
        monkeypatch.setattr(data, "normalize", normalize)
        extract(backbone, train)
        return normalize(images)

    monkeypatch.setattr(data, "normalize", while_the_other_run_ends)
    assert extract(backbone, train).maps.flatten(1).any(1).all() and len(os.listdir("cache")) == 1


@pytest.mark.parametrize("crop, batches", [("none", [32, 4]), ("five", [30] * 6)])
def test_the_backbone_sees_at_most_32_views_at_once(crop, batches, folder, backbone):
    train, seen = data.directory(folder, "train", 4), []
    train.images, train.labels = 12 * train.images, 12 * train.labels
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    extract(backbone, train, crop=crop)
    assert seen == batches


def test_another_file_weight_size_crop_facet_or_precision_is_another_cache(folder, backbone):
    def key(n_classes=4, **options):
        shutil.rmtree("cache", ignore_errors=True)
        extract(backbone, data.directory(folder, "train", n_classes), **options)
        return os.listdir("cache")[0]
    os.utime(folder / "labels/train/a.png", ns=(1, 1))
    original = key()
    assert key() == original
    seen = [original, key(size=32), key(crop="five"), key(facet="key"), key(precision=torch.bfloat16), key(3)]
    for change in (lambda: os.utime(folder / "imgs/train/a.png", ns=(1, 1)),
                   lambda: (save_label(folder / "labels/train/a.png", np.zeros((30, 40), np.uint8)),
                            os.utime(folder / "labels/train/a.png", ns=(1, 1))),  # only its size
                   lambda: (folder / "imgs/train/sub/c.png").rename(folder / "imgs/train/z.png"),
                   lambda: backbone.norm.bias.add_(1)):
        change()
        seen.append(key())
    assert len(set(seen)) == len(seen) == 10


@pytest.mark.parametrize("value", [float("nan"), 1e6])  # float16 ends at 65,504
def test_features_that_no_cache_can_hold_are_refused(value, folder, backbone):
    backbone.norm.bias.fill_(value)
    with pytest.raises(stego.InputError, match="a.png .* not finite in float16"):
        extract(backbone, data.directory(folder, "train", 4))


@pytest.mark.parametrize("n", [50, 6000])  # 6,000 are two blocks
def test_nearest_neighbors_equal_brute_force_across_blocks(n):
    vectors = torch.randn(n, 8) * torch.rand(n, 1) * 10
    found = data.nearest_neighbors(vectors, 3)
    some = torch.tensor([0, 1, n // 2, n - 409, n - 408, n - 1]).clamp(min=0)  # 5,592 rows are a block
    similarity = nnf.normalize(vectors[some]) @ nnf.normalize(vectors).T
    similarity[torch.arange(len(some)), some] = -2  # a vector is no neighbour of its own
    assert torch.equal(found[some], similarity.argsort(1, descending=True)[:, :3])
    few = data.nearest_neighbors(vectors[:4], 7)  # which have three others
    assert torch.equal(few.sort(1).values, torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]))


def test_processes_that_do_not_share_their_cache_are_refused(folder, backbone, monkeypatch):
    monkeypatch.setattr(data.dist, "barrier", lambda: None)
    train = data.directory(folder, "train", 4)
    with pytest.raises(stego.InputError, match="--cache-dir must be a folder that the machines share"):
        extract(backbone, train, rank=1, world=2)
    assert extract(backbone, train).maps.flatten(1).any(1).all()
