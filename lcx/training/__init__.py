"""Components shared by the training jobs (`trainer`, `blockwise`, `ladder`).

run             the contents of a run, with shapes and shardings known before any array is allocated
step            one compiled training step
meter           loss, tokens per second and model FLOP utilisation of finished steps
goodput         where the time of a run goes, over its restarts
profiling       records a window of steps with JAX's profiler
peak_flops      peak FLOP/s of the hardware
logger          metrics.jsonl, wandb, progress on the terminal
tensorboard     writes the metrics as TensorBoard event files
signals         turns SIGTERM and Ctrl-C into a flag that the training loop checks
distributed     joins the processes of a multi-process run
memory          checks that the training state fits into device memory
division        rows and devices: any number of devices
statements      the messages at the start and end of a run
workdirs        the folder of a run: here or in a bucket, config.gin, checkpoints after a non-finite step
resume_check    checks that a workdir's checkpoints belong to the current settings
residual_store  the residual stream at one depth of a model, stored on disk
"""
