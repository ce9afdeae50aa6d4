"""A checkpoint that was damaged, or whose training diverged, is refused in one sentence."""

import copy
import functools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

import pmixseg
from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import Distillation
from pmixseg.cli import main
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import read_checkpoint, restore, write_checkpoint
from pmixseg.modules.payload import Payload
from pmixseg.modules.preparation import Preparation
from pmixseg.modules.training.loss_log import FiniteLoss
from pmixseg.task import BRATS
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny
from tests.cli.presets import TINY_UNET


def student():
    torch.manual_seed(0)
    module = StudentModule(backbone=MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2))
    module.preparation = Preparation(normalisation="zscore-own-mask", patch=(16, 16, 16))
    return module


def content():
    module = student()
    return {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": module.state_dict(),
        "pmixseg": module.payload().to_dict(),
    }


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(content(), tmp_path / "a.ckpt")


@pytest.fixture(params=["nan", "inf"])
def diverged(request, tmp_path):
    """A checkpoint with one weight that is not finite."""
    state = content()
    name = next(k for k in state["state_dict"] if k.endswith("weight"))
    state["state_dict"][name] = state["state_dict"][name].clone()
    state["state_dict"][name].view(-1)[0] = float(request.param)
    return write_checkpoint(state, tmp_path / "diverged.ckpt")


NOT_FINITE = r"holds weights that are not finite, in 1 tensor \(.*weight\): the training diverged"


def test_weights_that_are_not_finite_are_refused_in_python(diverged):
    with pytest.raises(InputError, match=NOT_FINITE):
        load(diverged)
    with pytest.raises(InputError, match=NOT_FINITE):
        restore(student(), read_checkpoint(diverged))
    with pytest.raises(InputError, match=NOT_FINITE):
        Distillation(teacher=str(diverged), weight=1.0).load_teacher()


@pytest.mark.parametrize("command", ["segment", "test", "predict", "validate", "export", "fit"])
def test_no_command_uses_them(diverged, phantom_root, phantom_store, tmp_path, capsys, command):
    case = next(phantom_root.rglob("*_flair.nii.gz"))
    out = tmp_path / "out"
    flags = [f"--ckpt_path={diverged}", f"--data.store={phantom_store}", f"--run={out}"]
    flags += ["--data.split=WholeCohort", "--trainer.accelerator=cpu"]
    begin = [f"--init_from={diverged}", f"--data.store={phantom_store}", f"--run={out}"]
    begin += ["--model=StudentModule", *TINY_UNET]
    arguments = {
        "segment": [str(diverged), "--flair", str(case), "-o", str(out), "--device=cpu"],
        "export": [str(diverged), "-o", str(out / "a.pt2")],
        "fit": begin,
    }
    if command == "validate":
        flags.append("--data.split.part=val")
    assert main([command, *arguments.get(command, flags)]) == 1
    said = capsys.readouterr().err
    assert "that are not finite" in said
    assert "Traceback" not in said


def test_a_flipped_bit_of_a_weight_is_found(checkpoint, tmp_path):
    """The archive holds checksums, and PyTorch does not compare them."""
    raw = bytearray(checkpoint.read_bytes())
    values = read_checkpoint(checkpoint)["state_dict"]
    largest = max(values.values(), key=lambda v: v.numel())
    at = bytes(raw).index(largest.contiguous().numpy().tobytes())
    raw[at + 5] ^= 0x10
    broken = tmp_path / "b.ckpt"
    broken.write_bytes(raw)
    torch.load(broken, weights_only=True)
    with pytest.raises(InputError, match=r"b\.ckpt is damaged: the checksum of its part .*data/"):
        load(broken)


def test_a_file_that_is_cut_off_is_one_sentence(checkpoint, tmp_path):
    raw = checkpoint.read_bytes()
    for size in (0, 10, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cut.ckpt").write_bytes(raw[:size])
        with pytest.raises(InputError, match=r"cut\.ckpt"):
            load(tmp_path / "cut.ckpt")


WRONG = (None, 7, -1.5, "x", [], [1, "x"], {}, {"class_path": 3}, True, float("nan"), [[]])


def mutated(value, chance):
    """A copy of nested primitives with one node replaced, removed or renamed."""
    places = []

    def walk(node):
        if isinstance(node, dict):
            places.extend((node, k) for k in node)
            for inner in node.values():
                walk(inner)
        elif isinstance(node, list):
            places.extend((node, i) for i in range(len(node)))
            for inner in node:
                walk(inner)

    value = copy.deepcopy(value)
    walk(value)
    holder, key = chance.choice(places)
    if chance.random() < 0.3:
        del holder[key]
    else:
        holder[key] = copy.deepcopy(chance.choice(WRONG))
    return value


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_description_loads_or_is_one_sentence(tmp_path, seed):
    chance = random.Random(seed)
    state = content()
    state["pmixseg"]["cases"] = {
        "store": "s",
        "train": ["a"],
        "val": [],
        "test": ["b"],
        "scans": {"a": ["0f"]},
        "earlier": {},
    }
    state["pmixseg"] = mutated(state["pmixseg"], chance)
    path = write_checkpoint(state, tmp_path / "m.ckpt")
    try:
        module = load(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(module, StudentModule)


def test_a_payload_comes_back():
    payload = student().payload()
    again = Payload.from_dict(payload.to_dict())
    assert again.to_dict() == payload.to_dict()
    assert again.preparation == payload.preparation


@pytest.mark.parametrize("state", [None, [], {"a": 1}, {1: torch.zeros(1)}])
def test_a_checkpoint_without_weights_is_one_sentence(tmp_path, state):
    path = write_checkpoint({**content(), "state_dict": state}, tmp_path / "w.ckpt")
    with pytest.raises(InputError, match=r"w\.ckpt holds no weights"):
        load(path)


def test_whole_numbers_for_weights_are_refused(tmp_path):
    whole = {name: value.long() for name, value in content()["state_dict"].items()}
    path = write_checkpoint({**content(), "state_dict": whole}, tmp_path / "w.ckpt")
    with pytest.raises(InputError, match=r"is int64 \[.*\] there and float32 \["):
        load(path)


def test_a_training_that_diverges_says_at_which_step(tmp_path):
    module = student()
    seen = []

    def spoilt(output, batch, epoch):
        seen.append(1)
        value = output.logits.float().mean()
        return value * float("nan") if len(seen) == 2 else value

    module.segmentation_loss = spoilt
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    with pytest.raises(InputError, match=r"since step 1 \(seg\).*rate than 0\.001"):
        trainer.fit(module, MemoryData())
    assert len(seen) == 2


def test_an_image_that_is_not_finite_is_named(tmp_path):
    class Broken(MemoryData):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            batch["image"][[name == "case3" for name in batch["case_id"]], 0, 0] = torch.nan
            return batch

    sentence = r"image of case 'case3' holds NaN or infinity at step 1, .* correct its scans"
    with pytest.raises(InputError, match=sentence):
        quiet_trainer(tmp_path).fit(student(), Broken())


def test_the_first_step_is_known_although_nobody_asked_before():
    """As on a GPU, where a step asks for no value."""
    loss = FiniteLoss()
    for step, (seg, align) in enumerate([(1, 1), (1, np.nan), (np.inf, 1), (1, 1)]):
        loss.see(("seg", "align"), torch.tensor([float(seg), float(align)]), step)
    with pytest.raises(InputError, match=r"since step 1 \(align\)"):
        loss.check(lambda: 0.1)
    loss.check(lambda: 0.1)
    loss.see(("seg",), torch.tensor([2.0]), 5)
    loss.check(lambda: 0.1)


def test_an_output_that_is_not_finite_is_one_sentence(phantom_root):
    module = student().eval()
    decode = module._decode

    def spoilt(latents):
        output = decode(latents)
        return replace(output, logits=output.logits * float("nan"))

    module._decode = spoilt
    case = next(phantom_root.rglob("*_flair.nii.gz"))
    with pytest.raises(InputError, match="answers with numbers that are not finite"):
        module.segment({"flair": case})


def test_the_folder_of_a_run_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"is the folder of a run; give .*/best\.ckpt"):
        pmixseg.load(tmp_path)


class Mine(StudentModule):
    """Of a user's own module, which its checkpoint may name where it is called."""


def test_lightnings_own_loading_gives_the_same_model(tmp_path):
    torch.manual_seed(0)
    settings = EvaluationSettings(
        window=(16, 16, 16), overlap=0.25, temperatures={1: 2.0}, postprocess=["fill_holes"]
    )
    net = MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2)
    module = Mine(backbone=net, evaluation=settings, fill="zero")
    module.preparation = Preparation(normalisation="zscore-own-mask", patch=(16, 16, 16))
    state = {"state_dict": module.state_dict(), "pmixseg": module.payload().to_dict()}
    path = write_checkpoint(state, tmp_path / "a.ckpt")
    ours = load(path, modules=[__name__])
    theirs = Mine.load_from_checkpoint(path, map_location="cpu", strict=True, weights_only=True)
    assert type(theirs) is Mine
    assert not theirs.training
    assert theirs.payload() == ours.payload() == module.payload()
    assert (theirs.loaded_from, theirs.identity) == (ours.loaded_from, ours.identity)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_arguments_by_name_replace_those_of_the_checkpoint(checkpoint):
    faster = functools.partial(torch.optim.SGD, lr=0.5)
    assert StudentModule.load_from_checkpoint(checkpoint, optimizer=faster).lr == 0.5
    assert load(checkpoint, evaluation=EvaluationSettings(overlap=0.75)).evaluation.overlap == 0.75
    with pytest.raises(InputError, match="StudentModule takes no 'overlap'"):
        load(checkpoint, overlap=0.75)
    with pytest.raises(InputError, match=r"do not fit this StudentModule: .*use the backbone"):
        StudentModule.load_from_checkpoint(checkpoint, combination="t1ce")


@pytest.mark.parametrize(
    "lost", [{"strict": False}, {"weights_only": False}, {"hparams_file": "h"}]
)
def test_options_of_lightning_that_would_lose_something_are_refused(checkpoint, lost):
    with pytest.raises(InputError, match=r"takes no hparams_file, .* give arguments that"):
        StudentModule.load_from_checkpoint(checkpoint, **lost)
    with pytest.raises(InputError, match=r"map_location is \{'cpu': 'cpu'\}"):
        StudentModule.load_from_checkpoint(checkpoint, map_location={"cpu": "cpu"})
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        student().load_from_checkpoint(checkpoint)


def test_a_checkpoint_of_another_class_is_named(checkpoint):
    with pytest.raises(InputError, match="holds a StudentModule, which is no TeacherModule"):
        pmixseg.TeacherModule.load_from_checkpoint(checkpoint)
    assert type(pmixseg.SegmentationModule.load_from_checkpoint(checkpoint)) is StudentModule


def test_a_resumed_training_refuses_them(diverged, tmp_path):
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, logger=False, accelerator="cpu")
    with pytest.raises(InputError, match="are not finite"):
        trainer.fit(student(), MemoryData(), ckpt_path=diverged, weights_only=True)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "was not written by pmixseg"),
        ([1], "does not describe a model and its task; it is damaged"),
        ({"format": 99}, "has checkpoint format 99, this version of pmixseg reads 1; update"),
    ],
)
def test_an_entry_of_another_kind_is_told_from_a_damaged_one(entry, words):
    with pytest.raises(InputError, match=words):
        Payload.from_dict(entry)


def test_a_training_is_not_resumed_with_other_terms():
    made = StudentModule(backbone=tiny(levels=2)).payload()
    with pytest.raises(InputError, match=r"the terms \[\], this training has \['align'\]"):
        made.refuse_other_terms(["align"])


@pytest.mark.parametrize(
    ("patch", "words"), [(None, "no window size is known"), ((16, 16, 12), "largest stride, 8")]
)
def test_a_window_that_cannot_be_is_told(patch, words):
    with pytest.raises(InputError, match=words):
        Preparation(patch=patch).window(EvaluationSettings(), (1, 2, 4, 8))


def test_intensities_that_nobody_makes_any_more_are_told():
    with pytest.raises(InputError, match="'histogram', but this version of pmixseg makes"):
        Preparation(normalisation="histogram").target_spacing()
