"""LLaVA's JSON as an Arrow file: written once, shared, and found stale when the file changes."""

import json
import pickle
import sys

import apart
import pytest

from planner.ir.errors import InputError
from planner.training.data import LlavaConversations
from planner.training.data import conversation_table as records
from planner.training.data.conversation_table import open_records


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "conversations"


def record(number, **changes):
    said = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": "A number."}]
    return {"id": str(number), "conversations": said, **changes}


def write(folder, content):
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_it_is_parsed_once_and_mapped(tmp_path, cache, monkeypatch):
    path = write(tmp_path, [record(n) for n in range(5)])
    first = open_records(path)
    monkeypatch.setattr(records, "_json_list", None)
    second = open_records(path)
    assert list(first) == list(second)
    (arrow,) = cache.glob("*.arrow")
    assert second.cache_files == [{"filename": str(arrow)}]
    # What a worker process is sent is where the file is, not what is in it.
    assert len(pickle.dumps(second)) < 20_000


def test_another_content_is_another_file(tmp_path, cache):
    path = write(tmp_path, [record(1)])
    assert len(open_records(path)) == 1
    write(tmp_path, [record(1), record(2)])
    assert len(open_records(path)) == 2


def test_a_damaged_file_is_written_again(tmp_path, cache):
    path = write(tmp_path, [record(1)])
    open_records(path)
    (arrow,) = cache.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:50])
    assert open_records(path)[0]["id"] == "1"


def test_a_run_that_fails_leaves_nothing_behind(tmp_path, cache):
    path = write(tmp_path, json.dumps([record(1), record(2)])[:-5])
    with pytest.raises(InputError, match="is not valid JSON"):
        open_records(path)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def test_where_the_cache_cannot_be_written_it_is_temporary(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path / "file"))
    assert open_records(write(tmp_path, [record(1)]))[0]["texts"] == ["What is 1?", "A number."]


def test_records_of_all_kinds_keep_their_places(tmp_path, cache):
    content = [
        record(0, image="a.png", scene={"deep": [1, {"x": None}]}, kinds=[None], families=["text"]),
        record(1, id=17, model="something else", other={"nested": [1, "two"]}),
        "no record",
        record(3, kinds=["one", "too many"]),
        record(4, image=5),
    ]
    found = list(open_records(write(tmp_path, f" {json.dumps(content, indent=1)} \n")))
    assert found[0] == {
        "id": "0",
        "image": "a.png",
        "texts": ["What is 0?", "A number."],
        "families": ["text"],
        "kinds": [None],
        "scene": '{"deep": [1, {"x": null}]}',
        "fault": None,
    }
    assert (found[1]["id"], found[1]["image"], found[1]["scene"]) == ("17", None, None)
    assert [row["fault"] is None for row in found] == [True, True, False, False, False]
    assert "record 2: expected an object, found str" in found[2]["fault"]
    assert 'record 3 (id "3"): "kinds" is no list' in found[3]["fault"]
    assert 'record 4 (id "4"): "image" is not the name' in found[4]["fault"]


def test_an_empty_list_is_empty(tmp_path, cache):
    assert len(LlavaConversations(write(tmp_path, "[]"), tmp_path)) == 0


@pytest.mark.parametrize("text", ["", "[1 2]", "[1] 2", "[1,", '["\x00"]', "{", "[{}] ]", "[1,]"])
def test_what_json_does_not_accept_is_refused(tmp_path, cache, text):
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(InputError, match="is not valid JSON"):
        open_records(write(tmp_path, text))


def test_processes_that_start_together_share_one_file(tmp_path, cache):
    path = write(tmp_path, [record(n) for n in range(2000)])
    program = (
        "import sys; from pathlib import Path; "
        "from planner.training.data.conversation_table import open_records; "
        "print(len(open_records(Path(sys.argv[1]))))"
    )
    runs = [apart.start("-c", program, path, folder=tmp_path) for _ in range(2)]
    assert [run.finish().stdout.strip() for run in runs] == ["2000"] * 2
    assert len(list(cache.glob("*.arrow*"))) == 2  # and its lock


def test_without_datasets_it_says_what_to_install(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'planner\[train\]'"):
        open_records(write(tmp_path, [record(1)]))
