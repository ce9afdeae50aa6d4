"""One training step of teacher and student, without a trainer."""

import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from pmixseg.backbones import EarlyFusion, MultiEncoderUNet, RFNet, rfnet
from pmixseg.backbones.slots import decode_slots
from pmixseg.callbacks import Distillation
from pmixseg.data.missing import UniformCombinations
from pmixseg.describe import describe
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distillation import SelfDistillation
from pmixseg.losses.term import Term, TermWeight
from pmixseg.modules import StudentModule, TeacherModule
from pmixseg.task import BRATS, Task
from pmixseg.types import Latents
from tests.callbacks.memory_data import step, tiny


def test_post_processing_that_the_task_has_no_meaning_for_is_refused_at_once():
    task = Task("lesions", ("t1", "t2"), ("lesion",), {"lesion": ("lesion",)})
    make = functools.partial(
        StudentModule, task=task, backbone=MultiEncoderUNet(task.modalities, 2, width=4, levels=3)
    )
    with pytest.raises(InputError, match="'et_below_500' needs a region ET"):
        make(evaluation=EvaluationSettings(postprocess=("et_below_500",)))
    make(evaluation=EvaluationSettings(postprocess=("fill_holes",)))


@pytest.mark.parametrize("make", [TeacherModule, StudentModule])
def test_every_parameter_has_a_gradient_even_where_encoders_are_skipped(make, batch):
    batch["acquired"][:, 1:] = False
    module = make(backbone=tiny())
    step(module, batch).backward()
    module.on_after_backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


def test_student_never_sees_what_was_not_drawn(batch):
    module = StudentModule(backbone=tiny()).train()
    present = module.draw_present(batch)
    hidden = batch["image"].clone()
    hidden[~present] = float("nan")
    torch.testing.assert_close(
        step(module, batch), step(module, {**batch, "image": hidden}), rtol=0, atol=0
    )


def test_student_draws_from_the_key_and_within_acquired(batch):
    module = StudentModule(backbone=tiny())
    first = module.draw_present(batch)
    assert torch.equal(first, module.draw_present(batch))
    assert bool((first <= batch["acquired"]).all())
    keys = torch.arange(64)
    many = module.draw_present({**batch, "key": keys, "acquired": torch.ones(64, 4).bool()})
    assert len({tuple(row) for row in many.tolist()}) == 15


def test_dedicated_student_has_only_its_encoders_and_ignores_the_rest(batch):
    module = StudentModule(combination="t1+flair")
    assert module.modalities == ("flair", "t1")
    assert module.backbone.modalities == ("flair", "t1")
    assert module.fill == "zero"
    assert torch.equal(module.draw_present(batch)[0], torch.tensor([True, False, True, False]))
    other = batch["image"].clone()
    other[:, [1, 3]] = 7.0
    assert step(module, batch) == step(module, {**batch, "image": other})


def test_dedicated_student_refuses_a_case_without_its_modality(batch):
    module = StudentModule(combination="t1ce", backbone=tiny(modalities=("t1ce",)))
    with pytest.raises(InputError, match="case 'b' has none of"):
        module.draw_present(batch)


def test_backbone_is_fitted_to_the_task_and_combination():
    module = StudentModule(combination="t2", backbone=tiny())
    assert module.backbone.modalities == ("t2",)
    assert module.backbone.init_args["width"] == 4


def test_learned_anchor_gets_its_gradient_from_the_segmentation_loss(batch):
    teacher = TeacherModule(backbone=tiny(), fill_weight=0.5)
    step(teacher, batch).backward()
    gradients = [p.grad for p in teacher.anchor.parameters()]
    assert gradients
    assert all(g.abs().sum() > 0 for g in gradients)
    silent = TeacherModule(backbone=tiny(), fill_weight=0.0)
    batch["acquired"][:] = True
    step(silent, batch).backward()
    silent.on_after_backward()
    assert all(p.grad.abs().sum() == 0 for p in silent.anchor.parameters())
    assert not silent.anchor_gets_gradient()
    assert teacher.anchor_gets_gradient()


def test_fill_is_the_same_rule_in_training_and_at_test(batch):
    module = StudentModule(backbone=tiny(), anchor=MixtureAnchor())
    present = torch.tensor([[True, False, True, False]] * 2)
    seen = module.decode(module.encode(batch["image"], batch["acquired"]).restrict(present))
    only = module.decode(module.encode(batch["image"], present & batch["acquired"]))
    torch.testing.assert_close(seen.logits, only.logits)
    module.eval()
    again = module.decode(module.encode(batch["image"], present & batch["acquired"]))
    torch.testing.assert_close(again.logits, only.logits)


def test_output_carries_the_latents_before_the_fill(batch):
    module = StudentModule(backbone=tiny())
    present = torch.tensor([[True, False, False, False]] * 2)
    output = module(batch["image"], present)
    assert torch.equal(output.latents.usable[0], present)


class Constant(Term):
    """λ · c with a parameter c, and a look at what was encoded."""

    needs_acquired = True

    def __init__(self):
        super().__init__()
        self.c = torch.nn.Parameter(torch.tensor(3.0))
        self.seen = None

    def forward(self, output, batch):
        self.seen = output.latents.usable[0].clone()
        self.shown = batch["present"]
        return self.c * 1.0


def test_terms_are_added_with_their_weight_and_see_everything_acquired(batch):
    module = StudentModule(backbone=tiny())
    plain = step(module, batch)
    term = Constant()
    module.add_term("constant", term, TermWeight(0.25))
    torch.testing.assert_close(step(module, batch), plain + 0.75)
    assert torch.equal(term.seen, batch["acquired"])
    assert torch.equal(term.shown, module.draw_present(batch))


class Masks(Term):
    """Keeps the flags of a step."""

    def forward(self, output, batch):
        self.batch, self.latents = batch, output.latents
        return output.logits.sum() * 0.0


def test_terms_read_flags_in_the_order_of_the_slots(batch):
    module = StudentModule(combination="t1ce+t2", sampler=UniformCombinations())
    module.add_term("masks", term := Masks(), TermWeight(1.0))
    batch["acquired"] = torch.tensor([[True, True, False, True], [True, False, True, True]])
    step(module, batch)
    assert module.modalities == ("t1ce", "t2")
    assert torch.equal(term.batch["acquired"], batch["acquired"][:, [1, 3]])
    assert torch.equal(term.batch["image"], batch["image"][:, [1, 3]])
    drawn = module.draw_present(batch)
    assert not drawn[:, [0, 2]].any()
    assert torch.equal(term.batch["present"], drawn[:, [1, 3]])
    assert torch.equal(term.batch["of_task"]["present"], drawn)
    assert torch.equal(term.batch["of_task"]["image"], batch["image"])


def test_the_brain_travels_with_the_latents_of_a_step(batch):
    image = torch.zeros(2, 4, 16, 16, 16)
    image[0, 0, :, :, :9] = 1.0  # not a sequence of the network, but acquired
    image[1, 1, 0] = -2.0
    module = StudentModule(combination="t1ce+t2", backbone=tiny(modalities=("t1ce", "t2")))
    module.add_term("masks", term := Masks(), TermWeight(1.0))
    step(module, {**batch, "image": image, "acquired": torch.ones(2, 4, dtype=torch.bool)})
    fine, half, quarter = term.latents.brain
    assert [m.shape for m in term.latents.brain] == [(2, n, n, n) for n in (16, 8, 4)]
    assert fine.dtype == torch.bool
    # 9 columns of 16: the fifth of 8 holds half of brain and counts, the third of 4 a quarter.
    assert fine[0, 0, 0].sum() == 9 and half[0, 0, 0].sum() == 5 and quarter[0, 0, 0].sum() == 2
    # One slice of 16: half of the first of 8, a quarter of the first of 4.
    assert fine[1].sum() == 256 and half[1].sum() == 64 and quarter[1].sum() == 0


def test_new_features_leave_the_cache_and_the_rest_behind():
    one = torch.ones(1, 2, 1, 1, 1, 1)
    both = torch.ones(1, 2, dtype=torch.bool)
    old = Latents([one], ("a", "b"), [~both], cache={"kept": one}).with_brain(one[:, :, 0])
    new = old.with_features([one * 2], [both])
    assert new.cache == {} and old.cache and new.brain is old.brain
    assert torch.equal(new.usable[0], both) and torch.equal(new.features[0], one * 2)
    assert torch.equal(old.with_features([one * 2]).usable[0], ~both)


def test_term_in_warm_up_is_multiplied_by_zero_not_skipped(batch):
    module = StudentModule(backbone=tiny())
    term = Constant()
    module.add_term("constant", term, TermWeight(0.25, start_epoch=3))
    step(module, batch).backward()
    assert term.seen is not None
    assert term.c.grad is not None
    assert term.c.grad == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backbone": torch.nn.Conv3d(1, 1, 1)}, "give a pmixseg.backbones.Backbone"),
        ({"fill": "anchor", "anchor": NormalAnchor()}, "no features to fill"),
    ],
)
def test_impossible_modules_are_refused_at_construction(arguments, words):
    with pytest.raises(InputError, match=words):
        StudentModule(**arguments)


def test_early_fusion_defaults_to_no_fill(batch):
    network = {
        "class_path": "monai.networks.nets.UNet",
        "init_args": {
            "spatial_dims": 3,
            "in_channels": 4,
            "out_channels": 4,
            "channels": [4, 8],
            "strides": [2],
        },
    }
    module = StudentModule(
        backbone=EarlyFusion(modalities=BRATS.modalities, num_classes=4, network=network)
    )
    assert module.fill == "zero"
    step(module, batch).backward()


def test_own_backbone_by_overriding_one_method(batch):
    class Mine(StudentModule):
        def build_backbone(self):
            return tiny(modalities=self.modalities)

    module = Mine(combination="flair")
    assert module.backbone.channels[0] == 4
    step(module, batch).backward()


def test_described_arguments_build_the_same_module():
    module = StudentModule(combination="flair+t2", anchor=MixtureAnchor(weights="uniform"))
    text = describe(module)
    assert text["class_path"] == "pmixseg.StudentModule"
    assert text["init_args"]["anchor"]["init_args"]["weights"] == "uniform"


def test_compiled_is_the_same_network_with_the_same_keys(batch, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    plain, compiled = (
        StudentModule(backbone=tiny(), compile=flag).eval() for flag in (False, True)
    )
    compiled.load_state_dict(plain.state_dict())
    present = batch["acquired"]
    with torch.no_grad():
        expected = plain.decode(plain.encode(batch["image"], present)).logits
        assert not graphs
        logits = compiled.decode(compiled.encode(batch["image"], present)).logits
    assert len(graphs) >= 2, "encode and decode are compiled apart"
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_pytorch_schedule_given_by_name_is_stepped_per_epoch_and_survives_a_checkpoint(batch):
    cosine = {
        "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "init_args": {"T_max": 4},
    }
    module = StudentModule(backbone=tiny(), scheduler=cosine)
    for student in (module, StudentModule(**describe(module)["init_args"])):
        made = student.configure_optimizers()
        scheduler = made["lr_scheduler"]["scheduler"]
        assert isinstance(scheduler, torch.optim.lr_scheduler.CosineAnnealingLR)
        assert "interval" not in made["lr_scheduler"]
        start = scheduler.get_last_lr()[0]
        for _ in range(2):
            made["optimizer"].step()
            scheduler.step()
        assert scheduler.get_last_lr()[0] == pytest.approx(start / 2)


def test_a_foreign_network_gets_whole_gradients_in_bf16_on_a_cpu(batch):
    """SegResNet's fourth level has two voxels here: oneDNN alone leaves infinities there."""
    seen = []

    class Look(Callback):
        def on_after_backward(self, trainer, pl_module):
            seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))

    network = {"class_path": "monai.networks.nets.SegResNet", "init_args": {"init_filters": 16}}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module = StudentModule(backbone=EarlyFusion(network))
        trainer = Trainer(
            accelerator="cpu", precision=precision, fast_dev_run=True, callbacks=[Look()]
        )
        trainer.fit(module, DataLoader([batch], batch_size=None))
    wide, half = seen
    assert bool(half.isfinite().all())
    assert (half - wide).norm() < 0.1 * wide.norm()
    assert not any(layer._forward_hooks for layer in module.modules())


@pytest.mark.parametrize("taught", [False, True])
def test_a_separate_decoder_runs_once_in_a_step(batch, monkeypatch, taught):
    """Not again in the teacher's pass on filled slots, nor where the student teaches itself."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        return decode_slots(*arguments)

    monkeypatch.setattr(rfnet, "decode_slots", counted)
    module = (StudentModule if taught else TeacherModule)(backbone=RFNet(width=4)).train()
    if taught:
        distillation = Distillation(weight=1.0, terms={"self": SelfDistillation()})
        module.add_term("distill", distillation.build_term(module), TermWeight(1.0))
    step(module, batch).backward()
    assert len(calls) == 1
    assert all(part.training for part in module.modules())
