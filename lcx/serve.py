"""Serve a model over HTTP in the shape of OpenAI's completions: text in, text out.

Examples:
  python -m lcx.serve --checkpoint=path/to/hf_folder
  python -m lcx.serve --checkpoint=/tmp/run --port=8080 --name=mine --context_length=16384
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}'

Answers POST /v1/completions, GET /v1/models and GET /health, one generation at a time, and prints a line for each
request. It is for tests and evaluations on a machine of your own: it has no keys, no queue and no encryption.
"""

import sys

from lcx import config
from lcx.config.common_flags import add_format, add_loading


def main(argv=None) -> int:
    parser = config.parser(__doc__, gin=False, imports=True)
    add_loading(parser)
    add_format(parser)
    parser.add_argument(
        "--host", metavar="NAME", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="default: 8000; 0: one that is free, which is printed"
    )
    parser.add_argument(
        "--name", help="name of the model in requests (default: the last part of --checkpoint)"
    )
    return config.run(parser, "lcx.serving.server:serve", argv)


if __name__ == "__main__":
    sys.exit(main())
