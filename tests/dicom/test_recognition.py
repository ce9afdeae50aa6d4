"""Which sequence a series is, from its header; what is not certain is asked."""

from datetime import date

import pytest

from pmixseg.dicom import recognise
from pmixseg.dicom.example import PROTOCOLS
from pmixseg.dicom.recognition import choose, visits_apart, weighting
from pmixseg.dicom.series import Series
from pmixseg.errors import InputError
from pmixseg.task import BRATS

TIMES = {m: (p.echo, p.repetition, p.inversion) for m, p in PROTOCOLS.items()}


def series(number=1, description="", times=(None,) * 3, slices=30, **more):
    echo, repetition, inversion = times
    facts = {"echo": echo, "repetition": repetition, "inversion": inversion}
    return Series(f"1.{number}", number, description, (), slices, **facts, **more)


def pick(series, chosen=None, modalities=BRATS.modalities):
    return choose(recognise(series, BRATS.modalities, chosen), modalities)


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


@pytest.mark.parametrize(
    ("description", "times", "expected"),
    [
        ("ep2d_diff_b1000", TIMES["t2"], "'diff' makes it another image than T2"),
        ("DWI", TIMES["t2"], "'dwi' makes it another image than T2"),
        ("resolve_4scan_trace_ADC", TIMES["t2"], "'trace' makes it another image than T2"),
        ("perf DSC", TIMES["t2"], "'perf' makes it another image than T2"),
        ("T2 map", TIMES["t2"], "'map' makes it another image than T2"),
        ("T2* haemo", TIMES["t2"], "'haemo' makes it another image than T2"),
        ("AX FLAIR + C", TIMES["flair"], ("flair",)),
        ("T1 and T2", TIMES["t1"], ("t1", "t1ce")),
        ("gre", TIMES["t2"], ("t2",)),
        ("t2_tirm_tra", TIMES["flair"], "flair"),
        ("ax", TIMES["flair"], "flair"),
        ("sT2W_TSE", TIMES["t2"], "t2"),
    ],
)
def test_times_do_not_overrule_a_description(description, times, expected):
    (told,) = recognise([series(1, description, times)], BRATS.modalities)
    if isinstance(expected, tuple):
        assert (told.modality, told.may_be) == (None, expected)
    else:
        assert expected in (told.modality, told.reason.removeprefix("its description: "))
        assert not told.doubtful


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (series(kind=("original", "primary", "p", "nd"), times=TIMES["t2"]), "image type p"),
        (series(kind=("original", "t2 map"), times=TIMES["t2"]), "image type t2 map"),
        (series(kind=("original", "diffusion"), times=TIMES["t2"]), "image type diffusion"),
        (series(description="FLAIR", modality="PT"), "no MR image: its modality is PT"),
        (series(description="FLAIR", modality=""), "no MR image: its modality is not told"),
    ],
)
def test_what_is_no_scan(one, reason):
    (told,) = recognise([one], BRATS.modalities)
    assert told.modality is None and told.reason.startswith(reason)


def test_an_agent_beside_the_words_for_none_is_doubtful():
    pre = series(4, "T1w pre", TIMES["t1"], agent=True)
    (told,) = recognise([pre], BRATS.modalities)
    assert told.may_be == ("t1", "t1ce")


def test_two_of_a_kind_and_doubt_are_asked():
    twice = [series(n, "FLAIR", TIMES["flair"]) for n in (3, 8)]
    with pytest.raises(InputError, match="two series are flair"):
        pick(twice)
    assert pick(twice, {"flair": 8})["flair"].number == 8
    with pytest.raises(InputError, match="they have one number, so move the files of one away"):
        pick([twice[0]] * 2, {"flair": 3})
    unsure = [series(3, "ax", TIMES["t1"])]
    with pytest.raises(InputError, match="--series MODALITY=3"):
        pick(unsure)
    assert list(pick(unsure, {"t1": 3})) == ["t1"]
    both = [*unsure, series(4, "T1", TIMES["t1"]), series(5, "T1 gd", TIMES["t1"])]
    assert list(pick(both, {"t1": 4, "t1ce": 5})) == ["t1", "t1ce"]  # so it is none of these
    with pytest.raises(InputError, match="--series MODALITY=3"):
        pick(both, {"t1": 4})
    with pytest.raises(InputError, match="--series t1=9"):
        recognise(unsure, BRATS.modalities, {"t1": 9})


def test_what_a_model_does_not_read_is_not_asked():
    study = [series(2, "T1", TIMES["t1"]), series(3, "T1", TIMES["t1"]), series(4, "T2")]
    assert list(pick([*study, series(5, "ax", TIMES["t1"])], modalities=("t2",))) == ["t2"]


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
    with pytest.raises(InputError, match=r"no series is .* reads t1, t2; say which is"):
        choose([told], ("t1", "t2"))


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        ((date(2020, 2, 28), None, date(2020, 3, 1)), 2),  # a leap year
        ((date(2019, 3, 1), date(2020, 3, 1), date(2019, 9, 9)), 366),
        ((date(2020, 12, 31), date(2021, 1, 1), None), None),  # over midnight
        ((date(2020, 1, 1),) * 3, None),
        ((None, date(2020, 1, 1), None), None),
        ((), None),
    ],
)
def test_series_of_several_visits_are_told(days, expected):
    told = visits_apart([series(n, "ax", acquired=day) for n, day in enumerate(days)])
    assert told is expected is None or f"acquired {expected} days apart; see that" in told
