"""Find out what a pickle would build from its opcodes, without building or running anything."""

from __future__ import annotations

import io
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ..exceptions import CheckpointError

# everything in torch that a state dict needs; torch and libraries allow more, such as classes that
# open connections, and functions that build tensors of any size or without values
_OF_TORCH = re.compile(
    r"torch\.(Size|device|([A-Z]\w*)?Tensor|[A-Z]\w*Storage|storage\.(Untyped|Typed)Storage"
    r"|nn\.parameter\.(Parameter|Buffer)|serialization\._get_layout"
    r"|_tensor\._rebuild_from_type_v2"
    r"|_utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?|sparse_tensor|qtensor))"
)
# torch itself builds none of these; stand-ins without code take their place (torch_files.py)
INERT = re.compile(r"torch\.(nn\.(?!parameter\.)|optim\.|_C\._nn\.).+")
# names outside torch that it builds
_BUILT = ("OrderedDict", "Counter", "set", "complex", "bytearray", "encode")
# attributes that a pickle must not set, because they would hide methods
_OF_DICT = frozenset(dir(OrderedDict))
_METHODS = _OF_DICT.union(dir(torch.Tensor))
REUSED = 16  # maximum total size of the arguments of calls, in sizes of the pickle
_EMPTY = ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")
_LITERALS = ("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1",
             *_EMPTY)  # fmt: skip
MOST_INERT = 10**7  # uses of names without code, times names: torch takes as many steps
MOST_ODD = 10_000  # keys whose hashes could be equal: a dict of these takes quadratic time
LEAST = 1 << 16  # bytes that a smaller pickle is counted as
NESTED = 10_000  # tuples within a tuple, counting repeats: hashing a tuple visits all of them
ZIP64, LOCATOR, END = 56, 20, 22  # bytes of the records at the end of a zip archive
LIST_OF_TEXTS = re.compile(r"\x80\](\(X*e|Xa)*\.")  # opcodes, without those of the memo
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Global:
    """A name of a class or function."""

    name: str


@dataclass(frozen=True)
class _Tuple:
    """A tuple, how many tuples are in it, each as often as it occurs, and its size.

    ``n_odd`` is how many numbers and tuples it holds whose hashes could be equal to others.
    """

    items: tuple[Any, ...]
    weight: int
    size: int
    n_odd: int


@dataclass
class _Box:
    """A list, a dict, a set or an object: its size, and the keys that are strings."""

    kind: str  # the opcode, or the name of what was called
    size: int = 1
    keys: set[str] = field(default_factory=set)
    n_odd: int = 0  # as in a tuple

    def take(self, items: list[Any], has_keys: bool) -> None:
        """Add items; for dicts, keys and values alternate."""
        self.size += sum(map(_size, items))
        self.n_odd += sum(map(_odd, items[::2] if has_keys else items))
        if has_keys:
            self.keys.update(key for key in items[::2] if isinstance(key, str))


@dataclass(frozen=True)
class _Number:
    """A float or a large integer; with ``is_odd``, others have the same hash."""

    is_odd: bool


def _size(value: Any) -> int:
    """The approximate size of a value: characters, items."""
    if isinstance(value, str):
        return 1 + len(value)
    return value.size if isinstance(value, (_Tuple, _Box)) else 1


def _odd(value: Any) -> int:
    """How many numbers and tuples in a value could have equal hashes."""
    if isinstance(value, (_Tuple, _Box)):
        return value.n_odd
    return int(isinstance(value, _Number) and value.is_odd)


def _now(measure: Callable[[Any], int], value: Any) -> int:
    """A measure of a value, with what was added to lists since they became part of a tuple."""
    total, todo = 0, [value]
    while todo:
        part = todo.pop()
        if isinstance(part, _Tuple):
            todo.extend(part.items)
        total += 1 if isinstance(part, _Tuple) else measure(part)
    return total


def is_zip(path: Path) -> bool:
    """Whether torch reads a file as a zip archive: it checks the first bytes, Python the last."""
    with path.open("rb") as file:
        found = file.read(4) == b"PK\3\4"
    if found == zipfile.is_zipfile(path):
        return found
    if found:
        raise ValueError("it begins as a zip archive but does not end as one")
    raise CheckpointError(
        f"{str(path)!r} can't be read: it is a zip archive according to its last bytes, but not "
        f"according to its first ones, so two programs may read different contents. Load it and "
        f"save it again with torch."
    )


def check_pickles(path: Path) -> dict[str, type | None]:
    """Raise an error for a torch file that would fill memory or never finish loading.

    Returns the names that its pickles refer to; dict or list for classes whose objects are filled
    like one, since they are derived from it.
    """
    names: dict[str, type | None] = {}
    if not is_zip(path):
        with path.open("rb") as file:
            for _ in range(4):  # magic number, version, system, the object
                used = _check(file, path, names)
            listed = _keys(file, path) if used else set()
        if lost := sorted(used - listed):
            raise CheckpointError(
                f"{str(path)!r} can't be read: the data of the storage {lost[0]!r} is missing, and "
                f"torch would return uninitialized memory. Load it and save it again with torch."
            )
        return names
    with zipfile.ZipFile(path) as archive:
        if _directory(path) != archive.start_dir:
            raise CheckpointError(
                f"{str(path)!r} can't be read: it is a zip archive whose end record points to a "
                f"wrong position of its directory, so other programs may find other members in it. "
                f"Load it and save it again with torch."
            )
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        # names of members are compared as they are stored, without case: only zipfile uses an extra
        # field with another name
        last = [(m.orig_filename.lower().rpartition("/")[2], m) for m in members]
        found = [m for name, m in last if name == "data.pkl"]
        if packed or archive.comment or len(found) > 1:
            raise CheckpointError(
                f"{str(path)!r} can't be read: it is a zip archive that torch.save does not write: "
                f"{'its members are compressed' if packed else 'it holds more than one pickle'}. "
                f"Load it and save it again with torch."
            )
        orders = [archive.open(m).read(8).decode("latin1") for n, m in last if n == "byteorder"]
        if set(orders) - {sys.byteorder}:  # torch swaps bytes even on 'meta', where there are none
            raise CheckpointError(
                f"{str(path)!r} can't be read: it has the byte order {orders[0]!r}, expected "
                f"{sys.byteorder!r}. Load it with torch and save it as .safetensors."
            )
        for member in found:
            _check(io.BytesIO(archive.read(member)), path, names)
    return names


def is_of_tensors(name: str) -> bool:
    """Whether torch itself allows a name that passed the checks."""
    return name == "collections.OrderedDict" or (name[:6] == "torch." and not _is_inert(name))


def _directory(path: Path) -> int:
    """The start of the directory according to the end of a zip archive, as torch reads it.

    Python's zipfile uses the bytes just before the end instead. -1 if the two disagree.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(-min(size, ZIP64 + LOCATOR + END), io.SEEK_END)
        last = file.read()
    record, locator, end = last[: -LOCATOR - END], last[-LOCATOR - END : -END], last[-END:]
    if end[:4] != b"PK\5\6":
        return -1
    if locator[:4] != b"PK\6\7":
        return int.from_bytes(end[16:20], "little")
    if record[:4] != b"PK\6\6" or int.from_bytes(locator[8:16], "little") != size - len(last):
        return -1
    return int.from_bytes(record[48:56], "little")


def _keys(file: IO[bytes], path: Path) -> set[str]:
    """The keys of the storages that follow: a pickled list of strings."""
    found = list(pickletools.genops(file))
    codes = "".join(op.code for op, _, _ in found if op.code not in "qr")
    if not LIST_OF_TEXTS.fullmatch(codes):
        raise _refused(path, "a list of storages that torch.save does not write")
    return {str(arg) for op, arg, _ in found if op.code == "X"}


def _check(file: IO[bytes], path: Path, names: dict[str, type | None]) -> set[str]:
    """Simulate one pickle with a stack of strings, names and tuples, and None for all else.

    Returns the keys of the storages that it uses, and adds the names that it refers to.
    """
    used: set[str] = set()
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    given = 0  # total size of the arguments of calls, counting repeats from the memo
    stateful: dict[str, CheckpointError] = {}  # inert classes whose states may hide methods
    n_inert = 0  # uses of names that torch looks up in a list of all stand-ins
    for op, arg, where in pickletools.genops(file):
        name = op.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo.get(arg))
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("BINUNICODE", "SHORT_BINSTRING"):
            stack.append(arg)
        elif name in _LITERALS:
            stack.append(_Box(name) if name in _EMPTY else _number(name, arg))
        elif name == "TUPLE":
            items, stack = stack, marks.pop()
            stack.append(_nested(items, path))
        elif name in _TUPLES:
            n = _TUPLES[name]
            stack[-n:] = [_nested(stack[-n:], path)]
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            _check_call(called, arguments, path)
            size = _now(_size, arguments)
            given += size
            n_inert += _is_inert(called.name)
            is_number = called.name.endswith((".complex", ".Size"))  # which may be keys
            stack.append(_Box(called.name, size, n_odd=int(is_number)))
        elif name in ("APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
            _fill(stack[-1], items, name == "SETITEMS", names, path)
        elif name == "APPEND":
            _fill(stack[-2], [stack.pop()], False, names, path)
        elif name == "BUILD":
            state = stack.pop()
            given += _now(_size, state)
            if (hiding := _check_build(stack[-1], state, path)) is not None:
                stateful[stack[-1].kind] = hiding
            n_inert += 1
        elif name == "SETITEM":
            _fill(stack[-3], stack[-2:], True, names, path)
            del stack[-2:]
        elif name == "BINPERSID":
            used.add(_key(stack.pop(), path))
            stack.append(None)
        elif name == "GLOBAL":
            stack.append(_Global(_checked_name(str(arg), path)))
            names.setdefault(stack[-1].name)
            n_inert += _is_inert(stack[-1].name)
        elif name != "PROTO":
            for kind in stateful:
                if names.get(kind) is dict:
                    raise stateful[kind]
            return used if name == "STOP" else set()  # or an opcode that torch rejects
        if given > REUSED * max(where or 0, LEAST):
            raise _refused(path, "calls with the same large arguments again and again")
        if n_inert * len(names) > MOST_INERT:
            raise _refused(path, "very many objects of very many classes")
    return used


def _fill(
    box: Any, items: list[Any], has_keys: bool, names: dict[str, type | None], path: Path
) -> None:
    """Note what is added to a list or a dict, or to an object of a class derived from one."""
    if isinstance(box, _Box):
        box.take(items, has_keys)
        if box.kind in names:
            names[box.kind] = dict if has_keys else list
        if has_keys and box.n_odd > MOST_ODD:
            raise _refused(path, "a dict with very many keys that could have equal hashes")


def _is_inert(name: str) -> bool:
    """Whether torch does not build objects of this name itself."""
    if name.partition(".")[0] == "torch":
        return INERT.fullmatch(name) is not None
    return name.rpartition(".")[2] not in _BUILT  # modules may have other names, as in Python 2


def _check_build(target: Any, state: Any, path: Path) -> CheckpointError | None:
    """Raise an error if the state of anything but an OrderedDict is set, unless it is inert.

    That of a tensor could be other memory. Returns the error for the state of an inert object,
    which does not matter unless an OrderedDict takes its place.
    """
    kind = target.kind if isinstance(target, _Box) else ""
    if kind in ("", *_EMPTY) or not (_is_inert(kind) or kind == "collections.OrderedDict"):
        raise _refused(path, "an object whose state torch.save does not write")
    try:
        if state is target and _is_inert(kind):  # a dict whose items are its attributes
            _refuse_hidden(state.keys, _OF_DICT, path)
        else:
            _check_state(state, _OF_DICT if _is_inert(kind) else _METHODS, path)
    except CheckpointError as error:
        if not _is_inert(kind):
            raise
        return error
    return None


def _check_state(state: Any, methods: frozenset[str], path: Path) -> None:
    """Raise an error for attributes that would hide methods."""
    parts = state.items if isinstance(state, _Tuple) else (state,)
    for part in parts:
        if part is None:
            continue
        if not isinstance(part, _Box) or part.kind != "EMPTY_DICT":  # its keys are not known
            raise _refused(path, "a state that is not a dict")
        _refuse_hidden(part.keys, methods, path)


def _refuse_hidden(keys: set[str], methods: frozenset[str], path: Path) -> None:
    if hidden := sorted(methods.intersection(keys)):
        raise _refused(path, f"an object whose {hidden[0]!r} is replaced")


def _key(storage: Any, path: Path) -> str:
    """The key of a storage, from its tuple ("storage", class, key, ...)."""
    items = storage.items if isinstance(storage, _Tuple) else ()
    if len(items) < 3 or not isinstance(items[2], str):
        raise _refused(path, "more than tensors (a storage without a key)")
    return items[2]


def _number(code: str, value: Any) -> _Number | None:
    """A literal, if its hash matters."""
    if code == "BINFLOAT":
        return _Number(is_odd=False)
    is_long = code == "LONG1" and abs(value) >= 2**32
    return _Number(is_odd=abs(value) >= sys.hash_info.modulus) if is_long else None


def _nested(items: list[Any], path: Path) -> _Tuple:
    """A tuple of these items; raise an error for one that contains itself many times."""
    weight = 1 + sum(item.weight for item in items if isinstance(item, _Tuple))
    if weight > NESTED:
        raise _refused(path, "tuples nested so deeply that reading would not finish")
    # tuples of strings and small integers can't easily be given equal hashes
    n_odd = sum(map(_odd, items)) + any(isinstance(item, _Number) for item in items)
    return _Tuple(tuple(items), weight, 1 + sum(map(_size, items)), n_odd)


def _checked_name(name: str, path: Path) -> str:
    """A module and a name in it; raise an error for names in torch not needed for tensors."""
    module, _, attribute = name.rpartition(" ")
    full = f"{module}.{attribute}"
    is_known = _OF_TORCH.fullmatch(full) is not None
    if attribute == "bytearray" or (attribute.startswith("_rebuild_") and not is_known):
        raise _refused(path, f"more than dense tensors ({full})")
    if "." in attribute:  # torch.save writes names of modules and classes, not of what is in them
        raise _refused(path, f"more than tensors ({full})")
    is_dtype = isinstance(getattr(torch, attribute, None), torch.dtype) and module == "torch"
    is_ours = is_dtype or is_known or INERT.fullmatch(full) is not None
    if module.partition(".")[0] == "torch" and not is_ours:
        raise CheckpointError(
            f"{str(path)!r} can't be read: it holds more than tensors ({full}), and reading it "
            f"could run code. sksoup never unpickles code. Save only the state dict: "
            f"torch.save(module.state_dict(), path)."
        )
    return full


def _check_call(called: Any, arguments: Any, path: Path) -> None:
    """Raise an error for calls of unnamed objects, tensors without data, and encodings."""
    if not isinstance(called, _Global):
        raise _refused(
            path, "more than tensors (a call of something that is not a class or function)"
        )
    kind, items = called.name, arguments.items if isinstance(arguments, _Tuple) else ()
    if kind.startswith("torch.") and kind.endswith(("Tensor", "Storage")):
        # given a size only, they would expose memory of the process
        raise _refused(path, f"tensors without their values (a call of {kind})")
    if kind.endswith("._rebuild_parameter_with_state") and len(items) > 3:
        _check_state(items[3], _METHODS, path)
    if not _is_inert(kind) and _now(_odd, arguments) > MOST_ODD:
        raise _refused(path, "very many numbers or tuples that could have equal hashes")
    if kind.endswith("._rebuild_from_type_v2"):  # it calls its first argument with its third
        inner, given = (items[0], items[2]) if len(items) > 2 else (None, None)
        _check_call(inner, given, path)
        if len(items) > 3:
            _check_state(items[3], _METHODS, path)
    # encodings other than that of saved bytes, such as hex, double the size each time
    is_latin1 = len(items) == 2 and isinstance(items[0], str) and items[1] == "latin1"
    if kind == "_codecs.encode" and not is_latin1:
        raise _refused(path, "an encoding that torch.save does not write")


def _refused(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} can't be read: it holds {found}, which could fill the memory, expose its "
        f"contents, or hang. Save only the state dict: torch.save(module.state_dict(), path)."
    )
