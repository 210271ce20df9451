"""Files are written whole or not at all, and nothing is lost where they cannot be."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from planner.files import check_output, whole_folder, write_folder, write_together
from planner.ir.errors import InputError, first_line


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    write_folder(folder, {"a": b"old"})
    replace, fail = Path.replace, [True]

    def failing(path, target):
        if path.name == "new" and fail.pop():
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(InputError, match="Input/output error"):
        write_folder(folder, {"b": b"new"})
    assert [(entry.name, entry.read_bytes()) for entry in folder.iterdir()] == [("a", b"old")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["kernels"]


def test_weights_that_do_not_fit_on_a_disk_are_one_sentence(tmp_path):
    with (
        pytest.raises(InputError, match="No space left on device"),
        whole_folder(tmp_path / "model"),
    ):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_files_that_belong_together_are_written_together(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(InputError, match="b': Is a directory"):
        write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    (tmp_path / "b").rmdir()
    write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {
        "a": b"new",
        "b": b"new",
    }


def test_a_folder_is_no_output_file(tmp_path):
    (tmp_path / "here.json").mkdir()
    with pytest.raises(InputError, match="must be a file"):
        check_output(tmp_path / "here.json", ".json")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("one\ntwo", "one"),
        ("validation error for 'hidden_size':\n  -1 is less than 1\nmore", None),
        ("from one of:\n\n(1) a file", "from one of: (1) a file"),
        ("", "ValueError"),
        (":", ":"),
    ],
)
def test_what_an_error_announces_is_said_with_it(said, told):
    expected = told or "validation error for 'hidden_size': -1 is less than 1"
    assert first_line(ValueError(said)) == expected
