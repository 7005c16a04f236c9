"""Writes configs/pretrain/two_mamba: a file for each attention type, the two sizes, an MLP, and the published trainer.

    python scripts/two_mamba_configs.py

The names are those of `lcx.mixers.two_mamba`; the sizes and the trainer's settings are the tables below. A test
compares the files with what this script would write.
"""

import pathlib

from lcx.mixers.two_mamba import PUBLISHED

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs" / "pretrain" / "two_mamba"
#: size -> hidden size, width of the MLP, heads, head_dim, layers, parameters of 2Mamba
SIZES = {
    "small": (1024, 2048, 16, 64, 20, "275.8M"),
    "medium": (1536, 3072, 24, 64, 27, "736.8M"),
}
NAMES = ("softmax", "mamba", *PUBLISHED)
#: What the paper calls some of them.
TITLES = {
    "softmax": "softmax attention",
    "mamba": "the paper's Mamba-2, with a single head",
    "linear": "linear attention",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": "Mamba-2S",
    "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2": "2Mamba",
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2": "2Mamba-E",
}
HEAD = "# Written by scripts/two_mamba_configs.py: change that file, not this one.\n"

NAME = """\
# Pretrains a model of the 2Mamba paper (arXiv 2602.17363): {title}.
#
{head}\
# Settings: trainer.gin, at the size of sizes/small.gin. A second --gin_file=.../sizes/medium.gin changes the size.
# Hardware: 2 GPUs of 80 GB as published (at most 2 days); not run at this size by us.
# Command:
#   python -m lcx.train --gin_file=configs/pretrain/two_mamba/{name}.gin \\
#     --workdir=runs/two_mamba --gin.TEXT="'/path/to/text/*.jsonl'" --gin.TOKENIZER="'/path/to/hf_folder'"
from __gin__ import dynamic_registration
from lcx import model
from lcx import trainer
from lcx.mixers import two_mamba

include 'trainer.gin'
include 'sizes/small.gin'

trainer.Trainer.model = @model.Decoder()
model.Decoder.vocab_size = 32000
model.Decoder.max_position_embeddings = %SEQ_LEN
model.Decoder.initialization = 'torch'
model.Decoder.stages = (@model.Stage(),)
model.Stage.pattern = (@model.Block(),)
model.Block.mixer = @two_mamba.published()
model.Block.mlp = @model.Mlp()
two_mamba.published.attention_type = '{name}'
"""

SIZE = """\
# The size {size!r} of the 2Mamba paper: {params} parameters with 2Mamba, at a vocabulary of 32000.
#
{head}\
from __gin__ import dynamic_registration
from lcx import model
from lcx.mixers import two_mamba

MLP_SIZE = {inner}

model.Decoder.hidden_size = {hidden}
model.Mlp.intermediate_size = %MLP_SIZE
model.Stage.repeat = {layers}
two_mamba.published.num_heads = {heads}
two_mamba.published.head_dim = {head_dim}
"""

GELU = """\
# The MLP without a gate, down(gelu(up x)), for the models of the 2Mamba paper.
#
{head}\
# The published code knows the name (mlp_type 'gelu') and trains a gated SiLU all the same. Two projections instead of
# three: a third fewer parameters in the MLP, unless MLP_SIZE is set to 1.5 times that of the size.
# Hardware: see the files of the attention types.
# Command:  that of such a file, with this one as another --gin_file:
#   python -m lcx.train --gin_file=configs/pretrain/two_mamba/softmax.gin \\
#     --gin_file=configs/pretrain/two_mamba/mlp/gelu.gin --workdir=runs/softmax_gelu \\
#     --gin.TEXT="'/path/to/text/*.jsonl'" --gin.TOKENIZER="'/path/to/hf_folder'"
from __gin__ import dynamic_registration
from lcx import model
from lcx.mlps import plain

model.Block.mlp = @plain.PlainMlp()
plain.PlainMlp.intermediate_size = %MLP_SIZE
plain.PlainMlp.activation = 'gelu'
"""

TRAINER = """\
# The published trainer of the 2Mamba paper: optimizer, schedule, cadence. The files of the attention types include it.
#
{head}\
# As published, the learning rate decays to 0 at 1,000,000 updates, but the run stops after 100,001. Nothing is clipped,
# every parameter decays, and the held-out loss is that of all held-out documents. Unlike there, documents are packed,
# without attention between them: a published row holds one document, cut or padded to SEQ_LEN.
# Hardware: see the files of the attention types.
# Command:  that of a file that includes this one. Alone, it continues a folder of the published trainer:
#   python -m lcx.train --gin_file=configs/pretrain/two_mamba/trainer.gin --workdir=runs/continued \\
#     --gin.Trainer.init_from="'/path/to/two_mamba_folder'" --gin.Trainer.init_optimizer=True \\
#     --gin.TEXT="'/path/to/text/*.jsonl'" --gin.TOKENIZER="'/path/to/two_mamba_folder'"
from __gin__ import dynamic_registration
from lcx import data
from lcx import optim
from lcx import sharding
from lcx import trainer

TEXT = None                                 # published: FineWeb CC-MAIN-2024-51
TOKENIZER = None                            # published: that of Llama 2, 32000 tokens
SEQ_LEN = 2048                              # published: 2048, 4096, 8192

trainer.train.job = @trainer.Trainer()

data.Dataset.source = %TEXT
data.Dataset.tokenizer = %TOKENIZER
data.Dataset.eval_fraction = 0.001

trainer.Trainer.data = @data.Dataset()
trainer.Trainer.optimizer = @optim.AdamW()
trainer.Trainer.mesh = @sharding.MeshShape()
trainer.Trainer.steps = 1000000
trainer.Trainer.stop_at = 100001
trainer.Trainer.batch_size = 32
trainer.Trainer.seq_len = %SEQ_LEN
trainer.Trainer.dtype = 'bfloat16'
trainer.Trainer.remat = 'full'
trainer.Trainer.log_every = 10
trainer.Trainer.eval_every = 10000
trainer.Trainer.eval_batches = 1000000
trainer.Trainer.checkpoint_every = 1000
trainer.Trainer.wandb = 'auto'

sharding.MeshShape.data = -1
sharding.MeshShape.fsdp = 1

optim.AdamW.learning_rate = 1e-4
optim.AdamW.schedule = 'linear'
optim.AdamW.lag = 1
optim.AdamW.warmup_steps = 10000
optim.AdamW.final_fraction = 0.0
optim.AdamW.b1 = 0.9
optim.AdamW.b2 = 0.999
optim.AdamW.eps = 1e-7
optim.AdamW.weight_decay = 0.01
optim.AdamW.decay = '.'
optim.AdamW.clip_norm = None
"""


def files() -> dict[str, str]:
    """Name below FOLDER -> contents."""
    found = {"trainer.gin": TRAINER.format(head=HEAD), "mlp/gelu.gin": GELU.format(head=HEAD)}
    for size, (hidden, inner, heads, head_dim, layers, params) in SIZES.items():
        sizes = {"hidden": hidden, "inner": inner, "heads": heads, "head_dim": head_dim, "layers": layers}
        found[f"sizes/{size}.gin"] = SIZE.format(size=size, params=params, head=HEAD, **sizes)
    for name in NAMES:
        found[f"{name}.gin"] = NAME.format(name=name, title=TITLES.get(name, name), head=HEAD)
    return found


def main() -> None:
    for name, text in files().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
