"""Checkpoints in other layouts <-> lcx.

api, command, start   lcx.load and lcx.save; python -m lcx.convert; what a training run starts from
formats               the table of formats
core                  the contract of a format, models read parameter by parameter, the rules engine
hf                    Hugging Face folders; a family is one file in hf/families
workdir, evo2, peft, lolcats   the other formats, a room each
files                 readers and writers of safetensors, torch files and JSON; a destination that appears whole
verify, progress      what a conversion is worth, and how far it is
"""
