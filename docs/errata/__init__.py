"""Claims about inference engines that sound right, and what refutes them, one module per theme.

`python docs/errata/run.py NAME` prints the numbers of one claim; the page `docs/errata.md` explains them.
"""
