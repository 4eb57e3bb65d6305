"""ditkit and diffusers side by side: the same random weights, the same machine, the same run, in turns.

``python -m benchmarks`` (or ``make bench``) takes all figures in about six minutes on two quiet cores, prints a table
and writes outputs/benchmarks/; ``--write`` makes BENCHMARKS.md of it. Leaves out: the quality of clips.
"""
