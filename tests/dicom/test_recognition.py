"""Which sequence a series is, from its header; what is not certain is asked."""

import pytest

from pmixseg.dicom import recognise
from pmixseg.dicom.example import PROTOCOLS
from pmixseg.dicom.recognition import choose, weighting
from pmixseg.dicom.series import Series
from pmixseg.errors import InputError
from pmixseg.task import BRATS

TIMES = {m: (p.echo, p.repetition, p.inversion) for m, p in PROTOCOLS.items()}


def series(number=1, description="", times=(None,) * 3, slices=30, **more):
    echo, repetition, inversion = times
    facts = {"echo": echo, "repetition": repetition, "inversion": inversion}
    return Series(f"1.{number}", number, description, (), slices, **facts, **more)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((120, 9000, 2500), "flair"),
        ((90, 4500, None), "t2"),
        ((4, 600, None), "t1"),
        ((3, 2300, 900), "t1"),  # MPRAGE
        ((30, 50, None), None),  # susceptibility
        ((60, 3000, None), None),  # between proton density and T2
        ((None, 500, None), None),
    ],
)
def test_weighting_by_hand(times, expected):
    assert weighting(series(times=times))[0] == expected


@pytest.mark.parametrize(
    ("one", "modality", "doubtful"),
    [
        (series(description="T2 FLAIR", times=TIMES["t1"]), None, True),
        (series(description="ax", times=TIMES["t1"]), None, True),
        (series(description="ax", times=TIMES["t1"], agent=True), "t1ce", False),
        (series(description="ax", times=TIMES["flair"]), "flair", False),
        (series(description="T1 post Gd", times=TIMES["t1"]), "t1ce", False),
        (series(description="T1 MPRAGE", times=(3, 2300, 900)), "t1", False),
        (series(description="ep2d_diff", diffusion=True), None, False),
        (series(description="T1 sub", kind=("derived", "secondary")), None, False),
        (series(description="swi"), None, False),
        (series(description=""), None, False),
    ],
)
def test_doubt_is_no_guess(one, modality, doubtful):
    (told,) = recognise([one], BRATS.modalities)
    assert (told.modality, told.doubtful) == (modality, doubtful)


def test_two_of_a_kind_and_doubt_are_asked():
    twice = [series(n, "FLAIR", TIMES["flair"]) for n in (3, 8)]
    with pytest.raises(InputError, match="two series are flair"):
        choose(recognise(twice, BRATS.modalities))
    assert choose(recognise(twice, BRATS.modalities, {"flair": 8}))["flair"].number == 8
    with pytest.raises(InputError, match="they have one number, so move the files of one away"):
        choose(recognise([twice[0]] * 2, BRATS.modalities, {"flair": 3}))
    unsure = [series(3, "ax", TIMES["t1"])]
    with pytest.raises(InputError, match="--series MODALITY=3"):
        choose(recognise(unsure, BRATS.modalities))
    assert list(choose(recognise(unsure, BRATS.modalities, {"t1": 3}))) == ["t1"]
    with pytest.raises(InputError, match="--series t1=9"):
        recognise(unsure, BRATS.modalities, {"t1": 9})


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (series(description="T1 post Gd", times=TIMES["t1"]), "it is contrast-enhanced T1"),
        (series(description="ax", times=TIMES["flair"]), "flair, which this task does not have"),
    ],
)
def test_a_sequence_that_the_task_lacks_is_not_used(one, reason):
    (told,) = recognise([one], ("t1", "t2"))
    assert told.modality is None and reason in told.reason
    with pytest.raises(InputError, match="no series is a sequence of the model; say which is what"):
        choose([told])
