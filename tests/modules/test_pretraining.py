"""Masked pre-training: what is hidden, what is compared, and what a student takes from it."""

import pytest
import torch
from lightning.pytorch import Trainer

from pmixseg.errors import InputError
from pmixseg.modules import MaskedPretraining, StudentModule
from pmixseg.modules.checkpoint import load, read_checkpoint, restore
from pmixseg.modules.pretraining import Reconstruction, hide_blocks
from pmixseg.task import BRATS
from pmixseg.types import Latents, SegOutput
from tests.callbacks.memory_data import step, tiny


def output(logits):
    return SegOutput(logits, Latents([], BRATS.modalities, []))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.875, 0.99])
def test_exactly_a_share_of_the_cubes_is_hidden_in_every_sequence(share):
    image = torch.ones(3, 4, 12, 8, 16)
    hidden = hide_blocks(image, torch.tensor([1, 2, 3]), block=4, share=share)
    cubes = hidden.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5)
    assert set(cubes.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(cubes.amin(-1), cubes.amax(-1))  # whole cubes
    left = cubes.amax(-1).sum((2, 3, 4))
    assert (left == 24 - int(24 * share)).all()
    assert not torch.equal(hidden[:, 0], hidden[:, 1]) or share == 0
    assert not torch.equal(hidden[0], hidden[1]) or share == 0


def test_hiding_follows_from_the_key_alone_and_cuts_the_last_cubes():
    image = torch.rand(2, 4, 10, 9, 7) + 1
    both = hide_blocks(image, torch.tensor([5, 6]), block=4, share=0.5)
    assert both.shape == image.shape
    assert torch.equal(hide_blocks(image[1:], torch.tensor([6]), 4, 0.5), both[1:])
    assert torch.equal(both[both != 0], image[both != 0])


def test_the_loss_by_hand(batch):
    term = Reconstruction(num_classes=2, modalities=4)
    torch.nn.init.zeros_(term.head.weight)
    torch.nn.init.zeros_(term.head.bias)
    with pytest.raises(RuntimeError, match="whole"):
        term(output(torch.zeros(2, 2, 16, 16, 16)), batch)
    term.whole = torch.arange(8.0).view(2, 4, 1, 1, 1).expand(2, 4, 16, 16, 16)
    value = term(output(torch.zeros(2, 2, 16, 16, 16)), batch)
    # Sample a: (0 + 1 + 4 + 9) / 4; sample b lacks its second sequence: (16 + 36 + 49) / 3.
    assert value.item() == pytest.approx((3.5 + 101 / 3) / 2)


def test_no_label_is_read_and_every_parameter_learns(batch):
    module = MaskedPretraining(block=4, backbone=tiny())
    loss = step(module, {**batch, "label": torch.full_like(batch["label"], 99)})
    loss.backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []
    used = [n for n, p in module.backbone.named_parameters() if p.grad.abs().sum() > 0]
    assert any(name.startswith("decoder") for name in used)


def test_what_is_hidden_is_not_seen(batch):
    module = MaskedPretraining(block=4, share=0.5, backbone=tiny()).eval()
    seen = {}
    inner = module.backbone.encode
    module.encode = lambda image, present: seen.setdefault("out", inner(seen_image(image), present))

    def seen_image(image):
        seen["image"] = image
        return image

    step(module, batch)
    expected = hide_blocks(batch["image"], batch["key"], 4, 0.5)
    assert torch.equal(seen["image"], expected)
    assert (expected == 0).float().mean() > 0.5


def test_a_dedicated_network_is_compared_with_its_own_sequences(batch):
    batch["acquired"] = torch.tensor([[True, True, True, True], [False, True, False, True]])
    module = MaskedPretraining(combination="t1ce+t2", block=4)
    term = module.terms["reconstruct"]
    logits = []
    term.head.register_forward_pre_hook(lambda head, inputs: logits.append(inputs[0]))
    value = step(module, batch)
    assert torch.equal(term.whole, batch["image"][:, [1, 3]])
    errors = (term.head(logits[0]) - term.whole).square().mean((2, 3, 4))
    torch.testing.assert_close(value, errors.mean())


def test_it_learns_to_fill_in(batch):
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 16).view(1, 1, 16, 1, 1).expand(2, 4, 16, 16, 16)
    batch = {**batch, "image": ramp.clone(), "acquired": torch.ones(2, 4).bool()}
    module = MaskedPretraining(block=4, share=0.5, backbone=tiny())
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for number in range(40):
        loss = step(module, {**batch, "key": torch.tensor([2 * number, 2 * number + 1])})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # Always answering 0 leaves the mean square of the ramp.
    assert sum(losses[-5:]) / 5 < 0.6 * float(ramp.square().mean())


def test_a_student_takes_the_backbone_and_leaves_the_head(tmp_path):
    torch.manual_seed(0)
    module = MaskedPretraining(block=4, backbone=tiny())
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "pretrained.ckpt", weights_only=True)
    checkpoint = read_checkpoint(tmp_path / "pretrained.ckpt")
    assert any(key.startswith("terms.reconstruct") for key in checkpoint["state_dict"])
    student = StudentModule(backbone=tiny())
    restore(student, checkpoint)
    for a, b in zip(student.backbone.parameters(), module.backbone.parameters(), strict=True):
        assert torch.equal(a, b)
    again = load(tmp_path / "pretrained.ckpt")
    with pytest.raises(InputError, match="--init_from"):
        again.segment({"t1": "t1.nii.gz"})
    with pytest.raises(InputError, match="--init_from"):
        again.predict_item({}, [])


@pytest.mark.parametrize("wrong", [{"block": 0}, {"share": 1.0}, {"share": -0.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError, match="MaskedPretraining"):
        MaskedPretraining(backbone=tiny(), **wrong)
