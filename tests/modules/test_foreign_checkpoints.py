"""A checkpoint meets data, a task or a network that it does not belong to."""

import nibabel as nib
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.sampling import CaseSampler
from pmixseg.data.store.prepare import prepare
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import write_checkpoint
from pmixseg.task import BRATS, Task

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def student(width=4, task=BRATS):
    torch.manual_seed(1)
    net = MultiEncoderUNet(task.modalities, task.num_classes, width=width, levels=2)
    return StudentModule(task=task, backbone=net, evaluation=EvaluationSettings(overlap=0.0))


def data_of(store):
    return BraTSDataModule(store, patch_size=16, batch_size=2, val_cases=1)


@pytest.fixture(scope="module")
def trained(phantom_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer = Trainer(max_steps=1, limit_val_batches=0, default_root_dir=folder, **QUIET)
    trainer.fit(student(), data_of(phantom_store))
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def another_store(root, out, **arguments):
    report = prepare(find_cases(root, BRATS), out, BRATS, progress=False, **arguments)
    assert not report.failed
    return out


@pytest.mark.parametrize("module", [student, None])
def test_data_at_another_spacing_are_refused_however_the_model_was_made(
    trained, phantom_root, tmp_path, module
):
    store = another_store(phantom_root, tmp_path / "st", spacing=(10.0, 10.0, 10.0))
    trainer = Trainer(default_root_dir=tmp_path, limit_test_batches=1, **QUIET)
    sentence = r"trained with spacing None, but the data have \(10\.0, 10\.0, 10\.0\)"
    with pytest.raises(InputError, match=sentence):
        if module is None:
            trainer.test(load(trained), data_of(store))
        else:
            trainer.test(module(), data_of(store), ckpt_path=trained, weights_only=True)
    with pytest.raises(InputError, match=sentence):
        Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET).fit(
            student(), data_of(store), ckpt_path=trained, weights_only=True
        )


@pytest.mark.parametrize("scale", [(0.7, 0.7, 0.7), (0.7, 0.7, 2.04)], ids=["finer", "slices"])
def test_voxels_of_another_size_than_in_training_are_told(trained, phantom_root, tmp_path, scale):
    """Both keep the scans' own spacing, so nothing brings one to the other."""
    side = load(trained).preparation.voxels[0]
    cohort = tmp_path / "cohort"
    for case in find_cases(phantom_root, BRATS):
        own = cohort / case.case_id
        own.mkdir(parents=True)
        for path in (*case.images.values(), case.label):
            image = nib.load(path)
            other = image.affine @ np.diag([*scale, 1])
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj), other), own / path.name)
    met = " to ".join(f"{factor * side:.3g}" for factor in dict.fromkeys(scale))
    sentence = rf"voxels of {met} mm meet a model that was trained on voxels of {side:.3g}"
    with pytest.warns(UserWarning, match=sentence):
        load(trained).segment(find_cases(cohort, BRATS)[0].images)
    store = another_store(cohort, tmp_path / "st")
    trainer = Trainer(default_root_dir=tmp_path, limit_test_batches=1, **QUIET)
    for module, path in ((load(trained), None), (student(), trained)):
        module.force = True  # the cases are those of the training
        with pytest.warns(UserWarning, match=f"In the test cases {sentence}"):
            trainer.test(module, data_of(store), ckpt_path=path, weights_only=True)


def test_a_training_resumes_with_its_own_network_and_task_only(trained, phantom_store, tmp_path):
    def resume(module):
        Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET).fit(
            module, data_of(phantom_store), ckpt_path=trained, weights_only=True
        )

    with pytest.raises(
        InputError, match=r"do not fit this StudentModule: .* is \S+ \[4, .* and \S+ \[6, "
    ):
        resume(student(width=6))
    larger = student()
    larger.extra = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"it lacks extra.weight \(and 1 more\); use the backbone"):
        resume(larger)
    regions = {"whole": ("NCR", "ED", "ET")}
    with pytest.raises(InputError, match=r"belongs to the task 'brats'.*not to this one \('mine'"):
        resume(student(task=Task("mine", BRATS.modalities, BRATS.labels, regions)))


def test_a_model_of_a_float32_store_segments_as_it_was_tested(phantom_root, tmp_path):
    store = another_store(phantom_root, tmp_path / "st", dtype="float32")
    trainer = Trainer(max_steps=1, limit_val_batches=0, default_root_dir=tmp_path, **QUIET)
    trainer.fit(student(), data_of(store))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load(tmp_path / "a.ckpt")
    assert loaded.preparation.dtype == "float32"
    # Labels of an untrained network turn on the last digit of an intensity.
    case = find_cases(phantom_root, BRATS)[0]
    seen = {}
    for dtype in (None, "float32", "float16"):
        result = loaded.segment(case.images, SegmentSettings(dtype=dtype))
        seen[dtype] = np.asarray(result.labels)
    assert np.array_equal(seen[None], seen["float32"])
    assert not np.array_equal(seen[None], seen["float16"])


def test_a_test_whose_records_cannot_be_written_does_not_begin(trained, phantom_store, tmp_path):
    (tmp_path / "taken").touch()
    module = load(trained)
    module.test_step = lambda item, index: pytest.fail("a case was tested")
    trainer = Trainer(default_root_dir=tmp_path / "taken" / "run", **QUIET)
    with pytest.raises(InputError, match=r"records\.csv cannot be written \(.*irectory"):
        trainer.test(module, data_of(phantom_store))


def test_a_repeated_case_weighs_once_in_validation(phantom_store):
    """Three ranks and two cases: the third rank validates on a case of the first again."""
    assert [CaseSampler(2, rank, 3).indices for rank in range(3)] == [[0], [1], [0]]
    module = student()
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.log_dict = lambda values, **_: logged.update({k: float(v) for k, v in values.items()})
    truth = torch.zeros(4, 4, 4, dtype=torch.uint8)
    truth[0] = 1
    for name, hit in (("a", 1.0), ("b", 0.0), ("a", 1.0)):
        module.predict_item = lambda item, combinations, hit=hit: iter([Fixed(truth * int(hit))])
        item = {"case_id": name, "label": truth, "acquired": torch.ones(4).bool()}
        module.validation_combinations = lambda item: [BRATS.modalities]
        module.validation_step(item, 0)
    module.on_validation_epoch_end()
    assert logged["val/dice/WT"] == pytest.approx(0.5)
    module.validation_step(item, 0)
    module.on_validation_epoch_end()
    assert logged["val/dice/WT"] == pytest.approx(1.0)


class Fixed:
    """A prediction that is known."""

    def __init__(self, classes):
        self.classes = classes

    def on_grid(self):
        return self.classes


class Passing(StudentModule):
    """Hands on whatever it is given, as many subclasses do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Naming(StudentModule):
    def __init__(self, *names):
        super().__init__(names)


@pytest.mark.parametrize("given", [(), ("t1+t2",)])
def test_arguments_that_a_subclass_hands_on_by_place_have_their_names(tmp_path, given):
    net = MultiEncoderUNet(("t1", "t2") if given else BRATS.modalities, width=2, levels=2)
    module, content = Passing(*given, backbone=net), {}
    content["state_dict"] = module.state_dict()
    module.on_save_checkpoint(content)
    again = load(write_checkpoint(content, tmp_path / "a.ckpt"), modules=[__name__])
    assert again.modalities == module.modalities
    with pytest.raises(InputError, match=r"Naming: 2 values of \*names have no names"):
        Naming("flair", "t1")


class Noting(StudentModule):
    """Saves its arguments as Lightning's documentation does, and a note beside them."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.save_hyperparameters()
        self.save_hyperparameters({"commit": "abc"})


def test_notes_among_the_hyperparameters_are_kept_and_arguments_said_once(tmp_path):
    module = Noting(backbone=MultiEncoderUNet(width=2, levels=2))
    trainer = Trainer(default_root_dir=tmp_path, **QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"commit": "abc"}
    assert load(tmp_path / "a.ckpt", modules=[__name__]).backbone.channels == (2, 4)


def test_an_object_that_would_be_made_from_a_checkpoint_is_named(tmp_path):
    module, content = student(), {"callbacks": {"Mine": {"best": np.float64(0.5)}}}
    content["state_dict"] = module.state_dict()
    module.on_save_checkpoint(content)
    with pytest.raises(InputError, match=r"holds an object of numpy\S+scalar, .* plain numbers"):
        load(write_checkpoint(content, tmp_path / "a.ckpt"))
