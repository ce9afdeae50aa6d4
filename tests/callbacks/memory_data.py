"""A data module of a few random samples, for tests of training mechanics."""

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.data.keys import make_key
from pmixseg.modules import StudentModule
from pmixseg.task import BRATS

SIZE = 16


class Samples(Dataset):
    """Sample i is a function of i; ``acquired`` as given."""

    def __init__(self, acquired):
        self.acquired = torch.tensor(acquired)

    def __len__(self):
        return len(self.acquired)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(4, SIZE, SIZE, SIZE, generator=generator)
        return {
            "image": image * self.acquired[index][:, None, None, None],
            "label": torch.randint(0, 4, (SIZE, SIZE, SIZE), generator=generator),
            "case_id": f"case{index}",
            "acquired": self.acquired[index],
            "key": torch.tensor(make_key(0, 0, index)),
        }


class Strided(Sampler):
    """Rank r of n gets r, r + n, …, so that n ranks see together what one process sees."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)
        )
        return iter(range(rank, self.size, world))

    def __len__(self):
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self.size // (torch.distributed.get_world_size() if ready else 1)


class MemoryData(LightningDataModule):
    """What a module asks of a data module, without files."""

    task = BRATS
    patch_size = (SIZE, SIZE, SIZE)
    spacing = None
    normalisation = "zscore-own-mask"
    split_name = None
    seed = 0

    def __init__(self, acquired=((True,) * 4,) * 4, batch_size=2):
        super().__init__()
        self.acquired = acquired
        self.batch_size = batch_size

    def train_dataloader(self):
        data = Samples(self.acquired)
        return DataLoader(data, self.batch_size, sampler=Strided(len(data)))


def tiny(levels=3, modalities=BRATS.modalities, **arguments):
    """A network; mechanics that do not look at its levels need two."""
    return MultiEncoderUNet(modalities, num_classes=4, width=4, levels=levels, **arguments)


def student(**arguments):
    torch.manual_seed(0)
    return StudentModule(backbone=tiny(), **arguments)


def step(module, batch):
    """The loss of one training step without a trainer."""
    module.log_dict = module.log = lambda *args, **kwargs: None
    torch.manual_seed(0)
    return module.training_step(batch, 0)


def quiet_trainer(folder, **arguments):
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**settings, **arguments})


def fit(folder, module, *callbacks, data=None, resume=None, **arguments):
    """Train quietly for one epoch, on four samples; return the trainer."""
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **arguments)
    trainer.fit(module, data or MemoryData(), ckpt_path=resume, weights_only=True)
    return trainer
