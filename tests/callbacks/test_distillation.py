"""What the distillation callback does around its losses: what both see, ramps, the teacher."""

import pytest
import torch
from torch import nn

from pmixseg.backbones import MultiEncoderUNet, RFNet
from pmixseg.borrowed import evaluating
from pmixseg.callbacks import Distillation
from pmixseg.callbacks.distillation import DistillationTerm
from pmixseg.errors import InputError
from pmixseg.losses import (
    ContrastiveMatch,
    LogitKL,
    ProbabilityMSE,
    PrototypeMatch,
    SelfDistillation,
    SubsetMatch,
)
from pmixseg.losses.distillation import case_numbers
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.modules import StudentModule, TeacherModule
from tests.callbacks.memory_data import fit


class Bare(MultiEncoderUNet):
    def decode(self, latents):
        output = super().decode(latents)
        output.decoder = []
        return output


def student(**arguments):
    torch.manual_seed(0)
    backbone = MultiEncoderUNet(width=4, levels=3, deep_supervision=True)
    return StudentModule(backbone=backbone, fill="zero", **arguments)


def batch_of(acquired, present=None):
    torch.manual_seed(3)
    samples = len(acquired)
    acquired = torch.tensor(acquired, dtype=torch.bool)
    image = torch.randn(samples, 4, 16, 16, 16) * acquired[:, :, None, None, None]
    return {
        "image": image,
        "label": torch.randint(0, 4, (samples, 16, 16, 16)),
        "case_id": [f"case{i}" for i in range(samples)],
        "acquired": acquired,
        "present": acquired if present is None else torch.tensor(present, dtype=torch.bool),
        "key": torch.arange(samples),
    }


def test_single_modalities_are_decoded_one_by_one_and_summed():
    module = student().train()
    loss = SelfDistillation()
    loss.bind(module.backbone, module.backbone)
    term = DistillationTerm(None, {"self": loss}, module)
    assert term.needs_acquired
    batch = batch_of([[1, 1, 0, 1], [0, 1, 1, 1]])
    latents = module.encode(batch["image"], batch["acquired"])
    output = module.decode(latents)
    actual = term(output, batch)
    expected = 0.0
    for b in range(2):  # sample by sample: no masks
        row = {k: v[b : b + 1] for k, v in batch.items()}
        own = module.encode(row["image"], row["acquired"])
        teacher = module.decode(own)
        for slot in row["acquired"][0].nonzero().flatten().tolist():
            alone = torch.zeros(1, 4, dtype=torch.bool)
            alone[0, slot] = True
            single = module.decode(module.encode(row["image"], alone))
            expected += loss(single, teacher, {**row, "present": alone}) / 2
    assert actual.item() == pytest.approx(expected.item(), rel=1e-4)
    actual.backward()
    assert all(p.grad is not None for p in module.backbone.encoders.parameters())


def test_region_maps_of_an_rfnet_are_taught(tmp_path):
    torch.manual_seed(0)
    module = StudentModule(backbone=RFNet(width=4), criterion=RFNetCriterion(), fill="zero")
    seen = []
    loss = SelfDistillation()
    compare = loss._deep_maps
    loss._deep_maps = lambda *outputs: seen.append(compare(*outputs)) or seen[-1]
    fit(tmp_path, module, Distillation(weight=1.0, terms={"self": loss}))
    assert len(seen) == 2 * 4  # steps, single modalities
    assert seen[0] == ["ds1", "ds2", "ds3", "ds4"]
    assert module.trainer.callback_metrics["train/distill/self"] > 0


def test_a_ramp_follows_the_epochs_and_is_in_no_checkpoint(tmp_path):
    module = student()
    teacher = TeacherModule(backbone=MultiEncoderUNet(width=4, levels=3))
    terms = {"plain": LogitKL(), "output": ProbabilityMSE(10.0, ramp_epochs=4)}
    callback = Distillation(teacher, weight=1.0, terms=terms)
    strengths = []
    begin = DistillationTerm.begin_epoch

    def spy(self, epoch):
        begin(self, epoch)
        strengths.append((epoch, self.strengths.tolist()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTerm, "begin_epoch", spy)
        fit(tmp_path, module, callback, max_epochs=6)
    ramp = [ProbabilityMSE(ramp_epochs=4).strength(epoch) for epoch in range(6)]
    assert [epoch for epoch, _ in strengths[1:]] == list(range(6))
    for (_, both), expected in zip(strengths[1:], ramp, strict=True):
        assert both == pytest.approx([1.0, expected])
    assert not [k for k in module.state_dict() if "strengths" in k]
    # The value is the weighted sum.
    term = module.terms["distill"]
    term.begin_epoch(0)
    batch = batch_of([[1, 1, 1, 1]])
    output = module.decode(module.encode(batch["image"], batch["present"]))
    value = term(output, batch)
    parts = term.parts["plain"] + 10 * ramp[0] * term.parts["output"]
    assert value.item() == pytest.approx(parts.item(), rel=1e-5)


def test_the_teacher_is_moved_once_and_never_seen_by_the_student(tmp_path):
    module = student()
    teacher = TeacherModule(backbone=MultiEncoderUNet(width=4, levels=3)).train()
    moved = []
    move = teacher.to
    teacher.to = lambda device: moved.append(device) or move(device)
    callback = Distillation(teacher, weight=1.0, terms={"logit": LogitKL()})
    fit(tmp_path, module, callback, max_epochs=2)
    assert moved == [module.device]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    ours = {id(p) for p in module.parameters()}
    assert not ours & {id(p) for p in teacher.parameters()}


def test_a_teacher_without_a_weight_is_told_and_must_exist(tmp_path):
    told = pytest.warns(UserWarning, match="distill.weight is 0, so this Distillation does nothing")
    with told:
        fit(tmp_path, student(), Distillation(student()), max_epochs=1)
    with told, pytest.raises(InputError, match=r"nowhere\.ckpt does not exist"):
        fit(tmp_path, student(), Distillation("nowhere.ckpt"), max_epochs=1)


@pytest.mark.parametrize("of", ["the student", "its backbone"])
def test_a_teacher_that_would_freeze_its_student_is_refused(tmp_path, of):
    module = student()
    teacher = module if of == "the student" else StudentModule(backbone=module.backbone)
    with pytest.raises(
        InputError, match=r"distill\.teacher has weights in common with its student"
    ):
        fit(tmp_path, module, Distillation(teacher, weight=1.0), max_epochs=1)
    assert all(p.requires_grad for p in module.parameters())


def test_a_module_that_is_frozen_as_a_whole_is_told(tmp_path):
    teacher = TeacherModule(backbone=MultiEncoderUNet(width=4, levels=3))
    fit(tmp_path, student(), Distillation(teacher, weight=1.0), max_epochs=1)
    with pytest.raises(InputError, match=r"no weight of this TeacherModule .* requires_grad_"):
        fit(tmp_path, teacher)


def test_cases_are_numbered_for_losses_that_tell_them_apart(tmp_path):
    teacher = TeacherModule(backbone=MultiEncoderUNet(width=4, levels=3))
    seen = []
    loss = ContrastiveMatch()
    compare = loss.compare_level
    loss.compare_level = lambda *arguments: seen.append(arguments[2]) or compare(*arguments)
    fit(tmp_path, student(), Distillation(teacher, weight=1.0, terms={"contrast": loss}))
    for batch in seen:
        assert torch.equal(batch["case"], case_numbers(batch["case_id"]))
    assert len(seen) == 2
    assert case_numbers(["a", "b", "a"]).tolist()[0] == case_numbers(["a"]).item()


def test_a_teacher_leaves_every_part_in_its_mode(tmp_path):
    module = student().train()
    module.backbone.heads[0].eval()
    loss = SubsetMatch()
    loss.bind(module.backbone, module.backbone)
    term = DistillationTerm(None, {"subsets": loss}, module)
    before = [part.training for part in module.modules()]
    batch = batch_of([[1, 1, 1, 1]])
    output = module.decode(module.encode(batch["image"], batch["present"]))
    term(output, term.prepare(batch))
    assert [part.training for part in module.modules()] == before


def test_evaluating_is_undone_after_an_error():
    net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(ValueError, match="broken"), evaluating(net):
        assert not net.training and not net[0].training
        raise ValueError("broken")
    assert [net.training, net[0].training, net[1].training] == [True, True, False]


def test_a_backbone_without_decoder_maps_is_one_sentence(tmp_path):
    module = StudentModule(backbone=Bare(width=4, levels=3))
    teacher = TeacherModule(backbone=MultiEncoderUNet(width=4, levels=3))
    callback = Distillation(teacher, weight=1.0, terms={"prototype": PrototypeMatch()})
    with pytest.raises(InputError, match="student's backbone gives 0 in"):
        fit(tmp_path, module, callback)
