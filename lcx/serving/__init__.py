"""The machinery behind `python -m lcx.serve`: requests and their answers, and the server that carries them."""
