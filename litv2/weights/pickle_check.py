# SPDX-License-Identifier: Apache-2.0
"""Checks a pickle before torch reads it, so that a hostile one is rejected at once.

``torch.load(weights_only=True)`` runs no code from the file, but a small file can make it run forever or allocate all memory.
Here its pickle is interpreted opcode by opcode, with stand-ins for the objects that it would create:

* globals outside a short list are rejected by name, and so are calls to the allowed ones with unexpected arguments;
* nothing may blow up: storages have the size of their records, the expanded size of tuples is limited, keys are cheap to hash.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection

from ..errors import UserError

__all__ = ["CONFIG_NODE", "MadeList", "PickleCheck"]

CONFIG_NODE = "yacs.config.CfgNode"  # class of the configurations in the release's files

_ITEM_SIZES = dict(Double=8, Float=4, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1, ComplexDouble=16, ComplexFloat=8)
STORAGES = {f"{module}.{kind}Storage": size for kind, size in _ITEM_SIZES.items() for module in ("torch", "torch.cuda")}
STORAGES["torch.storage.UntypedStorage"] = 1
DTYPES = {
    f"torch.{name}"
    for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz".split()
}
REBUILD = {f"torch._utils.{name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")}
CALLABLE = {*REBUILD, CONFIG_NODE, "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device"}
CALLABLE |= {"builtins.set", "_codecs.encode"}

LARGEST_TUPLE = 1_000_000  # expanded elements: torch would hash, compare or print them all
DEEPEST_TUPLE = 100
TUPLE_KEYS = 10_000  # elements of all tuples used as keys: hashes of tuples can be made to collide
LARGEST_COUNTER = 1000  # entries: each Counter copies a dictionary, which the file may request any number of times
MOST_OPCODES = 4_000_000  # each may take 1 byte in the file and 64 in memory; a checkpoint of a thousand processes has 1.3 million
LARGEST_KEY = 1 << 60  # hashes of larger integers can be made to collide, too


# Stand-ins for the objects that a pickle creates. Strings and integers stand for themselves, None for any other atom.
class _Tuple:
    def __init__(self, items: list):
        self.items = items
        inner = [item for item in items if isinstance(item, _Tuple)]
        self.size: int = 1 + len(items) + sum(item.size for item in inner)
        self.depth: int = 1 + max((item.depth for item in inner), default=0)
        if self.size > LARGEST_TUPLE or self.depth > DEEPEST_TUPLE:
            raise UserError(f"a tuple expands to {self.size} elements, nested {self.depth} deep, which no checkpoint needs")
        if any(isinstance(item, _Made) and item.name == CONFIG_NODE for item in items):
            raise UserError(f"a tuple contains a {CONFIG_NODE}")


class MadeList:
    count = 0


class _Dict:
    count = 0


class _Global:
    def __init__(self, name: str):
        self.name = name


class _Made(_Global):
    """The result of calling the global of this name."""


class PickleCheck:
    """Checks one pickle by torch's rules for the stack; see ``torch/_weights_only_unpickler.py``.

    Args:
        also: names of further allowed globals, "module.name".
        storage: called with the key and the size in bytes of each storage, to check them; None if storages are not allowed.
    """

    def __init__(self, also: Collection[str] = (), storage: Callable[[str, int], None] | None = None):
        self.also = also
        self.storage = storage
        self.stack: list = []
        self.outer: list[list] = []  # the stacks below each mark
        self.memo: dict[int, object] = {}
        self.key_elements = 0

    def follow(self, pickle):
        """Interprets the pickle, given as bytes or a file, up to its STOP; returns the stand-in for the object that it creates.

        Raises:
            ValueError: the pickle uses a global that is not allowed, or would create something too large or unusual.
            Exception: the pickle is damaged (IndexError, KeyError and similar).
        """
        foreign = None
        for number, (opcode, argument, position) in enumerate(pickletools.genops(pickle)):
            name = opcode.name
            if number > MOST_OPCODES:
                raise UserError(f"the pickle has more than {MOST_OPCODES} opcodes")
            if name == "STOP":
                break
            if name in _PUSH:
                self.stack.append(argument if isinstance(argument, (str, int)) and not isinstance(argument, bool) else None)
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                index = len(self.memo) if name == "MEMOIZE" else argument
                if position is not None and index > position:
                    raise UserError(f"the memo index {index} at byte {position} is too large")
                self.memo[index] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self._global(*argument.split(" ", 1))
            elif name == "STACK_GLOBAL":
                attribute, module = self.stack.pop(), self.stack.pop()
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise UserError("the name of a global is not a string")
                self._global(module, attribute)
            elif name == "INST":
                raise UserError(f"it asks for the global {argument.replace(' ', '.')!r} (opcode INST)")
            elif handler := _HANDLERS.get(name):
                handler(self)
            elif name not in ("PROTO", "FRAME"):
                raise UserError(f"the pickle contains the opcode {name}, which torch.save does not write")
            if name in _FOREIGN:
                foreign = foreign or name
        if foreign:
            raise UserError(f"the pickle contains the opcode {foreign}, but torch reads only protocol 2 from untrusted files")
        return self.stack.pop()

    def _global(self, module: str, attribute: str) -> None:
        if (module, attribute) in NAME_MAPPING:  # of Python 2, which protocol 2 writes
            module, attribute = NAME_MAPPING[module, attribute]
        name = f"{IMPORT_MAPPING.get(module, module)}.{attribute}"
        if name not in CALLABLE and name not in STORAGES and name not in DTYPES and name not in self.also:
            raise UserError(f"it asks for the global {name!r}, which is not allowed in a checkpoint")
        self.stack.append(_Global(name))

    def _mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _pop_mark(self) -> list:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _tuple(self, count: int | None = None) -> None:
        items = self._pop_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        self.stack.append(_Tuple(items))

    def _append(self, items: list) -> None:
        if not isinstance(self.stack[-1], MadeList):
            raise UserError("the pickle appends to an object that is not a list")
        self.stack[-1].count += len(items)

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, _Dict) and getattr(target, "name", "") not in (CONFIG_NODE, "collections.OrderedDict"):
            raise UserError("the pickle sets an item of an object that is not a dictionary")
        if len(items) % 2:
            raise UserError("a key has no value")
        for key in items[::2]:
            self._check_key(key)
        if isinstance(target, _Dict):
            target.count += len(items) // 2

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _check_key(self, key) -> None:
        if isinstance(key, _Tuple):
            self.key_elements += key.size
            if self.key_elements > TUPLE_KEYS:
                raise UserError(f"tuples used as keys of dictionaries have more than {TUPLE_KEYS} elements in total")
            for item in key.items:
                self._check_key(item)
        elif isinstance(key, int) and abs(key) >= LARGEST_KEY or not isinstance(key, (str, int, type(None))):
            raise UserError("a key of a dictionary is neither a string, nor a number below 2 ** 60, nor a tuple of these")

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Global or not isinstance(arguments, _Tuple):
            raise UserError("it calls an object that is not a named global")
        name, items = function.name, arguments.items
        if name in self.also:
            fits = self._moderate(arguments)
        elif name == "collections.OrderedDict":
            fits = not items
        elif name == "collections.Counter":  # the milestones of torch's and mmengine's schedules
            fits = len(items) == 1 and isinstance(items[0], _Dict) and items[0].count <= LARGEST_COUNTER
        elif name == "builtins.set":
            fits = len(items) == 1 and isinstance(items[0], MadeList) and items[0].count == 0
        elif name == "torch.Size":
            fits = len(items) == 1 and isinstance(items[0], _Tuple) and all(isinstance(item, int) for item in items[0].items)
        elif name == "torch.device":
            fits = all(isinstance(item, (str, int)) for item in items)
        elif name == "_codecs.encode":  # bytes in protocol 2
            fits = len(items) == 2 and isinstance(items[0], str) and items[1] == "latin1"
        else:
            fits = name in REBUILD
        if not fits:
            raise UserError(f"it calls {name!r} with unexpected arguments")
        self.stack.append(_Made(name))

    def _moderate(self, arguments: _Tuple) -> bool:
        """Whether the arguments contain no integer that could be the size of something huge."""
        return all(
            self._moderate(item) if isinstance(item, _Tuple) else not isinstance(item, int) or abs(item) < 1 << 31
            for item in arguments.items
        )

    def _new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Global or not isinstance(arguments, _Tuple):
            raise UserError("it creates an object of a class that is not a named global")
        fits = self._moderate(arguments) if kind.name in self.also else kind.name == CONFIG_NODE and not arguments.items
        if not fits:
            raise UserError(f"it creates a {kind.name!r} with unexpected arguments")
        self.stack.append(_Made(kind.name))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        name = target.name if isinstance(target, _Made) else type(target).__name__.strip("_").lower()
        if name not in self.also and not (name in (CONFIG_NODE, "collections.OrderedDict") and isinstance(state, _Dict)):
            raise UserError(f"it sets the state of a {name}")

    def _persistent(self) -> None:
        identity = self.stack.pop()
        items = identity.items if isinstance(identity, _Tuple) else []
        if self.storage is None or len(items) not in (5, 6) or items[0] != "storage" or getattr(items[1], "name", "") not in STORAGES:
            raise UserError("a persistent id that is not a storage's")
        _, kind, key, location, count, *view = items
        if not isinstance(key, str) or not isinstance(location, str) or not isinstance(count, int) or count < 0:
            raise UserError("a persistent id that is not a storage's")
        self.storage(key, count * STORAGES[kind.name])
        self.stack.append(_Made("storage"))


_PUSH = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("SHORT_BINUNICODE", "BINUNICODE8"),
}
_FOREIGN = {"SHORT_BINUNICODE", "BINUNICODE8", "MEMOIZE", "FRAME", "STACK_GLOBAL"}  # interpreted only to name the global in the error
_HANDLERS: dict[str, Callable[[PickleCheck], None]] = {
    "MARK": PickleCheck._mark,
    "EMPTY_TUPLE": lambda self: self._tuple(0),
    "TUPLE": PickleCheck._tuple,
    "TUPLE1": lambda self: self._tuple(1),
    "TUPLE2": lambda self: self._tuple(2),
    "TUPLE3": lambda self: self._tuple(3),
    "EMPTY_LIST": lambda self: self.stack.append(MadeList()),
    "APPEND": lambda self: self._append([self.stack.pop()]),
    "APPENDS": lambda self: self._append(self._pop_mark()),
    "EMPTY_DICT": lambda self: self.stack.append(_Dict()),
    "EMPTY_SET": lambda self: self.stack.append(None),
    "SETITEM": PickleCheck._set_item,
    "SETITEMS": lambda self: self._set_items(self._pop_mark()),
    "REDUCE": PickleCheck._reduce,
    "NEWOBJ": PickleCheck._new_object,
    "BUILD": PickleCheck._build,
    "BINPERSID": PickleCheck._persistent,
}
