import copy
import functools
import importlib
import inspect
import math
import re
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

import pmixseg
from pmixseg import BRATS, BraTSDataModule, Distillation, PmixAlignment, StudentModule, Task
from pmixseg.argument_checks import argument_check
from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import RunCheckpoint, TermCallback
from pmixseg.data import Augmentation, Fractions, Store, find_cases, prepare
from pmixseg.describe import Described, build, constructor_arguments, describe
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.inference.outputs import Outputs
from pmixseg.losses import DiceCE, Distance, LatentMatch, LogitKL, MixtureAnchor
from tests.callbacks.memory_data import fit


class Inner(Described):
    def __init__(self, size: int = 1):
        self.size = size


class Outer(nn.Module, Described):
    def __init__(self, inner: Inner | None = None, rate: float = 0.1):
        super().__init__()
        self.inner = inner
        self.rate = rate


class Wider(Outer):
    def __init__(self, extra: str = "x", **kwargs):
        super().__init__(**kwargs)
        self.extra = extra


class Optimised(Described):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.AdamW):
        self.optimizer = optimizer


def test_an_attribute_that_was_changed_is_described():
    made = Wider(inner=Inner())
    made.rate, made.inner.size = 0.5, 2
    assert made.init_args == {"extra": "x", "inner": made.inner, "rate": 0.5}
    assert describe(made)["init_args"]["inner"]["init_args"] == {"size": 2}
    copied = copy.deepcopy(made)
    assert describe(copied) == describe(made)
    made.settle("rate")
    assert "rate" not in made.init_args
    made.inner = Outer()
    assert made.init_args["inner"] is made.inner
    loss = DiceCE()
    loss.dice_weight = "much"
    with pytest.raises(InputError, match="DiceCE: dice_weight is 'much'; give a number"):
        loss.check_changes()


def test_what_a_module_is_given_later_is_in_its_checkpoint(tmp_path):
    module = StudentModule(backbone=MultiEncoderUNet(width=2, levels=2))
    module.criterion.dice_weight = 0.5
    module.evaluation = EvaluationSettings(window=(16, 16, 16), overlap=0.25)
    described = build(module.payload().to_dict())
    assert described.criterion.dice_weight == 0.5
    assert described.evaluation == module.evaluation
    module.criterion = nn.CrossEntropyLoss()
    with pytest.raises(InputError, match=r"criterion is CrossEntropyLoss\(\); give a pmixseg"):
        fit(tmp_path, module)


def test_arguments_of_the_outermost_constructor_are_kept():
    made = Wider("y", rate=0.5)
    assert made.init_args == {"extra": "y", "rate": 0.5}
    assert describe(made) == {
        "class_path": f"{__name__}.Wider",
        "init_args": {"extra": "y", "rate": 0.5},
    }


def test_description_is_nested_and_can_be_built_again():
    text = describe(Outer(Inner(3)))
    assert text["init_args"]["inner"]["init_args"] == {"size": 3}
    again = build(text)
    assert isinstance(again, Outer)
    network = MultiEncoderUNet(modalities=("a", "b"), num_classes=2, width=4, levels=2)
    assert describe(build(describe(network))) == describe(network)


def test_paths_tuples_and_partials_are_described():
    assert describe({"p": Path("a/b"), "t": (1, 2)}) == {"p": "a/b", "t": [1, 2]}
    made = functools.partial(torch.optim.SGD, lr=0.1)
    assert describe(made)["class_path"].endswith("SGD")
    assert describe(made)["init_args"] == {"lr": 0.1}


def test_optimizer_from_the_command_line_is_described():
    parser = ArgumentParser()
    parser.add_class_arguments(Optimised, "o")
    config = parser.parse_args(["--o.optimizer=torch.optim.SGD", "--o.optimizer.lr=0.25"])
    text = describe(parser.instantiate(config).o.optimizer)
    assert (text["class_path"], text["init_args"]["lr"]) == ("torch.optim.SGD", 0.25)


def test_signature_is_kept_for_command_lines():
    parser = ArgumentParser()
    parser.add_argument("--net", type=Outer)
    made = parser.instantiate(
        parser.parse_args([f"--net={__name__}.Wider", "--net.rate=2", "--net.extra=z"])
    ).net
    assert (made.rate, made.extra) == (2.0, "z")


@pytest.mark.parametrize("value", [nn.Linear(1, 1), object(), lambda: 0])
def test_what_no_checkpoint_can_hold_is_refused(value):
    with pytest.raises(InputError, match=r"class_path|cannot be written"):
        describe({"thing": value}, "module")


def test_local_classes_are_refused():
    class Hidden(Described): ...

    with pytest.raises(InputError, match="inside a function"):
        describe(Hidden())


def test_wrong_names_and_arguments_are_sentences():
    with pytest.raises(InputError, match="cannot be imported"):
        build({"class_path": "pmixseg.nowhere.Net", "init_args": {}})
    with pytest.raises(InputError, match="cannot be made from"):
        build({"class_path": f"{__name__}.Inner", "init_args": {"colour": "red"}})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: StudentModule(fill="anchr"), "StudentModule: fill is 'anchr'; give zero or"),
        (lambda: StudentModule(fill_levels=[4]), "fill_levels is .4., but MultiEncoderUNet has"),
        (lambda: StudentModule(compile="fast"), "StudentModule: compile is .fast.; give true"),
        (lambda: MixtureAnchor(weights="lerned"), "weights is 'lerned'; give learned or uniform"),
        (lambda: LatentMatch(target="ancor"), "target is 'ancor'; give anchor or same or fused"),
        (lambda: PmixAlignment(detach="all"), "detach is 'all'; give anchor or none or features"),
        (lambda: PmixAlignment(weight=math.nan), "weight is nan; give a number"),
        (lambda: PmixAlignment(weight=math.inf), "weight is inf; give a finite number"),
        (lambda: PmixAlignment(ratio=math.nan), "ratio is nan"),
        (lambda: LogitKL(temperature=math.nan), "temperature is nan"),
        (lambda: DiceCE(dice_weight=math.inf), "dice_weight is inf"),
        (lambda: Augmentation(noise=math.nan), "noise is nan"),
        (lambda: Fractions(math.nan, 0.1, 0.2), "train is nan"),
        (lambda: StudentModule(backbone="RFNet"), r"'RFNet' stands where.*as in RFNet\(\) and not"),
        (lambda: StudentModule(backbone=nn.Conv3d(4, 4, 3)), "backbone is Conv3d.*EarlyFusion"),
        (lambda: StudentModule(criterion=nn.CrossEntropyLoss()), "give a pmixseg.losses.Criterion"),
        (lambda: PmixAlignment(distance=nn.MSELoss()), "is MSELoss.*an object of Distance"),
        (lambda: PmixAlignment(anchor=nn.MSELoss()), "give an object of Anchor or null"),
        (lambda: RunCheckpoint(3), "RunCheckpoint: run is 3; give a text or a path"),
        (lambda: StudentModule(criterion="dice"), "'dice' stands where"),
        (lambda: StudentModule(scheduler="cosine"), "'cosine' stands where"),
        (lambda: StudentModule(optimizer="AdamW"), "'AdamW' makes no optimizer"),
        (lambda: StudentModule(task="brats"), "task is 'brats'; give a pmixseg.Task"),
        (lambda: StudentModule(evaluation={"overlp": 0.3}), "no .overlp.; did you mean overlap?"),
        (lambda: PmixAlignment(anchor="mixture"), "'mixture' stands where"),
        (lambda: Distillation("x.ckpt", terms={"logit": "LogitKL"}), "'LogitKL' stands where"),
        (lambda: Distillation("x.ckpt", terms=["logit"]), "distill.terms is .'logit'.; give a"),
        (lambda: BraTSDataModule("store", split={"train": ["a"]}), "'train': .* stands where"),
        (lambda: BraTSDataModule("store", augmentation="strong"), "'strong' stands where"),
        (lambda: BraTSDataModule("store", patch_size=(32, 32)), "a whole number or a list of 3."),
    ],
)
def test_unknown_words_and_numbers_that_are_none_are_refused_in_python(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


class Plain(nn.Module):
    """No backbone."""


class Own(StudentModule):
    def build_backbone(self):
        return Plain()


class OwnTerm(TermCallback):
    def build_term(self, module):
        return Plain()


def data(**arguments):
    return BraTSDataModule(**{"store": "s", **arguments})


def student(**arguments):
    return StudentModule(backbone=MultiEncoderUNet(width=2, levels=2), **arguments)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: data(batch_size="2"), "BraTSDataModule: batch_size is '2'; give a whole number."),
        (lambda: data(batch_size=2.5), "batch_size is 2.5; give a whole number."),
        (lambda: data(num_workers=None), "num_workers is None; give a whole number."),
        (lambda: data(seed="a"), "seed is 'a'; give a whole number."),
        (lambda: data(spacing=2.0), "spacing is 2.0; give a list of 3 or null."),
        (lambda: data(predict_part="tets"), "predict_part is 'tets'; give train or val or test or"),
        (lambda: data(layout=5), "layout is 5; give a text or a path or null."),
        (
            lambda: data(task="brats"),
            "task is 'brats'; give a pmixseg.Task, such as pmixseg.BRATS.",
        ),
        (lambda: data(split=Fractions), "Fractions is a class; give an object of it, as in Fracti"),
        (lambda: StudentModule(backbone=MultiEncoderUNet), "MultiEncoderUNet is a class; give an "),
        (lambda: student(fill_levels=0), "StudentModule: fill_levels is 0; give a list or null."),
        (lambda: student(evaluation="x"), "evaluation is 'x'; give EvaluationSettings, or a map"),
        (lambda: student(evaluation={"window": 16}), "EvaluationSettings: window is 16; give a li"),
        (lambda: student(evaluation={"overlap": "x"}), "overlap is 'x'; give a number."),
        (lambda: PmixAlignment(weight="1"), "PmixAlignment: weight is '1'; give a number."),
        (lambda: PmixAlignment(levels=0), "PmixAlignment: levels is 0; give a list or null."),
        (lambda: Distillation(5), "Distillation: teacher is 5; give a text or null."),
        (lambda: SegmentSettings(tta="yes"), "SegmentSettings: tta is 'yes'; give true or false."),
        (
            lambda: student().segment({}, "strict"),
            "StudentModule.segment: settings is 'strict'; give SegmentSettings(...) or null.",
        ),
        (Own, "the network of this Own is a Plain, and no pmixseg.backbones.Backbone; derive it"),
        (
            lambda: OwnTerm("own", 1.0).setup(Trainer(logger=False), student(), "fit"),
            "OwnTerm.build_term made a Plain; let it return a pmixseg.losses.term.Term.",
        ),
    ],
)
def test_values_of_another_kind_are_one_sentence(make, sentence, monkeypatch):
    monkeypatch.setattr(OwnTerm, "_check_neighbours", lambda *_: None)
    with pytest.raises(InputError, match=re.escape(sentence)):
        make()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: pmixseg.load(None), "load: path is None; give a text or a path."),
        (lambda: pmixseg.load("a", modules="b"), "load: modules is 'b'; give a list."),
        (lambda: pmixseg.load("a", modules=[".b"]), "module '.b' cannot be imported"),
        (lambda: pmixseg.load("a", map_location=5), "map_location is 5; give a text or an object"),
        (lambda: pmixseg.load("a", map_location="meta"), "map_location is meta, which holds no"),
        (lambda: find_cases(".", "brats"), "task is 'brats'; give a pmixseg.Task, such as pmixs"),
        (lambda: find_cases(".", BRATS, labels="NCR=1"), "labels is 'NCR=1'; give a mapping"),
        (lambda: find_cases(".", BRATS, labels={1: "x"}), "labels holds 1; give a text there."),
        (lambda: prepare([], "s", BRATS, workers="2"), "prepare: workers is '2'; give a whole num"),
        (lambda: prepare(["a"], "s", BRATS), "cases holds 'a'; give an object of Case there."),
        (lambda: prepare([], "s", BRATS, spacing=2), "spacing is 2; give a list of 3 or null."),
        (lambda: Store.open(5), "Store.open: root is 5; give a path or a text."),
        (
            lambda: student().segment({}, codes="NCR=1"),
            "StudentModule.segment: codes is 'NCR=1'; give a mapping or null.",
        ),
        (lambda: student().segment({}, progress=5), "progress is 5; give a function or null."),
        (
            lambda: student(optimizer=torch.optim.SGD([torch.zeros(1)], 0.1)),
            "optimizer is SGD (...); give the class of an optimizer, or functools.partial",
        ),
        (lambda: Outputs("o"), "Outputs: folder is 'o'; give a path."),
        (lambda: student(anchor=5), "5 stands where an object belongs"),
        (lambda: data(store=student()), "store is StudentModule("),
        (lambda: MultiEncoderUNet([]), "MultiEncoderUNet: modalities is []; give one or more"),
        (lambda: BRATS.region_classes("NET"), "task 'brats' has no region 'NET'; use one of ['WT'"),
        (lambda: Task.from_dict({"name": "x"}), "a task is a mapping of name, modalities, labels,"),
    ],
)
def test_values_of_another_kind_in_a_call(make, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        make()


def _functions():
    """Every function and method of the package that checks its arguments."""
    package = Path(pmixseg.__file__).parent
    for path in package.rglob("*.py"):
        if "@checked\n" not in path.read_text() or path.name == "argument_checks.py":
            continue
        name = ".".join(["pmixseg", *path.relative_to(package).with_suffix("").parts])
        module = importlib.import_module(name)
        owners = [module, *(c for c in vars(module).values() if inspect.isclass(c))]
        for owner in (o for o in owners if getattr(o, "__module__", name) == name):
            for member in vars(owner).values():
                function = getattr(member, "__func__", member)
                mine = getattr(function, "__module__", None) == name
                if mine and getattr(function, "__code__", None) is CHECKING:
                    yield function


CHECKING = find_cases.__code__


def test_every_argument_of_a_checked_function_refuses_what_it_cannot_take():
    unchecked = {}
    for function in _functions():
        inner = function.__wrapped__
        if inner.__name__ == "__init__":
            continue
        names = [n for n in inspect.signature(inner).parameters if n not in ("self", "cls")]
        for name in names:
            try:
                argument_check(inner)(None, (), {name: unittest.mock.sentinel.anything})
            except InputError:
                continue
            unchecked.setdefault(inner.__qualname__, []).append(name)
    assert unchecked == {
        # Told with what is in them.
        "SegmentationNetwork.segment": ["images"],
        "segment_files": ["images"],
        # Those of the model, which says so itself.
        "load": ["arguments"],
    }


def test_kinds_that_fit_are_taken():
    data(batch_size=2.0, spacing=np.ones(3), seed=np.int64(3), store=Path("s"))
    PmixAlignment(weight=np.float32(0.5), levels=(0, 1))
    assert describe(student(fill_levels=[0]))["init_args"]["fill_levels"] == [0]


def test_numbers_and_arrays_of_numpy_are_plain_ones():
    assert PmixAlignment(levels=np.arange(2), ratio=np.float32(0.5)).levels == [0, 1]
    sgd = functools.partial(torch.optim.SGD, lr=np.float64(0.5), nesterov=np.bool_(False))
    made = student(anchor=MixtureAnchor(np.arange(4)), fill_levels=[np.int64(0)], optimizer=sgd)
    given = describe(made)["init_args"]
    assert given["anchor"]["init_args"]["weights"] == [0, 1, 2, 3]
    assert given["fill_levels"] == [0]
    assert given["optimizer"]["init_args"] == {"lr": 0.5, "nesterov": False}
    with pytest.raises(InputError, match=r"weights is \[1.0, -2.0"):
        MixtureAnchor(np.array([1.0, -2.0, 3.0, 4.0]))
    settings = SegmentSettings(window=np.array([16, 16, 32]), overlap=np.float32(0.5))
    assert repr((settings.window, settings.overlap)) == "((16, 16, 32), 0.5)"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Outer(colour="red"), "Outer takes no 'colour'; it takes "),
        (lambda: pmixseg.TeacherModule(combination="t1"), "takes no 'combination'; Student"),
        (lambda: student(fill_weight=1.0), "no 'fill_weight'; TeacherModule does."),
        (lambda: student(optimiser=None), "takes no 'optimiser'; did you mean optimizer?"),
        (lambda: PmixAlignment(wieght=1), "PmixAlignment takes no 'wieght'; did you mean weight?"),
        (lambda: data(batchsize=1), "BraTSDataModule takes no 'batchsize'; did you mean batch_si"),
    ],
)
def test_an_argument_that_does_not_exist_is_told_with_its_class(make, sentence):
    with pytest.raises(TypeError, match=re.escape(sentence)):
        make()


REQUIRED = {"modality": "t1", "path": "x", "rates": 0.5, "combinations": ["t1"], "transforms": []}

ANY_NUMBER = {"seed", "index"}
"""Arguments of which -1 means something."""


def described(cls, abstract=False):
    """Every class of the package whose constructor a file of settings may call."""
    for part in ("", ".losses", ".callbacks", ".data", ".modules", ".backbones"):
        package = importlib.import_module(f"pmixseg{part}")
        assert all(hasattr(package, name) for name in package.__all__)  # imported by that
    for below in cls.__subclasses__():
        yield from described(below, abstract)
        ours = below.__module__.startswith("pmixseg.")
        if ours and (abstract or not inspect.isabstract(below)):
            yield below


def test_numbers_that_mean_nothing_are_refused_by_every_class():
    asked = 0
    for cls in {*described(Described)}:
        parameters = inspect.signature(cls).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind == 1]
        if not {*needed} <= {*REQUIRED}:
            continue
        base = {name: REQUIRED[name] for name in needed}
        for p in parameters:
            if not re.search(r"^(int|float)\b", str(p.annotation)):
                continue
            for value in (-1, math.nan, math.inf):
                if p.name in ANY_NUMBER and value == -1:
                    continue
                asked += 1
                with pytest.raises(InputError):
                    cls(**{**base, p.name: value})
                    pytest.fail(f"{cls.__name__}({p.name}={value}) is taken")
    assert asked > 200


def test_a_class_has_ranges_of_its_own_arguments_alone():
    """A class of a user's own may mean something else by the same word."""
    for cls in {*described(Described, abstract=True)}:
        foreign = vars(cls).get("ranges", {}).keys() - {*constructor_arguments(cls), "epsilon"}
        assert not foreign, f"{cls.__name__} has ranges for {foreign}"


def test_an_argument_of_a_users_own_class_may_be_any_number():
    class Own(Distance):
        def __init__(self, beta: float = -1.0) -> None:
            super().__init__()
            self.beta = beta

        def forward(self, **views):
            raise NotImplementedError

    assert Own(beta=-0.5).beta == -0.5


def test_a_constructor_replaced_from_outside_is_not_taken_for_forgotten(monkeypatch):
    narrow = functools.partialmethod(MultiEncoderUNet.__init__, width=2, levels=2)
    monkeypatch.setattr(MultiEncoderUNet, "__init__", narrow)
    assert len(MultiEncoderUNet().strides) == 2
