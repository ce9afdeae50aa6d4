"""Which sequence a name means; where that is not certain, none."""

import pytest

from pmixseg.data.scans.sequences import modality_of, read_name
from pmixseg.task import BRATS

NAMES = {
    "t1": """
        t1 T1w x7_t1 sub-01_T1w sub-01_ses-post_T1w T1_pre pre_T1 T1_native T1_nativ t1n T1pre
        T1_pre_contrast T1_without_contrast T1_w_o_contrast T1_ohne_KM T1_no_Gd T1-noncontrast
        sub-01_ce-none_T1w T1_unenhanced T1_postop T1_post_op T1_post_treatment 3D_T1_MPRAGE t1_gre
        T1_reg T1_to_MNI T1_brain T1_FFE t1_ax_001 C003_T1 control_001_T1 IN_t1
        UPENN-GBM-00001_11_T1 T1-weighted
    """,
    "t1ce": """
        t1ce T1CE pat_T1_CE T1-CE t1c T1_c T1C T1_post T1post T1_post1 T1w_post_Gd T1_SE_post_Gd
        T1_km t1KM T1kontrast t1gd t1Gd T1-Gad T1_gado T1+C T1_+C T1+ t1_C_+ T1WI+C t1wi_ce T1wCE
        t1_mprage_gd T1_MPRAGEpost T1_axPost T1_SEGd T1_CEmprage T1_withGd ce_T1 CT1 ceT1w gdT1
        postcontrast_T1 T1wPostContrast T1_contrast T1contrast T1_enhanced T1_w_contrast
        T1_with_contrast t1_Gd-DTPA sub-01_ce-gadolinium_T1w TCGA-02-0006_1996.08.23_t1Gd
        BraTS-GLI-00005-100-t1c UPENN-GBM-00001_11_T1GD UCSF-PDGM-0004_T1c
        x_T1_post_contrast_reg_MNI
        T1_post_Gd_post_op preop_t1_gd t1-ce_1mm T1_CE2 T1_inject T1_gadovist
    """,
    "t2": """
        t2 t2w T2W x7_T2 t2_tse_tra T2TSE T2W_TSE T2_SPACE ax_t2 UPENN-GBM-00001_11_T2 T2-weighted
        BraTS-GLI-00005-100-t2w post_t2
    """,
    "flair": """
        flair FLAIR Flair sub-01_FLAIR t2f t2flair ax_T2_FLAIR T2-FLAIR flair_t2 FLAIR_3D FLA
        T2_tse_FLAIR T2_tirm_dark-fluid t2_spc_da-fl_sag T2FLAIR_BLADE post_flair 3D_FLAIR_sag
        BraTS-GLI-00005-100-t2f
    """,
}
UNKNOWN = """
    ADC DWI dwi_b1000 SWI PET mprage MPRAGE_gd GlistrBoost x7 at1 t1ce2 patient01
    T2_tirm T2_stir T2_star t2star t2s T2_GRE T2_medic pd_t2 T2_pd T1_map t1rho T1_dce T1_trace
    T1_sub T1_subtraction T1_FLAIR T1-FLAIR t1_to_t2 t1_in_t2 T1_to_T1ce flair_to_t2 t2_to_flair
    T1_C- T1C- T1_minus_C t1_pre_post pre_ce_t1 post_t1 C_T1 CE001_T1 T1_afterGd T1_wGd T1_mitKM
    T1_postcontr T1_sub-gd flair_gd FLAIR_CE t2_post seg_T1
"""


@pytest.mark.parametrize(("modality", "names"), NAMES.items())
def test_names_that_people_give_scans(modality, names):
    wrong = {n: r for n in names.split() if (r := modality_of(n, BRATS.modalities)) != modality}
    assert not wrong


def test_names_that_leave_a_doubt_mean_nothing():
    for name in UNKNOWN.split():
        reading = read_name(name, BRATS.modalities)
        assert reading.kind in ("unknown", "other"), name
        assert reading.doubt, name


def test_labels_and_results_are_no_scans():
    for name in ("x7_seg", "T1_seg", "t1_mask", "T1_CE_mask", "MASK", "tumour mask", "x7_entropy"):
        assert read_name(name, BRATS.modalities).kind == "label", name


def test_a_contrast_agent_never_goes_unnoticed():
    """Whatever else stands in the name, a T1 with a word for contrast agent is no plain T1."""
    for agent in ("ce", "gd", "gad", "gado", "km", "contrast", "post", "c", "+c", "Gadolinium"):
        for stem in (
            "x7_t1_{}",
            "T1{}",
            "T1w-{}",
            "sub-3_T1_mprage_{}_ax",
            "t1 tra {} 01",
            "{}_T1",
        ):
            assert modality_of(stem.format(agent), BRATS.modalities) in ("t1ce", None), agent
            assert modality_of(stem.format(agent), ("flair", "t1")) is None, agent


@pytest.mark.parametrize(
    ("name", "modalities", "expected"),
    [
        ("pat_T1_CE", ("t1", "t1_ce"), "t1_ce"),
        ("pat_T1Gd", ("t1", "t1_ce"), "t1_ce"),
        ("pat_T1", ("t1", "t1_ce"), "t1"),
        ("T1ce", ("T1 native", "T1-Gd"), "T1-Gd"),
        ("x_adc", ("t1ce", "adc"), "adc"),
        ("t1_adc", ("t1", "adc"), None),
        ("knee_t2fs", ("pd", "t2fs"), "t2fs"),
        ("knee_t2", ("pd", "t2fs"), None),
        ("x_T2 star", ("t2", "t2star"), "t2star"),
        ("x_t2", ("t2", "t2star"), "t2"),
        ("t1c_early", ("t1", "t1c_early", "t1c_late"), "t1c_early"),
        ("t1c", ("t1", "t1c_early", "t1c_late"), None),
        ("t1_mprage_gd", ("t1_mprage", "t1_mprage_gd"), "t1_mprage_gd"),
        ("t1_se_gd", ("t1_mprage", "t1_se"), None),
        ("swi_gd", ("swi",), None),
    ],
)
def test_a_task_with_other_names(name, modalities, expected):
    assert modality_of(name, modalities) == expected


def test_a_common_sequence_that_the_task_lacks_is_known_for_what_it_is():
    reading = read_name("x7_T1_post", ("flair", "t1"))
    assert (reading.kind, reading.doubt) == ("foreign", "it is contrast-enhanced T1")
