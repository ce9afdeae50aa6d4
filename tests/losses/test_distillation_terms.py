"""Distillation terms: golden numbers and slow references."""

import math

import pytest
import torch
from torch.nn import functional as F

from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distillation import (
    ContrastiveMatch,
    GramMatch,
    LatentMatch,
    LogitKL,
    ProbabilityMSE,
    PrototypeMatch,
    SelfDistillation,
    SubsetMatch,
    VariationalMatch,
    WeightedSoftCE,
)
from pmixseg.losses.distillation.prototypes import similarity_maps
from tests.losses.distillation_scenes import batch_of, flags, labels, network, output, scene, voxel


def test_logit_kl_by_hand():
    # T = 2: p = softmax(ln 3, 0) = (¾, ¼), q = (½, ½): KL = ¾ ln 1.5 + ¼ ln ½.
    t, s = voxel(2 * math.log(3), 0.0), voxel(0.0, 0.0)
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    label = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    plain = LogitKL(temperature=2, squared=False)
    assert plain(output(s), output(t), batch_of(label)).item() == pytest.approx(want)
    assert LogitKL(temperature=2)(output(s), output(t), batch_of(label)).item() == pytest.approx(
        4 * want
    )


def test_protokd_ten_is_two_and_a_half():
    """Their KL is averaged over the four classes as well, without T²."""
    net = network(num_classes=4)
    s, t = scene(net)[0], scene(net, seed=1)[0]
    q, p = F.log_softmax(s / 10, 1), F.softmax(t / 10, 1)
    theirs = 10 * F.kl_div(q, p, reduction="none").mean()
    term = LogitKL(2.5, temperature=10, squared=False)
    ours = term.weight * term(output(s), output(t), batch_of(labels()))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_weighted_soft_ce_by_hand():
    # Voxel 1: y = 0, teacher (¾, ¼) right, student (½, ½): weight ln ¾ - ln ½ = ln 1.5.
    # Voxel 2: y = 1, same logits: the teacher is wrong → 0. Voxel 3: the student is better → 0.
    ln3 = math.log(3)
    t = torch.tensor([[ln3, ln3, ln3], [0.0, 0.0, 0.0]]).reshape(1, 2, 3, 1, 1)
    s = torch.tensor([[0.0, 0.0, 2 * ln3], [0.0, 0.0, 0.0]]).reshape(1, 2, 3, 1, 1)
    label = torch.tensor([0, 1, 0]).reshape(1, 3, 1, 1)
    # At T = 2: p = (√3, 1)/(√3 + 1) and q = ½, so the soft cross-entropy is ln 2.
    got = WeightedSoftCE(temperature=2)(output(s), output(t), batch_of(label))
    assert got.item() == pytest.approx(math.log(1.5) * math.log(2) / 3, rel=1e-5)


def test_probability_mse_by_hand():
    t, s = voxel(math.log(3), 0.0), voxel(0.0, 0.0)
    label = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    got = ProbabilityMSE()(output(s), output(t), batch_of(label))
    assert got.item() == pytest.approx(0.0625)


# Latents --------------------------------------------------------------------------------------


def one_level(values):
    """Latents of one sample, one channel, two voxels: one row of values per modality."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, len(values), 1, 2, 1, 1)


def test_latent_match_by_hand():
    two = network(("a", "b"), (1,), (1,), 2)
    logits = torch.zeros(1, 2, 2, 1, 1)
    label = torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    teacher = output(logits, [one_level([[0.0, 4.0], [2.0, 6.0]])], ("a", "b"))
    student = output(logits, [one_level([[1.0, 6.0], [3.0, 9.0]])], ("a", "b"))

    def value(present, **options):
        term = LatentMatch(epsilon=0.0, **options)
        term.bind(two, two)
        return term(student, teacher, batch_of(label, flags(present))).item()

    # P = (1, 5), Var = 4. a: (0 + 1)/2, b: (4 + 16)/2.
    assert value([1, 1]) == pytest.approx((0.5 + 10) / 2 / 4)
    assert value([1, 0]) == pytest.approx(0.5 / 4)
    # same: a: (1 + 4)/2 = 2.5, b: (1 + 9)/2 = 5; pooled Var of 0 4 2 6 is 5.
    assert value([1, 1], target="same") == pytest.approx(7.5 / 2 / 5)
    # fused: mean (2, 7.5) against (1, 5): (1 + 6.25)/2.
    assert value([1, 1], target="fused") == pytest.approx(3.625 / 4)
    assert value([0, 1], target="fused") == pytest.approx(10 / 4)


def test_latent_match_divides_by_the_mean_of_the_channels_variances():
    two = network(("a",), (2,), (1,), 2)
    logits, label = torch.zeros(1, 2, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    t = torch.tensor([[0.0, 4.0], [1.0, 1.0]]).reshape(1, 1, 2, 2, 1, 1)  # variances 4 and 0
    term = LatentMatch(epsilon=0.0)
    term.bind(two, two)
    given = output(logits, [t + 1], ("a",)), output(logits, [t], ("a",))
    assert term(*given, batch_of(label, flags([1]))).item() == pytest.approx(1 / 2)


def test_same_leaves_out_what_the_teacher_was_not_shown():
    two = network(("a", "b"), (1,), (1,), 2)
    logits, label = torch.zeros(1, 2, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    taught = one_level([[0.0, 4.0], [math.nan, math.nan]])
    teacher = output(logits, [taught], ("a", "b"), flags([1, 0]))
    student = output(logits, [one_level([[1.0, 6.0], [3.0, 9.0]])], ("a", "b"))
    term = LatentMatch(target="same", epsilon=0.0)
    term.bind(two, two)
    # a alone: (1 + 4)/2 over its variance 4.
    got = term(student, teacher, batch_of(label, flags([1, 1]))).item()
    assert got == pytest.approx(2.5 / 4)


def test_latent_match_uses_the_teachers_anchor_if_it_has_features():
    two = network(("a", "b"), (1,), (1,), 2)
    logits = torch.zeros(1, 2, 2, 1, 1)
    label = torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    teacher = output(logits, [one_level([[0.0, 4.0], [2.0, 6.0]])], ("a", "b"))
    student = output(logits, [one_level([[1.0, 6.0], [3.0, 9.0]])], ("a", "b"))
    values = {}
    for name, anchor in {
        "first": MixtureAnchor([1, 0]),
        "normal": NormalAnchor(),
        "none": None,
    }.items():
        if anchor is not None:
            anchor.bind(("a", "b"), 1)
        term = LatentMatch(epsilon=0.0)
        term.bind(two, two, anchor=anchor)
        values[name] = term(student, teacher, batch_of(label, flags([1, 1]))).item()
        assert not [n for n, _ in term.named_modules() if "anchor" in n]  # the teacher's own
    # P = (0, 4): a: (1 + 4)/2, b: (9 + 25)/2, Var 4.
    assert values["first"] == pytest.approx((2.5 + 17) / 2 / 4)
    assert values["normal"] == values["none"] == pytest.approx((0.5 + 10) / 2 / 4)


def test_subset_match_by_hand():
    two = network(("a", "b"), (1,), (1,), 2)
    logits = torch.zeros(1, 2, 2, 1, 1)
    features = [one_level([[0.0, 4.0], [2.0, 8.0]])]
    term = SubsetMatch(epsilon=0.0)
    term.bind(two, two)
    # Shown: a, (0, 4). The second draw: both, (1, 6) with variance 6.25: (1 + 4)/2.
    lesson = output(logits, features, ("a", "b"))
    student = output(logits, features, ("a", "b"))
    batch = batch_of(torch.zeros(1, 2, 1, 1, dtype=torch.int64), flags([1, 0]))
    assert term(student, lesson, batch).item() == pytest.approx(2.5 / 6.25)
    # The second draw: b alone, (2, 8) with variance 9; what a holds is not read.
    features = [features[0].clone()]
    features[0][0, 0] = math.nan
    lesson = output(logits, features, ("a", "b"), flags([0, 1]))
    assert term(student, lesson, batch).item() == pytest.approx((4 + 16) / 2 / 9)
    assert list(term.parameters()) == []


def test_gram_match_by_hand():
    one = network(("a",), (2,), (1,), 2)
    logits, label = torch.zeros(1, 2, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    f = torch.tensor([[1.0, 1.0], [0.0, 2.0]]).reshape(1, 1, 2, 2, 1, 1)  # channels x voxels
    t = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).reshape(1, 1, 2, 2, 1, 1)
    term = GramMatch()
    term.bind(one, one)
    # G^s = ½ [[2, 2], [2, 4]], G^t = ½ [[4, 0], [0, 0]]: differences -1, 1, 1, 2.
    batch = batch_of(label, flags([1]))
    assert term(output(logits, [f], ("a",)), output(logits, [t], ("a",)), batch).item() == 1.75


def test_variational_match_by_hand():
    one = network(("a",), (1,), (1,), 2)
    logits, label = torch.zeros(1, 2, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    student = output(logits, [one_level([[1.0, 2.0]])], ("a",))
    teacher = output(logits, [one_level([[3.0, 3.0]])], ("a",))
    term = VariationalMatch()
    term.bind(one, one)
    batch = batch_of(label, flags([1]))
    assert term(student, teacher, batch).item() == pytest.approx(0.5 * (4 + 1) / 2)
    term.raw_variances["1"].data.fill_(-30.0)  # σ² stops at 0.01
    want = 0.5 * (2.5 / 0.01 + math.log(0.01))
    assert term(student, teacher, batch).item() == pytest.approx(want, rel=1e-5)


def test_contrastive_match_by_hand():
    one = network(("a",), (2,), (1,), 2)
    logits = torch.zeros(2, 2, 1, 1, 1)
    label = torch.zeros(2, 1, 1, 1, dtype=torch.int64)
    s = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).reshape(2, 1, 2, 1, 1, 1)
    # Teacher: 60° from the first axis, and the second axis.
    t = torch.tensor([[1.0, math.sqrt(3)], [0.0, 5.0]]).reshape(2, 1, 2, 1, 1, 1)
    term = ContrastiveMatch()
    term.bind(one, one)
    every = flags([1], [1])
    # d² = 2 - 2 cos. d₀₀² = 1, d₁₁² = 0; d₀₁² = 2 (beyond the margin), d₁₀² = 2 - √3.
    near = math.sqrt(2 - math.sqrt(3))
    apart = 0.5 * (1 + 0 + 0 + (1 - near) ** 2) / 2
    given = (output(logits, [s], ("a",)), output(logits, [t], ("a",)))
    assert term(*given, batch_of(label, every)).item() == pytest.approx(apart, rel=1e-5)
    # Two patches of one case: all four pairs are the same case.
    joined = 0.5 * ((1 + 2) / 2 + (2 - math.sqrt(3) + 0) / 2) / 2
    got = term(*given, batch_of(label, every, ["x", "x"])).item()
    assert got == pytest.approx(joined, rel=1e-5)


def test_prototype_match_by_hand():
    one = network(("a",), (2,), (1,), 2)
    logits = torch.zeros(1, 2, 2, 1, 1)
    label = torch.tensor([0, 1]).reshape(1, 2, 1, 1)
    s = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).reshape(1, 1, 2, 2, 1, 1)  # (1, 0) and (1, 1)
    t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 2, 2, 1, 1)  # (1, 0) and (0, 1)
    term = PrototypeMatch()
    term.bind(one, one)
    given = (output(logits, [s], ("a",)), output(logits, [t], ("a",)))
    batch = batch_of(label, flags([1]))
    # The prototypes are the voxels; off the diagonal cos 45° against cos 90°: squared ½. Per class
    # the mean over two voxels is ¼.
    assert term(*given, batch).item() == pytest.approx(0.25, abs=1e-5)
    # All of one class: prototypes (1, ½) and (½, ½), and one class to divide by.
    batch["label"] = torch.zeros_like(label)
    mine, theirs = (2 / math.sqrt(5), 3 / math.sqrt(10)), (1 / math.sqrt(2),) * 2
    want = sum((x - y) ** 2 for x, y in zip(mine, theirs, strict=True)) / 2
    assert term(*given, batch).item() == pytest.approx(want, abs=1e-5)


def test_a_class_counts_from_a_mass_of_one_voxel():
    one = network(("a",), (3,), (2,), 2)
    label = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    label[0, 0, 0, :2] = 1  # 2/8 of a coarse voxel
    f, t = torch.randn(2, 1, 1, 3, 2, 2, 2).unbind(0)
    logits = torch.zeros(1, 2, 4, 4, 4)
    term = PrototypeMatch()
    term.bind(one, one)
    given = (output(logits, [f], ("a",)), output(logits, [t], ("a",)))
    with_two = term(*given, batch_of(label, flags([1])))
    label[0, :2, :2, :2] = 1  # one coarse voxel
    with_eight = term(*given, batch_of(label, flags([1])))
    fractions = torch.ones(1, 1, 2, 2, 2)
    fractions[0, 0, 0, 0, 0] = 6 / 8
    only = (similarity_maps(f, fractions) - similarity_maps(t, fractions)).square().mean()
    assert with_two.item() == pytest.approx(only.item(), rel=1e-5)
    assert with_eight != with_two
    # No class reaches a mass of one voxel: one coarse voxel, half and half.
    tiny = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    tiny[0, 0] = 1
    given = [output(torch.zeros(1, 2, 2, 2, 2), [x[..., :1, :1, :1]], ("a",)) for x in (f, t)]
    assert term(*given, batch_of(tiny, flags([1]))).item() == 0.0


def test_self_distillation_is_the_sum_of_its_parts():
    net = network()
    (s, fs), (t, ft) = scene(net), scene(net, seed=1)
    present = flags([1, 0, 1, 0], [0, 0, 0, 1])
    whole = SelfDistillation()
    parts = [LogitKL(0.5, 4.0), PrototypeMatch(0.1)]
    for term in (whole, *parts):
        term.bind(net, net)
    given = output(s, fs), output(t, ft), batch_of(labels(), present)
    want = sum(term.weight * term(*given) for term in parts)
    assert whole(*given).item() == pytest.approx(want.item()) and whole.self_taught
