# SPDX-License-Identifier: Apache-2.0
"""An instruction in front of targets that are text alone: labels, answers, captions.

MMEB's image targets carry an instruction already; its texts stand bare. Several later recipes say
on that side, too, what is asked for (ReMatch measured 65.5 to 67.3 for it on the 36 tasks). The
rule is chosen in training (`data.target_instruction`), recorded in `vlm2vec.json`, and applied by
the evaluator.
"""

from __future__ import annotations

from vlm2vec_jax.evaluation import mmeb as benchmark

BY_TASK = "task"
"""The rule that takes the words of the subset's meta-task; any other rule is the words."""

WORDS = {
    # The form that QQMM-embed's page shows for classification; the others are made like it.
    "classification": "Represent the following answer to an image classification task:",
    "vqa": "Represent the following answer to a question about an image:",
    "retrieval": "Represent the following text to find the image that it belongs to:",
    "grounding": "Represent the following description of an object in an image:",
    benchmark.OTHER: "Represent the following text:",
}
"""Meta-task -> instruction."""


def words_of(rule: str, subset: str) -> str:
    """The instruction that a rule means for a subset; "" for none."""
    if rule != BY_TASK:
        return rule
    return WORDS[benchmark.group_of(subset)[0]]


def instructed(rule: str, subset: str, text: str, image: str) -> str:
    """A target's text under a rule.

    Args:
      rule: "" for none, `task`, or the words themselves.
      subset: which one the target is of.
      text: as the data has it.
      image: its image path; a target with an image stays as it is, and so does an empty text.
    """
    words = words_of(rule, subset) if rule and text.strip() and not image else ""
    return f"{words.rstrip()} {text}" if words else text
