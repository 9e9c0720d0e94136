"""segkit beside what people use instead, on the same work in one run: `make bench` writes docs/benchmarks.md.

What every work shares:

    worker.py         one side of a comparison in a process of its own
    sides.py          who takes part, and what it took
    turns.py          sides take turns: medians of seconds, peaks of memory
    tables.py         rows, tables, and the folder that keeps them as they come
    machine.py        versions, processor, and the rates that it reaches at most
    inputs.py         subjects and scans of known size
    bench.py          sizes, folders and data of one run
    nnunet.py         nnU-Net by its own commands, on data of segkit
    nnunet_trainer.py its trainer with short epochs
    trainings.py      the trainings whose quality is compared
    page.py           docs/benchmarks.md
    chart.py          its figure
    __main__.py       python -m benchmarks
    gpu.py            python -m benchmarks.gpu
    gpu_memory.py     what a command held on the GPU

A module a work, in the order of the page: staging, fetching, training_step, epoch, quality, predicting, scoring,
meshing, starting, growth. A side is a function that makes the work ready and gives it as a callable; it imports what it
measures itself, since segkit and its peers live in different environments.

Studies for docs/learning.md, each a command of its own: learning, partial_annotation, voting.
"""
