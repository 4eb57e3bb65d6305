"""Finished frames: to bytes, into files, and back.

A clip is uint8 [T, H, W, 3] RGB everywhere in this room. The suffix of a path names its format (see ``write.py``);
every file carries a card with the caller's manifest (``card.py``); files appear whole or not at all (``files.py``).
Leaves out: decoding latents, and what belongs into a manifest."""

from .pixels import as_image, frames_sha256, read_image, to_uint8
from .read import read_manifest, read_video
from .sheet import contact_sheet, preview_blocks
from .write import check_writable, write_video

__all__ = [
    "as_image", "check_writable", "contact_sheet", "frames_sha256", "preview_blocks", "read_image", "read_manifest",
    "read_video", "to_uint8", "write_video",
]  # fmt: skip
