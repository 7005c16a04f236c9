"""The adapter for lm-evaluation-harness (`lm_eval`): log-likelihoods and continuations of an lcx checkpoint.

Tokenization, truncation and windows are those of lm_eval's own `hf` model, so that both give the same scores on the
same Hugging Face folder. Requests are batched by length.
"""

import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lcx import hub, terminal
from lcx.config import setup_jax
from lcx.config.flags import hint
from lcx.convert.api import load
from lcx.data import check_vocabulary
from lcx.errors import UserError, first_line
from lcx.evals.support import answers, forced, scoring
from lcx.evals.support.progress import progress

NAME = "lcx"


def run(argv: Sequence[str]) -> None:
    """lm_eval's own command, which then knows the model `lcx`.

    Raises:
      UserError: lm_eval is not installed, or refuses the arguments.
    """
    setup_jax()
    model_class()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *argv]
    try:
        cli_evaluate()
    except ValueError as error:
        if isinstance(error, UserError) or not _refused_by_lm_eval(error):
            raise
        raise UserError(f"lm_eval refuses this: {first_line(error)}") from error


def _refused_by_lm_eval(error: BaseException) -> bool:
    """Whether lm_eval itself has raised the exception: an unknown task or model, a flag that does not fit."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and at.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "lm_eval"


@functools.cache
def model_class() -> type:
    """The class that lm_eval knows as `lcx` from then on; made here, because it inherits from a class of lm_eval.

    Raises:
      UserError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not there ({error}): pip install 'lcx[eval]' to run its tasks"
        ) from None

    class Harness(_Requests, TemplateLM):
        """`_Requests` with what lm_eval's own class adds to it."""

        def __init__(self, **arguments: Any):
            TemplateLM.__init__(self)
            _check_names(arguments)
            _Requests.__init__(self, **arguments)

    return register_model(NAME)(Harness)


def _check_names(arguments: Mapping[str, Any]) -> None:
    """Raises UserError for an argument of the model that there is not."""
    known = [name for name in inspect.signature(_Requests).parameters if name not in ("device", "max_batch_size")]
    for name in arguments:
        if name not in inspect.signature(_Requests).parameters:
            close = hint(name, known) or f"; expected some of {', '.join(known)}"
            raise UserError(f"--model_args has {name!r}, which is unknown{close}")


class _Requests:
    """What lm_eval asks of a model.

    Args:
      checkpoint: as in lcx.load; `pretrained` is another name for it.
      context_length, dtype, adapter: as in lcx.load.
      max_length: the longest row; None: the model's window.
      tokens_per_batch: of a forward pass.
      add_bos_token: whether BOS precedes a text; None: as the tokenizer does.
      max_gen_toks: tokens of a continuation where a task does not say.
      batch_size, max_batch_size, device: given by lm_eval; a batch is limited by its tokens instead.
    """

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        pretrained: str | None = None,
        context_length: int | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
        adapter: str | None = None,
        tokens_per_batch: int = scoring.TOKENS_PER_BATCH,
        add_bos_token: bool | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        path = checkpoint or pretrained
        if path is None:
            raise UserError("no checkpoint is given: set --model_args checkpoint=PATH")
        place = hub.local(str(path))
        self.tokenizer = terminal.tokenizer_of(place)
        self._model, self._params = load(
            place,
            dtype=dtype,
            context_length=context_length,
            adapter=None if adapter is None else (adapter,),
        )
        check_vocabulary(self.tokenizer, self._model.vocab_size)
        self.max_length = int(max_length or self._model.max_position_embeddings)
        self.max_gen_toks, self._tokens = int(max_gen_toks), int(tokens_per_batch)
        self._add_bos, self._batch = add_bos_token, int(batch_size) if str(batch_size).isdecimal() else 16

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        found = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        if found is None:
            raise UserError(
                "the tokenizer has neither BOS nor EOS, and this task scores texts without a context"
            )
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        asked = self._add_bos if add_special_tokens is None else add_special_tokens
        bos = None if self.tokenizer.bos_id is None else self.tokenizer.decode([self.tokenizer.bos_id])
        if add_special_tokens is None and bos and string.startswith(bos):
            asked = False
        return self.tokenizer.encode(string, add_special_tokens=asked is not False).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy continuation) of each continuation after its context."""
        rows, places = [], []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens is longer than max_length,"
                    f" {self.max_length}: raise max_length"
                )
            row = [*context, *continuation][-(self.max_length + 1) :]
            rows.append(row)
            places.append(list(range(len(row) - len(continuation), len(row))))
        with progress(None if disable_tqdm else "lm_eval", sum(map(len, rows)), "tokens") as bar:
            return forced.log_likelihoods(
                self._model, self._params, rows, places, tokens_per_batch=self._tokens, bar=bar
            )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows that do not overlap, as lm_eval defines them."""
        from lm_eval import utils

        windows, owner = [], []
        for number, request in enumerate(requests):
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, found):
                windows.append((None, *window))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            asked = dict(request.args[1])
            sampled = asked.get("do_sample", asked.get("temperature", 0.0) > 0)
            temperature = float(asked.get("temperature", 1.0)) if sampled else 0.0
            new = int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or self.max_gen_toks)
            groups.setdefault((new, temperature, float(asked.get("top_p", 1.0))), []).append(i)
        out = [""] * len(requests)
        for (new, temperature, top_p), members in groups.items():
            room = self.max_length - new
            if room < 1:
                raise UserError(
                    f"max_gen_toks {new} leaves no room for a prompt in max_length {self.max_length}:"
                    " lower max_gen_toks, or raise max_length"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            texts = answers.continuations(
                self._model,
                self._params,
                self.tokenizer,
                prompts,
                max_new_tokens=new,
                batch_size=self._batch,
                tokens_per_batch=self._tokens,
                temperature=temperature,
                top_p=top_p,
            )
            for i, text in zip(members, texts, strict=True):
                out[i] = _until(text, requests[i].args[1].get("until"))
        return out


def _until(text: str, stops: Any) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop:
            text = text.partition(stop)[0]
    return text
