"""Build the architecture described by the config.json of a Hugging Face folder."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..exceptions import CheckpointError
from ..tables import shortened
from .growth import bounded_growth, bounded_work
from .hub_config import prepare_fields, read_config
from .sources import open_checkpoint

# PEFT's name of a task -> transformers' class for it
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def hub_folder(path: Path) -> Path | None:
    """Return the Hugging Face folder that a checkpoint's path is or is in."""
    folder = path if path.is_dir() else path.parent
    return folder.absolute() if (folder / "config.json").is_file() else None


class HubModule:
    """A factory that builds the architecture in a folder's config.json offline with transformers.

    The module may not be larger than the weights at ``path``, which are in the folder. With a PEFT
    ``task`` it is transformers' model for that task, which may have a head that the folder lacks.
    ``pad_token_id`` is set for texts by the tokenizer's, which adapters do not store.
    """

    def __init__(
        self,
        folder: Path,
        path: Path | None = None,
        key: str | None = None,
        task: str | None = None,
        n_labels: int | None = None,
    ) -> None:
        self.folder = folder
        self.path = folder if path is None else path
        self.key = key
        self.task = task
        self.n_labels = n_labels
        self.pad_token_id: int | None = None
        self._refused: tuple[str, str] | None = None  # a config, and why

    def __repr__(self) -> str:
        return f"HubModule({str(self.folder)!r})"

    def __call__(self) -> nn.Module:
        try:
            import transformers
        except ImportError as error:
            raise ImportError(
                f"transformers is needed to build the architecture in {str(self.folder)!r}, but it "
                f"is not installed. Run pip install 'sksoup[hub]', or pass module=build_model."
            ) from error
        path = self.folder / "config.json"
        header = open_checkpoint(self.path, self.key).header
        described = read_config(path, header)
        as_read = repr(described)
        if self._refused is not None and self._refused[0] == as_read:  # may have taken a minute
            raise CheckpointError(self._refused[1])
        try:
            with offline():
                if self.n_labels is not None:
                    described["num_labels"] = self.n_labels
                    described.pop("id2label", None), described.pop("label2id", None)
                prepare_fields(described, transformers, path)
                self._set_padding(described)
                if self.task is None:
                    build_from = find_class(described.get("architectures"), path)
                else:
                    build_from = getattr(transformers, AUTO_CLASSES[self.task]).from_config
                kind = described.get("model_type")
                if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
                    raise CheckpointError(
                        f"{str(path)!r} has the model type {kind!r}, which transformers "
                        f"{transformers.__version__} does not have. Pass module=build_model."
                    )

                def build() -> nn.Module:
                    config = transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(described))
                    config.name_or_path = str(self.folder)
                    module: nn.Module = build_from(config)
                    return module

                # first on 'meta', where nothing is allocated, to check the size
                with (
                    bounded_work(len(header), path),
                    bounded_growth(header, path),
                    torch.device("meta"),
                ):
                    build()
                return build()
        except CheckpointError as error:
            self._refused = as_read, str(error)
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise CheckpointError(
                f"{str(path)!r} can't be built by transformers {transformers.__version__}: "
                f"{type(error).__name__}: {shortened(lines[0], 300).rstrip('.')}. Correct the "
                f"file, or pass module=build_model."
            ) from error

    def _set_padding(self, described: dict[str, Any]) -> None:
        """Classifiers of decoders, which read a text at its last token, as Trainer sets them up."""
        size = described.get("vocab_size")
        if self.pad_token_id is None or (isinstance(size, int) and self.pad_token_id >= size):
            return
        names = described.get("architectures")
        is_whole = isinstance(names, list) and "ForSequenceClassification" in str(names[:1])
        if self.task == "SEQ_CLS" or (is_whole and described.get("pad_token_id") is None):
            described["pad_token_id"] = self.pad_token_id


def find_class(names: Any, path: Path) -> Any:
    """The model class named in a config, which must be a model of transformers."""
    import transformers

    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if (
        not isinstance(found, type)
        or not issubclass(found, transformers.PreTrainedModel)
        or not found.__module__.startswith("transformers.")
    ):
        raise CheckpointError(
            f"{str(path)!r} has the architecture {name!r}, which is not a model of transformers "
            f"{transformers.__version__}. Pass module=build_model."
        )
    return found


_switching = threading.RLock()


@contextmanager
def offline() -> Iterator[None]:
    """Temporarily disable all requests of huggingface_hub, whatever a config contains.

    And the question of transformers whether to run code, which a loop's input could answer, and its
    log, in which texts of a config could control the terminal: errors are raised, too.
    """
    from huggingface_hub import constants
    from transformers import dynamic_module_utils as questions
    from transformers.utils.logging import get_verbosity, set_verbosity

    with _switching:  # the switches are shared by all threads
        before = constants.HF_HUB_OFFLINE, questions.TIME_OUT_REMOTE_CODE
        verbosity = get_verbosity()
        constants.HF_HUB_OFFLINE, questions.TIME_OUT_REMOTE_CODE = True, 0
        set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            set_verbosity(verbosity)
            constants.HF_HUB_OFFLINE, questions.TIME_OUT_REMOTE_CODE = before
