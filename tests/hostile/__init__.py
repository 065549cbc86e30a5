"""Checkpoints that were made to do harm, each beside a valid twin that differs in one thing.

A test file for attackers: `corpus.CASES` has them all, `corpus.run` loads them in a process of
their own, with little memory, and says what came of each.
"""
