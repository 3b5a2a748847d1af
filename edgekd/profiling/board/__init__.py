"""What runs on a board: Python 3.8 and its standard library, and whatever runtime is there. Packed into one file by `edgekd.profiling.boards`."""
