"""Checkpoints that were made to do harm, each beside a valid twin that loads.

`corpus.CASES` has them all; `corpus.run_all` loads them in a process with little memory, and says
what came of each.
"""
