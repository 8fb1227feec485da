"""Read the pickles of torch.save as plain data; nothing that they name is imported or called.

``torch.load`` with ``weights_only`` calls what torch and other libraries allow in one list for the
whole process, and takes unbounded time and memory. Here, each opcode takes constant time in its
bytes.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import IO, Any, NamedTuple

import torch

from .protocol import LONGEST_NAME, MOST_DIMENSIONS

# where a storage starts in the file, in bytes, and its values as a one-dimensional tensor, given
# its key, its dtype and its number of values
FindStorage = Callable[[str, torch.dtype, int], tuple[int, torch.Tensor]]

SAVE_WEIGHTS = "Save only the state dict: torch.save(module.state_dict(), path)."
_ORDERED_DICT = "collections.OrderedDict"
_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip
_BYTES = {"torch.storage.UntypedStorage": torch.uint8, "torch.QInt8Storage": torch.int8,
          "torch.QUInt8Storage": torch.uint8, "torch.QInt32Storage": torch.int32}  # fmt: skip
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()} | _BYTES
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_tensor_v3")  # fmt: skip
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_KINDS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_NOT_DENSE = ("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor")
_PLAIN = {_ORDERED_DICT, *_STORAGES, *_TENSORS, _PARAMETERS[0]}
_IN_TORCH = {*_PLAIN, *_PARAMETERS, _WITH_ATTRIBUTES, *_KINDS, *_NOT_DENSE}
# other names in torch that state dicts and training checkpoints contain
_HARMLESS_IN_TORCH = re.compile(
    r"torch\.(Size|device|torch_version\.TorchVersion|serialization\._get_layout|(nn\.(?!parameter\.)|optim\.|_C\._nn\.).+)"
)
# modules that no harmless pickle refers to
_NEVER = ("builtins", "os", "posix", "nt", "sys", "subprocess", "commands", "shutil", "socket",
          "importlib", "runpy", "pty", "ctypes", "code", "pdb", "webbrowser", "pickle", "operator",
          "functools", "multiprocessing", "asyncio", "signal", "platform", "pip",
          "torch")  # fmt: skip
# except for these names in them
_DATA = re.compile(
    r"builtins\.(object|bool|int|long|float|complex|str|unicode|bytes|bytearray|tuple|list|dict|set"
    r"|frozenset|slice|x?range)|functools\.partial|operator\.(item|attr)getter"
)
# packages and functions whose calls only build data
_BUILDERS = re.compile(
    r"(numpy|pandas|datetime|collections|zoneinfo)\..+|copyreg\._reconstructor|re\._compile"
    r"|_codecs\.encode|torch\.(Size|device|serialization\._get_layout)"
)
_SHOWN = {"encode": "bytes", "xrange": "range"}  # what these calls make
_OF_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# attributes that the states of tensors and dicts must not have
_OF_DICT = frozenset(dir(OrderedDict))
_OF_TENSOR = frozenset(dir(torch.Tensor))
_MOST_ARGUMENTS = 8
_LEAST_BYTES_OF_A_TENSOR = 20  # torch.save writes three times as many
_LEAST_BYTES_OF_A_PAIR = 4
_IN_ITS_PLACE = torch.zeros(1).to_sparse()  # of a sparse or quantized tensor; none can be mixed


@dataclass(frozen=True)
class Pickled:
    """What a pickle holds; whether all of it is dicts, lists, numbers, texts and dense tensors."""

    value: Any
    is_plain: bool
    places: Mapping[int, Place]  # of the tensors in it, by id()


class View(NamedTuple):
    """How a tensor is a view of its storage; ``offset`` and ``stride`` count values."""

    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    is_conj: bool
    is_negative: bool

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor, given all values of the storage; a copy if it has the negative bit."""
        values = values if values.dtype == self.dtype else values.view(self.dtype)
        made = values.as_strided(self.size, self.stride, values.storage_offset() + self.offset)
        made = -made if self.is_negative else made  # torch has no public view for it
        return made.conj() if self.is_conj else made


class Place(NamedTuple):
    """Where a tensor is in a file: the bytes of its storage, and a view of them."""

    start: int
    stop: int
    view: View


class Inert(dict[Any, Any]):
    """In place of an object of a class that is not loaded: its items, and all else it is made of.

    Without items, it does not count as a mapping.
    """

    __slots__ = ("given", "more", "name")

    def __init__(self, name: str, given: tuple[Any, ...]) -> None:
        super().__init__()
        self.name = name
        self.given = given
        self.more: list[Any] | None = None

    def hold(self, items: list[Any]) -> None:
        """Add items of a list, or a state."""
        if self.more is None:
            self.more = []
        self.more.extend(items)


class OddKey:
    """In place of a key of a dict that could have the hash of many others."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _OrderedDict(dict[Any, Any]):
    """As collections.OrderedDict, with less memory."""

    __slots__ = ()


def kind_of(value: Any) -> str:
    """The name of the class of a value, also if it was not loaded."""
    if isinstance(value, OddKey):
        return kind_of(value.value)
    if isinstance(value, _Name):
        return "class or function"
    return value.name if isinstance(value, Inert) else type(value).__name__.lstrip("_")


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle refers to, with its module and alone."""

    full: str
    own: str


def read_pickle(file: IO[bytes] | bytes, find_storage: FindStorage) -> Pickled:
    """What a pickle of ``torch.save`` holds; raise UnpicklingError for anything unusual in it.

    Tensors are views of storages. Objects of unknown classes become `Inert`, and keys of dicts that
    could have equal hashes `OddKey`.
    """
    machine = _Machine(find_storage)
    for op, arg, where in pickletools.genops(file):
        if op.name == "STOP":
            break
        act = _ACTS.get(op.name)
        if act is None:
            raise UnpicklingError(
                f"it was written with a pickle protocol that torch.load does not read without "
                f"running code (opcode {op.name}). Save it again, without pickle_protocol=."
            )
        act(machine, arg)
        if machine.n_made > (where or 0):
            raise _refused("the same list or arguments in very many calls")
    if len(machine.stack) != 1 or machine.marks:
        raise _refused("more than one object")
    return Pickled(machine.stack[0], machine.is_plain, machine.places)


class _Machine:
    """The state of a pickle that is being read: a stack, and the objects it refers to again."""

    def __init__(self, find_storage: FindStorage) -> None:
        self.find_storage = find_storage
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, tuple[torch.dtype, int, _Storage]] = {}
        self.places: dict[int, Place] = {}
        self.views: dict[str, View] = {}  # by their text, as tuples may have equal hashes
        self.is_plain = True
        self.n_made = 0  # bytes of a pickle of torch.save for what calls have made
        self.n_values = 0  # of all storages, less those of tensors with the negative bit

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_ascii(self, value: str) -> None:
        """A text of Python 2, which programs decode in different ways unless it is ASCII."""
        if not value.isascii():
            raise _refused("a text of Python 2 that is not ASCII")
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def name(self, arg: str) -> None:
        """A name of a class, of a function or of a dtype."""
        module, _, attribute = arg.rpartition(" ")
        full = f"{_OF_PYTHON_2.get(module, module)}.{attribute}"
        dtype = vars(torch).get(attribute) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            self.stack.append(dtype)
            return
        self.is_plain &= full in _PLAIN
        self.stack.append(_checked(full, attribute))

    def call(self, _: None) -> None:
        given, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Name) or not isinstance(given, tuple):
            raise _refused("a call of something that is not a class or function")
        self.stack.append(self.result(called, given))

    def new(self, _: None) -> None:
        """An object without a call of ``__init__``."""
        given, kind = self.stack.pop(), self.stack.pop()
        is_class = isinstance(kind, _Name) and kind.full not in _PLAIN and isinstance(given, tuple)
        if not is_class:
            raise _refused("a new object of something that is not a class")
        self.stack.append(self.result(kind, given))

    def result(self, called: _Name, given: tuple[Any, ...]) -> Any:
        """What a call makes: a dict, a tensor, or an object without code."""
        if called.full in _IN_TORCH and len(given) > _MOST_ARGUMENTS:  # they would be copied
            raise _refused(f"a call of {called.full} with {len(given):,} arguments")
        if called.full == _ORDERED_DICT:
            return self.ordered_dict(*given)
        if called.full in _TENSORS:
            return self.tensor(called.full, *given)
        if called.full in _PARAMETERS:
            if not isinstance(given[0], torch.Tensor):
                raise _refused("a parameter without a tensor")
            self.refuse_hidden(given[3:], _OF_TENSOR)
            return given[0]
        if called.full == _WITH_ATTRIBUTES:
            function, kind, values = given[:3]
            names = [
                one.full if isinstance(one, _Name) else kind_of(one) for one in (function, kind)
            ]
            is_known = names[0] in _TENSORS + _PARAMETERS and names[1] in _KINDS
            if not is_known or not isinstance(values, tuple):
                raise _refused(f"more than dense tensors ({names[1]})")
            self.refuse_hidden(given[3:], _OF_TENSOR)
            return self.result(function, values)
        if called.full == "torch.Size" and len(given) == 1 and isinstance(given[0], tuple):
            return given[0]
        if called.full in _NOT_DENSE:
            return _IN_ITS_PLACE
        # of a given size, with whatever is in the memory
        if called.full in _KINDS or called.full in _STORAGES:
            raise _refused(f"tensors without their values (a call of {called.full})")
        own = called.own
        if own[:1].isupper() or _DATA.fullmatch(called.full) or _BUILDERS.fullmatch(called.full):
            return Inert(_SHOWN.get(own, own), given)
        raise _runs_code(called.full)

    def ordered_dict(self, pairs: Any = None) -> _OrderedDict:
        """An empty one, or one of a list of pairs, as Python 2 wrote them."""
        pairs = [] if pairs is None else pairs
        is_list = isinstance(pairs, list) and all(isinstance(one, (list, tuple)) for one in pairs)
        if not is_list:
            raise _refused("an OrderedDict of something that is not a list of pairs")
        self.n_made += _LEAST_BYTES_OF_A_PAIR * len(pairs)
        return _OrderedDict((_key(name), value) for name, value in pairs)

    def tensor(self, function: str, *given: Any) -> torch.Tensor:
        """A view of a storage: offset, sizes and strides in values, and for version 3 a dtype."""
        self.n_made += _LEAST_BYTES_OF_A_TENSOR
        (storage, offset, size, stride, *_), rest = given[:6], list(given[6:])
        if not isinstance(storage, _Storage):
            raise _refused("a tensor without a storage")
        dtype = None if storage.is_bytes else storage.values.dtype
        if function.endswith("_v3"):
            dtype, *rest = rest
        if not isinstance(dtype, torch.dtype):
            raise _refused("a tensor without a dtype")
        _check_view(storage.values.nbytes // dtype.itemsize, offset, size, stride)
        self.n_made += len(size)
        bits = rest[0] if rest else {}
        is_known = isinstance(bits, dict) and not bits.keys() - {"conj", "neg"}
        if not is_known or not all(value is True for value in bits.values()):
            raise _refused("a tensor with unknown metadata")
        if "conj" in bits and not dtype.is_complex:
            raise _refused("a real tensor with the conjugate bit")
        if "neg" in bits:  # which is copied
            self.n_values -= math.prod(size)
            if self.n_values < 0:
                raise _refused("more tensors with the negative bit than values")
        view = View(dtype, offset, size, stride, "conj" in bits, "neg" in bits)
        made = view.of(storage.values)
        # a tensor that is freed gives its id to a new one, which has its own place
        stop = storage.start + storage.values.nbytes
        once = self.views.setdefault(str(view), view)
        self.places[id(made)] = Place(storage.start, stop, once)
        return made

    def build(self, _: None) -> None:
        """Set the state of an object."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _OrderedDict):  # attributes, such as the versions of modules
            self.refuse_hidden((state,), _OF_DICT)
            self.is_plain &= type(state) is dict and state.keys() == {"_metadata"}
        elif isinstance(target, Inert):
            target.hold([state])
        else:  # that of a tensor could be other memory
            raise _refused(f"the state of a {kind_of(target)}")

    def refuse_hidden(self, states: tuple[Any, ...], hidden: frozenset[str]) -> None:
        """Raise an error for states that would change what other programs read."""
        for state in states:
            for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
                if part is not None and not isinstance(part, dict):
                    raise _refused("a state that is not a dict")
                self.n_made += len(part or ())
                if names := hidden.intersection(part or ()):
                    raise _refused(f"an object whose {min(names)!r} is replaced")

    def append(self, _: None) -> None:
        item = self.stack.pop()
        self.extend([item])

    def appends(self, _: None) -> None:
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.hold(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise _refused(f"items of a {kind_of(target)}")

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def set_items(self, _: None) -> None:
        self.update(self.since_mark())

    def update(self, items: list[Any]) -> None:
        """Add items to a dict: keys and values in turn."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _refused(f"items of a {kind_of(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def storage(self, _: None) -> None:
        """A storage outside the pickle, which all tensors that use it share."""
        found = self.stack.pop()
        if not isinstance(found, tuple) or len(found) not in (5, 6) or found[0] != "storage":
            raise _refused("more than tensors (an object outside the pickle)")
        _, kind, key, location, count = found[:5]
        if location == "meta":
            raise _refused("a storage on the device 'meta', which has no values")
        dtype = _STORAGES.get(kind.full) if isinstance(kind, _Name) else None
        if dtype is None:
            raise _refused(f"more than dense tensors ({getattr(kind, 'full', kind_of(kind))})")
        # other keys could be those of several members of an archive
        is_key = isinstance(key, str) and len(key) <= 20 and key.isascii() and key.isdecimal()
        if not is_key or not _is_count(count) or found[5:] not in ((), (None,)):
            raise _refused("a storage without a key or a size, or a view of a storage")
        if key not in self.storages:
            start, values = self.find_storage(key, dtype, count)
            self.n_values += count
            self.storages[key] = dtype, count, _Storage(start, values, kind.full in _BYTES)
        *known, storage = self.storages[key]
        if known != [dtype, count]:
            raise _refused(f"the storage {key!r} with two dtypes or sizes")
        self.stack.append(storage)


@dataclass(frozen=True, eq=False)
class _Storage:
    """The values of a storage, which may be bytes of another dtype, and its start in the file."""

    start: int
    values: torch.Tensor
    is_bytes: bool


_ACTS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "NONE": _Machine.push,  # whose argument is None
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    "BINUNICODE": _Machine.push,
    "SHORT_BINSTRING": _Machine.push_ascii,
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPERSID": _Machine.storage,
}


def _key(value: Any) -> Any:
    """A key of a dict; anything that could have the hash of many others becomes an `OddKey`."""
    is_small = isinstance(value, int) and abs(value) < 2**32
    return value if isinstance(value, str) or is_small or value is None else OddKey(value)


def _check_view(n_values: int, offset: Any, size: Any, stride: Any) -> None:
    """Raise an error unless a tensor is within the values of its storage."""
    are_tuples = isinstance(size, tuple) and isinstance(stride, tuple)
    is_small = are_tuples and len(size) == len(stride) <= MOST_DIMENSIONS
    if not is_small or not all(map(_is_count, (offset, *size, *stride))):
        raise _refused("a tensor with a wrong shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= n_values:
        raise _refused("a tensor that is larger than its storage")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _checked(full: str, attribute: str) -> _Name:
    """A name in a pickle; raise an error for those that no harmless one contains."""
    if len(full) > LONGEST_NAME:
        raise _refused(f"the name of a class with {len(full):,} characters")
    if "." in attribute:  # torch.save writes names of modules and classes, not of what is in them
        raise _refused(f"more than tensors ({full})")
    package = full.partition(".")[0]
    if package == "torch":
        known = full in _IN_TORCH or _HARMLESS_IN_TORCH.fullmatch(full) is not None
        if not known and attribute.startswith("_rebuild_"):
            raise _refused(f"more than dense tensors ({full})")
    else:
        known = package not in _NEVER or _DATA.fullmatch(full) is not None
    if not known:
        raise _runs_code(full)
    return _Name(full, attribute)


def _runs_code(name: str) -> UnpicklingError:
    return UnpicklingError(
        f"it holds more than tensors ({name}), and reading it could run code. sksoup never "
        f"unpickles code. {SAVE_WEIGHTS}"
    )


def _refused(found: str) -> UnpicklingError:
    return UnpicklingError(f"it holds {found}, which sksoup does not read. {SAVE_WEIGHTS}")
