"""Texts to tokens, by the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.hub import HubModule, hub_folder, offline
from ..checkpoints.hub_config import LIMIT
from ..checkpoints.protocol import LONGEST_NAME
from ..checkpoints.sources import paths_of
from ..checkpoints.texts import read_json
from ..exceptions import CheckpointError, SoupWarning
from ..tables import short, shortened

# files without which transformers makes up an empty tokenizer
VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "prophetnet.tokenizer", "tekken.json",
)  # fmt: skip
OF_BYTES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")  # have no vocabulary
TEXTS = ("chat_template", "name_or_path", "_name_or_path")  # fields that transformers keeps as text
MOST_BYTES = 100_000_000  # of a configuration, which may list all added tokens
TOGETHER = 1000  # texts that are tokenized at a time
MOST_TEXTS, MUCH_LONGER = 0.95, 4  # with a longer one, the user is warned
# models whose first position is the number after that of the padding token
OFFSET = re.compile("roberta|camembert|longformer|mpnet|data2vec-text|xmod|ibert|esm")
MOST_TOKENS = 512  # where neither --max-length nor the model says less


def find_tokenizer(collection: CheckpointCollection, given: str | None) -> Path:
    """The folder that was given, else that of the first checkpoint with a tokenizer."""
    for folder in [Path(given)] if given is not None else _folders(collection):
        if any((folder / name).is_file() for name in VOCABULARIES) or _reads_bytes(folder):
            return folder
    looked = repr(given) if given is not None else "the folders of the checkpoints"
    raise CheckpointError(
        f"There is no tokenizer in {looked}: expected one of {', '.join(VOCABULARIES)}. Give the "
        f"folder that tokenizer.save_pretrained wrote: --tokenizer FOLDER."
    )


def _reads_bytes(folder: Path) -> bool:
    """Whether a folder is that of a tokenizer without a vocabulary."""
    path = folder / "tokenizer_config.json"
    found = read_json(path, MOST_BYTES) if path.is_file() else None
    return isinstance(found, dict) and found.get("tokenizer_class") in OF_BYTES


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "--text needs transformers, which is not installed: pip install 'sksoup[hub]'."
        ) from error
    with _errors_of(folder, f"be loaded by transformers {transformers.__version__}"):
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            _refuse_addresses(folder / name, _checked(folder / name, transformers))
        described = _checked(folder / "config.json", transformers)
        with offline():
            config = _plain_config(described, transformers)
            config.name_or_path = str(folder)
            loaded = transformers.AutoTokenizer.from_pretrained(
                str(folder), config=config, local_files_only=True, trust_remote_code=False
            )
            if not isinstance(loaded, transformers.PreTrainedTokenizerBase):
                raise TypeError(f"a {type(loaded).__name__} is no tokenizer")
            return loaded


@contextmanager
def _errors_of(folder: Any, what: str) -> Iterator[None]:
    """Raise all errors as one that names the tokenizer's folder."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any class: that of a panic in tokenizers is no Exception
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"The tokenizer in {str(folder)!r} can't {what}: {type(error).__name__}: "
            f"{shortened(first, 300).rstrip('.')}. Give the folder of another: --tokenizer FOLDER."
        ) from error


def _refuse_addresses(path: Path, found: dict[str, Any]) -> None:
    """Raise an error for a file that a tokenizer could fetch, with tiktoken."""
    for field, value in found.items():
        text = json.dumps(value) if field == "init_inputs" else value  # arguments without names
        if isinstance(text, str) and "://" in text and field not in TEXTS:
            raise CheckpointError(
                f"{str(path)!r} has the address {short(value)} as {short(field)}, from which "
                f"transformers might fetch a file. Remove the field, or give another folder: "
                f"--tokenizer."
            )


def _plain_config(described: dict[str, Any], transformers: Any) -> Any:
    """A config with what AutoTokenizer chooses a class by, and nothing else.

    Other fields of a file, such as ``attribute_map``, could change what it reads there.
    """
    kind = described.get("model_type")
    if kind == "encoder-decoder" and isinstance(described.get("encoder"), dict):
        kind = described["encoder"].get("model_type")  # whose tokenizer is used
    try:
        config = transformers.CONFIG_MAPPING[kind]()
    except Exception:  # unknown, or one that must be told of its parts
        config = transformers.PretrainedConfig()
    for field in ("tokenizer_class", "model_name"):
        if isinstance(described.get(field), str):
            setattr(config, field, described[field])
    return config


def _checked(path: Path, transformers: Any) -> dict[str, Any]:
    """A configuration whose ``tokenizer_class`` is a tokenizer of transformers; {} without a file.

    AutoTokenizer would call its ``from_pretrained``, which may load a model, or ask whether to run
    code.
    """
    found = read_json(path, MOST_BYTES) if path.is_file() else None
    if not isinstance(found, dict):
        return {}
    if "configuration_files" in found:  # transformers would read another one
        raise CheckpointError(
            f"{str(path)!r} names other configurations ('configuration_files'), which transformers "
            f"would read in its place. Remove the field, or give another folder: --tokenizer."
        )
    classes = []
    name = found.get("tokenizer_class")
    if isinstance(name, str) and len(name) <= LONGEST_NAME:
        # transformers looks for a name with "Fast", then without it, again and again
        stems = [name.removesuffix("Fast" * k) for k in range(name.count("Fast") + 1)]
        classes = [
            getattr(transformers, stem + end, None) for stem in stems for end in ("", "Fast")
        ]
    elif name is not None:
        classes = [name]
    for part in (found, found.get("encoder")):  # without a class, it is that of the model
        kind = part.get("model_type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
            of_model = transformers.TOKENIZER_MAPPING.get(transformers.CONFIG_MAPPING[kind], None)
            # version 4 has a slow and a fast one
            classes += of_model if isinstance(of_model, tuple) else [of_model]
            name = name or f"of {kind}"
    if not all(one is None or _is_tokenizer(one, transformers) for one in classes):
        raise CheckpointError(
            f"{str(path)!r} names the tokenizer {name!r}, which is no tokenizer of transformers "
            f"{transformers.__version__}. Give the folder of another: --tokenizer FOLDER."
        )
    return found


def _is_tokenizer(found: Any, transformers: Any) -> bool:
    """Whether a class is one of tokenizers, or tells which package it needs."""
    kinds = (transformers.PreTrainedTokenizerBase,)
    is_tokenizer = isinstance(found, type) and issubclass(found, kinds)
    return is_tokenizer or isinstance(found, transformers.utils.DummyObject)


def set_padding(tokenizer: Any, config: dict[str, Any], module: Any) -> None:
    """Pad with the model's token, on the side that gives all texts the positions they have alone.

    Classifiers of decoders look for this token, which adapters do not store.
    """
    with _errors_of(tokenizer.name_or_path, "pad texts"):
        if tokenizer.pad_token is None:  # of GPT-2 and others; its positions are masked
            known = config.get("pad_token_id")
            is_known = type(known) is int and 0 <= known < len(tokenizer)
            token = tokenizer.convert_ids_to_tokens(known) if is_known else tokenizer.eos_token
            tokenizer.pad_token = token
    if config.get("model_type") != "xlnet":  # which reads the last position
        tokenizer.padding_side = "right"
    if isinstance(module, HubModule):
        module.pad_token_id = tokenizer.pad_token_id


def tokenize(
    tokenizer: Any, texts: Sequence[list[str]], max_length: int | None, config: dict[str, Any]
) -> dict[str, NDArray[Any]]:
    """Inputs of a model: arrays by name, padded to the longest text, cut at ``max_length``.

    ``texts`` is one column, or two of pairs. They are tokenized twice, the first time for their
    lengths, a part at a time, as the lists of a tokenizer take far more memory than arrays.
    """
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, int) and OFFSET.search(str(config.get("model_type"))):
        pad = config.get("pad_token_id")
        positions -= 1 + (pad if isinstance(pad, int) else 1)
    limits = (MOST_TOKENS, tokenizer.model_max_length, positions)
    most = max_length or min(n for n in limits if isinstance(n, int) and n > 0)
    starts = range(0, len(texts[0]), TOGETHER)
    parts = [[column[k : k + TOGETHER] for column in texts] for k in starts]
    with _errors_of(tokenizer.name_or_path, "tokenize the texts"):
        lengths = np.concatenate([
            [len(ids) for ids in tokenizer(*part, truncation=True, max_length=most)["input_ids"]]
            for part in parts
        ])  # fmt: skip
        size = {"truncation": True, "max_length": max(1, int(lengths.max()))}
        rows = [
            tokenizer(*part, padding="max_length", return_tensors="np", **size) for part in parts
        ]
        found = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
        _refuse_unknown(tokenizer, found["input_ids"], config)
    _warn_of_long_ones(lengths)
    return found


def _refuse_unknown(tokenizer: Any, ids: NDArray[Any], config: dict[str, Any]) -> None:
    """Raise an error for tokens that the model does not have."""
    if ids.dtype.kind not in "iu":
        raise TypeError("it has no token for some of the words, nor one for unknown words")
    size = config.get("vocab_size")
    is_known = ids >= 0
    if isinstance(size, int) and config.get("model_type") != "canine":  # which hashes them
        is_known &= ids < size
    if not is_known.all():
        raise CheckpointError(
            f"The tokenizer in {tokenizer.name_or_path!r} is of another model: the texts have the "
            f"token {ids[~is_known][0]}, but the config.json has a vocabulary of {size}. Give the "
            f"folder of the model's own: --tokenizer FOLDER."
        )


def _warn_of_long_ones(lengths: NDArray[Any]) -> None:
    """Warn if a few texts make the padded rows several times as long as most texts are."""
    longest, usual = int(lengths.max()), int(np.quantile(lengths, MOST_TEXTS, method="higher"))
    if longest >= MUCH_LONGER * max(usual, 1):
        warnings.warn(
            f"The longest of {len(lengths)} texts has {longest} tokens, but {MOST_TEXTS:.0%} have "
            f"at most {usual}. All are padded to the longest, and the fit takes time and memory in "
            f"proportion. To cut long texts, give --max-length {usual}.",
            SoupWarning,
            stacklevel=2,
        )


def first_config(collection: CheckpointCollection) -> tuple[dict[str, Any], Path | None]:
    """The config.json of the first checkpoint in a Hugging Face folder, and where it is."""
    for folder in map(hub_folder, _folders(collection)):
        if folder is not None:
            config = folder / "config.json"
            found = read_json(config, LIMIT)
            return found if isinstance(found, dict) else {}, config
    return {}, None


def _folders(collection: CheckpointCollection) -> list[Path]:
    """The folders that the checkpoints lie in, then those of the bases of adapters."""
    paths = paths_of(collection, collection.names)
    return list(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))
