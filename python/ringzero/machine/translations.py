"""Where translations are kept from run to run: `translations/` in the cache directory, for this user alone.

RINGZERO_TRANSLATION_CACHE in the environment says otherwise: "off", or the absolute path of another folder.
"""

from __future__ import annotations

import os
from typing import Final

from ringzero.errors import InputError
from ringzero.images.cache import cache_root

__all__ = ["VARIABLE", "translation_folder"]

VARIABLE: Final = "RINGZERO_TRANSLATION_CACHE"


def translation_folder(choice: bool | str | os.PathLike[str] = True) -> str | None:
    """Return the folder that `choice` means, or None for keeping nothing.

    True is the environment's choice, else the user's cache. Raises InputError for an environment variable
    that is neither "off" nor an absolute path.
    """
    if choice is False:
        return None
    if choice is not True:
        return os.path.abspath(choice)
    configured = os.environ.get(VARIABLE, "")
    if configured == "off":
        return None
    if configured:
        if not os.path.isabs(configured):
            raise InputError(f'{VARIABLE}={configured!r}: give "off" or the absolute path of a folder')
        return configured
    try:
        return str(cache_root() / "translations")
    except InputError:
        return None  # no home directory: machines run all the same
