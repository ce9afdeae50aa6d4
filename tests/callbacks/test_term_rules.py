"""Every rule of the term contract (docs/design/contracts.md), each through a small training."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import (
    Distillation,
    GapMonitor,
    PmixAlignment,
    PredictionWriter,
    ProtocolScores,
    TemperatureFitting,
    TermCallback,
)
from pmixseg.data.missing import UniformCombinations
from pmixseg.errors import InputError
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distillation import SelfDistillation, SubsetMatch
from pmixseg.losses.term import Term, TermWeight
from pmixseg.modules import StudentModule, TeacherModule, load
from pmixseg.modules.checkpoint import read_checkpoint, restore
from pmixseg.task import BRATS, Task
from tests.callbacks.memory_data import MemoryData, fit, quiet_trainer, student, tiny


class Pull(Term):
    """(p - 1)² with a learnable p: the smallest term with a parameter."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(()))
        self.calls = 0

    def forward(self, output, batch):
        self.calls += 1
        return (self.p - 1) ** 2


class PullCallback(TermCallback):
    def __init__(self, weight=1.0, name="pull", **kwargs):
        super().__init__(name, weight, **kwargs)

    def build_term(self, module):
        return Pull()


def test_learnable_parameters_reach_optimizer_and_checkpoint(tmp_path):
    module = student()
    trainer = fit(tmp_path, module, PullCallback())
    assert module.terms["pull"].p.item() != 0
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = read_checkpoint(tmp_path / "a.ckpt")
    assert "terms.pull.p" in state["state_dict"]
    assert state["pmixseg"]["terms"] == ["pull"]


def test_a_parameter_outside_the_optimizer_is_an_error(tmp_path):
    class TooLate(Callback):
        def on_fit_start(self, trainer, module):
            module.terms["late"] = Pull()

    with pytest.raises(InputError, match=r"terms\.late\.p"):
        fit(tmp_path, student(), TooLate())


def test_weight_zero_builds_nothing(tmp_path):
    module = student()
    fit(tmp_path, module, PullCallback(weight=0.0), PmixAlignment(), Distillation())
    assert len(module.terms) == 0


def test_warm_up_multiplies_by_zero_and_evaluates_all_the_same(tmp_path):
    module = student()
    fit(tmp_path, module, PullCallback(start_epoch=5))
    term = module.terms["pull"]
    assert term.calls == 2
    assert term.p.item() == 0
    assert term.p.grad is not None


def test_alignment_is_finite_from_step_zero(tmp_path):
    module = student()
    fit(tmp_path, module, PmixAlignment(weight=1.0, warmup_epochs=3))
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_weights_load_without_and_with_other_terms(tmp_path):
    module = student()
    trainer = fit(tmp_path, module, PullCallback())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = load(tmp_path / "a.ckpt")
    assert len(again.terms) == 0
    assert not again.training
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[name], rtol=0, atol=0)
    other = student()
    other.add_term("other", Pull(), None)
    restore(other, read_checkpoint(tmp_path / "a.ckpt"))
    assert other.terms["other"].p.item() == 0


def test_resuming_with_other_terms_is_refused(tmp_path):
    trainer = fit(tmp_path, student(), PullCallback())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = {"resume": tmp_path / "a.ckpt", "max_epochs": 2}
    with pytest.raises(InputError, match=r"\['pull'\].*init_from"):
        fit(tmp_path, student(), **resumed)
    module = student()
    fit(tmp_path, module, PullCallback(), **resumed)
    assert module.terms["pull"].calls == 2  # only the second epoch ran


@pytest.fixture
def teacher_path(tmp_path):
    torch.manual_seed(1)
    trainer = fit(tmp_path, TeacherModule(backbone=tiny()), PmixAlignment(weight=0.1))
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    return str(tmp_path / "teacher.ckpt")


def test_frozen_teacher_is_in_no_checkpoint_stays_in_eval_and_unchanged(tmp_path, teacher_path):
    module = student()
    trainer = fit(tmp_path, module, Distillation(teacher_path, weight=0.5))
    teacher = module.terms["distill"].teacher
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    saved = read_checkpoint(tmp_path / "student.ckpt")["state_dict"]
    assert not [k for k in saved if "teacher" in k]
    owned = sum(v.numel() for k, v in saved.items() if not k.startswith("terms."))
    assert owned == sum(v.numel() for k, v in student().state_dict().items())
    for name, value in load(teacher_path).state_dict().items():
        torch.testing.assert_close(value, teacher.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (Task("two", ("ct", "pet"), ("lesion",), {"L": ("lesion",)}), "for the task 'brats'"),
        (
            Task("brats", BRATS.modalities, ("tumour",), {"WT": ("tumour",)}),
            r"labels \['NCR', 'ED', 'ET'\].*\['tumour'\]",
        ),
    ],
    ids=["another task", "other classes"],
)
def test_teacher_of_another_task_is_refused(teacher_path, task, sentence):
    with pytest.raises(InputError, match=sentence):
        Distillation(teacher_path, weight=1.0).build_term(StudentModule(task=task))


@pytest.mark.parametrize(
    ("what", "other"), [("spacing", (2.0, 2.0, 2.0)), ("normalisation", "zscore-joint-mask")]
)
def test_a_teacher_of_data_that_were_prepared_otherwise_is_refused(
    tmp_path, teacher_path, what, other
):
    data = MemoryData()
    setattr(data, what, other)
    trainer = quiet_trainer(tmp_path, callbacks=[Distillation(teacher_path, weight=1.0)])
    with pytest.raises(InputError, match=f"the teacher was trained with {what} .* the teacher's"):
        trainer.fit(student(), data)


@pytest.mark.parametrize(
    ("callback", "run"),
    [
        (PullCallback(), "fit"),
        (GapMonitor(), "fit"),
        (TemperatureFitting("out.ckpt"), "validate"),
        (ProtocolScores({"all": UniformCombinations()}), "test"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_of_another_kind_is_one_sentence(tmp_path, callback, run):
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    sentence = f"{type(callback).__name__} needs a SegmentationModule, not a BoringModel"
    with pytest.raises(InputError, match=sentence):
        getattr(trainer, run)(BoringModel())


def test_a_writer_of_predictions_says_what_it_writes(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[PredictionWriter()])
    with pytest.raises(InputError, match="predict_step of this BoringModel returned a Tensor"):
        trainer.predict(BoringModel())


def test_distillation_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"distill\.teacher"):
        fit(tmp_path, student(), Distillation(weight=1.0))


def test_a_network_can_teach_itself_without_a_teacher(tmp_path):
    module = student()
    fit(tmp_path, module, Distillation(weight=1.0, terms={"self": SelfDistillation()}))
    assert module.terms["distill"].teacher is None
    assert not module.terms["distill"].parts, "nothing of a step outlives it"


def test_a_second_draw_teaches_the_first(tmp_path, monkeypatch):
    module = student()
    seen = []
    forward = SubsetMatch.forward

    def spy(self, learnt, taught, batch):
        seen.append((batch["present"].clone(), taught.latents.usable[0].clone()))
        assert not taught.logits.requires_grad
        return forward(self, learnt, taught, batch)

    monkeypatch.setattr(SubsetMatch, "forward", spy)
    fit(tmp_path, module, Distillation(weight=1.0, terms={"subsets": SubsetMatch()}), max_epochs=3)
    assert module.terms["distill"].teacher is None
    shown, second = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert not torch.equal(shown, second)
    assert second.any(1).all() and not second.all()


def test_terms_are_set_up_before_weight_averaging(tmp_path):
    with pytest.raises(InputError, match="list it after"):
        fit(tmp_path, student(), EMAWeightAveraging(), PullCallback())
    module = student()
    fit(tmp_path, module, PullCallback(), EMAWeightAveraging())
    assert "pull" in module.terms


def test_two_terms_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="two terms are called 'pull'"):
        fit(tmp_path, student(), PullCallback(), _Other())
    fit(tmp_path, student(), PullCallback(), _Other(weight=0.0))
    align = PmixAlignment(weight=0.1)
    for twice in ([align, align], [align, PmixAlignment(weight=1.0)]):
        with pytest.raises(InputError, match="two terms are called 'align'; leave one of the"):
            fit(tmp_path, student(), *twice)
    module = student()
    module.add_term("pull", Pull(), TermWeight(1.0))
    with pytest.raises(InputError, match="the model has a term 'pull'"):
        fit(tmp_path, module, PullCallback())


class _Other(PullCallback): ...


@pytest.mark.parametrize("callback", [PmixAlignment, Distillation])
def test_a_callback_that_does_nothing_is_told(tmp_path, callback):
    with pytest.warns(UserWarning, match=f"weight is 0, so this {callback.__name__} does nothing"):
        fit(tmp_path, student(), callback())


def test_alignment_borrows_the_anchor_without_registering_it_twice(tmp_path):
    module = student()
    trainer = fit(tmp_path, module, PmixAlignment(weight=0.1))
    assert module.terms["align"].anchor is None
    groups = trainer.optimizers[0].param_groups
    owned = [id(p) for g in groups for p in g["params"]]
    assert len(owned) == len(set(owned))
    assert sum(k.startswith("anchor.") for k in module.state_dict()) > 0
    assert not [k for k in module.state_dict() if k.startswith("terms.align.anchor")]


def test_alignment_with_its_own_anchor(tmp_path):
    module = student(fill="zero")
    fit(tmp_path, module, PmixAlignment(weight=0.1, anchor=NormalAnchor(), distance="mse"))
    assert isinstance(module.terms["align"].anchor, NormalAnchor)


@pytest.mark.parametrize(
    ("module_arguments", "callback", "words"),
    [
        ({"fill": "zero"}, PmixAlignment(weight=1.0), "has no anchor"),
        ({}, PmixAlignment(weight=1.0, anchor=MixtureAnchor()), "learned weights"),
        ({}, PmixAlignment(weight=1.0, levels=[7]), r"levels \[7\]"),
        ({"fill": "zero", "anchor": MixtureAnchor()}, PullCallback(), "would stay uniform"),
    ],
)
def test_impossible_alignments_are_refused(tmp_path, module_arguments, callback, words):
    with pytest.raises(InputError, match=words):
        fit(tmp_path, student(**module_arguments), callback)


def test_a_second_fit_replaces_the_term(tmp_path):
    module = student()
    fit(tmp_path, module, PullCallback())
    fit(tmp_path, module, PullCallback())
    assert list(module.terms) == ["pull"]


def test_learned_anchor_moves_and_is_logged(tmp_path):
    module = student(optimizer=torch.optim.Adam)
    trainer = fit(tmp_path, module, PmixAlignment(weight=0.1), max_epochs=3)
    weights = [trainer.logged_metrics[f"anchor/level1/{m}"].item() for m in module.modalities]
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert max(abs(w - 0.25) for w in weights) > 1e-4
    assert "anchor/level0/t1" not in trainer.logged_metrics  # not aligned, so not filled


@pytest.mark.parametrize(
    ("combination", "term", "refused"),
    [
        ("flair+t1", SubsetMatch(), True),
        ("flair+t1", SelfDistillation(student_sees="shown"), True),
        ("flair+t1", SelfDistillation(), False),
        ("t1", SelfDistillation(), True),
        (None, SubsetMatch(), False),
        (None, SelfDistillation(student_sees="shown"), False),
        ("teacher", SubsetMatch(), True),
        ("teacher", SelfDistillation(), False),
    ],
)
def test_a_self_taught_term_that_could_only_be_0_is_refused(combination, term, refused):
    net = MultiEncoderUNet(width=4, levels=2)
    teacher = combination == "teacher"
    module = TeacherModule(backbone=net) if teacher else StudentModule(combination, backbone=net)
    callback = Distillation(weight=1.0, terms={"self": term})
    if not refused:
        callback.build_term(module)
        return
    with pytest.raises(InputError, match="hides none in training"):
        callback.build_term(module)
