"""Finished frames: to bytes, into files, and back.

A clip is uint8 [T, H, W, 3] RGB everywhere in this room. The suffix of a path names its format (see ``write.py``);
every file carries a card with the caller's manifest (``card.py``); files appear whole or not at all (``files.py``).
Leaves out: decoding latents, and what belongs into a manifest."""

from .image import as_image, image_and_remark, read_image
from .pixels import frames_sha256, to_uint8
from .read import is_picture, open_clip, read_manifest, read_video
from .sheet import contact_sheet, preview_blocks
from .write import check_writable, write_video

__all__ = [
    "as_image", "check_writable", "contact_sheet", "frames_sha256", "image_and_remark", "is_picture", "open_clip",
    "preview_blocks", "read_image", "read_manifest", "read_video", "to_uint8", "write_video",
]  # fmt: skip
