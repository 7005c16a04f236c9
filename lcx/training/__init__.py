"""What the jobs (`trainer`, `blockwise`, `ladder`) use.

run             what a run holds, and how it is laid out before there are arrays
step            one compiled training step
meter           loss, tokens per second and model FLOP utilisation of finished steps
peak_flops      what the hardware could do
logger          metrics.jsonl, wandb, progress on the terminal
signals         SIGTERM and Ctrl-C as a flag that the loop reads
distributed     starting several processes
resume_check    whether a workdir's checkpoints belong to these settings
residual_store  the residual stream at one depth, on disk
"""
