"""Writing a file whole, in its folder."""

import errno
import os
import stat
from pathlib import Path

import pytest

from pmixseg.errors import InputError
from pmixseg.files import file_hash, hidden_folder_near, inside, whole


def test_a_file_is_there_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "a.csv"
    with whole(target) as part:
        part.write_text("one")
        assert not target.exists()
        assert part.parent == target.parent
        assert part.suffix == ".csv"
    assert target.read_text() == "one"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a.nii.gz"
    target.write_text("old")

    def fail():
        with whole(target) as part:
            assert part.name.endswith(".nii.gz")
            part.write_text("half")
            raise KeyError("a fault of the program")

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_is_one_sentence(tmp_path, number):
    def fail():
        with whole(tmp_path / "a.csv"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(InputError, match=rf"a\.csv cannot be written \({os.strerror(number)}\)"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_weight_file_that_is_not_whole_is_one_sentence(tmp_path):
    def fail():
        with whole(tmp_path / "a.ckpt"):
            raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 8")

    with pytest.raises(InputError, match=r"a\.ckpt cannot be written"):
        fail()


def test_a_folder_in_place_of_the_file_is_one_sentence(tmp_path):
    (tmp_path / "a.csv" / "x").mkdir(parents=True)

    def write():
        with whole(tmp_path / "a.csv") as part:
            part.write_text("x")

    with pytest.raises(InputError, match=r"a\.csv cannot be written"):
        write()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_device_or_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="pipe is a device or pipe"), whole(pipe) as part:
        part.write_text("x")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_planted_link_is_never_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr("pmixseg.files.token_hex", lambda size: next(names))
    (tmp_path / f".{'0' * 16}.csv").symlink_to(victim)
    with whole(tmp_path / "a.csv") as part:
        part.write_text("mine")
    assert victim.read_text() == "precious"
    assert (tmp_path / "a.csv").read_text() == "mine"


def test_a_target_that_is_a_link_is_replaced_and_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.csv").symlink_to(victim)
    with whole(tmp_path / "a.csv") as part:
        part.write_text("mine")
    assert victim.read_text() == "precious"
    assert (tmp_path / "a.csv").read_text() == "mine"


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with whole(tmp_path / "a.csv") as part:
        part.write_text("x")
    assert stat.S_IMODE((tmp_path / "a.csv").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_the_longest_name_of_a_disk_can_be_written(tmp_path):
    target = tmp_path / ("n" * 251 + ".csv")
    with whole(target) as part:
        part.write_text("x")
    assert target.read_text() == "x"


def test_a_folder_beside_another_is_gone_unless_it_was_renamed(tmp_path):
    with hidden_folder_near(tmp_path / "case") as part:
        (part / "x").write_text("x")
        part.rename(tmp_path / "case")
    with hidden_folder_near(tmp_path / "other") as part:
        (part / "x").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["case"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "..\\x", "a\0b", "x\n", "\ud800"]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"case .*cannot name a file or folder"):
        inside(tmp_path, name, "case")


@pytest.mark.parametrize("name", ["Brats18_1", "patient 7 (2)", "Zoë", "a..b", ".x"])
def test_a_plain_name_stays_in_its_folder(tmp_path, name):
    assert inside(tmp_path, name, "case") == tmp_path / name


def test_the_hash_of_a_file_is_sha_256(tmp_path):
    # SHA-256 of b"abc", FIPS 180-2, appendix B.1
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_no_other_module_writes_under_a_temporary_name_of_its_own():
    package = Path(__file__).parents[1] / "pmixseg"
    for path in package.rglob("*.py"):
        if path.name != "files.py":
            text = path.read_text()
            for word in ("uuid4", "mkdtemp", "mkstemp", ".part.", '.part"', "getpid"):
                assert word not in text, f"{path} has {word}"
