"""Small configs, and the table of architectures: what is kept, and what is checked again."""

import json
from unittest import mock

import pytest

from planner.ir.errors import InputError
from planner.models.checking import CHECKS, Checked, architecture_table, check_types
from planner.models.checking.small_config import LAYERS, WIDTH, small_default


def test_a_small_config_keeps_kinds_of_layers_and_moves_special_tokens():
    config = small_default("qwen3_next")
    assert config.hidden_size == WIDTH
    assert config.num_hidden_layers == LAYERS
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    llava = small_default("llava")
    assert llava.text_config.hidden_size == WIDTH
    assert 300 < llava.image_token_id < llava.text_config.vocab_size


@pytest.fixture
def asked():
    """Model types as they are checked; all pass."""
    names = []

    def checked(name):
        names.append(name)
        return Checked(name, dict.fromkeys(CHECKS, "yes"), {"layer": 2}, ["a | b"])

    with mock.patch.object(architecture_table, "checked", checked):
        yield names


def test_a_table_goes_on_where_it_was_stopped(asked, tmp_path):
    output = tmp_path / "table.md"

    def stop(done, of, name):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_types([], output, stop)
    first = list(asked)
    assert len(first) == 2
    check_types(["gpt2"], output, lambda *_: None)
    rows = check_types([], output, lambda *_: None)
    assert len(asked) == len(set(asked)) == len(rows)
    assert f"| {first[0]} | 2 / 0 / 0 | yes |" in output.read_text()
    assert "a \\| b" in output.read_text()
    check_types(["gpt2"], output, lambda *_: None)
    assert asked.count("gpt2") == 2


def test_a_table_of_other_versions_is_begun_anew(asked, tmp_path):
    output = tmp_path / "table.md"
    check_types(["gpt2"], output, lambda *_: None)
    path = output.with_suffix(".json")
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"versions": {"torch": "1", "transformers": "1"}}))
    check_types(["llama"], output, lambda *_: None)
    assert [row["model_type"] for row in json.loads(path.read_text())["rows"]] == ["llama"]


def test_another_file_is_not_written_over(asked, tmp_path):
    output = tmp_path / "notes.md"
    output.write_text("# Notes\n")
    with pytest.raises(InputError, match="is another file"):
        check_types(["gpt2"], output, lambda *_: None)
    assert output.read_text() == "# Notes\n"
    assert asked == []


def test_an_unknown_model_type_is_refused(asked):
    with pytest.raises(InputError, match="no model type 'lama'"):
        check_types(["lama"], None, lambda *_: None)
    assert asked == []


def test_an_output_that_cannot_be_is_refused_before_anything_is_checked(tmp_path):
    def never(*_):
        raise AssertionError

    with pytest.raises(InputError, match=r"suffix \.md"):
        check_types(["gpt2"], tmp_path / "table.txt", never)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        check_types(["gpt2"], tmp_path / "file" / "table.md", never)
    for text in ("[]", "{", "{}", "null"):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(InputError, match=r"table\.json"):
            check_types(["gpt2"], tmp_path / "table.md", never)


def test_a_check_that_fails_says_why_and_the_other_is_made():
    def fails(model_type):
        raise ValueError("no such thing")

    def passes(model_type):
        return Checked(model_type, {"runs": "yes"})

    with (
        mock.patch.object(architecture_table, "lowered_row", fails),
        mock.patch.object(architecture_table, "run_row", passes),
    ):
        row = architecture_table.checked("gpt2")
    assert row.answers["runs"] == "yes"
    assert row.answers["lowered"] == ""
    assert row.remarks == ["lowering gpt2 fails: no such thing"]
