"""lm-evaluation-harness on lcx checkpoints: its own command, with one more model, `lcx`.

    python -m lcx.lm_eval --model lcx --model_args checkpoint=path/to/checkpoint --tasks mmlu --num_fewshot 5

All flags are those of `lm_eval`. `--model_args` takes checkpoint, context_length, max_length, dtype, adapter,
tokens_per_batch, add_bos_token and max_gen_toks. Needs the package lm_eval (extra `eval`).
"""

import importlib.util
import sys

from lcx.errors import UserError


def main(argv=None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    installed = importlib.util.find_spec("lm_eval") is not None
    if {"-h", "--help"} & {*arguments}:
        print(__doc__, flush=True)
        if not installed:
            print("lm_eval is not installed here: pip install 'lcx[eval]', and --help shows its flags as well")
            return 0
    try:
        if not installed:  # before jax is imported
            raise UserError("lm-evaluation-harness is not there: pip install 'lcx[eval]' to run its tasks")
        from lcx import harness

        harness.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
