"""Folders that appear whole or not at all, and components written in the layout of diffusers from tensors in memory.

Leaves out: what is in them (convert.py), and large files (``files/writing.py``).
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.checkpoints.kinds.configs import of_class
from ditkit.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def appearing(dst: Path) -> Iterator[Path]:
    """A folder beside ``dst`` that takes its name and its place when the block ends well, and vanishes otherwise."""
    folder = dst.with_name(f".ditkit-{secrets.token_hex(6)}.part")
    old = dst.with_name(f".ditkit-{secrets.token_hex(6)}.old")
    try:
        folder.mkdir(parents=True)
        yield folder
        if dst.exists():
            os.rename(dst, old)
        try:
            os.rename(folder, dst)
        except BaseException:  # Ctrl-C too: the old one is deleted below
            if old.exists() and not dst.exists():
                os.rename(old, dst)
            raise
    except OSError as error:
        do = "Choose a folder that you can write to and that has room"
        raise OutputError(f"writing {dst}", (error.strerror or str(error)).lower(), do) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def write_component(
    folder: str | Path, config: Mapping[str, Any] | None, tensors: "Mapping[str, Tensor] | None" = None,
    config_name: str = "config.json", weights_name: str = "diffusion_pytorch_model.safetensors",
    files: Sequence[str | Path] = (),
) -> None:  # fmt: skip
    """Write one component: its config, its ``tensors`` (already under the names of the layout) and copies of ``files``.

    For a text encoder ``weights_name`` is ``model.safetensors``. The folder appears complete or not at all; one that is
    there already is never touched. Raises OutputError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if (folder := Path(folder)).exists():
        raise OutputError(f"writing {folder}", "it exists already", "Choose another folder, or remove it first")
    with appearing(folder) as temporary:
        for file in files:
            shutil.copy(file, temporary)
        if tensors is not None:
            plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            try:
                save_file(plain, temporary / weights_name, {"format": "pt"})
            except SafetensorError as error:  # a full disk, told in the library's own way
                raise OutputError(f"writing {folder}", str(error), "Check the disk and its free space") from None
        if config is not None:
            write_json(temporary / config_name, config)


def write_index(
    folder: str | Path, components: Mapping[str, tuple[str, str]], pipeline: str = "WanPipeline",
    values: Mapping[str, Any] = {},
) -> None:  # fmt: skip
    """Write ``model_index.json`` for components that are there: name -> (library, class). Write it last.

    Raises OutputError when a component's folder is not there."""
    folder = Path(folder)
    if absent := sorted(name for name in components if not (folder / name).is_dir()):
        raise OutputError(f"writing {folder}/model_index.json", f"there is no {', '.join(absent)}", "Write these first")
    temporary = folder / "model_index.json.tmp"
    write_json(temporary, {**of_class(pipeline), **values, **components})
    os.replace(temporary, folder / "model_index.json")
