"""Pictures of a run: files or pixels that a caller hands over become fields of a State and names in its request. Leaves
out: reading single files (``media``) and what models make of them (``stages/encode.py``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditkit.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ditkit.media.clip import Clip
    from ditkit.request import Request

FIELDS = ("image", "last_image", "control_video", "control_mask", "reference_images")
CONTROL = ("control_video", "control_mask")
STRIDE = 4  # frames are made in fours, after a first one
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


def read(request: Request, pixels: Mapping[str, Any], told: dict[str, str] | None = None) -> dict[str, Any]:
    """The pictures of ``request`` as arrays, those of files read now: image and last_image uint8 [H, W, 3],
    reference_images a list of such, control_video uint8 [T, H, W, 3], control_mask float32 [T or 1, H, W]. ``told`` is
    given, by field, what was taken otherwise than the file has it. Raises RequestError, StateError."""
    found: dict[str, Any] = {}
    told = {} if told is None else told
    for name in FIELDS:
        value, own = getattr(request, name), pixels.get(name)
        if name == "reference_images" and value:
            if own is not None and len(own) != len(value):
                raise RequestError(f"{len(own)} pictures as {name}", f"the request has {len(value)}", "Give as many")
            found[name] = [*own] if own is not None else [_load(name, path, request, told) for path in value]
        elif value:
            found[name] = _load(name, value, request, told) if own is None else own
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
            do = _advice(count, frames, count if count % STRIDE == 1 else frames)
            raise RequestError(f"{name} of {count} frames", f"the run makes {frames}", do)


def _advice(count: int, frames: int, usable: int, name: str = "it") -> str:
    """What to do with ``count`` frames where ``frames`` are made; a run that makes ``usable`` would take them."""
    cut = f"Cut {name} to what the run makes" if count > frames else ""
    ask = f"ask for {usable} frames" if usable != frames else ""
    return f"{cut}, or {ask}" if cut and ask else cut or ask.capitalize() or f"Give {frames}"


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


def pixels_of(name: str, value: Any, request: Request | None = None) -> Any:
    """What a file, or a picture in memory, given as ``name`` shows: an array, or a list of them. ``request`` says which
    frames of a file are taken."""
    if name == "reference_images" and isinstance(value, list | tuple):
        return [_pixels(name, item, request) for item in value]
    return _pixels(name, value, request)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "__fspath__")


def _name(pixels: np.ndarray) -> str:
    import numpy as np

    found = hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode())
    found.update(np.ascontiguousarray(pixels).data)  # in place: a control video is large
    return IN_MEMORY + found.hexdigest()


def _pixels(name: str, value: Any, request: Request | None = None) -> Any:
    """What was handed over as ``name``, as an array of its kind. Raises RequestError."""
    import numpy as np

    from ditkit.media import as_image

    if _is_path(value):
        return _load(name, str(value), request, {})
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


def _load(name: str, path: str, request: Request | None, told: dict[str, str]) -> np.ndarray:
    from ditkit.media import image_and_remark, is_picture

    if path.startswith(IN_MEMORY):
        raise RequestError(f"{name}={path}", "these pixels came from no file", f"Hand {name} over again")
    if name == "control_video" or (name == "control_mask" and not is_picture(path)):
        frames = _frames(name, path, request, told)
        return frames if name == "control_video" else _levels(frames)
    pixels, remark = image_and_remark(path)
    if remark:
        told[name] = f"{told[name]}; {remark}" if name in told else remark
    return _levels(pixels[None]) if name == "control_mask" else pixels


def _levels(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] -> float32 [T, H, W] from 0 to 1, frame by frame: the mean is made in float64."""
    import numpy as np

    mask = np.empty(frames.shape[:3], np.float32)
    for index, frame in enumerate(frames):
        mask[index] = frame.mean(-1).astype(np.float32) / 255
    return mask


def _frames(name: str, path: str, request: Request | None, told: dict[str, str]) -> np.ndarray:
    """The frames of a file that the run looks at; whether it has enough of them is known before one is decoded."""
    from ditkit.media import open_clip

    with open_clip(path) as clip:
        if request is None or (name == "control_mask" and clip.count == 1):  # one frame serves for all
            return clip.take(clip.count)[0]
        frames, timing, file = request.frames, request.control_timing, os.path.basename(path)
        by_time = timing == "time" or (timing == "auto" and clip.count != frames)
        fps = request.fps if by_time else None
        given = clip.lasts(fps)
        if not 0 <= given - frames < STRIDE:  # fewer than that no longer run could use
            advice = _advice(given, frames, given - (given - 1) % STRIDE, file)
            do = f"At {fps} a second {file} gives {given}: {advice[0].lower()}{advice[1:]}"
            do = advice if given == clip.count else do
            raise RequestError(f"{name} of {clip.count} frames", f"the run makes {frames}", do)
        pixels, taken = clip.take(frames, fps)
        if remark := _remark(clip, taken, request):
            told[name] = f"{file} {remark}"
        return pixels


def _remark(clip: Clip, taken: list[int], request: Request) -> str:
    """What is to be said of frames that do not play as their file does."""
    if taken == [*range(len(taken))] and len(taken) < clip.count <= len(taken) + STRIDE:
        return f"has {clip.count} frames: the last {clip.count - len(taken)} are left aside"
    if taken != [*range(clip.count)]:
        some = ", ".join(map(str, taken[:6])) + (", ..." if len(taken) > 6 else "")
        has = f"has {clip.count} frames" + (f", {clip.rate:.4g} a second" if clip.rate else "")
        return f"{has}: taken are those on screen at {request.fps} a second ({some})"
    if clip.rate and abs(clip.rate - request.fps) > 0.01 * request.fps:
        how = "slower" if clip.rate > request.fps else "faster"
        return f"has {clip.rate:.4g} frames a second, and all are taken one by one: they play {how}, at {request.fps}"
    return ""
