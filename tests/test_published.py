"""What others published: the authors' checkpoints, timm's and DINO's files, downloads; and files that mean harm."""
import argparse
import collections
import contextlib
import functools
import hashlib
import http.server
import importlib
import json
import operator
import os
import sys
import threading
import types
import typing
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import nn

import evaluate
import stego

SETTINGS = {  # of the authors' configs/train_config.yml, as for their CocoStuff-27 ViT-B, but for dim
    "dataset_name": "cocostuff27", "crop_type": "five", "crop_ratio": 0.5, "res": 224, "loader_crop_type": "center",
    "model_type": "vit_base", "arch": "dino", "dino_feat_type": "feat", "projection_type": "nonlinear",
    "dino_patch_size": 8, "continuous": True, "dim": 7, "dropout": True, "zero_clamp": True, "stabalize": False,
    "pointwise": True, "lr": 5e-4, "pretrained_weights": None, "max_steps": 7000, "batch_size": 32, "num_neighbors": 7,
    "extra_clusters": 2, "has_labels": False, "pytorch_data_dir": "/data", "hydra": {"run": {"dir": "."}}, "tags": ["a"],
    "neg_inter_weight": 0.1538476246415498, "pos_inter_weight": 1, "pos_intra_weight": 0.1,
    "neg_inter_shift": 1, "pos_inter_shift": 0.2, "pos_intra_shift": 0.12}


@contextlib.contextmanager
def foreign_classes(*paths):
    """Yields empty classes that pickle under these paths, importable only in here."""
    modules, classes = {}, []
    for path in paths:
        module, _, name = path.rpartition(".")
        for end in range(1, module.count(".") + 2):  # the packages around it too
            package = ".".join(module.split(".")[:end])
            modules.setdefault(package, types.ModuleType(package))
        classes.append(type(name, (dict,) if name == "AttributeDict" else (), {"__module__": module}))
        setattr(modules[module], name, classes[-1])
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield classes


def authors_weights(n_classes=5, extra=2, dim=7, width=64):
    """A small model under the names of the authors' LightningModule, and its ViT."""
    vit = stego.VisionTransformer(8, width, 2, 1, image_size=32)
    layers = {"net.model": vit, "net.cluster1.0": nn.Conv2d(width, dim, 1), "net.cluster2.0": nn.Conv2d(width, width, 1),
              "net.cluster2.2": nn.Conv2d(width, dim, 1), "linear_probe": nn.Conv2d(dim, n_classes, 1),
              "decoder": nn.Conv2d(dim, width, 1)}
    state = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    state.update({"train_cluster_probe.clusters": torch.randn(n_classes, dim),
                  "cluster_probe.clusters": torch.randn(n_classes + extra, dim)})
    return state, vit


def write_authors_checkpoint(path, state, attribute_dict=False, **settings):
    """What Lightning 1.x and omegaconf 2.1 make of the authors' model, class paths included."""
    paths = ("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
             "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
             "pytorch_lightning.utilities.parsing.AttributeDict",
             "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    with foreign_classes(*paths) as (DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata, AttributeDict,
                                     ModelCheckpoint):
        def node(value, parent=None):
            kind = DictConfig if isinstance(value, dict) else ListConfig if isinstance(value, list) else AnyNode
            out = kind()
            metadata = Metadata() if kind is AnyNode else ContainerMetadata()
            vars(metadata).update(ref_type=typing.Any, object_type={DictConfig: dict, ListConfig: list}.get(kind), flags={},
                                  key_type=int, resolver_cache=collections.defaultdict(dict, {"now": {}}))
            vars(out).update(_metadata=metadata, _parent=parent)
            if kind is AnyNode:
                out._val = value
            elif kind is DictConfig:
                out._content = {key: node(item, out) for key, item in value.items()}
            else:
                out._content = [node(item, out) for item in value]
            return out

        hyper_parameters = {"n_classes": 5, "cfg": node({**SETTINGS, **settings})}
        if attribute_dict:
            hyper_parameters = AttributeDict(hyper_parameters)
        state = collections.OrderedDict(state)
        state._metadata = {"": {"version": 1}}  # as Module.state_dict() leaves it
        torch.save({
            "epoch": 3, "global_step": 7000, "pytorch-lightning_version": "1.5.0", "state_dict": state,
            "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(27.0), "current_score": np.float64(26)}},
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": 5e-4, "betas": (0.9, 0.999), "params": [0]}]}],
            "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": hyper_parameters}, path)


# ---- the authors' checkpoints ----

@pytest.mark.parametrize("feat_type, facet", [("feat", "token"), ("KK", "key")])
def test_authors_checkpoint_gives_codes_and_predictions_of_a_straight_computation(feat_type, facet, tmp_path):
    state, vit = authors_weights()
    write_authors_checkpoint(tmp_path / "a.ckpt", state, dino_feat_type=feat_type)
    assert not {"omegaconf", "pytorch_lightning"} & sys.modules.keys()
    model, config = stego.load_checkpoint(tmp_path / "a.ckpt")
    images = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        x = vit.eval()(images, facet)
        def conv(x, name):
            return nnf.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])
        codes = conv(x, "net.cluster1.0") + conv(conv(x, "net.cluster2.0").relu(), "net.cluster2.2")
        large = nnf.interpolate(codes, (48, 40), mode="bilinear", align_corners=False)
        cosine = torch.einsum("nchw,kc->nkhw", nnf.normalize(large, dim=1), nnf.normalize(state["cluster_probe.clusters"]))
        probes, prediction = evaluate.model_probes(model)
        predicted = {name: evaluate.log_probabilities(probe, model(images), (48, 40)) for name, (probe, _) in probes.items()}
    assert prediction == evaluate.ONLINE and not model.training and probes.keys() == {evaluate.ONLINE, evaluate.LINEAR}
    torch.testing.assert_close(model(images), codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(predicted[evaluate.ONLINE], (2 * cosine).log_softmax(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(predicted[evaluate.LINEAR], conv(large, "linear_probe").log_softmax(1), rtol=0, atol=1e-5)
    assert config["facet"] == facet


@pytest.mark.parametrize("attribute_dict", [False, True])  # as Lightning's versions differ
def test_authors_settings_get_our_names_and_are_those_of_the_preset(attribute_dict, tmp_path):
    write_authors_checkpoint(tmp_path / "a.ckpt", authors_weights()[0], attribute_dict)
    config = stego.load_checkpoint(tmp_path / "a.ckpt")[1]
    preset = {**stego.PRESETS["cocostuff27-vitb8"], "code_dim": 7}
    assert {key: config[key] for key in preset} == preset
    assert json.loads(json.dumps(config)) == config  # plain values
    assert {key: config[key] for key in config.keys() - preset.keys()} == {
        "preset": "cocostuff27-vitb8", "data_root": None, "num_classes": 5, "num_clusters": 7, "resolution": 224,
        "eval_resolution": 320, "facet": "token", "dropout": 0.1, "lr": 5e-4, "neighbors": 7,
        "zero_clamp": True, "stabilize": False}


@pytest.mark.parametrize("settings, preset, backbone, crop", [
    ({"dataset_name": "potsdam", "model_type": "vit_small", "crop_type": None}, "potsdam-vits8", "dino_vits8_300ep", "none"),
    ({"dataset_name": "cityscapes"}, "cityscapes-vitb8", "dino_vitb8", "five"),
    ({"dataset_name": "cocostuff15", "model_type": "vit_small", "dino_patch_size": 16}, None, "dino_vits16", "five")])
def test_preset_and_backbone_are_read_from_the_authors_settings(settings, preset, backbone, crop, tmp_path):
    write_authors_checkpoint(tmp_path / "a.ckpt", authors_weights()[0], **settings)
    config = stego.load_checkpoint(tmp_path / "a.ckpt")[1]
    assert (config["preset"], config["backbone"], config["crop"]) == (preset, backbone, crop)


def test_evaluate_scores_an_authors_checkpoint_with_what_the_file_says(tmp_path, monkeypatch):
    write_authors_checkpoint(tmp_path / "potsdam_test.ckpt", authors_weights()[0], dataset_name="directory")
    for kind in ("imgs", "labels"):
        (tmp_path / "data" / kind / "val").mkdir(parents=True)
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "data/imgs/val/a.jpg")
    Image.linear_gradient("L").resize((40, 30)).point(lambda v: v // 60).save(tmp_path / "data/labels/val/a.png")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(tmp_path / "potsdam_test.ckpt"), "--data-root",
                                      str(tmp_path / "data"), "--no-crf", "--workers", "0", "--device", "cpu"])
    evaluate.main()
    summary = json.loads((tmp_path / "potsdam_test/eval-val/scores.json").read_text())
    assert summary["prediction"] == evaluate.ONLINE and len(summary["classes"]) == 5
    assert summary["results"].keys() == {evaluate.ONLINE, evaluate.LINEAR}
    assert len(summary["results"][evaluate.ONLINE]["assignment"]) == 7


@pytest.mark.parametrize("change", [
    lambda state: state.pop("linear_probe.weight"), lambda state: state.pop("net.cluster2.2.bias"),
    lambda state: state.pop("net.model.blocks.1.attn.qkv.bias"), lambda state: state.pop("cluster_probe.clusters"),
    lambda state: state.update({"net.cluster1.0.weight": torch.zeros(7, 3, 1, 1)})])
def test_authors_checkpoint_that_lacks_a_part_is_refused(change, tmp_path):
    state = authors_weights()[0]
    change(state)
    write_authors_checkpoint(tmp_path / "a.ckpt", state)
    with pytest.raises(stego.InputError, match="a.ckpt: neither"):
        stego.load_checkpoint(tmp_path / "a.ckpt")


def test_checkpoint_of_another_lightning_program_is_refused(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}, "args": argparse.Namespace()}, tmp_path / "other.ckpt")
    with pytest.raises(stego.InputError, match="other.ckpt: neither"):
        stego.load_checkpoint(tmp_path / "other.ckpt")


def test_records_give_tensors_as_torch_does(tmp_path):
    base = torch.randn(4, 6)
    saved = {"view": base.t()[1:3], "shared": base, "half": base.half(), "bfloat16": base.bfloat16(),
             "bool": base > 0, "bytes": torch.arange(5, dtype=torch.uint8), "long": torch.tensor(7),
             "empty": torch.empty(0, 3), "parameter": nn.Parameter(base[0])}
    torch.save({**saved, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    read = stego.read_tensors(tmp_path / "a.pth")
    for name, value in saved.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype
    assert vars(read["args"]) == {"lr": 1}


# ---- files that mean harm ----

class Call:
    """Pickles as a call of function(*args), and an optional state for the result."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def harmful(folder):
    """name -> an object whose unpickling would make a folder `folder`, or take a step towards it."""
    mkdir, python = Call(os.mkdir, folder), f"import os; os.mkdir({folder!r})"
    return {
        "os.mkdir": mkdir, "os.system": Call(os.system, f"mkdir {folder}"), "exec": Call(exec, python),
        "eval": Call(eval, f"exec({python!r})"), "getattr": Call(getattr, Call(importlib.import_module, "os"), "mkdir"),
        "partial": Call(functools.partial, os.mkdir, folder), "map": Call(list, Call(map, os.mkdir, [folder])),
        "methodcaller": Call(operator.methodcaller, "mkdir", folder), "torch.load": Call(torch.load, folder),
        "torch.hub.load": Call(torch.hub.load, folder), "module": nn.Linear(2, 2),
        "in a tensor": Call(torch._utils._rebuild_parameter, mkdir, True, {}),
        "in an allowed class": Call(argparse.Namespace, mkdir),
        "as its state": Call(argparse.Namespace, state={"a": mkdir}),
        "as its method": Call(argparse.Namespace, state={"__setstate__": os.mkdir})}


@pytest.mark.parametrize("name", harmful("x"))
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_asks_for_anything_but_tensors_and_settings_is_refused(name, zipped, tmp_path):
    bad = harmful(str(tmp_path / "executed"))[name]
    torch.save({"state_dict": bad, "hyper_parameters": {}, "teacher": bad}, tmp_path / "bad.ckpt",
               _use_new_zipfile_serialization=zipped)
    reason = "refused, because it asks for" if zipped else "not tensors and settings alone"
    for load in (stego.load_checkpoint, stego.load_backbone):
        with pytest.raises(stego.InputError, match=f"bad.ckpt: .*{reason}"):
            load(tmp_path / "bad.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("pickled, message", [
    (b"cposix\nsystem\nN\x85R.", "asks for posix.system"), (b"ctorch\nhub.load\n.", "asks for torch.hub.load"),
    (b"\x80\x02comegaconf\n__import__\ncposix\nsystem\n.", "asks for posix.system"),  # the Record imported nothing
    (b"cstego\nread_tensors\n.", "asks for stego.read_tensors"),
    *((pickled, "not tensors and settings|not a readable file") for pickled in (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"(cposix\nsystem\nS'true'\no.", b"(S'true'\niposix\nsystem\n.", b"\x82\x01.", b"(", b"",
        b"ctorch\nFloatStorage\n)R."))])
def test_no_opcode_leads_around_the_refusal(pickled, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
    with pytest.raises(stego.InputError, match=f"bad.ckpt: .*({message})"):
        stego.load_checkpoint(tmp_path / "bad.ckpt")


def test_records_cannot_be_tampered_with_for_later_files(tmp_path):
    """BUILD with a second dict sets attributes, of classes too: here __init__ of what stands for an omegaconf class."""
    state = b"N}X\x08\x00\x00\x00__init__ccollections\nOrderedDict\ns\x86b."
    before = dict(vars(stego.Record)), set(torch.serialization.get_safe_globals())
    for built in (b"comegaconf\nX\n", b"comegaconf\nX\n)R"):  # the class itself, an instance
        with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + built + state)
            archive.writestr("archive/version", "3")
        with pytest.raises(stego.InputError, match="bad.ckpt"):
            stego.load_checkpoint(tmp_path / "bad.ckpt")
    assert (dict(vars(stego.Record)), set(torch.serialization.get_safe_globals())) == before


# ---- backbones of others ----

def randomised(**kwargs):
    vit = stego.VisionTransformer(14, 128, 2, 2, image_size=70, layer_scale=True, **kwargs).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_names_give_the_same_features(registers, tmp_path):
    vit = randomised(registers=registers)
    state = dict(vit.state_dict())
    if registers:  # timm folds the class token's position into the token
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(state, tmp_path / "pytorch_model.bin")
    backbone = stego.load_backbone(tmp_path / "pytorch_model.bin")
    for size in (70, 98):
        images = torch.randn(1, 3, size, 70)
        torch.testing.assert_close(backbone(images), vit(images), rtol=0, atol=1e-5)


def test_dino_training_checkpoint_may_hold_its_arguments(tmp_path):
    state = randomised().state_dict()
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()},
                "args": argparse.Namespace(arch="vit_small", lr=5e-4)}, tmp_path / "checkpoint.pth")
    loaded = stego.load_backbone(tmp_path / "checkpoint.pth").state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_dinov3_and_safetensors_are_refused_with_a_way_out(tmp_path):
    state = randomised().state_dict()
    del state["pos_embed"]
    state.update({"rope_embed.periods": torch.ones(16), "storage_tokens": torch.zeros(1, 4, 128)})
    torch.save(state, tmp_path / "v3.pth")
    with pytest.raises(stego.InputError, match="v3.pth: these are DINOv3 weights.*take DINO or DINOv2"):
        stego.load_backbone(tmp_path / "v3.pth")
    (tmp_path / "a.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(stego.InputError, match=r"a\.safetensors: .*convert it once with torch\.save"):
        stego.load_backbone(tmp_path / "a.safetensors")


# ---- downloads ----

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of one backbone "remote", torch.hub's cache in tmp_path. .answer: "whole", "half" or "error page"."""
    content = tmp_path / "served.pth"
    torch.save(randomised().state_dict(), content)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            body = b"<html>not here</html>" if server.answer == "error page" else content.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if server.answer == "half" else body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.answer, server.file = 0, "whole", tmp_path / "checkpoints/vit.pth"
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setitem(stego.BACKBONES, "remote", f"http://127.0.0.1:{server.server_port}/vit.pth")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_backbone_is_downloaded_once_and_its_sha256_printed(server, capsys):
    stego.load_backbone("remote")
    stego.load_backbone("remote")
    digest = hashlib.sha256(server.file.read_bytes()).hexdigest()
    assert server.requests == 1 and digest in capsys.readouterr().out
    assert sorted(os.listdir(server.file.parent)) == ["vit.pth", "vit.pth.lock"]


@pytest.mark.parametrize("answer", ["half", "error page"])
def test_a_download_that_went_wrong_is_not_kept(answer, server):
    server.answer = answer
    with pytest.raises(stego.InputError, match=r"cannot download http.*/vit\.pth .*fetch it on"):
        stego.load_backbone("remote")
    assert not server.file.exists()
    server.answer = "whole"
    assert stego.load_backbone("remote").patch_size == 14
    assert sorted(os.listdir(server.file.parent)) == ["vit.pth", "vit.pth.lock"]


def test_a_broken_file_in_the_cache_is_named(server):
    stego.load_backbone("remote")
    os.truncate(server.file, server.file.stat().st_size // 2)
    with pytest.raises(stego.InputError, match=r"vit\.pth: not a readable file.*; delete that file, and the next run"):
        stego.load_backbone("remote")


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(server, monkeypatch):
    url = "http://127.0.0.1:9/vit.pth"  # nobody listens there
    monkeypatch.setitem(stego.BACKBONES, "remote", url)
    with pytest.raises(stego.InputError) as raised:
        stego.load_backbone("remote")
    assert url in str(raised.value) and f"put it into {server.file.parent}/" in str(raised.value)
