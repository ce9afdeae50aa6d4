"""Every rule of the conformance checks is broken once, and the check says so in words."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from pmixseg.backbones import EarlyFusion, MultiEncoderUNet
from pmixseg.errors import InputError
from pmixseg.losses import DistillationLoss, LatentMatch, LogitKL
from pmixseg.testing import ConformanceError, check_backbone, check_term
from pmixseg.types import Latents, SegOutput

STORE: dict[str, torch.Tensor] = {}


class Small(MultiEncoderUNet):
    """Base of the broken ones, which change what it is made of, or its output."""

    def __init__(self, modalities=("a", "b", "c"), num_classes=2):
        super().__init__(modalities, num_classes, width=2, levels=2)
        self.spoil()

    def spoil(self): ...

    def spoilt(self, out):
        return out

    def decode(self, latents):
        return self.spoilt(super().decode(latents))


class WrongStride(Small):
    def spoil(self):
        self.strides = (1, 4)


class WrongOrder(Small):
    def spoil(self):
        self.strides = (2, 1)


class WrongClasses(Small):
    def spoilt(self, out):
        return replace(out, logits=out.logits[:, :1])


class ExtrasInEval(Small):
    def spoilt(self, out):
        return replace(out, extras={"ds1": out.logits})


class Leaks(Small):
    """Normalises every modality by the mean over all."""

    shares_encoding = False

    def encode(self, image, present):
        return super().encode(image - image.mean(1, keepdim=True), present)


class LeaksInTraining(Small):
    def spoilt(self, out):
        if self.training:
            out.logits = out.logits + STORE["image"].mean()
        return out

    def encode(self, image, present):
        STORE["image"] = image
        return super().encode(image, present)


class Overwrites(Small):
    def encode(self, image, present):
        image.mul_(2)
        return super().encode(image, present)


class ReadsAbsent(Small):
    """Adds the mean of all slots without looking at the flags."""

    def spoilt(self, out):
        out.logits = out.logits + out.latents.features[0].mean((1, 2))[:, None]
        return out


class IgnoresFill(Small):
    """Decodes what was present when it was encoded."""

    def encode(self, image, present):
        latents = super().encode(image, present)
        STORE["present"] = present
        return latents

    def decode(self, latents):
        flags = [STORE["present"]] * len(latents)
        return super().decode(Latents(latents.features, latents.modalities, flags))


class FirstRow(Small):
    """Reads the presence of the first sample only, as public code does."""

    def encode(self, image, present):
        return super().encode(image, present[:1].expand(len(present), -1))


class CouplesInTraining(Small):
    def spoil(self):
        self.heads[0] = nn.Sequential(nn.BatchNorm3d(2), nn.Conv3d(2, 2, 1))


class Unused(Small):
    def spoil(self):
        self.forgotten = nn.Linear(2, 2)


class Samples(Small):
    def spoilt(self, out):
        out.logits = nn.functional.dropout(out.logits, 0.5, training=True)
        return out


class DependsOnOthers(Small):
    """Latents depend on how many modalities are encoded, yet it claims to share encodings."""

    def encode(self, image, present):
        latents = super().encode(image, present)
        count = present.sum(1)[:, None, None, None, None, None]
        latents.features = [f * count for f in latents.features]
        return latents


class CachesMasked(Small):
    """Keeps in the cache what depends on presence."""

    def decode(self, latents):
        if "logits" not in latents.cache:
            latents.cache["logits"] = super().decode(latents).logits
        return SegOutput(latents.cache["logits"], latents)


class FixedSize(Small):
    def encode(self, image, present):
        if image.shape[2] != image.shape[3]:
            raise RuntimeError("only cubes")
        return super().encode(image, present)


class HiddenTensor(Small):
    def spoil(self):
        self.scale = torch.rand(1)

    def spoilt(self, out):
        out.logits = out.logits * self.scale
        return out


class NotRebuilt(Small):
    def spoil(self):
        self.num_classes = 1 if STORE.get("rebuilt") is not None else self.num_classes
        STORE["rebuilt"] = torch.ones(1)


class Views(Small):
    """Reads memory in the order in which it lies."""

    def encode(self, image, present):
        flat = torch.as_strided(image, image.shape, torch.empty(image.shape).stride())
        return super().encode(flat, present)


class Overflows(Small):
    def spoilt(self, out):
        if out.logits.dtype == torch.bfloat16:
            out.logits = (out.logits * 1e30).half().float()
        return out


class BreaksCompiled(Small):
    def spoilt(self, out):
        if torch.compiler.is_compiling():
            out.logits = out.logits + 1
        return out


class FinestFirst(Small):
    def spoilt(self, out):
        out.decoder = [out.logits, functional.avg_pool3d(out.logits, 2)]
        return out


class MapsInTraining(Small):
    def spoilt(self, out):
        out.decoder = out.decoder if self.training else []
        return out


class OtherSides(Small):
    def spoilt(self, out):
        out.decoder = [out.logits[..., 1:]]
        return out


class MapsLeak(Small):
    def spoilt(self, out):
        out.decoder = [STORE["image"]]
        return out

    def encode(self, image, present):
        STORE["image"] = image
        return super().encode(image, present)


BROKEN = [
    (WrongStride, "shape", "level 1 has the shape"),
    (WrongOrder, "attributes", "finest first"),
    (WrongClasses, "shape", "logits have the shape"),
    (ExtrasInEval, "shape", "must be empty in eval mode"),
    (FinestFirst, "decoder", "finest last"),
    (MapsInTraining, "decoder", "in eval than in training mode"),
    (OtherSides, "decoder", "sides that divide"),
    (MapsLeak, "decoder", "absent modalities"),
    (Leaks, "leak", "noise in the voxels of absent modalities"),
    (LeaksInTraining, "leak", "training mode"),
    (Overwrites, "inputs", "image was changed in place"),
    (ReadsAbsent, "masking", "latents.masked(level)"),
    (IgnoresFill, "fill", "filled after encoding"),
    (FirstRow, "batch", "its own row of present"),
    (CouplesInTraining, "batch", "batch norm"),
    (Unused, "gradient", "forgotten.weight, forgotten.bias"),
    (Samples, "determinism", "no dropout"),
    (DependsOnOthers, "restrict", "shares_encoding = False"),
    (CachesMasked, "restrict", "latents.cache"),
    (FixedSize, "sizes", "only cubes"),
    (HiddenTensor, "state dict", "outside parameters and buffers"),
    (NotRebuilt, "description", "num_classes is 1 and not 2"),
    (Views, "channels last", "in channels_last_3d"),
    (Overflows, "bf16", "not finite"),
    (BreaksCompiled, "compile", "compiled, the logits differ"),
]


@pytest.mark.parametrize(
    ("cls", "rule", "words"), BROKEN, ids=lambda x: getattr(x, "__name__", None)
)
def test_a_broken_backbone_fails_in_the_right_words(cls, rule, words):
    STORE.clear()
    with pytest.raises(ConformanceError) as caught:
        check_backbone(cls(), compile="eager" if rule == "compile" else False)
    assert words in caught.value.broken[rule], caught.value
    assert cls.__name__ in str(caught.value)


def test_every_rule_is_broken_once():
    with pytest.raises(InputError, match="nonsense") as caught:
        check_backbone(Small(), skip=["nonsense"])
    rules = {rule for _, rule, _ in BROKEN}
    named = str(caught.value).split("rules are ")[1]
    assert all(f"'{rule}'" in named for rule in rules)
    assert named.count("'") == 2 * len(rules)


def test_small_is_sound_and_skip_hides_a_rule():
    check_backbone(Small(), compile="eager")
    check_backbone(Unused(), skip=["gradient"])


def test_the_checked_network_is_left_alone():
    net = Unused().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    check_backbone(net, skip=["gradient"])
    assert not net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_an_instance_that_cannot_be_written_down_fails_the_description():
    with pytest.raises(ConformanceError) as caught:
        check_backbone(EarlyFusion(nn.Conv3d(4, 4, 1)))
    assert set(caught.value.broken) == {"description"}


class Term(nn.Module):
    def forward(self, output, batch):
        shown = output.latents.masked(1).float()
        count = output.latents.usable[1].sum()
        return output.logits.float().square().mean() + shown.square().sum() / count


class Vector(Term):
    def forward(self, output, batch):
        return output.logits.float().mean((1, 2, 3, 4))


class Number(Term):
    def forward(self, output, batch):
        return 0.0


class Alone(Term):
    """The variance over one present modality is 0 / 0."""

    def forward(self, output, batch):
        count = batch["present"].sum(1)
        return super().forward(output, batch) + 0 / (count - 1).max()


class OneSample(Term):
    def forward(self, output, batch):
        return output.logits.float().flatten(1).var(0, correction=0).mean() / (
            len(output.logits) - 1
        )


class SteepAtZero(Term):
    def forward(self, output, batch):
        return output.latents.features[1].float().abs().sqrt().mean()


class Detached(Term):
    def forward(self, output, batch):
        return output.logits.detach().float().mean()


class InPlace(Term):
    def forward(self, output, batch):
        output.logits.mul_(0.5)
        return super().forward(output, batch)


class SeesHidden(Term):
    def forward(self, output, batch):
        return output.latents.features[0].float().square().mean()


class SeesMissingImage(Term):
    def forward(self, output, batch):
        return (output.logits.float().mean() - batch["image"].mean()).square()


class Half(Term):
    def forward(self, output, batch):
        return output.logits.mean()


class UnusedParameter(Term):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


BROKEN_TERMS = [
    (Vector, "scalar", "without dimensions"),
    (Number, "scalar", "float"),
    (Alone, "one modality", "always be finite"),
    (OneSample, "one sample", "always be finite"),
    (SteepAtZero, "gradient", "output.latents.features[1] is not finite"),
    (Detached, "gradient", "no graph"),
    (InPlace, "inputs", "changed output.logits in place"),
    (SeesHidden, "absent", "count present slots"),
    (SeesMissingImage, "absent", "images that were not acquired"),
    (Half, "bf16", "torch.bfloat16"),
    (UnusedParameter, "parameters", "weight"),
]


@pytest.mark.parametrize(
    ("cls", "rule", "words"), BROKEN_TERMS, ids=lambda x: getattr(x, "__name__", None)
)
def test_a_broken_term_fails_in_the_right_words(cls, rule, words):
    with pytest.raises(ConformanceError) as caught:
        check_term(cls())
    assert words in caught.value.broken[rule], caught.value


def test_every_term_rule_is_broken_once():
    with pytest.raises(InputError) as caught:
        check_term(Term(), skip=["nonsense"])
    rules = {rule for _, rule, _ in BROKEN_TERMS}
    assert str(caught.value).count("'") - 2 == 2 * len(rules)


@pytest.mark.parametrize("backbone", [None, Small(("only",))])
def test_a_sound_term_passes(backbone):
    check_term(Term, backbone)


class Constant(DistillationLoss):
    def compare(self, student, teacher, batch):
        return teacher.logits.square().mean()


def test_a_distillation_loss_is_checked_as_it_is():
    for loss in (LogitKL, LatentMatch()):
        check_term(loss)
    with pytest.raises(ConformanceError) as caught:
        check_term(Constant())
    assert "no graph" in caught.value.broken["gradient"]
