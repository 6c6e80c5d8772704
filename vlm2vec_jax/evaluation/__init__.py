# SPDX-License-Identifier: Apache-2.0
"""Scoring a model on MMEB's 36 datasets, or on subsets of the same layout.

`mmeb` is the benchmark as a table, `scoring` decides on the device which rows are right, `store`
keeps embeddings and results with fingerprints, `embedding` embeds each distinct input once, `run`
is the evaluation itself, `tables` makes averages and tables, and `report` with `html` and `charts`
draws all of it as one offline page.
"""
