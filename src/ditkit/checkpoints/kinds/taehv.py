"""TAEHV, the tiny VAEs for previews (taew2_1, taew2_2 and its larger decoder).

Source: https://github.com/madebyollin/taehv ``taehv.py``.
"""

from ditkit.checkpoints.kinds.kind import Kind, Layout
from ditkit.checkpoints.kinds.sizes import SizeReader, Sizes, Tensors
from ditkit.checkpoints.kinds.wan_vae import PREVIEW, ports, strides


def taehv_sizes(tensors: Tensors, layout: str = "native") -> Sizes:
    """Fields of ``TAEHVConfig``. Which levels of the decoder double the frames is not told: a file may have more rows
    there than are used, so the official choice stands."""
    read = SizeReader(tensors, layout)
    big = "decoder.0.weight" in tensors
    read.tell("variant", "super" if big else "base", "decoder.0" if big else "decoder.1")
    read.axis("encoder_width", "encoder.0.weight", 0, 4)
    read.side("patch_size", "encoder.0.weight", 4)
    read.axis("z_dim", "encoder.17.weight", 0, 4)
    joins = [read.shape(f"encoder.{n}.conv.weight", 4) for n in (2, 7, 12)]
    read.tell("temporal_downsample", tuple(frames > dim for dim, frames, *_ in joins), "encoder.2, 7 and 12")
    levels = ((0, 1), (4, 4), (11, 4), (18, 4)) if big else ((1, 1), (8, 1), (14, 1), (20, 1))
    widths = tuple(read.shape(f"decoder.{n}.weight", 4)[0] // shuffle for n, shuffle in levels)
    read.tell("decoder_widths", widths, "the decoder's convolutions")
    return read.sizes()


TAEHV = Kind(
    "taehv", "TAEHV", "a TAEHV", ("preview_decoder", "vae"),
    {
        "native": Layout((("encoder.17.weight", "decoder.1.weight", "decoder.3.conv.0.weight"),
                          ("encoder.17.weight", "decoder.0.weight", "decoder.1.conv.3.weight"))),
    },
    taehv_sizes,
    config_class="ditkit.models.taehv:TAEHVConfig", module="ditkit.models.taehv:TAEHV",
    load="ditkit.assembly.loaders:load_taehv", get="Take taew2_1 or taew2_2 of madebyollin/taehv",
    ports=ports, strides=strides, preview=PREVIEW,
)  # fmt: skip
