"""Distillation losses: golden numbers and slow references."""

import math

import pytest
import torch
from torch.nn import functional as F

from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distillation import (
    ContrastiveMatch,
    GramMatch,
    LatentMatch,
    LatentPrototypeMatch,
    LogitKL,
    ProbabilityMSE,
    PrototypeMatch,
    SelfDistillation,
    SubsetMatch,
    VariationalMatch,
    WeightedSoftCE,
)
from pmixseg.losses.distillation.prototypes import similarity_maps
from tests.losses.scenes import batch_of, flags, labels, network, output, scene, voxel

ONE = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
"""The label of one voxel."""


def test_logit_kl_by_hand():
    # T = 2: p = softmax(ln 3, 0) = (¾, ¼), q = (½, ½): KL = ¾ ln 1.5 + ¼ ln ½.
    t, s = voxel(2 * math.log(3), 0.0), voxel(0.0, 0.0)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    plain, squared = LogitKL(temperature=2, squared=False), LogitKL(temperature=2)
    assert plain(output(s), output(t), batch_of(ONE)).item() == pytest.approx(expected)
    assert squared(output(s), output(t), batch_of(ONE)).item() == pytest.approx(4 * expected)


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
    # y = 0, teacher (¾, ¼) right everywhere but in voxel 2, where y = 1.
    # Voxel 1: student (½, ½): weight ln ¾ - ln ½ = ln 1.5. Voxel 2: the teacher is wrong: 0.
    # Voxel 3: the student is better: 0. Voxel 4: student (¼, ¾): weight ln ¾ - ln ¼ = ln 3.
    ln3 = math.log(3)
    t = torch.tensor([[ln3, ln3, ln3, ln3], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 4, 1, 1)
    s = torch.tensor([[0.0, 0.0, 2 * ln3, 0.0], [0.0, 0.0, 0.0, ln3]]).reshape(1, 2, 4, 1, 1)
    label = torch.tensor([0, 1, 0, 0]).reshape(1, 4, 1, 1)
    # At T = 2: p = (a, b) = (√3, 1)/(√3 + 1). q is (½, ½) in voxel 1 and (b, a) in voxel 4.
    a, b = math.sqrt(3) / (math.sqrt(3) + 1), 1 / (math.sqrt(3) + 1)
    first, fourth = math.log(2), -(a * math.log(b) + b * math.log(a))
    expected = (math.log(1.5) * first + ln3 * fourth) / (math.log(1.5) + ln3)
    actual = WeightedSoftCE(temperature=2)(output(s), output(t), batch_of(label))
    assert actual.item() == pytest.approx(expected, rel=1e-5)
    # A student that is never behind has nothing to learn; the mean over no voxel is 0.
    s = t.clone().requires_grad_()
    nothing = WeightedSoftCE()(output(s), output(t), batch_of(label))
    nothing.backward()
    assert nothing.item() == 0 and not s.grad.any()


def test_probability_mse_by_hand():
    t, s = voxel(math.log(3), 0.0), voxel(0.0, 0.0)
    actual = ProbabilityMSE()(output(s), output(t), batch_of(ONE))
    assert actual.item() == pytest.approx(0.0625)


def test_probability_mse_over_the_foreground_and_its_ramp_by_hand():
    # p = (½, ¼, ¼), q = (⅓, ⅓, ⅓): the foreground's squared differences are 1/144 each.
    t, s = voxel(math.log(2), 0.0, 0.0), voxel(0.0, 0.0, 0.0)
    loss = ProbabilityMSE(10.0, over="foreground", ramp_epochs=20)
    actual = loss(output(s), output(t), batch_of(ONE))
    assert actual.item() == pytest.approx(2 / 144)
    # 10·exp(-5 (1 - e/20)²): e⁻⁵, e^(-5/4), then 1 for ever.
    strengths = [loss.strength(epoch) for epoch in (0, 10, 20, 200)]
    assert strengths == pytest.approx([math.exp(-5), math.exp(-1.25), 1.0, 1.0])
    assert ProbabilityMSE().strength(0) == 1.0


# Latents --------------------------------------------------------------------------------------


def one_level(values):
    """Latents of one sample, one channel, two voxels: one row of values per modality."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, len(values), 1, 2, 1, 1)


TWO = network(("a", "b"), (1,), (1,), 2)
LOGITS = torch.zeros(1, 2, 2, 1, 1)
LABEL = torch.zeros(1, 2, 1, 1, dtype=torch.int64)


def of_two(a, b, shown=None):
    """The output of a network that made these latents of its two modalities."""
    return output(LOGITS, [one_level([a, b])], ("a", "b"), shown)


TAUGHT, LEARNT = of_two([0.0, 4.0], [2.0, 6.0]), of_two([1.0, 6.0], [3.0, 9.0])


def matched(term, student, teacher, present, **bound):
    """What a term says of two networks that show these modalities."""
    term.bind(TWO, TWO, **bound)
    return term(student, teacher, batch_of(LABEL, flags(present))).item()


def compared(term, student, teacher, label=LABEL, shown=((1,),), cases=None):
    """What a term says of latents ``[B, 1, C, ...]`` of a network with one modality."""
    if not term.pairs:
        net = network(("a",), (student.shape[2],), (label.shape[-1] // student.shape[-1],), 2)
        term.bind(net, net)
    logits = torch.zeros(len(label), 2, *label.shape[1:])
    outputs = (output(logits, [latents], ("a",)) for latents in (student, teacher))
    return term(*outputs, batch_of(label, flags(*shown), *([cases] if cases else []))).item()


def test_latent_match_by_hand():
    def value(present, **options):
        return matched(LatentMatch(epsilon=0.0, **options), LEARNT, TAUGHT, present)

    # P = (1, 5). a: (0 + 1)/2, b: (4 + 16)/2. The variance of the latents 0 4 2 6 is 5.
    assert value([1, 1]) == pytest.approx((0.5 + 10) / 2 / 5)
    assert value([1, 0]) == pytest.approx(0.5 / 5)
    # same: a: (1 + 4)/2 = 2.5, b: (1 + 9)/2 = 5.
    assert value([1, 1], target="same") == pytest.approx(7.5 / 2 / 5)
    # fused: mean (2, 7.5) against (1, 5): (1 + 6.25)/2.
    assert value([1, 1], target="fused") == pytest.approx(3.625 / 5)
    assert value([0, 1], target="fused") == pytest.approx(10 / 5)


def test_the_scale_is_the_same_for_an_aligned_and_an_unaligned_teacher():
    """The same error against the mean weighs the same, however far apart the latents are."""
    student = of_two([1.0, 5.0], [1.0, 5.0])
    # The mean is (0, 4) both times; the variance of the latents is 4 and 4 + 9.
    teachers = of_two([0.0, 4.0], [0.0, 4.0]), of_two([-3.0, 1.0], [3.0, 7.0])
    values = [matched(LatentMatch(epsilon=0.0), student, teacher, [1, 1]) for teacher in teachers]
    assert values == pytest.approx([1 / 4, 1 / 13])


def test_latent_match_divides_by_the_mean_of_the_channels_variances():
    t = torch.tensor([[0.0, 4.0], [1.0, 1.0]]).reshape(1, 1, 2, 2, 1, 1)  # variances 4 and 0
    assert compared(LatentMatch(epsilon=0.0), t + 1, t) == pytest.approx(1 / 2)


def test_same_leaves_out_what_the_teacher_was_not_shown():
    teacher = of_two([0.0, 4.0], [math.nan, math.nan], flags([1, 0]))
    # a alone: (1 + 4)/2 over its variance 4.
    actual = matched(LatentMatch(target="same", epsilon=0.0), LEARNT, teacher, [1, 1])
    assert actual == pytest.approx(2.5 / 4)


def test_latent_match_uses_the_teachers_anchor_if_it_has_features():
    values = {}
    for name, anchor in {
        "first": MixtureAnchor([1, 0]),
        "normal": NormalAnchor(),
        "none": None,
    }.items():
        if anchor is not None:
            anchor.bind(("a", "b"), 1)
        term = LatentMatch(epsilon=0.0)
        values[name] = matched(term, LEARNT, TAUGHT, [1, 1], anchor=anchor)
        assert not [n for n, _ in term.named_modules() if "anchor" in n]  # the teacher's own
    # P = (0, 4): a: (1 + 4)/2, b: (9 + 25)/2, Var 5.
    assert values["first"] == pytest.approx((2.5 + 17) / 2 / 5)
    assert values["normal"] == values["none"] == pytest.approx((0.5 + 10) / 2 / 5)


def test_subset_match_by_hand():
    two = network(("a", "b"), (1,), (1,), 2)
    logits = torch.zeros(1, 2, 2, 1, 1)
    features = [one_level([[0.0, 4.0], [2.0, 8.0]])]
    term = SubsetMatch(epsilon=0.0)
    term.bind(two, two)
    # Shown: a, (0, 4). The second draw: both, (1, 6): (1 + 4)/2. The variance of 0 4 2 8 is 8.75.
    teacher_output = output(logits, features, ("a", "b"))
    student = output(logits, features, ("a", "b"))
    batch = batch_of(torch.zeros(1, 2, 1, 1, dtype=torch.int64), flags([1, 0]))
    assert term(student, teacher_output, batch).item() == pytest.approx(2.5 / 8.75)
    # The second draw: b alone, (2, 8) with variance 9; what a holds is not read.
    features = [features[0].clone()]
    features[0][0, 0] = math.nan
    teacher_output = output(logits, features, ("a", "b"), flags([0, 1]))
    assert term(student, teacher_output, batch).item() == pytest.approx((4 + 16) / 2 / 9)
    assert list(term.parameters()) == []


def test_gram_match_by_hand():
    f = torch.tensor([[1.0, 1.0], [0.0, 2.0]]).reshape(1, 1, 2, 2, 1, 1)  # channels x voxels
    t = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).reshape(1, 1, 2, 2, 1, 1)
    # G^s = ½ [[2, 2], [2, 4]], G^t = ½ [[4, 0], [0, 0]]: differences -1, 1, 1, 2.
    assert compared(GramMatch(), f, t) == 1.75
    # SMU-Net: G/(C·N) halves the matrices; Σ (…)² = 7/4, divided by 4 · 2² · (2·1)².
    published = GramMatch(normalisation="smunet")
    assert compared(published, f, t) == pytest.approx(7 / 4 / (4 * 4 * 4))
    # Of three sides the first two count: of 1 x 1 x 2 voxels these are (1·1)².
    f, t, label = (x.reshape(*x.shape[:-3], 1, 1, 2) for x in (f, t, LABEL))
    assert compared(published, f, t, label) == pytest.approx(7 / 4 / (4 * 4))


def test_variational_match_by_hand():
    latents = one_level([[1.0, 2.0]]), one_level([[3.0, 3.0]])
    term = VariationalMatch()
    assert compared(term, *latents) == pytest.approx(0.5 * (4 + 1) / 2)
    term.raw_variances["1"].data.fill_(-30.0)  # σ² stops at 0.01
    expected = 0.5 * (2.5 / 0.01 + math.log(0.01))
    assert compared(term, *latents) == pytest.approx(expected, rel=1e-5)


def test_contrastive_match_by_hand():
    label = torch.zeros(2, 1, 1, 1, dtype=torch.int64)
    s = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).reshape(2, 1, 2, 1, 1, 1)
    # Teacher: 60° from the first axis, and the second axis.
    t = torch.tensor([[1.0, math.sqrt(3)], [0.0, 5.0]]).reshape(2, 1, 2, 1, 1, 1)
    term, every = ContrastiveMatch(), ((1,), (1,))
    # d² = 2 - 2 cos. d₀₀² = 1, d₁₁² = 0; d₀₁² = 2 (beyond the margin), d₁₀² = 2 - √3.
    near = math.sqrt(2 - math.sqrt(3))
    apart = 0.5 * (1 + 0 + 0 + (1 - near) ** 2) / 2
    assert compared(term, s, t, label, every) == pytest.approx(apart, rel=1e-5)
    # Two patches of one case: all four pairs are the same case.
    joined = 0.5 * ((1 + 2) / 2 + (2 - math.sqrt(3) + 0) / 2) / 2
    assert compared(term, s, t, label, every, ["x", "x"]) == pytest.approx(joined, rel=1e-5)


def test_prototype_match_by_hand():
    label = torch.tensor([0, 1]).reshape(1, 2, 1, 1)
    s = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).reshape(1, 1, 2, 2, 1, 1)  # (1, 0) and (1, 1)
    t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 2, 2, 1, 1)  # (1, 0) and (0, 1)
    term = LatentPrototypeMatch()
    # The prototypes are the voxels; off the diagonal cos 45° against cos 90°: squared ½. Per class
    # the mean over two voxels is ¼.
    assert compared(term, s, t, label) == pytest.approx(0.25, abs=1e-5)
    # All of one class: prototypes (1, ½) and (½, ½), and one class to divide by.
    mine, theirs = (2 / math.sqrt(5), 3 / math.sqrt(10)), (1 / math.sqrt(2),) * 2
    expected = sum((x - y) ** 2 for x, y in zip(mine, theirs, strict=True)) / 2
    assert compared(term, s, t, torch.zeros_like(label)) == pytest.approx(expected, abs=1e-5)


def test_a_class_counts_from_a_mass_of_one_voxel():
    label = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    label[0, 0, 0, :2] = 1  # 2/8 of a coarse voxel
    f, t = torch.randn(2, 1, 1, 3, 2, 2, 2).unbind(0)
    term = LatentPrototypeMatch()
    with_two = compared(term, f, t, label)
    label[0, :2, :2, :2] = 1  # one coarse voxel
    with_eight = compared(term, f, t, label)
    fractions = torch.ones(1, 1, 2, 2, 2)
    fractions[0, 0, 0, 0, 0] = 6 / 8
    only = (similarity_maps(f, fractions) - similarity_maps(t, fractions)).square().mean()
    assert with_two == pytest.approx(only.item(), rel=1e-5)
    assert with_eight != with_two
    # No class reaches a mass of one voxel: one coarse voxel, half and half.
    tiny = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    tiny[0, 0] = 1
    assert compared(term, *(x[..., :1, :1, :1] for x in (f, t)), tiny) == 0.0


def test_self_distillation_by_hand():
    # T = 4: teacher p = (¾, ¼), single modality q = (½, ½); the mean over two classes.
    t, s = voxel(4 * math.log(3), 0.0), voxel(0.0, 0.0)
    divergence = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    loss = SelfDistillation(prototype_weight=0.0)
    batch = batch_of(ONE, flags([1]))
    assert loss(output(s), output(t), batch).item() == pytest.approx(0.5 * divergence)
    # Two auxiliary maps: as far apart as the logits, at ½, and equal ones, at ¼. Other extras and
    # maps that only one side has are not compared.
    student, teacher = output(s), output(t)
    student.extras = {"ds2": t, "ds1": s, "separate": s, "ds3": s}
    teacher.extras = {"ds1": t, "ds2": t, "separate": t}
    assert loss(student, teacher, batch).item() == pytest.approx(0.5 * 1.5 * divergence)
    shallow = SelfDistillation(prototype_weight=0.0, deep=False)
    assert shallow(student, teacher, batch).item() == pytest.approx(0.5 * divergence)
    # A sample that lacks the modality counts as 0.
    two = [torch.cat([x, x]) for x in (s, t)]
    batch = batch_of(torch.cat([ONE, ONE]), flags([1], [0]))
    actual = loss(output(two[0]), output(two[1]), batch).item()
    assert actual == pytest.approx(0.5 * divergence / 2)


def test_self_distillation_is_what_passion_computes():
    """A slow reference: probabilities drawn up, floored at 0.005, means over everything."""
    torch.manual_seed(0)
    sides = (8, 8, 4, 2, 1)  # logits and the maps of RFNet at 1, ½, ¼, ⅛
    s, t = ([20 * torch.randn(1, 4, n, n, n, dtype=torch.float64) for n in sides] for _ in range(2))
    label = torch.randint(0, 4, (1, 8, 8, 8))
    weights = (1, 0.5, 0.25, 0.125, 0.0625)
    expected = 0.0
    for mine, theirs, weight in zip(s, t, weights, strict=True):
        probabilities = []
        for logits in (mine, theirs):
            p = F.softmax(logits / 4, 1)
            up = F.interpolate(p, (8, 8, 8), mode="trilinear", align_corners=True)
            probabilities.append(up.clamp(0.005, 1))
        q, p = probabilities
        expected += weight * (16 * p * (p / q).log()).mean()
    prototypes = PrototypeMatch()(output(s[0]), output(t[0]), batch_of(label))
    student, teacher = output(s[0]), output(t[0])
    student.extras = {f"ds{k}": each for k, each in enumerate(s[1:], 1)}
    teacher.extras = {f"ds{k}": each for k, each in enumerate(t[1:], 1)}
    actual = SelfDistillation()(student, teacher, batch_of(label))
    assert actual.item() == pytest.approx((0.5 * expected + 0.1 * prototypes).item())


def test_prototypes_of_the_decoder_are_those_of_the_literature():
    """A slow reference of ProtoKD's and PASSION's term, on one sample with all classes."""
    torch.manual_seed(0)
    label = torch.randint(0, 3, (1, 4, 4, 4))
    s, t = torch.randn(1, 5, 4, 4, 4), torch.randn(1, 7, 4, 4, 4)
    squared = []
    for k in range(3):
        where = label[0] == k
        maps = [
            F.cosine_similarity(f[0], f[0][:, where].mean(1)[:, None, None, None], dim=0)
            for f in (s, t)
        ]
        squared.append((maps[0] - maps[1]).square().mean())
    logits = torch.zeros(1, 3, 4, 4, 4)
    coarse = torch.randn(1, 5, 2, 2, 2)
    arguments = output(logits, decoder=[coarse, s]), output(logits, decoder=[coarse, t])
    loss = PrototypeMatch()
    assert loss(*arguments, batch_of(label)).item() == pytest.approx(
        torch.stack(squared).mean().item(), rel=1e-4
    )
    assert PrototypeMatch(index=0)(*arguments, batch_of(label)).item() == 0
