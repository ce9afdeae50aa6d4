"""Which levels are filled: those that are aligned, and the checkpoint knows them."""

import pytest
import torch

from pmixseg.callbacks import PmixAlignment
from pmixseg.errors import InputError
from pmixseg.losses.anchors import MixtureAnchor
from pmixseg.modules import load
from pmixseg.modules.checkpoint import read_checkpoint
from pmixseg.modules.fill import fill_with_anchor
from pmixseg.types import Latents
from tests.callbacks.memory_data import fit, student


def filled(module):
    """Levels whose hidden slots hold the anchor when the decoder reads them."""
    read, decode = {}, module._decode
    module._decode = lambda ready: decode(read.setdefault("latents", ready))
    try:
        image = torch.randn(1, 4, 16, 16, 16)
        only = torch.tensor([[True, False, False, False]])
        with torch.no_grad():
            module.eval()(image, only)
    finally:
        module._decode = decode
    return [level for level, usable in enumerate(read["latents"].usable) if bool(usable.all())]


def test_each_level_is_filled_with_its_own_weights():
    anchor = MixtureAnchor("learned")
    anchor.bind(("a", "b", "c"), 2)
    anchor.scores.data = torch.tensor([[1.0, 3.0, 9.0], [3.0, 1.0, 9.0]]).log()
    features = torch.tensor([0.0, 4.0, 7.0]).view(1, 3, 1, 1, 1, 1)
    shown = torch.tensor([[True, True, False]])
    made = fill_with_anchor(Latents([features] * 2, ("a", "b", "c"), [shown] * 2), anchor)
    # Over the two that are shown: 3/4 · 4 and 1/4 · 4.
    assert [level[0, 2].item() for level in made.features] == pytest.approx([3, 1])


def test_the_aligned_levels_are_filled_in_training_and_after_loading(tmp_path):
    module = student()
    assert filled(module) == [0, 1, 2]
    trainer = fit(tmp_path, module, PmixAlignment(weight=0.1, levels=[1]))
    assert module.fill_levels == [1] and filled(module) == [1]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["pmixseg"]["fill_levels"] == [1]
    again = load(tmp_path / "a.ckpt")
    assert filled(again) == [1]
    image, only = torch.randn(1, 4, 16, 16, 16), torch.tensor([[True, False, True, False]])
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(image, only).logits, module.eval()(image, only).logits, rtol=0, atol=0
        )


def test_a_module_of_the_default_takes_the_levels_of_the_weights(tmp_path):
    module = student()
    trainer = fit(tmp_path, module, PmixAlignment(weight=0.1, levels=[2]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = student()
    fresh.on_load_checkpoint(read_checkpoint(tmp_path / "a.ckpt"))
    assert fresh.fill_levels == [2]
    told = student(fill_levels=[0])
    told.on_load_checkpoint(read_checkpoint(tmp_path / "a.ckpt"))
    assert told.fill_levels == [0]


@pytest.mark.parametrize(
    ("callbacks", "levels"),
    [
        ([], None),
        ([PmixAlignment(weight=0.0)], None),
        ([PmixAlignment(weight=0.1)], [1, 2]),
        (
            [
                PmixAlignment(weight=0.1, levels=[-1]),
                PmixAlignment(weight=0.1, levels=[0], distance="mse", name="fine"),
            ],
            [0, 2],
        ),
    ],
)
def test_levels_follow_what_is_aligned(tmp_path, callbacks, levels):
    module = student()
    fit(tmp_path, module, *callbacks)
    assert module.fill_levels == levels
    fit(tmp_path, module)
    assert module.fill_levels is None  # a fit aligns what its own callbacks align


def test_levels_that_were_named_stay(tmp_path):
    module = student(fill_levels=[0, 2], anchor=MixtureAnchor("uniform"))
    fit(tmp_path, module, PmixAlignment(weight=0.1, levels=[1]))
    assert module.fill_levels == [0, 2] and filled(module) == [0, 2]


def test_learned_weights_of_a_level_that_nothing_fills_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"levels \[1, 2\], but \[2\] are not filled"):
        fit(tmp_path, student(fill_levels=[1]), PmixAlignment(weight=0.1))
    with pytest.raises(InputError, match=r"get no gradient .* fill_levels: \[\]"):
        fit(tmp_path, student(fill_levels=[]))
    shared = student(fill_levels=[1], anchor=MixtureAnchor(shared=True))
    fit(tmp_path, shared, PmixAlignment(weight=0.1))
    own = PmixAlignment(weight=0.1, anchor=MixtureAnchor("uniform"))
    fit(tmp_path, student(fill_levels=[1]), own)
