"""One program in several processes: they find each other, agree on what they run, and notice when one of them is gone.

    join        start-up: TPU pods, SLURM, Open MPI, Kubernetes, plain hosts
    rollcall    until they have joined: who is there, who is missing, who is gone
    peer        a connection between two of them until then
    channel     short texts from process to process, through JAX's coordination service
    agreement   versions, configuration and data are the same everywhere; work that one process does for all
    watch       a process that ends, or hangs, ends the others with one clear line

The arrays themselves travel through JAX's collectives.
"""
