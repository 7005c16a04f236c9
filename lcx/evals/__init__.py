"""Evaluations: one file a task, one frozen dataclass a file.

    loss_by_position  mean loss at each distance from the beginning of the context: where is the wall?
    perplexity        sliding window (Press et al.) or non-overlapping, token-weighted
    passkey           is a number found again k tokens later, and up to which k?
    sequence_likelihood  log p of every record of a FASTA file
    variant_effects   log p of a sequence with a variant against that without

Your own is a frozen dataclass in any package that fulfils `Evaluation`; name it in a .gin file:

    evaluator.evaluate.evals = (@loss_by_position.LossByPosition(), @my_package.MyTask())

An evaluation that reads text has a field `dataset`. Where that is None, the evaluator sets it to what the checkpoint
was trained on.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from lcx.data import Tokenizer
from lcx.model import Decoder

Result = dict[str, Any]


class Evaluation(Protocol):
    """The whole contract: a frozen dataclass (its fields are the settings) with a name, a call and a plot."""

    @property
    def name(self) -> str:
        """Key in results.json and name of the plot's file; two of one kind in a run need different ones."""

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        """Measures. `params` may lie on a mesh; `tokenizer` is the checkpoint's, None where it has none.

        The result is ready for JSON and holds, besides the numbers of the task,
          "definition": what the numbers are, in words that let someone else compute them again,
          "summary": one line for the terminal,
          "table": {column: number or text}, this model's row in the report,
          "model": `model_facts.facts(model)`, by which plots tell models apart.
        """

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        """Draws the results of one or more models, {label: result}, on matplotlib axes."""
