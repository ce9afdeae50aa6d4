"""Two processes compute the losses and gradients of one process on the joined batch."""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pmixseg
from pmixseg.losses.alignment import AlignmentLoss
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distances import DISTANCES
from pmixseg.losses.distillation import (
    ContrastiveMatch,
    GramMatch,
    LatentMatch,
    LatentPrototypeMatch,
    LogitKL,
    ProbabilityMSE,
    PrototypeMatch,
    SelfDistillation,
    SubsetMatch,
    VariationalMatch,
    WeightedSoftCE,
)
from pmixseg.losses.ranks import SharedSums, gather_constants, sum_over_ranks
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.losses.segmentation import Criterion, DiceCE
from pmixseg.losses.shaspec import ShaSpecCriterion
from pmixseg.losses.uhved import UHVEDCriterion
from pmixseg.modules.training.trainer_checks import name_coupled_losses
from pmixseg.types import Latents, SegOutput
from tests.processes import run_two

NAMES = ("flair", "t1ce", "t1", "t2")
TERMS = (
    LogitKL,
    WeightedSoftCE,
    LatentMatch,
    GramMatch,
    VariationalMatch,
    ContrastiveMatch,
    PrototypeMatch,
    LatentPrototypeMatch,
    ProbabilityMSE,
    SelfDistillation,
    SubsetMatch,
)


class AllLosses(nn.Module):
    """A linear encoder per modality under every distance and every distillation loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.Parameter(torch.randn(4, 3, 3))
        self.head = nn.Parameter(torch.randn(3, 3))
        self.alignments = nn.ModuleDict(
            {name: AlignmentLoss(name, [3], NAMES, [0], "linear") for name in DISTANCES}
        )
        self.terms = nn.ModuleList([make() for make in TERMS])
        network = SimpleNamespace(
            modalities=NAMES, slots=NAMES, channels=(3,), strides=(1,), num_classes=3
        )
        for term in self.terms:
            term.bind(network, network)
        self.double()
        for p in self.parameters():
            nn.init.normal_(p, 0.3, 0.3)

    def forward(self, batch):
        features = torch.einsum("moc,bmcdhw->bmodhw", self.encoders, batch["features"])
        acquired = batch["acquired"]
        latents = Latents([features], NAMES, [acquired], brain=[batch["brain"]])
        values = []
        for name, alignment in self.alignments.items():
            anchor = NormalAnchor() if name == "vid" else MixtureAnchor("uniform")
            anchor.bind(NAMES, 1)
            values.append(alignment(latents, anchor, batch["present"], acquired))
        logits = torch.einsum("oc,bcdhw->bodhw", self.head, latents.masked(0).sum(1))
        taught = Latents([batch["features"]], NAMES, [acquired])
        student = SegOutput(logits, latents, {}, [logits])
        total = batch["features"].sum(1)
        teacher = SegOutput(total, taught, {}, [total])
        values += [term(student, teacher, batch) for term in self.terms]
        return torch.stack(values)


def make_batch():
    """Four samples; the first two lack t1 altogether, the last two lack t2.

    The processes have unequal numbers of brain voxels and of shown sequences, and a sample of the
    second has no brain at all.
    """
    generator = torch.Generator().manual_seed(1)
    rows = [[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0], [0, 1, 1, 0]]
    shown = [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0], [0, 1, 0, 0]]
    features = torch.randn(4, 4, 3, 2, 2, 3, generator=generator, dtype=torch.float64)
    shares = torch.tensor([0.9, 0.7, 0.4, 0.0])[:, None, None, None]
    return {
        "features": features,
        "brain": torch.rand(4, 2, 2, 3, generator=generator) < shares,
        "acquired": torch.tensor(rows, dtype=torch.bool),
        "present": torch.tensor(shown, dtype=torch.bool),
        "label": torch.randint(0, 3, (4, 2, 2, 3), generator=generator),
        "case": torch.tensor([1, 2, 1, 3]),
    }


def part(batch, rank):
    rows = slice(2 * rank, 2 * rank + 2)
    return {key: value[rows] for key, value in batch.items()}


CRITERIA = {
    DiceCE: ({}, {"batch_dice": True}, {"batch_dice": True, "include_background": False}),
    RFNetCriterion: ({}, {"fusion_start_epoch": 5}),
    ShaSpecCriterion: ({},),
    UHVEDCriterion: ({},),
}
"""Every criterion of the package, under arguments that change how it joins samples."""


def subclasses(cls):
    for below in cls.__subclasses__():
        yield below
        yield from subclasses(below)


def criteria(rows):
    """Value of every criterion on some of four samples, and its gradient by what it reads."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(4, *shape, generator=generator, dtype=torch.float64)

    read = {"logits": draw(3, 4, 4, 4), "ds1": draw(3, 4, 4, 4), "ds2": draw(3, 2, 2, 2)}
    read |= {"separate": draw(4, 3, 4, 4, 4), "reconstruction": draw(4, 4, 4, 4)}
    read |= {"shared": draw(4, 2, 2, 2, 2), "modality": draw(4, 4), "divergence": draw()}
    image, label = draw(4, 4, 4, 4), torch.randint(0, 3, (4, 4, 4, 4), generator=generator)
    # The third modality is on no process, the second on one alone; one sample has one modality.
    slots = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]]).bool()
    read = {name: value[rows].requires_grad_() for name, value in read.items()}
    flags = dict.fromkeys(("separate_slots", "encoded", "reconstruction_slots"), slots[rows])
    extras = {**read, **flags}
    output = SegOutput(extras.pop("logits"), Latents([], NAMES, []), extras)
    results = {}
    for cls, settings in CRITERIA.items():
        for arguments in settings:
            loss = cls(**arguments)(output, {"image": image[rows], "label": label[rows]}, 0)
            slopes = torch.autograd.grad(loss, list(read.values()), materialize_grads=True)
            named = dict(zip(read, slopes, strict=True))
            results[f"{cls.__name__} {arguments}"] = (loss.detach(), named)
    return results


def test_every_criterion_is_tried_on_several_processes():
    for module in pkgutil.walk_packages(pmixseg.__path__, "pmixseg."):
        if module.name.startswith(("pmixseg.losses", "pmixseg.backbones", "pmixseg.modules")):
            importlib.import_module(module.name)
    own = {cls for cls in subclasses(Criterion) if cls.__module__.startswith("pmixseg.")}
    assert set(CRITERIA) == own
    assert not any(cls.couples_samples for cls in own)


def run(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = AllLosses()
    wrapped = DistributedDataParallel(model)
    values = wrapped(part(make_batch(), rank))
    values.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    own = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
    sums = SharedSums()
    total = sums.add(own)
    sums.settle((total * (1 + rank)).sum()).backward()
    results = {
        "values": values.detach(),
        "gradients": gradients,
        "total": total.detach(),
        "slope": own.grad,
        "gathered": gather_constants(own),
        "criteria": criteria(slice(2 * rank, 2 * rank + 2)),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    # torch 2.13 may wait for ever where DDP's reducer is the last to let go of a gloo group: it
    # joins gloo's thread with Python's lock held, which that thread needs to free a tensor.
    del wrapped
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path):
    run_two(run, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert rank["total"].tolist() == [3.0, 20.0]
        assert rank["slope"].tolist() == [3.0, 3.0]  # 1 from the first process, 2 from the second
        assert rank["gathered"].tolist() == [1.0, 10.0, 2.0, 10.0]
    model = AllLosses()
    values = model(make_batch())
    values.sum().backward()
    mean = (ranks[0]["values"] + ranks[1]["values"]) / 2
    for name, actual, expected in zip([*DISTANCES, *TERMS], mean, values, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10), name
    for name, p in model.named_parameters():
        for rank in ranks:
            assert torch.allclose(rank["gradients"][name], p.grad, rtol=1e-8, atol=1e-12), name
    for name, (loss, slopes) in criteria(slice(0, 4)).items():
        apart = [rank["criteria"][name] for rank in ranks]
        torch.testing.assert_close((apart[0][0] + apart[1][0]) / 2, loss, msg=name)
        for read, slope in slopes.items():
            halves = torch.cat([part[1][read] for part in apart]) / 2  # the mean that DDP takes
            torch.testing.assert_close(halves, slope, msg=f"{name}: {read}")


def test_one_process_passes_values_through():
    value = torch.randn(3, requires_grad=True)
    assert SharedSums().add(value) is value
    loss = value.sum()
    assert SharedSums().settle(loss) is loss
    assert torch.equal(sum_over_ranks(value), value) and not sum_over_ranks(value).requires_grad
    assert torch.equal(gather_constants(value), value) and not gather_constants(value).requires_grad


def test_a_fit_of_several_processes_names_a_loss_that_is_another_there(recwarn):
    class Coupled(DiceCE):
        couples_samples = True

    one = SimpleNamespace(world_size=1)
    name_coupled_losses(nn.ModuleList([DiceCE(batch_dice=True), Coupled()]), one)
    assert not recwarn
    name_coupled_losses(nn.ModuleList([DiceCE(), RFNetCriterion()]), SimpleNamespace(world_size=2))
    assert not recwarn
    with pytest.warns(UserWarning, match="^Coupled: .*each of 2 processes"):
        name_coupled_losses(nn.ModuleList([DiceCE(), Coupled()]), SimpleNamespace(world_size=2))
