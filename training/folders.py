"""A folder in the layout of diffusers, written from tensors in memory. Tests and benchmarks make theirs so, too."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ditkit.checkpoints.convert.folders import appearing, write_json
from ditkit.checkpoints.kinds.configs import of_class
from ditkit.errors import OutputError


def write_component(
    folder: str | Path, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor] | None = None,
    config_name: str = "config.json", weights_name: str = "diffusion_pytorch_model.safetensors",
    files: Sequence[str | Path] = (),
) -> None:  # fmt: skip
    """Write one component: its config, its ``tensors`` (already under the names of the layout) and copies of ``files``.

    For a text encoder ``weights_name`` is ``model.safetensors``. The folder appears complete or not at all; one that is
    there already is never touched. Raises OutputError."""
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
