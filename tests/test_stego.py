"""stego.py: the losses against golden values and slow loops, gradients, shifts, head and probes, the ViT."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import ROOT

import stego

GOLDEN = {name: torch.from_numpy(np.asarray(value))  # of the authors' code at eb4d6b5
          for name, value in np.load(ROOT / "tests/golden_stego.npz").items()}


def golden_vit():
    weights = {key[4:]: value for key, value in GOLDEN.items() if key.startswith("vit/")}
    return stego.vit_from_state_dict(weights, num_heads=6).eval().requires_grad_(False)


def test_sample_equals_golden():
    # the authors' output has its two point axes swapped
    sampled = stego.sample(GOLDEN["sample_map"], GOLDEN["sample_points"])
    torch.testing.assert_close(sampled.transpose(2, 3), GOLDEN["sampled"], rtol=0, atol=1e-5)
    beyond = stego.sample(GOLDEN["sample_map"], torch.full((2, 1, 1, 2), 5.0))[:, :, 0, 0]
    assert torch.equal(beyond, GOLDEN["sample_map"][:, :, -1, -1])  # the border is repeated


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

    def cosine(a, b, n, h, w, i, j):
        a, b = a[n, :, h, w], b[n, :, i, j]
        return float(a @ b / (a.norm() * b.norm()))

    F = np.array([cosine(features_a, features_b, *k) for k in np.ndindex(loss.shape)]).reshape(loss.shape)
    for n, h, w, i, j in np.ndindex(F.shape):
        centered = F[n, h, w, i, j] - F[n, h, w].mean() + F.mean()
        S = cosine(codes_a, codes_b, n, h, w, i, j)
        assert loss[n, h, w, i, j].item() == pytest.approx(-max(S, 0) * (centered - 0.3), abs=1e-6)
    assert stego.correlation(torch.zeros(1, 4, 1, 1), codes_a[:1, :, :1, :1]) == 0  # and not NaN


def test_the_loss_teaches_the_codes_but_not_the_features():
    features, codes = (torch.randn(2, 6, 3, 3, requires_grad=True) for _ in range(2))
    stego.correspondence_loss(features, features, codes, codes, 0.1)[0].mean().backward()
    assert features.grad is None and codes.grad.abs().sum() > 0


def test_derangement_is_a_permutation_without_fixed_points_and_each_is_as_likely():
    for n in (2, 3, 16):
        for _ in range(50):
            partner = stego.derangement(n)
            assert sorted(partner.tolist()) == list(range(n)) and (partner != torch.arange(n)).all()
    counts = torch.stack([nnf.one_hot(stego.derangement(4), 4) for _ in range(3000)]).float().mean(0)
    assert (counts - (1 - torch.eye(4)) / 3).abs().max() < 0.04
    with pytest.raises(ValueError, match="two images"):
        stego.derangement(1)


@pytest.mark.parametrize("switches", [{}, {"center": False, "zero_clamp": False}, {"stabilize": True}])
def test_objective_equals_its_three_terms_written_out(switches):
    x, x_knn = torch.randn(2, 4, 6, 5, 7)
    s, s_knn = torch.randn(2, 4, 3, 5, 7)
    torch.manual_seed(2)
    loss, terms = stego.stego_loss(x, x_knn, s, s_knn, (0.5, 2.0, 3.0), (0.1, 0.2, 0.3), **switches)
    torch.manual_seed(2)  # the same points and negatives, drawn in the same order
    at, at_other = 2 * torch.rand(4, 11, 11, 2) - 1, 2 * torch.rand(4, 11, 11, 2) - 1

    def term(g, t, points, shift):
        pair = [stego.sample(*maps) for maps in ((x, at), (g, points), (s, at), (t, points))]
        return stego.correspondence_loss(*pair, shift, **switches)[0].mean()

    expected = {"self": term(x, s, at, 0.1), "knn": term(x_knn, s_knn, at_other, 0.2)}
    expected["rand"] = sum(term(x[rand], s[rand], at_other, 0.3)
                           for rand in [stego.derangement(4) for _ in range(5)]) / 5
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name])
    torch.testing.assert_close(loss, 0.5 * terms["self"] + 2 * terms["knn"] + 3 * terms["rand"])


def correspondences(share, n=200_000):
    """F of n pairs of points, a share of which show one class: unlike ones look the same everywhere."""
    return torch.where(torch.rand(n) < share, 0.8 + 0.1 * torch.randn(n), 0.1 + 0.2 * torch.randn(n))


def test_rates_are_those_of_a_mixture_of_like_and_unlike_pairs():
    rates = stego.same_class_rates(correspondences(0.5), correspondences(0.3), correspondences(0.1), 0.1)
    assert rates == pytest.approx((0.5, 0.3, 0.1), abs=0.01)
    F, alike = correspondences(0.1), torch.ones(1000)
    for nothing_to_see in ((F, F - 1, F), (alike, alike, alike)):
        assert stego.same_class_rates(*nothing_to_see, 0.2) == pytest.approx((0.2, 0.2, 0.2))


@pytest.mark.parametrize("n_groups, threshold", [(5, -1.0), (3, -1.0), (1, 0.2)])
def test_linkage_equals_a_slow_loop_over_the_members_of_groups(n_groups, threshold):
    vectors = nnf.normalize(torch.randn(40, 5), dim=1).double()
    groups = [part.tolist() for part in torch.arange(40).split([1, 1, 1, 2, 2, 3, 4, 6, 8, 12])]  # given
    sums = torch.stack([vectors[group].sum(0) for group in groups])
    found = stego.linkage(sums, torch.tensor([len(group) for group in groups]), n_groups, threshold)
    merged = [[i] for i in range(10)]
    while len(merged) > n_groups:
        def mean_cosine_and_cost(pair):
            a, b = ([member for i in merged[k] for member in groups[i]] for k in pair)
            cosine = (vectors[a] @ vectors[b].T).mean()
            return cosine, (1 - cosine) * (len(a) * len(b) / (len(a) + len(b))) ** (1 / 16)
        pairs = itertools.combinations(range(len(merged)), 2)
        a, b = min(pairs, key=lambda pair: mean_cosine_and_cost(pair)[1])
        if mean_cosine_and_cost((a, b))[0] <= threshold:
            break
        merged[a] += merged.pop(b)
    assert len(found.unique()) == len(merged)
    assert all(len(set(found[group].tolist())) == 1 for group in merged)


def test_head_is_a_linear_plus_a_nonlinear_branch_each_with_its_own_channel_dropout():
    head = stego.SegmentationHead(64, 4, dropout=0.5).eval()
    x, seen = torch.rand(3, 64, 2, 2) + 1, []
    first, _, second = head.nonlinear
    torch.testing.assert_close(head(x), head.linear(x) + second(first(x).relu()))
    for branch in (head.linear, head.nonlinear):
        branch.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head.train()(x)
    for maps in seen:
        dropped = (maps == 0).flatten(2)
        assert torch.equal(dropped.all(2), dropped.any(2)) and 0.3 < dropped.float().mean() < 0.7
    assert not torch.equal(*seen)


def test_cluster_probe_equals_golden():
    probe = stego.ClusterProbe(10, 9)
    probe.centroids.data = GOLDEN["probe_centroids"]
    cosine = probe(GOLDEN["probe_codes"])
    assert torch.equal(cosine.argmax(1), GOLDEN["probe_assign"])
    torch.testing.assert_close(probe.loss(GOLDEN["probe_codes"]), GOLDEN["probe_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close((2 * cosine).log_softmax(1), GOLDEN["probe_logp_alpha2"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 5), (17, 30), (9, 3)])
def test_linear_probe_loss_is_cross_entropy_of_the_interpolated_logits_without_void(size):
    logits, labels = torch.randn(3, 6, 4, 5, requires_grad=True), torch.randint(0, 6, (3, *size)).byte()
    labels[1] = labels[0, 0] = stego.VOID  # an image without a label, and some pixels
    large = nnf.interpolate(logits, size, mode="bilinear", align_corners=False)
    expected = nnf.cross_entropy(large, labels.long(), ignore_index=255)
    loss = stego.linear_probe_loss(logits, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_linear_probe_loss_of_a_batch_without_labels_is_zero_and_teaches_nothing():
    logits = torch.randn(2, 6, 4, 5, requires_grad=True)
    loss = stego.linear_probe_loss(logits, torch.full((2, 8, 8), stego.VOID, dtype=torch.uint8))
    assert loss == 0 and (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_a_model_teaches_its_head_and_never_its_backbone(backbone):
    model = stego.Stego(backbone.train().requires_grad_(), 5, 4, n_classes=3)
    images = torch.randn(2, 3, 32, 16, requires_grad=True)
    codes = model(images)
    assert codes.shape == (2, 5, 4, 2) and model.linear_probe(codes).shape == (2, 3, 4, 2)
    codes.sum().backward()
    assert images.grad is None and all(part.grad is not None for part in model.head.parameters())
    assert not any(parameter.requires_grad for parameter in backbone.parameters()) and not backbone.training


@pytest.mark.parametrize("size", ["native", "wide"])
@pytest.mark.parametrize("facet, name", [("token", "feat"), ("key", "key")])
def test_vit_equals_golden(size, facet, name):
    features = golden_vit()(GOLDEN[f"vit_{size}_images"], facet)
    torch.testing.assert_close(features, GOLDEN[f"vit_{size}_{name}"], rtol=0, atol=1e-5)
