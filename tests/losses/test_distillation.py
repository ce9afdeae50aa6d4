"""What every distillation loss must do: networks that differ, gradients, options."""

import pytest
import torch
from torch.nn import functional as F

from pmixseg.describe import build, describe
from pmixseg.errors import InputError
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
from tests.losses.scenes import NAMES, batch_of, flags, labels, network, output, scene

TERMS = [
    LogitKL,
    WeightedSoftCE,
    ProbabilityMSE,
    LatentMatch,
    GramMatch,
    VariationalMatch,
    ContrastiveMatch,
    PrototypeMatch,
    LatentPrototypeMatch,
    SelfDistillation,
    SubsetMatch,
]


def differing_networks():
    """A student of two modalities and a teacher of four; strides 1 2 4 8 against 2 4 16."""
    student = network(("t2", "flair"), (2, 3, 4, 5), (1, 2, 4, 8))
    teacher = network(NAMES, (6, 7, 8), (2, 4, 16))
    return student, teacher


@pytest.mark.parametrize("make", [t for t in TERMS if t is not SubsetMatch])
def test_networks_may_differ(make):
    student, teacher = differing_networks()
    s, fs = scene(student, side=16)
    t, ft = scene(teacher, side=16, seed=1)
    leaves = [s, *fs]
    for leaf in leaves:
        leaf.requires_grad_()
    term = make()
    term.bind(student, teacher)
    present = flags([1, 1], [1, 0])
    # In sample 1 flair is not shown; its slot holds rubbish. The teacher lacks t1ce in sample 0.
    acquired = flags([1, 0, 1, 1], [1, 1, 1, 1])
    for feature in ft:
        feature[0, 1] = torch.nan
    with torch.no_grad():
        for feature in fs:
            feature[1, 1] = torch.nan
    taught, learnt = output(t, ft, NAMES, acquired), output(s, fs, student.modalities)
    loss = term(learnt, taught, batch_of(labels(side=16), present))
    loss.backward()
    assert torch.isfinite(loss) and loss.ndim == 0
    gradients = [x.grad for x in leaves if x.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    for p in term.parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all()


@pytest.mark.parametrize("make", TERMS)
def test_gradients_are_right(make):
    net = network(("a", "b"), (2, 3), (1, 2))
    torch.manual_seed(0)
    s, fs = scene(net, dtype=torch.float64, side=2)
    t, ft = scene(net, dtype=torch.float64, side=2, seed=1)
    term = make()
    term.bind(net, net)
    term.double()
    names = [n for n, _ in term.named_parameters()]
    leaves = [s, *fs, *[torch.randn_like(p) for p in term.parameters()]]
    batch = batch_of(labels(side=2), flags([1, 1], [0, 1]))
    taught = output(t, ft, ("a", "b"))

    def loss(s, f0, f1, *arguments):
        learnt = output(s, [f0, f1], ("a", "b"))
        replaced = dict(zip(names, arguments, strict=True))
        return torch.func.functional_call(term, replaced, (learnt, taught, batch))

    if make is WeightedSoftCE:  # its weight is detached: compare with the weight held
        logits = s.requires_grad_()
        weight = (
            (
                F.cross_entropy(s, batch["label"], reduction="none")
                - F.cross_entropy(t, batch["label"], reduction="none")
            )
            .clamp_min(0)
            .detach()
        ) * (t.argmax(1) == batch["label"])
        soft = -(F.softmax(t / 10, 1) * F.log_softmax(s / 10, 1)).sum(1)
        held = (weight * soft).sum() / weight.sum()
        (expected,) = torch.autograd.grad(held, logits)
        (actual,) = torch.autograd.grad(loss(*leaves), logits)
        assert torch.allclose(actual, expected) and expected.abs().max() > 0
        return
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("make", TERMS)
def test_the_teacher_gets_no_gradient_and_autocast_changes_nothing(make):
    net = network()
    (s, fs), (t, ft) = scene(net), scene(net, seed=1)
    for x in (s, *fs, t, *ft):
        x.requires_grad_()
    term = make()
    term.bind(net, net)
    batch = batch_of(labels())
    expected = term(output(s, fs), output(t, ft), batch)
    expected.backward()
    assert all(x.grad is None for x in (t, *ft))
    with torch.autocast("cpu", torch.bfloat16):
        actual = term(output(s, fs), output(t, ft), batch)
    assert actual == expected and actual.dtype == torch.float32


@pytest.mark.parametrize("make", [LatentMatch, LatentPrototypeMatch, GramMatch, VariationalMatch])
def test_early_fusion_on_either_side(make):
    fused, several = network(NAMES, slots=("fused",)), network(NAMES)
    for student, teacher in ((fused, several), (several, fused), (fused, fused)):
        s, fs = scene(student)
        t, ft = scene(teacher, seed=1)
        term = make()
        term.bind(student, teacher)
        value = term(
            output(s, fs, student.slots),
            output(t, ft, teacher.slots),
            batch_of(labels(), flags([1, 0, 0, 0], [0, 1, 1, 0])),
        )
        assert torch.isfinite(value) and value > 0


@pytest.mark.parametrize(
    "make", [LatentMatch, PrototypeMatch, LatentPrototypeMatch, SelfDistillation, SubsetMatch]
)
def test_equal_networks_agree(make):
    """A student that equals its teacher has nothing to learn; maps start as the identity."""
    net = network(("a",))
    s, fs = scene(net)
    term = make()
    term.bind(net, net)
    value = term(output(s, fs, ("a",)), output(s, fs, ("a",)), batch_of(labels(), flags([1], [1])))
    assert value.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "make",
    [LatentMatch, LatentPrototypeMatch, GramMatch, VariationalMatch, ContrastiveMatch, SubsetMatch],
)
@pytest.mark.parametrize("fill", [0.0, 7.0])
def test_constant_latents_have_finite_gradients(make, fill):
    net = network(("a", "b"), (2,), (4,))
    s, (f,) = scene(net)
    f = torch.full_like(f, fill).requires_grad_()  # one voxel, no variance
    term = make()
    term.bind(net, net)
    arguments = output(s, [f], ("a", "b")), output(s, [f.detach()], ("a", "b"))
    loss = term(*arguments, batch_of(labels(), flags([1, 1], [0, 1])))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(f.grad).all()


@pytest.mark.parametrize(
    ("make", "student", "teacher", "match"),
    [
        (LogitKL, network(num_classes=4), network(), "4; distil|3 classes"),
        (LatentMatch, network(strides=(1, 3)), network(strides=(2, 4)), "strides"),
        (lambda: LatentMatch(strides=[8]), network(), network(), "strides"),
        (
            lambda: LatentMatch(target="same"),
            network(("a", "b")),
            network(("a", "c")),
            "not \\['b'\\]",
        ),
    ],
)
def test_networks_that_cannot_be_compared_are_refused(make, student, teacher, match):
    with pytest.raises(InputError, match=match):
        make().bind(student, teacher)


@pytest.mark.parametrize("make", TERMS)
def test_wrong_weights_are_refused_and_terms_can_be_described(make):
    with pytest.raises(InputError, match="weight"):
        make(weight=-1.0)
    term = make(weight=0.25)
    again = build(describe(term))
    assert type(again) is make and again.weight == 0.25


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match="temperature"):
        LogitKL(temperature=0)
    with pytest.raises(InputError, match="target"):
        LatentMatch(target="other")
    with pytest.raises(InputError, match="over is 'all'"):
        ProbabilityMSE(over="all")
    with pytest.raises(InputError, match="ramp_epochs"):
        ProbabilityMSE(ramp_epochs=-1)
    with pytest.raises(InputError, match="normalisation"):
        GramMatch(normalisation="other")
    with pytest.raises(InputError, match="student_sees"):
        SelfDistillation(student_sees="all")


def test_single_modalities_of_early_fusion_cannot_be_decoded():
    fused = network(NAMES, slots=("fused",))
    with pytest.raises(InputError, match="mixes modalities at the input"):
        SelfDistillation().bind(fused, fused)
    SelfDistillation(student_sees="shown").bind(fused, fused)


def test_a_network_without_decoder_maps_or_with_others_is_one_sentence():
    net = network()
    (s, fs), (t, ft) = scene(net), scene(net, seed=1)
    batch = batch_of(labels())
    with pytest.raises(InputError, match=r"student's backbone gives 0 in SegOutput.decoder"):
        PrototypeMatch()(output(s, fs, decoder=[]), output(t, ft), batch)
    with pytest.raises(InputError, match=r"teacher's backbone gives 1"):
        PrototypeMatch(index=1)(output(s, fs, decoder=[s, s]), output(t, ft), batch)
    with pytest.raises(InputError, match=r"\[4, 4, 4\] voxels in the student and \[2, 2, 2\]"):
        PrototypeMatch()(output(s, fs), output(t, ft, decoder=[t[..., ::2, ::2, ::2]]), batch)


LATENT = [
    LatentMatch,
    SubsetMatch,
    GramMatch,
    lambda: GramMatch(normalisation="smunet"),
    VariationalMatch,
    ContrastiveMatch,
    LatentPrototypeMatch,
]


@pytest.mark.parametrize("make", LATENT)
def test_background_of_a_patch_has_no_influence(make):
    """70 % of the voxels are background: what stands there changes nothing, nor does its share."""
    net = network(("a", "b"), (3,), (1,))
    term = make()
    term.bind(net, net)

    def value(width, seed):
        # 2 samples, 3 x 10 x width voxels of which 3 x 3 x 10 are brain.
        torch.manual_seed(0)
        inside = torch.randn(2, 2, 2, 3, 3, 3, 10)
        torch.manual_seed(seed)
        maps = 5 * torch.randn(2, 2, 2, 3, 3, width, 10)
        maps[..., :3, :] = inside
        brain = torch.zeros(2, 3, width, 10, dtype=torch.bool)
        brain[:, :, :3] = True
        label = torch.zeros(2, 3, width, 10, dtype=torch.int64)
        label[:, :, :2] = 1
        student, teacher = (
            output(torch.zeros(2, 3, 3, width, 10), [m], ("a", "b"), brain=[brain]) for m in maps
        )
        return term(student, teacher, batch_of(label, flags([1, 0], [1, 1]))).item()

    expected = value(10, 1)
    assert expected > 0
    assert value(10, 2) == pytest.approx(expected, rel=1e-5)
    if "lambda" not in make.__name__:  # SMU-Net's own normalisation divides by the sides
        assert value(5, 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", LATENT)
def test_a_patch_without_brain_counts_as_nothing(make):
    net = network(("a", "b"), (3,), (1,))
    term = make()
    term.bind(net, net)
    s, (f,) = scene(net)
    t, (g,) = scene(net, seed=1)
    f.requires_grad_()
    none = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    arguments = output(s, [f], ("a", "b"), brain=[none]), output(t, [g], ("a", "b"), brain=[none])
    value = term(*arguments, batch_of(labels(), flags([1, 1], [0, 1])))
    value.backward()
    assert f.grad.isfinite().all() and not f.grad.any()
    # Embeddings of nothing coincide: no distance to the same case, a margin to the other.
    assert value.item() == pytest.approx(0.5 if make is ContrastiveMatch else 0.0, abs=1e-5)


@pytest.mark.parametrize("make", TERMS)
def test_a_loss_is_one_graph_whatever_is_shown(make):
    """No tensor's value is asked for, and no shape depends on the masks: compiled once."""
    net = network()
    (s, fs), (t, ft) = scene(net), scene(net, seed=1)
    term = make()
    term.bind(net, net)
    torch.compiler.reset()
    compiled = torch.compile(term, fullgraph=True, dynamic=False, backend="eager")
    brain = [torch.rand(2, 4 // stride, 4 // stride, 4 // stride) < 0.5 for stride in (1, 2)]
    rows = [([1, 0, 0, 1], [0, 1, 1, 1]), ([1, 1, 1, 1], [1, 0, 0, 0])]
    for step, row in enumerate(rows):
        batch = batch_of(labels(seed=step), flags(*row))
        batch["case"] = torch.tensor([step, 5])
        arguments = output(s, fs, brain=brain), output(t, ft), batch
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert compiled(*arguments).item() == pytest.approx(term(*arguments).item(), rel=1e-5)


def test_terms_begin_with_the_constants_of_the_docs():
    """The constants of docs/method/distillation.md."""
    assert WeightedSoftCE().init_args == {"weight": 0.5, "temperature": 10.0}
    assert ContrastiveMatch().init_args["weight"] == 0.5
    assert ContrastiveMatch().init_args["margin"] == 1.0
    assert PrototypeMatch().init_args == {"weight": 0.1, "index": -1}
    assert GramMatch().weight == 1e-4
    assert VariationalMatch().weight == 0.5
    assert SubsetMatch().weight == 0.2  # M3AE's 0.1, with both sides moving
    self_taught = SelfDistillation()
    assert (self_taught.logit_weight, self_taught.prototype.weight) == (0.5, 0.1)
    assert self_taught.temperature == 4.0 and self_taught.student_sees == "single"


@pytest.mark.parametrize(
    ("term", "strides"),
    [(LatentMatch, [2, 4]), (LatentPrototypeMatch, [2, 4]), (SubsetMatch, [4]), (GramMatch, [4])],
)
def test_levels_that_are_compared_where_none_are_named(term, strides):
    made = term()
    net = network(channels=(2, 3, 4), strides=(1, 2, 4))
    made.bind(net, net)
    assert [pair.stride for pair in made.pairs] == strides
