"""ditkit and diffusers side by side: the same random weights, the same machine, the same run, in turns.

``python -m benchmarks`` (or ``make bench``) takes all figures in about 25 minutes on two quiet cores (six of them
without ``loading``), prints a table and writes outputs/benchmarks/; ``--write`` puts them into BENCHMARKS.md. Leaves
out: the quality of clips.
"""
