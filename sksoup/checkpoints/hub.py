"""Hugging Face folders: the architecture their config.json describes, and the files beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import nn

from ..exceptions import CheckpointError

# what a model folder holds beside its weights: configuration, tokenizer, processor
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
NOT_COMPANIONS = ("*.index.json", "trainer_state.json", "history.json", "*results.json")


def hub_folder(path: Path) -> Path | None:
    """Return the Hugging Face folder that a checkpoint's path is, or lies in."""
    folder = path if path.is_dir() else path.parent
    return folder.absolute() if (folder / "config.json").is_file() else None


class HubModule:
    """A factory for the architecture in a folder's config.json, through transformers, offline."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"HubModule({str(self.folder)!r})"

    def __call__(self) -> nn.Module:
        try:
            import transformers
        except ImportError as error:
            raise ImportError(
                f"The architecture in {str(self.folder)!r} is built by transformers, which is not "
                f"installed: pip install 'sksoup[hub]', or give module=build_model."
            ) from error
        path = self.folder / "config.json"
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            names = described.get("architectures") or []
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{str(path)!r} can't be read: {error}.") from error
        if "auto_map" in described:
            raise CheckpointError(
                f"{str(path)!r} names code of its own ('auto_map'), which sksoup never runs. Give "
                f"the architecture: module=build_model."
            )
        architecture = getattr(transformers, str(names[0]), None) if names else None
        if architecture is None:
            raise CheckpointError(
                f"{str(path)!r} names the architecture {names[0] if names else None!r}, which "
                f"transformers {transformers.__version__} does not have. Give module=build_model."
            )
        config = transformers.AutoConfig.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False
        )
        module: nn.Module = architecture(config)
        return module


def copy_companions(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files from one model folder to another."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and not any(path.match(other) for other in NOT_COMPANIONS):
                shutil.copyfile(path, target / path.name)
