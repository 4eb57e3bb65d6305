"""Components computed by MLX: the UMT5 text encoder, on Apple silicon or on a Linux CPU."""
