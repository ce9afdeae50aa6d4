import pytest

from tests.inference.tiny_models import save, tiny_student


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save(tiny_student(), tmp_path_factory.mktemp("docs") / "tiny.ckpt")
