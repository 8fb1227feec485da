"""Recipes as JSON documents, all of whose fields are checked on reading."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, fields
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..exceptions import RecipeError
from ..tables import short
from .ingredients import Base, Ingredient
from .layers import is_statistic
from .mix import as_dtype, check_coef

FORMAT_VERSION = 2  # version 1 had no digest, and coefficients were always lists
MOST_BYTES = 100_000_000  # of the header of a .safetensors file, and of a .json file
LISTED = 4096  # coefficients written as numbers; more are written as the bytes of float64
DEPTH = 20  # maximum nesting of lists and mappings in ``params``
SHA256 = re.compile("[0-9a-f]{64}")
WRONG = (KeyError, TypeError, ValueError, OverflowError)  # errors raised while reading a field


def write_document(recipe: Any) -> str:
    """A recipe as JSON text, with the SHA-256 of all its fields."""
    document = {"format_version": FORMAT_VERSION} | {
        field.name: getattr(recipe, field.name) for field in fields(recipe)
    }
    document["ingredients"] = [asdict(one) for one in recipe.ingredients]
    document["coef"] = _packed(recipe.coef)
    document["base"] = None if recipe.base is None else asdict(recipe.base)
    try:
        read_back = json.loads(json.dumps(document, allow_nan=False))
        digest = _digest(read_back)
        _fields(read_back)
    except WRONG as error:
        raise RecipeError(f"The recipe can't be written: {_wrong(error)}") from error
    text = json.dumps({**read_back, "sha256": digest}, indent=1)
    _check_size(len(text), "as text")
    return text


def check_header(text: str, names: Iterable[str]) -> None:
    """Raise an error if a document is too large for the header of a .safetensors file."""
    entry = len('"":{"dtype":"F8_E4M3","shape":[],"data_offsets":[,]},') + 8 * 20  # 8 numbers
    tensors = sum(len(json.dumps(name)) + entry for name in names)
    _check_size(len(json.dumps(text)) + tensors, "with the names of the tensors")


def _check_size(n_bytes: int, how: str) -> None:
    if n_bytes > MOST_BYTES:
        raise RecipeError(
            f"The recipe can't be written: it takes {n_bytes / 1e6:,.0f} MB {how}, but the header "
            f"of a .safetensors file is limited to {MOST_BYTES / 1e6:,.0f} MB. Fit with fewer "
            f"layers (layerwise= accepts a function that groups them) or fewer checkpoints; "
            f"soup.state_dict() returns the weights, and soup.coef_ has the coefficients."
        )


def read_document(text: str, source: str) -> dict[str, Any]:
    """The checked fields of a recipe from its JSON text; raise RecipeError if it is invalid."""
    document, digest = _parsed(text, source)
    version = document["format_version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise RecipeError(
            f"{source} has recipe format {short(version)}, expected 1 to {FORMAT_VERSION}. If it "
            f"was written by a newer version of sksoup, read it with that version."
        )
    try:
        found = _fields(document)
        recorded = document.get("sha256") if version == 1 else document["sha256"]
    except WRONG as error:
        raise RecipeError(f"{source} is not a complete sksoup recipe: {_wrong(error)}") from error
    if recorded != (None if "sha256" not in document else digest):
        raise RecipeError(
            f"{source} was changed after it was written: its SHA-256 is {digest[:12]}..., expected "
            f"{short(recorded)} as in its 'sha256'. Get the original. If the change was intended, "
            f"remove 'sha256' and set 'format_version' to 1."
        )
    return found


def _parsed(text: str, source: str) -> tuple[dict[str, Any], str]:
    """The document and its digest, after checking numbers, duplicate names and UTF-8."""
    try:
        document = json.loads(text, parse_constant=_refused, object_pairs_hook=_mapping)
        document["format_version"]
        digest = _digest({name: value for name, value in document.items() if name != "sha256"})
    except RecursionError as error:
        raise RecipeError(f"{source} is not a sksoup recipe: it is nested too deeply.") from error
    except (*WRONG, AttributeError) as error:
        raise RecipeError(f"{source} is not a sksoup recipe: {_wrong(error)}") from error
    return document, digest


def _wrong(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}."
    if isinstance(error, UnicodeEncodeError):  # its message contains the whole document
        near = error.object[max(0, error.start - 40) : error.end]
        return (
            f"{near!r} has an unpaired surrogate, which is not valid text. If it is a file name, "
            f"rename the file, or open the collection with names=."
        )
    return str(error)


def _refused(constant: str) -> None:
    raise ValueError(f"it holds {constant}, expected finite numbers")


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it has {short(counts.most_common(1)[0][0])} twice")
    return found


def _digest(document: dict[str, Any]) -> str:
    """SHA-256 of canonical JSON; raise ValueError for infinity and unpaired surrogates."""
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _fields(document: dict[str, Any]) -> dict[str, Any]:
    """The fields by name; raise KeyError, ValueError, TypeError or OverflowError if invalid."""
    layer_names = _texts(document["layer_names"], "layer_names")
    ingredients = tuple(map(_ingredient, _list(document["ingredients"], "ingredients")))
    if len({one.name for one in ingredients}) < len(ingredients):
        raise ValueError("two ingredients have the same name.")
    shape = len(layer_names), len(ingredients)
    layers = _layers(document["layers"], len(layer_names))
    scores = _dict(document.get("scores", {}), "scores")
    versions = _dict(document.get("versions", {}), "versions")
    params = _dict(document.get("params", {}), "params")
    _check_depth(params, DEPTH)
    digest = document.get("weights_sha256")
    return {
        "method": _text(document["method"], "method"),
        "ingredients": ingredients,
        "coef": _coef(document["coef"], shape),
        "layers": layers,
        "layer_names": layer_names,
        "params": params,
        "scores": {
            name: _number(score, f"scores[{short(name)}]") for name, score in scores.items()
        },
        "temperature": _positive(document.get("temperature", 1.0), "temperature"),
        "recalibrated": _statistics(document.get("recalibrated", []), layers),
        "versions": {name: _text(v, f"versions[{short(name)}]") for name, v in versions.items()},
        "classes": _labels(document.get("classes", [])),
        "held_out": _held_out(document.get("held_out")),
        "base": _base(document.get("base")),
        "dtype": _dtype(document.get("dtype")),
        "weights_sha256": None if digest is None else _sha256(digest, "weights_sha256"),
    }


def _ingredient(value: Any) -> Ingredient:
    one = _dict(value, "an ingredient")
    name = _text(one["name"], "the name of an ingredient")
    optional = {
        field: _text(one[field], f"the {field} of {short(name)}")
        for field in ("file", "key", "prefix")
        if one.get(field) is not None
    }
    return Ingredient(name, _sha256(one["sha256"], f"the sha256 of {short(name)}"), **optional)


def _base(value: Any) -> Base | None:
    if value is None:
        return None
    base = _dict(value, "base")
    return Base(_sha256(base["sha256"], "the sha256 of base"), _texts(base["without"], "base"))


def _dtype(value: Any) -> str | None:
    if value is not None:
        as_dtype(_text(value, "dtype"))
    return value  # type: ignore[no-any-return]


def _layers(value: Any, n_layers: int) -> dict[str, int]:
    layers = _dict(value, "layers")
    for name, row in layers.items():
        if type(row) is not int or not 0 <= row < n_layers:
            raise ValueError(
                f"layers[{short(name)}] is {short(row)}, expected a row of coef in [0, {n_layers})."
            )
    return layers


def _statistics(value: Any, layers: Collection[str]) -> tuple[str, ...]:
    names = _texts(value, "recalibrated")
    for name in names:
        if name not in layers or not is_statistic(name):
            raise ValueError(
                f"recalibrated lists {short(name)}, expected BatchNorm statistics that are in "
                f"layers; only those are re-estimated from data."
            )
    return names


def _labels(value: Any) -> tuple[Any, ...]:
    for label in (labels := _list(value, "classes")):
        if not isinstance(label, (bool, int, float, str)):
            raise ValueError(f"classes holds {short(label)}, expected strings and numbers.")
    return tuple(labels)


def _packed(coef: NDArray[np.float64]) -> Any:
    """Coefficients as lists of numbers, or if they are many as bytes in Base64."""
    if coef.size <= LISTED:
        return coef.tolist()
    data = np.ascontiguousarray(coef, dtype="<f8").tobytes()
    return {"shape": list(coef.shape), "float64": base64.b64encode(data).decode()}


def _coef(value: Any, shape: tuple[int, int]) -> NDArray[np.float64]:
    """The coefficients from either form, with the expected shape."""
    if isinstance(value, dict):
        data = base64.b64decode(_text(value["float64"], "coef['float64']"), validate=True)
        if value["shape"] != list(shape) or len(data) != 8 * shape[0] * shape[1]:
            raise ValueError(
                f"coef has shape {short(value['shape'])} and {len(data)} bytes for {shape[0]} "
                f"layers and {shape[1]} ingredients, expected {8 * shape[0] * shape[1]} bytes."
            )
        coef = np.frombuffer(data, dtype="<f8").reshape(shape).astype(np.float64)
    else:
        rows = [_list(row, "a row of coef") for row in _list(value, "coef")]
        for c in chain.from_iterable(rows):
            if not _is_number(c):
                raise ValueError(f"coef holds {short(c)}, expected numbers.")
        coef = np.array(rows, dtype=np.float64)
    check_coef(coef, shape[1])
    if len(coef) != shape[0]:
        raise ValueError(f"coef has shape {coef.shape} for {shape[0]} layers.")
    return coef


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, what: str) -> Any:
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"{what} is {short(value)}, expected a finite number.")
    return value


def _positive(value: Any, what: str) -> float:
    if _number(value, what) <= 0:
        raise ValueError(f"{what} is {short(value)}, expected a number above 0.")
    return float(value)


def _held_out(value: Any) -> tuple[float, int] | None:
    if value is None:
        return None
    score, n = _list(value, "held_out")
    if type(n) is not int or n < 1:
        raise ValueError(f"held_out has {short(n)} rows, expected a number above 0.")
    return float(_number(score, "held_out")), n


def _sha256(value: Any, what: str) -> str:
    if not SHA256.fullmatch(_text(value, what)):
        raise ValueError(f"{what} is {short(value)}, expected 64 hexadecimal digits.")
    return str(value)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {short(value)}, expected a string.")
    return value


def _texts(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_text(one, f"an entry of {what}") for one in _list(value, what))


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is {short(value)}, expected a list.")
    return value


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {short(value)}, expected a mapping.")
    return value


def _check_depth(value: Any, levels: int) -> None:
    if isinstance(value, (dict, list)):
        if not levels:
            raise ValueError(f"params is nested deeper than {DEPTH} levels.")
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, levels - 1)
