"""What is kept on disk between runs: results of stages, and hashes of files. Leaves out: runs themselves (``runs``)."""
