"""Settings that do nothing say so, once, at the start of a training or at its end."""

import warnings

import pytest
import torch

from pmixseg.callbacks import PmixAlignment
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.modules import StudentModule, TeacherModule
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny


def sentences(folder, module, **arguments):
    """Warnings of our own in a short training."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        trainer = quiet_trainer(folder, callbacks=[PmixAlignment(weight=0.1, **arguments)])
        trainer.fit(module, MemoryData())
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
        (StudentModule, {"distance": "nmse", "anchor": NormalAnchor()}, "only pushes the mean"),
        (StudentModule, {"distance": "mse", "anchor": NormalAnchor()}, None),
        (StudentModule, {"distance": "case_nce"}, None),
    ],
)
def test_inert_settings_are_one_sentence_at_the_start(tmp_path, make, arguments, match):
    torch.manual_seed(0)
    found = sentences(tmp_path, make(backbone=tiny(), anchor=fixed()), **arguments)
    assert len(found) == (match is not None), found
    assert match is None or match in found[0]


def test_weights_that_stay_uniform_are_one_sentence_at_the_end(tmp_path):
    torch.manual_seed(0)
    slow = StudentModule(backbone=tiny(), optimizer=torch.optim.SGD)
    (found,) = sentences(tmp_path, slow)
    assert "stayed uniform" in found
    moved = StudentModule(backbone=tiny())
    torch.nn.init.normal_(moved.anchor.scores)
    assert sentences(tmp_path, moved) == []
