"""Conversion between lcx checkpoints and other checkpoint formats.

api, command, start   lcx.load and lcx.save; python -m lcx.convert; loading the initial model of a training run
formats               the table of formats
core                  the contract of a format, models read parameter by parameter, the rules engine
hf                    Hugging Face folders; each family is one file in hf/families
workdir, evo2, peft, lolcats   the other formats, one package each
files                 readers and writers of safetensors, torch files and JSON; atomic writing of a destination folder
verify, progress      comparison of the result with the source; progress reporting
"""
