"""What a segmentation wrote is told: the numbers in the file, and results that no patient has."""

import nibabel as nib
import numpy as np
import pytest

from pmixseg.cli import main
from pmixseg.modules import load
from tests.inference.tiny_models import save, tiny_student


@pytest.fixture
def case(phantom_root):
    return sorted(p.parent for p in phantom_root.rglob("*_flair.nii.gz"))[0]


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_scan_by_file_has_the_codes_of_its_folder(checkpoint, case, tmp_path, capsys):
    assert main(["segment", str(checkpoint), str(case), "-o", str(tmp_path / "folder")]) == 0
    told = "numbers in the files: 0 background, 1 NCR, 2 ED, 4 ET"
    assert told in said(capsys)
    scans = [f"--{p.name.split('_')[-1][:-7]}={p}" for p in case.iterdir() if "seg" not in p.name]
    assert main(["segment", str(checkpoint), *scans, "-o", str(tmp_path / "files")]) == 0
    assert told in said(capsys)
    results = [nib.load(next((tmp_path / k).glob("*_seg.nii.gz"))) for k in ("folder", "files")]
    codes = [np.unique(image.dataobj).tolist() for image in results]
    assert codes[0] == codes[1]
    assert np.array_equal(results[0].dataobj, results[1].dataobj)


def test_codes_of_the_users_own_are_told(checkpoint, case, tmp_path, capsys):
    scan = f"--flair={next(case.glob('*_flair.nii.gz'))}"
    flags = ["-o", str(tmp_path), "--codes", "NCR=5,ED=6,ET=7"]
    assert main(["segment", str(checkpoint), scan, *flags]) == 0
    assert "numbers in the files: 0 background, 5 NCR, 6 ED, 7 ET" in said(capsys)


@pytest.mark.parametrize(
    ("bias", "sentence"), [((9.0, 0, 0, 0), "nothing was segmented"), ((0, 0, 9.0, 0), "more than")]
)
def test_a_result_that_no_patient_has_is_told(case, tmp_path, bias, sentence):
    module = tiny_student()
    head = [m for m in module.backbone.modules() if getattr(m, "out_channels", 0) == 4][-1]
    head.weight.data.zero_()
    head.bias.data.copy_(head.bias.data.new_tensor(bias))
    model = load(save(module, tmp_path / "a.ckpt"))
    scans = {"flair": next(case.glob("*_flair.nii.gz")), "t1": next(case.glob("*_t1.nii.gz"))}
    with pytest.warns(UserWarning, match=sentence):
        result = model.segment(scans)
    assert sentence in " ".join(result.warnings)
