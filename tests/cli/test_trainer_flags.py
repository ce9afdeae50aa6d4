"""Flags of Lightning's Trainer that people use: they work, or are one sentence."""

import pytest

from pmixseg.cli import main
from tests.cli.test_training import TINY

ONE_CYCLE = "--model.scheduler=pmixseg.modules.OneCycle"


def fit(store, run, *flags):
    command = ["fit", f"--run={run}", f"--data.store={store}", *TINY, "--model=StudentModule"]
    return main([*command, *flags])


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.overfit_batches=1", "--data.batch_size=1"],
        ["--trainer.overfit_batches=1.0", "--trainer.max_epochs=2"],
        ["--trainer.callbacks=LearningRateMonitor", "--trainer.limit_train_batches=1"],
        [ONE_CYCLE, "--trainer.max_steps=1"],
        [ONE_CYCLE, "--trainer.fast_dev_run=true"],
    ],
)
def test_works(phantom_store, tmp_path, flags, recwarn):
    assert fit(phantom_store, tmp_path, *flags) == 0
    assert not [w for w in recwarn if "overfit" in str(w.message)]
