import subprocess
import sys

import pytest

import pmixseg.data


def test_every_export_is_found():
    for name in pmixseg.data.__all__:
        assert getattr(pmixseg.data, name) is not None
    homes = [name for names in pmixseg.data._HOME.values() for name in names]
    assert sorted(homes) == sorted(pmixseg.data.__all__)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = pmixseg.data.Nothing


def test_the_store_needs_no_lightning():
    code = (
        "import sys; from pmixseg.data import Split; import pmixseg.data.keys; "
        "print([m for m in ('lightning', 'torchio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
