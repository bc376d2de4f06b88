"""Pyserini's lists of prebuilt indexes are read when a list is used, and only then."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from routehead_plugins.adapters import _index_lists

NAME = "pyserini.prebuilt_index_info"


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], ModuleType]:
    """Stand in for the module of lists of a Pyserini 2 whose source is given."""

    def register(source: str) -> ModuleType:
        file = tmp_path / "prebuilt_index_info.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(NAME, file)
        monkeypatch.setattr(importlib.metadata, "version", lambda _package: "2.4.0")
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
        # Registered and deleted so that the module of the real Pyserini is back afterwards.
        monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
        del sys.modules[NAME]
        _index_lists.defer_index_lists()
        return sys.modules[NAME]

    return register


def test_nothing_is_executed_until_an_entry_is_asked_for(
    lists: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    module = lists(
        f"with open({str(ran)!r}, 'a') as file: file.write('x')\n"
        "TF_INDEX_INFO = {'a': 1, 'b': 2}\nFAISS_INDEX_INFO = {'c': 3}\n"
    )
    entries, others = module.TF_INDEX_INFO, module.FAISS_INDEX_INFO
    assert not ran.exists()
    assert (entries["a"], dict(entries), len(entries)) == (1, {"a": 1, "b": 2}, 2)
    assert ("a" in entries, "c" in entries, {**others}) == (True, False, {"c": 3})
    assert ran.read_text() == "x"
    with pytest.raises(KeyError):
        entries["c"]


def test_other_names_are_those_of_the_module(lists: Callable[[str], ModuleType]) -> None:
    module = lists("PREBUILT_INDEXES_COMMIT = '12ab'\n")
    assert module.PREBUILT_INDEXES_COMMIT == "12ab"
    with pytest.raises(AttributeError, match=r"'NONESUCH'"):
        _ = module.NONESUCH
    with pytest.raises(AttributeError, match=r"'__path__'"):
        _ = module.__path__


def test_a_failed_download_is_tried_again(
    lists: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    net = tmp_path / "net"
    entries = lists(
        f"import pathlib\nTF_INDEX_INFO = eval(pathlib.Path({str(net)!r}).read_text())\n"
    ).TF_INDEX_INFO
    for _ in range(2):
        with pytest.raises(OSError, match=r"No such file"):
            len(entries)
    net.write_text("{'a': 1}")
    assert dict(entries) == {"a": 1}


def test_lists_that_are_imported_already_stay(lists: Callable[[str], ModuleType]) -> None:
    module = lists("")
    _index_lists.defer_index_lists()
    assert sys.modules[NAME] is module


@pytest.mark.parametrize("version", ["1.6.0", "a checkout"])
def test_a_pyserini_that_brings_its_lists_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _package: version)
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    del sys.modules[NAME]
    _index_lists.defer_index_lists()
    assert NAME not in sys.modules


def test_without_pyserini_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    del sys.modules[NAME]
    _index_lists.defer_index_lists()
    assert NAME not in sys.modules
