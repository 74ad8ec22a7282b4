"""Paths that a user gave are refused before anything is made."""

import pytest

from esper_lightning.core.paths import (
    expand_home,
    require_output,
    require_output_folder,
    requires_folder,
)


def test_a_new_file_and_an_earlier_one_of_the_kind_are_accepted_and_nothing_is_made(tmp_path):
    new = tmp_path / "not" / "there" / "file"
    assert require_output("save", new, "zip", b"PK") == new
    assert not new.parent.exists()
    earlier = tmp_path / "earlier.zip"
    earlier.write_bytes(b"PK and more")
    assert require_output("save", str(earlier), "zip", b"PK") == earlier
    assert earlier.read_bytes() == b"PK and more"


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/a/b") == require_output("save", "~/a/b", "zip", b"PK") == tmp_path / "a/b"
    for other in ("a/~/b", "/~", "~nobody-of-this-name/a"):
        assert str(expand_home(other)) == other


def test_a_link_stands_for_its_target(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"PK")
    link.symlink_to(target)
    assert require_output("save", link, "zip", b"PK") == target


@pytest.mark.parametrize(("name", "hint"), [
    ("folder", "It is a folder."),
    ("other", "Something else is there."),
    ("other/below", "No file can be written there: "),
    ("n" * 300, "No file can be written there: File name too long."),
    ("nul\0", "No file can be written there: embedded null byte."),
], ids=["folder", "other", "below a file", "long", "nul"])  # fmt: skip
def test_what_would_be_lost_or_cannot_be_written_is_refused_by_its_setting(tmp_path, name, hint):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"^save must name a new file or an earlier zip, got") as e:
        require_output("save", f"{tmp_path}/{name}", "zip", b"PK")
    assert hint in str(e.value)
    assert (tmp_path / "other").read_bytes() == b"precious"


def test_a_folder_below_a_file_is_refused(tmp_path):
    require_output_folder("run_dir", tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^run_dir must be a folder that can be made"):
        require_output_folder("run_dir", tmp_path / "file" / "b")


def test_an_error_of_the_disk_names_the_setting_and_other_errors_stay_as_they_are():
    message = r"^root must be .* \(No space left\), got '/x'.$"
    with pytest.raises(ValueError, match=message), requires_folder("root"):
        raise OSError(28, "No space left", "/x")
    with pytest.raises(KeyError), requires_folder("root"):
        raise KeyError
