"""What a training run would cost, from its .gin file, before there is hardware: `python -m lcx.plan`.

One file for each step of the way:

    topology     the devices by name ("v5p:4x4x4", "h200:8", "cpu:2"), and their data sheets
    abstract     the training state of a job as shapes: nothing is read but the headers of a checkpoint
    compiled     the real training step, compiled ahead of time for those devices; memory per device
    cache        what a compiler said of an equal program before
    program      compiled HLO: arrays, loops and how often each runs
    traffic      bytes that the compiled program sends between devices, by mesh axis, and moves in memory
    flops        operations of the step as it is traced, recomputation included
    buffers      the largest arrays of the program, each with the setting that shrinks it
    longest      the longest rows that fit
    search       other settings of the same training that fit, fastest first
    roofline     a time from all of the above, with its assumptions
    report       the plan as text and as JSON
    silence      compilers of absent devices say nothing
    command      all of it in order
"""
