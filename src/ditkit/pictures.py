"""Pictures of a run: files or pixels that a caller hands over become fields of a State and names in its request. Leaves
out: reading single files (``media``) and what models make of them (``stages/encode.py``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditkit.errors import DitkitError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ditkit.request import Request

FIELDS = ("image", "last_image", "control_video", "control_mask", "reference_images")
CONTROL = ("control_video", "control_mask")
IN_MEMORY = "sha256:"  # how a request names pixels that came from no file


def take(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values as a Request has them, pixels that were handed over in memory). A path stays a path; anything else that
    is a picture (PIL, numpy, torch) is named by the hash of its pixels."""
    plain: dict[str, Any] = dict(values)
    pixels: dict[str, Any] = {}
    for name in FIELDS:
        value: Any = values.get(name)
        several = name == "reference_images" and isinstance(value, list | tuple)
        if all(map(_is_path, value if several else [value])):
            plain[name] = [*map(str, value)] if several else str(value)
        elif value is not None:
            pixels[name] = pixels_of(name, value)
            plain[name] = [*map(_name, pixels[name])] if several else _name(pixels[name])
    return plain, pixels


def placed(request: Request) -> Request:
    """``request`` with whole paths, so that a State or a clip finds its pictures from every folder."""

    def whole(path: str) -> str:
        return path if path.startswith(IN_MEMORY) else os.path.abspath(os.path.expanduser(path))

    given = {name: value for name in FIELDS if (value := getattr(request, name))}
    places = {k: [*map(whole, v)] if isinstance(v, list) else whole(v) for k, v in given.items()}
    return request.model_copy(update=places)


def read(request: Request, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures of ``request`` as arrays, those of files read now: image and last_image uint8 [H, W, 3],
    reference_images a list of such, control_video uint8 [T, H, W, 3], control_mask float32 [T or 1, H, W]."""
    found: dict[str, Any] = {}
    for name in FIELDS:
        value, own = getattr(request, name), pixels.get(name)
        if name == "reference_images" and value:
            if own is not None and len(own) != len(value):
                raise RequestError(f"{len(own)} pictures as {name}", f"the request has {len(value)}", "Give as many")
            found[name] = [*own] if own is not None else [_load(name, path) for path in value]
        elif value:
            found[name] = _load(name, value) if own is None else own
    counts = {name: len(found[name]) for name in CONTROL if name in found}
    if counts.get("control_mask") == 1:  # it serves for all frames
        counts["control_mask"] = request.frames
    check_control(counts, request.frames)
    return found


def check_control(counts: Mapping[str, int], frames: int) -> None:
    """``counts``: how many frames the control video and its mask have, where they are given. Raises RequestError."""
    if "control_mask" in counts and "control_video" not in counts:
        asked = "a control mask without a control video"
        raise RequestError(asked, "there is nothing to be kept", "Give control_video as well")
    for name, count in counts.items():
        if count != frames:
            do = f"Cut it, or ask for {count} of them"
            raise RequestError(f"{name} of {count} frames", f"the run makes {frames}", do)


def tensors(pictures: Mapping[str, Any], clips: int, request: Request) -> dict[str, Tensor]:
    """State fields: the same pictures for each of ``clips``; a mask that is one picture, for each frame; references of
    different sizes on white, in the size of the video."""
    import numpy as np
    import torch

    from ditkit.conditioning.images import one_size

    def repeat(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).unsqueeze(0).repeat(clips, *(1,) * array.ndim)

    fields = {name: value for name, value in pictures.items() if name != "reference_images"}
    if "control_mask" in fields and len(fields["control_mask"]) == 1:
        fields["control_mask"] = np.repeat(fields["control_mask"], request.frames, axis=0)
    if references := pictures.get("reference_images"):
        given = [torch.from_numpy(np.ascontiguousarray(picture)) for picture in references]
        together = one_size(given, request.height, request.width, request.image_processing)
        fields["reference_images"] = together.numpy()
    return {name: repeat(value) for name, value in fields.items()}


def pixels_of(name: str, value: Any) -> Any:
    """What a file, or a picture in memory, given as ``name`` shows: an array, or a list of them."""
    if name == "reference_images" and isinstance(value, list | tuple):
        return [_pixels(name, item) for item in value]
    return _pixels(name, value)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "__fspath__")


def _name(pixels: np.ndarray) -> str:
    import numpy as np

    found = hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode())
    found.update(np.ascontiguousarray(pixels).data)  # in place: a control video is large
    return IN_MEMORY + found.hexdigest()


def _pixels(name: str, value: Any) -> Any:
    """What was handed over as ``name``, as an array of its kind. Raises RequestError."""
    import numpy as np

    from ditkit.media import as_image

    if _is_path(value):
        return _load(name, str(value))
    if name not in CONTROL:
        return as_image(value)
    if hasattr(value, "detach"):  # a tensor of any device and kind; so nothing of torch is imported here
        value = (value.detach().float() if value.is_floating_point() else value.detach()).cpu()
    array = np.asarray(value)
    if not array.size:
        raise RequestError(f"{name} of {array.dtype} {list(array.shape)}", "it has no pixels", "Give another one")
    if name == "control_video" and array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3:
        return array
    if name == "control_mask" and array.dtype.kind == "f" and array.ndim == 3:
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise RequestError(name, "it has values outside 0 to 1", "Divide a mask of 8 bits by 255")
        return array.astype(np.float32)
    wanted = "uint8 [T, H, W, 3]" if name == "control_video" else "floats [T, H, W] from 0 to 1"
    raise RequestError(f"{name} of {array.dtype} {list(array.shape)}", "it is of another form", f"Give {wanted}")


def _load(name: str, path: str) -> np.ndarray:
    import numpy as np

    from ditkit.media import read_image, read_video

    if path.startswith(IN_MEMORY):
        raise RequestError(f"{name}={path}", "these pixels came from no file", f"Hand {name} over again")
    if name == "control_video":
        return read_video(path)[0]
    if name != "control_mask":
        return read_image(path)
    try:  # a mask is a picture for all frames, or a video; what the file holds says which
        mask = read_image(path)[None]
    except RequestError as no_picture:
        try:
            mask = read_video(path)[0]
        except DitkitError:
            raise no_picture from None
    return mask.mean(-1).astype(np.float32) / 255
