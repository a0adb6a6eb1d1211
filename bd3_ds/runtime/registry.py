"""Registries: entries that a recipe selects by name, built in or registered by a plugin.

A registry imports the modules of the built-in entries at its first use, so that a package can hold a registry whose
entries live in packages that it does not import. Modules that register entries keep heavy imports
(torch) inside functions: names and facts are read before any network is built.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from bd3_ds.runtime.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name. `key` is the configuration key that chooses one; `home` the module or package of our entries."""

    def __init__(self, key: str, home: str):
        self.key = key
        self._home = home
        self._entries: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        self._loaded = False

    def register(self, name: str, entry: T) -> T:
        """Add an entry; returns it. Raises UserError for a name that is taken."""
        origin = sys._getframe(1).f_globals.get("__name__", "?")
        self._add(name, entry, origin)
        return entry

    def registered(self, name: str) -> Callable[[T], T]:
        """`register` as a decorator of a function or class that is the entry."""
        origin = sys._getframe(1).f_globals.get("__name__", "?")

        def add(entry: T) -> T:
            self._add(name, entry, origin)
            return entry

        return add

    def _add(self, name: str, entry: T, origin: str) -> None:
        self._load()  # ours first, so that it is the other one that takes a name twice
        if name in self._entries:
            raise UserError(
                f"{self.key}={name} is registered by {self._origins[name]} and again by {origin}; give it another name"
            )
        self._entries[name] = entry
        self._origins[name] = origin

    def __getitem__(self, name: str) -> T:
        """The entry of this name; raises UserError for an unknown one."""
        self._load()
        if name not in self._entries:
            raise UserError(self.unknown(name))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """All names, ours first."""
        self._load()
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def unknown(self, name: str) -> str:
        """A sentence for a name that is not known."""
        return f"{self.key}={name} is unknown; {did_you_mean(name, self)}"

    def remove(self, name: str) -> None:
        """Forget an entry, as tests of a module that registers some must."""
        del self._entries[name], self._origins[name]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        if __name__.partition(".")[0] != self._home.partition(".")[0]:
            return  # this is the copy in a model's folder, whose modelling code imports the entries' modules itself
        home = importlib.import_module(self._home)
        for module in pkgutil.iter_modules(getattr(home, "__path__", [])):
            importlib.import_module(f"{self._home}.{module.name}")
