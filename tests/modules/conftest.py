import pytest
import torch

from pmixseg.task import BRATS


@pytest.fixture
def batch():
    """Two samples with other modalities acquired, absent ones 0."""
    generator = torch.Generator().manual_seed(0)
    acquired = torch.tensor([[True, True, True, True], [True, False, True, True]])
    image = torch.randn(2, BRATS.num_modalities, 16, 16, 16, generator=generator)
    return {
        "image": image * acquired[:, :, None, None, None],
        "label": torch.randint(0, 4, (2, 16, 16, 16), generator=generator),
        "case_id": ["a", "b"],
        "acquired": acquired,
        "key": torch.tensor([11, 12]),
    }
