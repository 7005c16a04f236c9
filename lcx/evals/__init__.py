"""Evaluations: one file per task, each with one frozen dataclass.

    loss_by_position     mean loss at each position in the context: up to which length does the model work?
    perplexity           of whole documents, with a sliding (Press et al.) or non-overlapping window
    long_ppl             perplexity of the tokens whose prediction needs the long context
    passkey              retrieval of a number that was given k tokens earlier, and the largest k that works
    needle_grid          numbers hidden in a text, by length and depth
    published_needle     the needle test of the 2Mamba paper
    key_value            the value of one of many keys, by length and position
    recall               associative recall in tokens, for tiny models
    ruler                the 13 tasks of RULER by length, and the effective length
    long_documents       questions about long documents, and summaries
    cost                 speed, memory and state by length
    sequence_likelihood  log p of every record of a FASTA file
    variant_effects      log p of a sequence with a variant minus that of the reference

An evaluation may have a method `finding(results) -> str`: a clause for the first sentence of a report, that says what
the results of one or more models, {label: result}, show, with their uncertainty (`evals.support.words`).

Your own evaluation is a frozen dataclass in any package that implements `Evaluation`; name it in a .gin file:

    evaluator.evaluate.evals = (@loss_by_position.LossByPosition(), @my_package.MyTask())

It may have a method `check()`, which is called before the model is loaded and raises UserError for settings that cannot
work, such as a file that does not exist; and a method `check_model(model, tokenizer)`, which is called before the
weights are read, for what cannot work with this window, this vocabulary or this tokenizer.

An evaluation that reads text has a field `dataset`. If that is None, the evaluator sets it to the data that the
checkpoint was trained on.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from lcx.data import Tokenizer
from lcx.model import Decoder

Result = dict[str, Any]


class Evaluation(Protocol):
    """The interface of an evaluation: a frozen dataclass whose fields are its settings, with these three members."""

    @property
    def name(self) -> str:
        """Key in results.json and file name of the plot. Must be unique among the evaluations of a run."""

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        """Runs the evaluation.

        Args:
          model, params: from the checkpoint; params may be sharded over a mesh.
          tokenizer: the checkpoint's tokenizer, or None if it has none.

        Returns:
          A dict that can be written as JSON. In addition to the numbers of the task it contains
            "definition": what the numbers mean, precisely enough to compute them again,
            "summary": one line for the terminal,
            "table": {column: number or text}, this model's row in the report,
            "model": `model_facts.facts(model)`, by which plots distinguish models.
          It may contain "notes": sentences for the terminal and the report, such as what limited the evaluation.
        """

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        """Draws the results of one or more models, {label: result}, on matplotlib axes."""
