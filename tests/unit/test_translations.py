"""Where translations are kept."""

import os

import pytest

from ringzero.errors import InputError
from ringzero.machine.translations import VARIABLE, translation_folder


def test_the_environment_chooses_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert translation_folder() == "/xdg/ringzero/translations"
    monkeypatch.setenv(VARIABLE, "off")
    assert translation_folder() is None
    assert translation_folder("/mine") == "/mine"
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    assert translation_folder() == "/elsewhere"
    assert translation_folder(False) is None
    monkeypatch.setenv(VARIABLE, os.path.join("not", "absolute"))
    with pytest.raises(InputError, match="absolute"):
        translation_folder()
