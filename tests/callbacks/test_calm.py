"""What Lightning says to nobody's use stays unsaid, of every process."""

import logging
import warnings

import pytest

from pmixseg.callbacks.calm import calm


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("Seed set to 0", False),
        ("[rank: 1] Seed set to 0", False),
        ("GPU available: False, used: False", False),
        ("[rank: 1] the loss is not finite", True),
    ],
)
def test_chatter_of_any_rank(message, kept):
    calm()
    logger = logging.getLogger("lightning.fabric.utilities.seed")
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, message, (), None)
    assert bool(logger.filter(record)) == kept


@pytest.mark.parametrize(("name", "kept"), [("val/dice/WT", False), ("my/loss", True)])
def test_advice_to_average_what_is_a_mean_of_all_processes_already(name, kept):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        calm()
        advice = "when logging on epoch level in distributed setting"
        warnings.warn(
            f"It is recommended to use `self.log('{name}', ..., sync_dist=True)` {advice}.",
            stacklevel=1,
        )
    assert bool(seen) == kept
