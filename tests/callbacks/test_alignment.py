"""PmixAlignment in short trainings: a weight by ratio, drawn latents, settings that do nothing."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback

from pmixseg.callbacks import PmixAlignment
from pmixseg.callbacks.gradient_ratio import GradientRatio
from pmixseg.errors import InputError
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.term import TermWeight
from pmixseg.modules import StudentModule, TeacherModule
from tests.callbacks.memory_data import MemoryData, fit, quiet_trainer, tiny
from tests.processes import spread


def student(**arguments):
    torch.manual_seed(0)
    return StudentModule(backbone=tiny(), optimizer=torch.optim.SGD, **arguments)


def test_the_weight_by_hand():
    z = torch.tensor([1.0, 2.0], requires_grad=True)
    ratio = GradientRatio(0.1, steps=2, name="align")
    # |d(3 Σz)/dz| = 3 √2 and |d(z₀²)/dz| = 2, then 4 √2 and 2.
    for slope in (3.0, 4.0):
        assert ratio.measuring
        ratio.measure(slope * z.sum(), z[0] ** 2, [z])
        ratio.end_step()
    assert not ratio.measuring
    assert ratio.weight() == pytest.approx(0.1 * 7 * 2**0.5 / 4)
    again = GradientRatio(0.3, steps=2, name="align")
    again.load(ratio.state())
    assert again.weight() == pytest.approx(3 * ratio.weight())


def test_float16_neither_loses_small_gradients_nor_counts_those_that_overflow():
    z = torch.tensor([1.0, 2.0], dtype=torch.float16, requires_grad=True)
    ratio = GradientRatio(0.1, steps=3, name="align")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    # Slopes of 3e-9 and 2e-9 are 0 in float16, whose smallest number is 6e-8; 2 · 2¹⁶ is infinite.
    for slope in (1e-9, 1.0, 1e-9):
        ratio.measure(slope * 3 * z.float().sum(), slope * 2 * z.float().sum(), [z], scaler)
        ratio.end_step()
    assert ratio.weight() == pytest.approx(0.15, rel=1e-3)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_loss_without_a_gradient_gives_no_weight(slopes):
    z = torch.ones(2, requires_grad=True)
    ratio = GradientRatio(0.1, steps=1, name="align")
    ratio.measure(slopes[0] * z.sum(), slopes[1] * z.sum(), [z])
    ratio.end_step()
    with pytest.raises(InputError, match=r"align\.ratio cannot be reached"):
        ratio.weight()


@pytest.mark.parametrize(("levels", "aligned"), [(2, (0, 1)), (4, (2, 3))])
def test_by_default_the_two_coarsest_levels_are_aligned(levels, aligned):
    module = StudentModule(backbone=tiny(levels=levels))
    assert PmixAlignment(weight=1.0).build_term(module).aligned_levels == aligned


class Watch(Callback):
    """The weight of the alignment in every step, and the gradients by backpropagation."""

    def __init__(self):
        self.weights, self.norms = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.weights.append(module.term_weights["align"].at(module.current_epoch))
        term = module.terms["align"]
        inner = type(term).forward

        def forward(output, batch):
            value = inner(term, output, batch)
            features = [output.latents.features[level] for level in term.aligned_levels]
            pair = []
            for loss in (module.segmentation_loss(output, batch, 0), value):
                grads = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
                pair.append(sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5)
            self.norms.append(pair)
            return value

        term.forward = forward

    def on_train_batch_end(self, trainer, module, *_):
        del module.terms["align"].forward


def test_first_steps_are_measured_and_then_the_weight_is_fixed(tmp_path):
    watch = Watch()
    module = student()
    align = PmixAlignment(ratio=0.1, ratio_steps=3)
    data = MemoryData(((True,) * 4,) * 8, batch_size=2)  # 4 steps an epoch
    trainer = fit(tmp_path, module, align, watch, data=data, max_epochs=2)
    first = watch.norms[:3]
    expected = 0.1 * sum(s for s, _ in first) / sum(a for _, a in first)
    assert watch.weights[:3] == [0.0] * 3
    assert watch.weights[3:] == pytest.approx([expected] * 5, rel=1e-4)
    assert trainer.logged_metrics["align/weight"].item() == pytest.approx(expected, rel=1e-4)


def test_a_resumed_training_has_the_same_weight(tmp_path):
    data = MemoryData(((True,) * 4,) * 4, batch_size=2)  # 2 steps an epoch
    whole = student()
    whole_align = PmixAlignment(ratio=0.2, ratio_steps=3)
    fit(tmp_path / "whole", whole, whole_align, data=data, max_epochs=3)
    half = student()
    trainer = fit(tmp_path, half, PmixAlignment(ratio=0.2, ratio_steps=3), data=data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, align = student(), PmixAlignment(ratio=0.2, ratio_steps=3)
    fit(tmp_path, rest, align, data=data, resume=tmp_path / "half.ckpt", max_epochs=3)
    assert align.schedule.weight == whole_align.schedule.weight > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_a_loss_that_does_not_act_is_refused(tmp_path):
    complete = MemoryData(((True,) * 4,) * 4, batch_size=2)
    module = TeacherModule(backbone=tiny())
    align = PmixAlignment(ratio=0.1, ratio_steps=1, distance="vid", anchor=NormalAnchor())
    with pytest.raises(InputError, match=r"align\.ratio cannot be reached"):
        fit(tmp_path, module, align, data=complete, max_epochs=2)


def test_impossible_ratios_are_refused(tmp_path):
    with pytest.raises(InputError, match="give one of them"):
        PmixAlignment(weight=0.1, ratio=0.1)
    with pytest.raises(InputError, match="above 0"):
        PmixAlignment(ratio=0.0)
    with pytest.raises(InputError, match="compares patients"):
        one = MemoryData(((True,) * 4,) * 2, batch_size=1)
        fit(tmp_path, student(), PmixAlignment(weight=0.1, distance="case_nce"), data=one)
    trainer = quiet_trainer(tmp_path, callbacks=[PmixAlignment(weight=0.1)])
    with pytest.raises(InputError, match="a step has 1 sample"):  # of a loader of one's own
        trainer.fit(student(), one.train_dataloader())


def ranks(folder, processes):
    module, align = student(), PmixAlignment(ratio=0.1, ratio_steps=1, distance="case_nce")
    rows = ((True,) * 4, (True, False, True, True), (False, True, True, False), (True,) * 4)
    data = MemoryData(rows, batch_size=4 // processes)
    fit(folder, module, align, Keep(), data=data, max_epochs=3, **spread(processes))
    return torch.load(folder / "kept.pt", weights_only=True)


class Keep(Callback):
    """Writes weight and parameters down."""

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            kept = {"weight": torch.tensor(module.term_weights["align"].weight)}
            torch.save({**kept, **module.state_dict()}, f"{trainer.default_root_dir}/kept.pt")


@pytest.mark.ddp
def test_two_processes_find_the_weight_of_one(tmp_path):
    one, two = ranks(tmp_path, 1), ranks(tmp_path, 2)
    assert one["weight"] > 0
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-6, msg=name)


def build(sample, batch_of=2):
    torch.manual_seed(0)
    module = StudentModule(backbone=tiny())
    module.log = module.log_dict = lambda *args, **kwargs: None
    callback = PmixAlignment(weight=1.0, distance="kl", sample=sample)
    module.add_term("align", callback.build_term(module), TermWeight(0.0))
    batch = next(iter(MemoryData().train_dataloader()))
    return module, batch


def loss(module, batch):
    torch.manual_seed(7)
    return module.training_step(batch, 0)


def test_samples_change_what_is_decoded_and_repeat_with_the_seed():
    plain, batch = build(False)
    sampled, _ = build(True)
    assert loss(sampled, batch) == loss(sampled, batch)
    assert not torch.isclose(loss(sampled, batch), loss(plain, batch), rtol=1e-6)


def test_the_segmentation_loss_reaches_the_variance_heads():
    for sample in (False, True):
        module, batch = build(sample)
        loss(module, batch).backward()
        heads = module.terms["align"].alignment.distance.log_variances.parameters()
        moved = [p.grad.abs().sum().item() > 0 for p in heads]
        assert any(moved) == sample


def test_at_test_the_latents_themselves_are_read():
    module, batch = build(True)
    plain, _ = build(False)
    with torch.no_grad():
        logits = [m.eval()(batch["image"], batch["acquired"]).logits for m in (module, plain)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_sampled_kl_leaves_every_weight_finite(tmp_path):
    torch.manual_seed(0)
    module = StudentModule(backbone=tiny())
    align = PmixAlignment(weight=0.1, distance="kl", sample=True)
    fit(tmp_path, module, align)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_only_kl_has_gaussians(tmp_path):
    module = StudentModule(backbone=tiny())
    with pytest.raises(InputError, match="'kl'"):
        PmixAlignment(weight=0.1, sample=True).build_term(module)


def sentences(folder, module, **arguments):
    """Warnings of our own in a short training."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        fit(folder, module, PmixAlignment(weight=0.1, **arguments))
    words = ("align", "anchor")
    return [str(w.message) for w in raised if any(word in str(w.message) for word in words)]


def fixed():
    return MixtureAnchor("uniform")


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (TeacherModule, {"distance": "vid", "anchor": NormalAnchor()}, "no gradient"),
        (StudentModule, {"distance": "vid", "anchor": NormalAnchor()}, None),
        (StudentModule, {"distance": "kl"}, "heads"),
        (StudentModule, {"distance": "kl", "sample": True}, None),
        (StudentModule, {"distance": "nmse", "anchor": NormalAnchor()}, "nmse to a NormalAnchor"),
        (StudentModule, {"distance": "vic", "anchor": NormalAnchor()}, "vic to a NormalAnchor"),
        (
            StudentModule,
            {"distance": "mse", "anchor": NormalAnchor(), "detach": "features"},
            "a NormalAnchor does not move",
        ),
        (StudentModule, {"distance": "mse", "anchor": NormalAnchor()}, None),
        (StudentModule, {"distance": "case_nce"}, None),
    ],
)
def test_inert_settings_are_one_sentence_at_the_start(tmp_path, make, arguments, match):
    torch.manual_seed(0)
    warned = sentences(tmp_path, make(backbone=tiny(), anchor=fixed()), **arguments)
    assert len(warned) == (match is not None), warned
    assert match is None or match in warned[0]


def test_one_sequence_has_nothing_to_be_aligned_to(tmp_path):
    alone = StudentModule(backbone=tiny(), combination="t1ce")
    (sentence,) = sentences(tmp_path, alone, anchor=fixed())
    assert "aligns the one sequence of this StudentModule to itself" in sentence


def test_weights_that_stay_uniform_are_one_sentence_at_the_end(tmp_path):
    torch.manual_seed(0)
    slow = StudentModule(backbone=tiny(), optimizer=torch.optim.SGD)
    (sentence,) = sentences(tmp_path, slow)
    assert "stayed uniform" in sentence
    moved = StudentModule(backbone=tiny())
    torch.nn.init.normal_(moved.anchor.scores)
    assert sentences(tmp_path, moved) == []
