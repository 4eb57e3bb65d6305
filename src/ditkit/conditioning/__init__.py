"""Pictures and control videos into the tensors that condition a transformer.

Sizes (``sizes.py``), pixels (``images.py``), the condition of image-to-video and the control input of VACE
(``condition.py``). Pure functions of tensors on the CPU; the VAE comes in as a function. Leaves out: reading files
(``media``), CLIP (``models``), and when what runs (``stages``).
"""
