"""Folders of several runs, as other versions wrote them."""

import json

import pytest

from esper.errors import RunFolderError
from esper.tolaria import create_study, make_config, open_study


@pytest.fixture
def folder(tmp_path):
    create_study(tmp_path / "study", make_config(task="spirals", backend="jax", steps=100), 3)
    return tmp_path / "study"


def rewritten(folder, **changes):
    file = folder / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_study_is_read_as_it_was_written(folder):
    assert [config.seed for _, config in open_study(folder).runs] == [0, 1, 2]
    assert {config.steps for _, config in open_study(folder).runs} == {100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 1}, "written by an older Esper.*replayed and shown by itself"),
        ({"schema_version": 3}, "schema version 3, this Esper reads 2: use the Esper that wrote"),
        ({"seeds": "many"}, "study.json is damaged: "),
        ({"config": {"task": 5}}, "study.json is damaged: "),
    ],
)
def test_a_study_that_cannot_be_read_is_refused(folder, changes, message):
    rewritten(folder, **changes)
    with pytest.raises(RunFolderError, match=message):
        open_study(folder)
