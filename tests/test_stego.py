"""stego.py: the losses against golden values and slow loops, gradients, backbone, probes, checkpoints."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import ROOT

import stego

GOLDEN = {name: torch.from_numpy(np.asarray(value))  # of the authors' code at eb4d6b5
          for name, value in np.load(ROOT / "tests/golden_stego.npz").items()}


def tiny_vit(**kwargs):
    return stego.VisionTransformer(8, 32, 2, 2, image_size=32, **kwargs).eval()


# ---- correspondence loss ----

def test_sample_equals_golden():
    # the authors' output has its two point axes swapped
    sampled = stego.sample(GOLDEN["sample_map"], GOLDEN["sample_points"])
    torch.testing.assert_close(sampled.transpose(2, 3), GOLDEN["sampled"], rtol=0, atol=1e-5)


def test_sample_reads_x_along_the_width_and_repeats_the_border():
    maps = torch.arange(12.0).reshape(1, 1, 3, 4)  # value = 4 row + column
    points = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 0.0], [5.0, 5.0]]).reshape(1, 1, 5, 2)
    assert stego.sample(maps, points).flatten().tolist() == [0.0, 3.0, 8.0, 5.5, 11.0]


def test_correlation_equals_a_slow_loop_of_cosines():
    a, b = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 3, 1)
    out = stego.correlation(a, b)
    assert out.shape == (2, 2, 3, 3, 1)
    for n, h, w, i in np.ndindex(2, 2, 3, 3):
        assert out[n, h, w, i, 0].item() == pytest.approx(
            nnf.cosine_similarity(a[n, :, h, w], b[n, :, i, 0], dim=0).item(), abs=1e-6)


@pytest.mark.parametrize("center", [0, 1])
@pytest.mark.parametrize("clamp", [0, 1])
@pytest.mark.parametrize("stabilize", [0, 1])
def test_correspondence_loss_equals_golden(center, clamp, stabilize):
    loss, S = stego.correspondence_loss(GOLDEN["features_a"], GOLDEN["features_b"], GOLDEN["codes_a"],
                                        GOLDEN["codes_b"], GOLDEN["shift"].item(), center, clamp, stabilize)
    expected = GOLDEN[f"loss_center{center}_clamp{clamp}_stabilize{stabilize}"]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(S, GOLDEN["code_correlation"], rtol=0, atol=1e-5)


def test_correspondence_loss_equals_a_slow_loop():
    features_a, features_b = torch.randn(2, 6, 2, 2), torch.randn(2, 6, 3, 2)
    codes_a, codes_b = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 3, 2)
    loss, _ = stego.correspondence_loss(features_a, features_b, codes_a, codes_b, shift=0.3)
    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))
    F = np.array([[[[[cosine(features_a[n, :, h, w], features_b[n, :, i, j]) for j in range(2)] for i in range(3)]
                    for w in range(2)] for h in range(2)] for n in range(2)])
    for n, h, w, i, j in np.ndindex(F.shape):
        centered = F[n, h, w, i, j] - F[n, h, w].mean() + F.mean()
        S = cosine(codes_a[n, :, h, w], codes_b[n, :, i, j])
        assert loss[n, h, w, i, j].item() == pytest.approx(-max(S, 0) * (centered - 0.3), abs=1e-6)


def test_loss_teaches_the_codes_but_not_the_features():
    features, codes = (torch.randn(2, 6, 3, 3, requires_grad=True) for _ in range(2))
    stego.correspondence_loss(features, features, codes, codes, 0.1)[0].mean().backward()
    assert features.grad is None and codes.grad.abs().sum() > 0


def test_zero_clamp_leaves_codes_alone_that_point_apart():
    codes_a, codes_b = torch.randn(1, 4, 1, 1, requires_grad=True), torch.randn(1, 4, 1, 1)
    codes_b = -codes_a.detach() + 0.1 * codes_b
    features = torch.randn(1, 6, 1, 1)
    stego.correspondence_loss(features, features, codes_a, codes_b, 0.1)[0].sum().backward()
    assert codes_a.grad.abs().sum() == 0


def test_descending_the_loss_pulls_corresponding_points_together_and_others_apart():
    features = nnf.one_hot(torch.tensor([0, 0, 1, 1])).float().T.reshape(1, 2, 2, 2)
    codes = torch.randn(1, 8, 2, 2, requires_grad=True)
    optimizer = torch.optim.Adam([codes], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        stego.correspondence_loss(features, features, codes, codes, 0.5)[0].mean().backward()
        optimizer.step()
    S = stego.correlation(codes, codes).reshape(4, 4)
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    assert S[same].min() > 0.95 and S[~same].max() < 0.05


# ---- objective ----

@pytest.mark.parametrize("n", [2, 3, 16])
def test_derangement_is_a_permutation_without_fixed_points(n):
    for _ in range(50):
        partner = stego.derangement(n)
        assert sorted(partner.tolist()) == list(range(n)) and (partner != torch.arange(n)).all()


def test_derangement_reaches_every_other_image_equally_often():
    counts = torch.stack([nnf.one_hot(stego.derangement(4), 4) for _ in range(3000)]).float().mean(0)
    assert (counts - (1 - torch.eye(4)) / 3).abs().max() < 0.04


def test_derangement_of_one_image_is_refused():
    with pytest.raises(ValueError, match="two images"):
        stego.derangement(1)


def test_objective_equals_its_three_terms_written_out():
    x, x_knn, s, s_knn = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5), torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    torch.manual_seed(1)
    loss, terms = stego.stego_loss(x, x_knn, s, s_knn, (0.5, 2.0, 3.0), (0.1, 0.2, 0.3), n_points=3, n_negatives=2)

    torch.manual_seed(1)  # the same points and negatives, drawn in the same order
    points_a, points_b = 2 * torch.rand(4, 3, 3, 2) - 1, 2 * torch.rand(4, 3, 3, 2) - 1
    def pair(f, g, s, t, pf, pg, b):
        return stego.correspondence_loss(
            stego.sample(f, pf), stego.sample(g, pg), stego.sample(s, pf), stego.sample(t, pg), b)[0].mean()
    expected = {"self": pair(x, x, s, s, points_a, points_a, 0.1), "knn": pair(x, x_knn, s, s_knn, points_a, points_b, 0.2)}
    rand = [stego.derangement(4) for _ in range(2)]
    expected["rand"] = sum(pair(x, x[r], s, s[r], points_a, points_b, 0.3) for r in rand) / 2
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name])
    torch.testing.assert_close(loss, 0.5 * expected["self"] + 2 * expected["knn"] + 3 * expected["rand"])


# ---- shifts without tuning ----

def correspondences(share, n=200_000):
    """Of n pairs of points, a share of which have one class and correspond well: unlike ones look alike everywhere."""
    return torch.where(torch.rand(n) < share, 0.8 + 0.1 * torch.randn(n), 0.1 + 0.2 * torch.randn(n))


def test_rates_are_those_of_a_mixture_of_like_and_unlike_pairs():
    rates = stego.same_class_rates(correspondences(0.5), correspondences(0.3), correspondences(1 / 9), n_classes=12)
    assert rates == pytest.approx((0.5, 0.3, 1 / 9), abs=0.01)


def test_rates_of_a_class_that_is_all_alike_are_those_of_any_other():
    """The sky, a tenth of every image, corresponds better than anything else: no reason to take it for the only class."""
    F = torch.cat([correspondences(0.4, 100_000), torch.ones(1000)])
    assert stego.same_class_rates(F, F, correspondences(1 / 9), 12) == pytest.approx((0.4, 0.4, 1 / 9), abs=0.02)


def test_rates_where_nothing_can_be_told_are_those_of_random_images():
    F, alike = correspondences(0.1), torch.ones(1000)
    assert stego.same_class_rates(F, F - 1, F, 12) == pytest.approx((1 / 9, 1 / 9, 1 / 9))
    assert stego.same_class_rates(alike, alike, alike, 8) == pytest.approx((1 / 6, 1 / 6, 1 / 6))
    assert stego.same_class_rates(F, F, F, 1) == (1, 1, 1)


# ---- head and probes ----

def test_head_is_a_linear_plus_a_nonlinear_branch_each_with_its_own_channel_dropout():
    head = stego.SegmentationHead(6, 4, dropout=0.5)
    x = torch.randn(3, 6, 2, 2)
    head.eval()
    torch.testing.assert_close(head(x), head.linear(x) + head.nonlinear(x))
    head.train()
    seen = []
    for branch in (head.linear, head.nonlinear):
        branch.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head(x)
    dropped = [(maps == 0).all(-1).all(-1) for maps in seen]
    assert all(((maps == 0).flatten(2).float().mean(2) % 1 == 0).all() for maps in seen)  # whole channels
    assert not torch.equal(*dropped)


def test_cluster_probe_equals_golden():
    probe = stego.ClusterProbe(10, 9)
    probe.centroids.data = GOLDEN["probe_centroids"]
    cosine = probe(GOLDEN["probe_codes"])
    assert torch.equal(cosine.argmax(1), GOLDEN["probe_assign"])
    torch.testing.assert_close(probe.loss(GOLDEN["probe_codes"]), GOLDEN["probe_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close((2 * cosine).log_softmax(1), GOLDEN["probe_logp_alpha2"], rtol=0, atol=1e-5)


def test_cluster_probe_moves_only_the_nearest_centroids():
    probe = stego.ClusterProbe(2, 3)
    probe.centroids.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    probe.loss(torch.tensor([[1.0, 0.1], [0.1, 1.0]]).T.reshape(1, 2, 1, 2)).backward()
    assert (probe.centroids.grad.abs().sum(1) > 0).tolist() == [True, True, False]


# ---- backbone ----

@pytest.mark.parametrize("size", ["native", "wide"])
@pytest.mark.parametrize("facet, name", [("token", "feat"), ("key", "key")])
def test_vit_equals_golden(size, facet, name):
    vit = stego.vit_from_state_dict({key[4:]: v for key, v in GOLDEN.items() if key.startswith("vit/")}, num_heads=6)
    with torch.no_grad():
        features = vit.eval()(GOLDEN[f"vit_{size}_images"], facet)
    torch.testing.assert_close(features, GOLDEN[f"vit_{size}_{name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("registers, layer_scale", [(0, False), (0, True), (4, True)])
def test_architecture_is_read_off_the_weights(registers, layer_scale, tmp_path):
    vit = tiny_vit(registers=registers, layer_scale=layer_scale)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save({**vit.state_dict(), "mask_token": torch.zeros(1, 32)}, tmp_path / "vit.pth")
    rebuilt = stego.vit_from_state_dict(torch.load(tmp_path / "vit.pth"), num_heads=2)
    images = torch.randn(2, 3, 48, 64)
    for facet in ("token", "key"):
        torch.testing.assert_close(rebuilt(images, facet), vit(images, facet))
    assert rebuilt(images).shape == (2, 32, 6, 8)


def test_load_backbone_takes_the_teacher_of_a_dino_checkpoint_and_freezes_it(tmp_path):
    state = tiny_vit().state_dict()
    teacher = {f"module.backbone.{key}": value for key, value in state.items()} | {"module.head.mlp.0.weight": torch.ones(2)}
    torch.save({"teacher": teacher, "student": {}, "epoch": 3}, tmp_path / "dino.pth")
    backbone = stego.load_backbone(tmp_path / "dino.pth")
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


def break_pos(state):
    state["pos_embed"] = state["pos_embed"][:, :-1]


def break_block(state):
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("norm.weight"), "norm.weight"),
    (lambda state: state.pop("blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias"),
    (lambda state: state.update({"blocks.0.extra": torch.ones(1)}), "blocks.0.extra"),
    (break_pos, "pos_embed"), (break_block, "blocks.1.mlp.fc1.weight")])
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    state = tiny_vit().state_dict()
    change(state)
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(stego.InputError, match=message):
        stego.load_backbone(tmp_path / "vit.pth")


def test_backbone_files_are_data_and_never_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"teacher": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for name in ("bomb.pth", "text.pth", "missing.pth"):
        with pytest.raises(stego.InputError, match=name):
            stego.load_backbone(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("arguments", [{"images": torch.zeros(1, 3, 33, 32)},
                                       {"images": torch.zeros(1, 3, 32, 32), "facet": "query"}])
def test_vit_refuses_what_it_cannot_do(arguments):
    with pytest.raises(ValueError):
        tiny_vit()(**arguments)


def test_bfloat16_features_point_along_the_float32_ones():
    vit = stego.vit_from_state_dict({key[4:]: v for key, v in GOLDEN.items() if key.startswith("vit/")}, num_heads=6).eval()
    exact, fast = (stego.frozen_features(vit, GOLDEN["vit_native_images"], bfloat16=flag) for flag in (False, True))
    assert fast.dtype == torch.float32 and not torch.equal(exact, fast)
    assert nnf.cosine_similarity(exact, fast, dim=1).min() > 0.999


# ---- presets and checkpoints ----

def test_presets_are_complete_and_name_known_backbones():
    keys = {"backbone", "crop", "code_dim", "batch_size", "steps", "center"} | {
        f"{kind}_{term}" for kind in ("lambda", "b") for term in ("self", "knn", "rand")}
    for preset in stego.PRESETS.values():
        assert keys <= preset.keys() | stego.DEFAULTS.keys() and preset["backbone"] in stego.BACKBONES
        assert keys <= preset.keys() or preset["dataset"] == "scenes"  # a published result leaves nothing to the defaults


@pytest.mark.parametrize("n_classes, refit, facet", [(5, True, "token"), (None, False, "key")])
def test_checkpoint_gives_back_the_model_and_its_configuration(n_classes, refit, facet, tmp_path):
    model = stego.Stego(tiny_vit(), 7, 6, n_classes, facet=facet).eval()
    if refit:
        model.refit_probe = stego.ClusterProbe(7, 6)
    stego.save_checkpoint(tmp_path / "c.pt", model, {"steps": 3, "names": ["a"]}, step=3)
    loaded, config = stego.load_checkpoint(tmp_path / "c.pt")
    assert config == {"steps": 3, "names": ["a"]} and not loaded.training and loaded.head.dropout.p == 0.1
    assert (loaded.linear_probe is None) == (n_classes is None) and (loaded.refit_probe is None) == (not refit)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(loaded.cluster_probe(loaded(images)), model.cluster_probe(model(images)))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(tmp_path):
    """The process dies in the middle of the write; the file of the step before must still load."""
    script = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import stego
model = stego.Stego(stego.VisionTransformer(8, 32, 1, 1, 32), 3, 2)
stego.save_checkpoint("c.pt", model, dict(step=1))
write = pathlib.Path.write_bytes
def die_half_way(path, content):
    write(path, content)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.write_bytes = die_half_way
stego.save_checkpoint("c.pt", model, dict(step=2))
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert process.returncode == -9
    assert stego.load_checkpoint(tmp_path / "c.pt")[1] == {"step": 1}


def test_foreign_files_are_no_checkpoints(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 broken")
    for name in ("other.pt", "broken.pt", "missing.pt"):
        with pytest.raises(stego.InputError, match=name):
            stego.load_checkpoint(tmp_path / name)
