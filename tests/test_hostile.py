"""Checkpoints: ours and the authors' give back their models; hostile and damaged files are harmless."""
import argparse
import collections
import functools
import importlib
import io
import os
import pickle
import random
import sys
import types
import zipfile
from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from conftest import random_vit
from test_weights import save_safetensors
from torch import nn

import evaluate
import stego
import train

AUTHORS = {  # of the authors' configs/train_config.yml
    "dataset_name": "cocostuff27", "crop_type": "random", "model_type": "vit_small", "dino_patch_size": 8,
    "dino_feat_type": "feat", "dim": 7, "pos_intra_weight": 0.1, "pos_inter_weight": 1,
    "neg_inter_weight": 0.15, "pos_intra_shift": 0.12, "pos_inter_shift": 0.2, "neg_inter_shift": 1,
    "hydra": {"run": {"dir": "."}}, "tags": ["a"]}


def small_model():
    return stego.Stego(random_vit("dino"), 7, 6).eval()


@pytest.mark.parametrize("family, heads, options", [
    ("dino", 2, {"n_classes": 5}), ("dinov3_plus", 4, {"facet": "key", "dropout": 0.3})])
def test_a_checkpoint_gives_back_the_model_and_its_settings(family, heads, options, tmp_path):
    model = stego.Stego(random_vit(family, num_heads=heads), 7, 6, **options).eval()
    if family != "dino":
        model.refit_probe = stego.ClusterProbe(7, 4)
    stego.save_checkpoint(tmp_path / "c.pt", model, {"steps": 3, "lr": None}, step=3)
    loaded, config = stego.load_checkpoint(tmp_path / "c.pt")
    assert config == {"steps": 3, "lr": None} and not any(module.training for module in loaded.modules())
    assert loaded.head.dropout.p == options.get("dropout", 0.1)
    images = torch.randn(2, 3, 32, 40)
    assert torch.equal(loaded(images), model(images))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())


def foreign(path, bases=(), **attributes):
    """An instance of a class that pickles under this path, importable while sys.modules holds its module."""
    module, _, name = path.rpartition(".")
    for dot in (*[i for i, c in enumerate(module) if c == "."], None):  # the packages around it, too
        sys.modules.setdefault(module[:dot], types.ModuleType(module[:dot]))
    if not hasattr(sys.modules[module], name):
        setattr(sys.modules[module], name, type(name, bases, {"__module__": module}))
    instance = getattr(sys.modules[module], name)()
    vars(instance).update(attributes)
    return instance


def omegaconf(value):
    if isinstance(value, list):
        return foreign("omegaconf.listconfig.ListConfig", _content=[omegaconf(item) for item in value])
    if not isinstance(value, dict):
        return foreign("omegaconf.nodes.AnyNode", _val=value, _parent=None)
    content = {key: omegaconf(item) for key, item in value.items()}
    return foreign("omegaconf.dictconfig.DictConfig", _content=content, _parent=None)


def authors_checkpoint(path, attribute_dict=False, **settings):
    """What Lightning and omegaconf make of a small model of the authors'. Returns its weights and its ViT."""
    vit = random_vit("dino")
    layers = {"net.model": vit, "net.cluster1.0": nn.Conv2d(128, 7, 1), "linear_probe": nn.Conv2d(7, 5, 1),
              "net.cluster2.0": nn.Conv2d(128, 128, 1), "net.cluster2.2": nn.Conv2d(128, 7, 1)}
    state = {f"{name}.{key}": value for name, layer in layers.items()
             for key, value in layer.state_dict().items()}
    state |= {"train_cluster_probe.clusters": torch.randn(5, 7), "cluster_probe.clusters": torch.randn(8, 7)}
    with mock.patch.dict(sys.modules):
        parameters = foreign("lightning.parsing.AttributeDict", (dict,)) if attribute_dict else {}
        parameters["cfg"] = omegaconf(AUTHORS | settings)
        callbacks = {type(foreign("lightning.callbacks.ModelCheckpoint")): {"best_model_score": 1.0}}
        torch.save({"state_dict": state, "callbacks": callbacks, "hyper_parameters": parameters,
                    "loops": Call(argparse.Namespace, state=(1, 2)),  # a state that is no dict
                    "optimizer_states": collections.defaultdict(None, a=1)}, path)
    return state, vit


@pytest.mark.parametrize("feat_type, facet, attribute_dict", [("feat", "token", False), ("KK", "key", True)])
def test_the_authors_checkpoint_gives_its_codes_and_predictions(feat_type, facet, attribute_dict, tmp_path):
    state, vit = authors_checkpoint(tmp_path / "a.ckpt", attribute_dict, dino_feat_type=feat_type)
    assert not {"omegaconf", "lightning"} & sys.modules.keys()
    model, config = stego.load_checkpoint(tmp_path / "a.ckpt")
    images = torch.randn(2, 3, 48, 40)

    def conv(x, name):
        return nnf.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = vit(images, facet)
    codes = conv(x, "net.cluster1.0") + conv(conv(x, "net.cluster2.0").relu(), "net.cluster2.2")
    cosine = torch.einsum("nchw,kc->nkhw", nnf.normalize(codes, dim=1),
                          nnf.normalize(state["cluster_probe.clusters"]))
    torch.testing.assert_close(model(images), codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.cluster_probe(codes), cosine, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.linear_probe(codes), conv(codes, "linear_probe"), rtol=0, atol=1e-5)
    assert model.refit_probe is None and not model.training
    assert config == {
        "dataset": "cocostuff27", "backbone": "dino_vits8_300ep", "crop": "none", "facet": facet,
        "code_dim": 7, "num_classes": 5, "num_clusters": 8, "data_root": None, "eval_resolution": 320,
        "lambda_self": 0.1, "lambda_knn": 1, "lambda_rand": 0.15, "b_self": 0.12, "b_knn": 0.2, "b_rand": 1}


class Call:
    """Pickles as a call of function(*args), whose result may get a state."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __call__(self):
        """So that pickle takes a Call for the function of another."""

    def __reduce__(self):
        return self.reduced


def harmful(folder):
    """name -> an object whose unpickling makes the folder."""
    mkdir = Call(os.mkdir, folder)
    return {
        "os.system": Call(os.system, f"mkdir {folder}"),
        "eval": Call(eval, f"__import__('os').mkdir({folder!r})"),
        "getattr": Call(Call(getattr, Call(importlib.import_module, "os"), "mkdir"), folder),
        "partial": Call(Call(functools.partial, os.mkdir, folder)), "in containers": [1, {"a": (mkdir,)}],
        "in a parameter": Call(torch._utils._rebuild_parameter, mkdir, True, {}),
        "in a state": Call(argparse.Namespace, state={"a": mkdir}), "beside a module": [nn.ReLU(), mkdir],
        "in a state of OrderedDict": Call(collections.OrderedDict, state={"a": mkdir})}


def write_pickle(path, pickled):
    """The file that torch.save writes for this pickle, without tensors."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")


@pytest.mark.parametrize("name", harmful("x"))
@pytest.mark.parametrize("old", [False, True])
def test_no_code_in_a_file_is_ever_run(name, old, tmp_path):
    bad, executed = harmful(str(tmp_path / "executed"))[name], tmp_path / "executed"
    pickle.loads(pickle.dumps(bad))  # so the file does mean harm
    executed.rmdir()
    path = tmp_path / "bad.pt"
    stego.save_checkpoint(path, small_model(), {})
    good = torch.load(path, weights_only=True)
    for saved in (bad, {"model": bad}, {"state_dict": bad, "hyper_parameters": bad},
                  good | {"model": good["model"] | {"more": bad}}):
        torch.save(saved, path, _use_new_zipfile_serialization=not old)
        for load in (stego.load_checkpoint, stego.load_backbone):
            with pytest.raises(stego.InputError, match=r"bad\.pt: ") as refused:
                load(path)
            assert "weights_only" not in str(refused.value)  # torch advises to run the file
    assert not executed.exists()


SLOTS = b"N}X\x08\0\0\0__init__ccollections\nOrderedDict\ns\x86b."  # sets an attribute, of classes too


@pytest.mark.parametrize("pickled", [
    b"cposix\nsystem\nX\x04\0\0\0true\x85R.", b"(S'true'\niposix\nsystem\n.", b"cstego\nRecord\n" + SLOTS,
    b"ctorch\nTensor\n" + SLOTS, b"ctorch._utils\n_rebuild_tensor_v2\n" + SLOTS])
def test_no_opcode_calls_a_function_or_changes_a_class(pickled, tmp_path, monkeypatch):
    def state():
        things = stego.Record, torch.Tensor, torch._utils._rebuild_tensor_v2
        return [dict(vars(thing)) for thing in things], set(torch.serialization.get_safe_globals())

    monkeypatch.setattr(os, "system", lambda command: pytest.fail("it was run"))
    monkeypatch.setitem(sys.modules, "posix", os)
    before = state()
    write_pickle(tmp_path / "bad.pt", b"\x80\x02" + pickled)
    with pytest.raises(stego.InputError, match=r"bad\.pt: "):
        stego.load_checkpoint(tmp_path / "bad.pt")
    assert state() == before


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("name, value, reason", [
    ("head.linear.bias", torch.full((7,), torch.nan), "weights are not finite"),
    ("cluster_probe.centroids", torch.ones(256, 7), "more than 255 clusters"),
    ("refit_probe.centroids", torch.ones(3, 9), "size mismatch for refit_probe"),  # codes have 7 numbers
    ("backbone.cls_token", torch.ones(1).expand(1, 1, 10 ** 9), "larger than the file"),  # all one number
    ("backbone.cls_token", torch.empty(1, 1, 10 ** 9, device="meta"), "not a state dict of tensors"),
    ("linear_probe.weight", torch.ones(10 ** 9, 0, 1, 1), "not a state dict of tensors"),
    ("head.linear.bias", torch.ones(7).to_sparse(), "not a state dict of tensors"),
    ("head.linear.bias", torch.ones(7, dtype=torch.cfloat), "not a state dict of tensors")])
def test_no_file_holds_unusable_tensors_or_takes_much_more_memory_than_it_has(name, value, reason, tmp_path):
    stego.save_checkpoint(tmp_path / "c.pt", small_model(), {})
    good = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.save(good | {"model": good["model"] | {name: value}}, tmp_path / "c.pt")
    with pytest.raises(stego.InputError, match=rf"c\.pt: .*{reason}"):
        stego.load_checkpoint(tmp_path / "c.pt")


def damaged(rng, content):
    """One to three of the things that happen to bytes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, n = rng.randrange(8, len(content) + 1), rng.choice((1, 2, 4, 8, 64))
        end, new = rng.choice(((i + n, rng.randbytes(n)), (i + 4, bytes(3) + b"\x80"), (i, rng.randbytes(n)),
                               (i + n, b""), (None, b"")))
        content[i:end] = new
    return bytes(content)


def with_damaged_pickle(rng, content):
    """The zip file of torch.save with a damaged pickle in it, its checksum right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, damaged(rng, old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind, load, damage", [
    ("ours", stego.load_checkpoint, with_damaged_pickle), ("ours", stego.load_checkpoint, damaged),
    ("theirs", stego.load_checkpoint, with_damaged_pickle), ("safetensors", stego.load_backbone, damaged)])
def test_damaged_files_are_read_or_refused_in_one_sentence_and_nothing_else(kind, load, damage, tmp_path):
    path, found = tmp_path / "damaged.pt", {"read": 0, "refused": 0}
    vit = random_vit("dinov2", embed_dim=16, num_heads=1, depth=1, patch_size=4, image_size=8)
    {"ours": lambda: stego.save_checkpoint(path, stego.Stego(vit, 3, 2), {"steps": 3}),
     "theirs": lambda: authors_checkpoint(path),
     "safetensors": lambda: save_safetensors(vit.state_dict(), path)}[kind]()
    whole = path.read_bytes()
    for n in range(60):
        path.write_bytes(damage(random.Random(n), whole) if n else whole)
        try:
            load(path)
            found["read"] += 1
        except stego.InputError as error:
            assert "damaged.pt" in str(error) and "\n" not in str(error)
            found["refused"] += 1
    assert min(found.values()) > 0, found


@pytest.mark.parametrize("content", [
    3, {"weights": torch.ones(2)}, {"state_dict": {}, "hyper_parameters": {}}, {"model": {}, "config": 3}])
def test_other_files_are_no_checkpoints(content, tmp_path, monkeypatch):
    (tmp_path / "runs/c").mkdir(parents=True)
    torch.save(content, "runs/c/checkpoint.pt")
    with pytest.raises(stego.InputError, match=r"checkpoint\.pt: "):
        stego.load_checkpoint("runs/c/checkpoint.pt")
    model = small_model()
    model.facet = "value"
    stego.save_checkpoint("runs/c/other.pt", model, {})
    with pytest.raises(stego.InputError, match=r"other\.pt: .*facet is 'token' or 'key', not 'value'"):
        stego.load_checkpoint("runs/c/other.pt")
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "c"])
    with pytest.raises(stego.InputError, match="--resume c: no run to go on with"):
        train.parse_args()


def test_settings_that_training_does_not_write_are_refused(tmp_path, monkeypatch):
    model = small_model()
    for config in {}, {"eval_resolution": "x"}, {"precision": 3, "eval_resolution": 32}:
        stego.save_checkpoint(tmp_path / "c.pt", model, config)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "c.pt", "--predict", "photos", "--out", "out"])
        with pytest.raises(stego.InputError, match=r"c\.pt: its settings are not those of a run"):
            evaluate.main()
