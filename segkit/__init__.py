"""segkit: train, judge and look at a multi-organ CT segmentation.

The files in the order in which data walk through them; each imports only from those above it.

What all of them share
    errors.py          what is raised, and what is reported, when something from outside is not as it should be
    untrusted.py       files from outside: regular ones alone, JSON with limits
    labels.py          structures <-> channels, groups, colours, left/right partners
    codes.py           masks <-> one code volume with its codebook, lossless
    locks.py           one process at a time
    runs.py            where a run's files go; files that are whole or not there

Files of others, and data to try with
    formats/           files of others, in and out: NIfTI, NRRD, DICOM, labels, meshes
    phantom/           synthetic CT subjects with all 117 structures, in the dataset layout
    download/          the public data set, resumable and checked

A data set, from folders to a store
    splits.py          which subjects train, validate and test
    subjects.py        find the subjects of a data set, and choose among them
    reading.py         a subject's files -> HU and label codes, checked
    scans.py           a scan of anybody's, without labels: NIfTI, NRRD or DICOM
    audit.py           what is wrong with a data set
    stores.py          volumes on disk, read a slice at a time, with checksums
    staging.py         subject folder -> staged store, a compressed block a slice
    seen.py            what a model was trained on, and cannot be judged by
    dataset.py         a data folder made ready in one call

Slices for a network
    choices.py         what is chosen by name: networks, losses, formats of results
    settings.py        what a person changes about a training and its scores
    slices.py          staged subjects -> batches of slices with their codes
    slabs.py           the same for a 3D network: slices in a row
    augment.py         one resampling for fit-to-shape, rotation, scale, shift, flip; intensity
    segmenting.py      planes on the network's grid -> codes on a scan's own pixels

The machine
    devices.py         which device there is and in which precision it is fast
    ranks.py           several processes that train one model
    record.py          what a result came from: versions, code, hardware, data

Networks and losses
    norms.py           normalisation of each slice alone, fast on a CPU
    unet.py            the 2D U-Net
    networks.py        what MODEL chooses among, from MONAI where it has it
    chunks.py          a batch cut into chunks of pixels, and what its targets tell beforehand
    head.py            the last layer with its loss, chunk by chunk
    losses.py          cross-entropy, Dice and focal loss; network and loss as one

Measures
    metrics.py         counts -> Dice, IoU, success rate, detection
    calibration.py     outputs of a network -> probabilities that mean what they say
    surface.py         surface distances in mm: HD95, ASSD, surface Dice
    confusion.py       which structure's voxels were called what

Training
    torch_file.py      files of torch, written, and read as data alone
    weights_file.py    weights and JSON in one safetensors file, for others
    checkpoints.py     save and load, safely
    training_state.py  what an interrupted training goes on from
    memory.py          batches that are too large for the memory
    validation.py      scores during training, and the threshold
    schedule.py        the learning rate of each step, and when training ends early
    interrupts.py      the stop button, held back until a step is whole
    steps.py           one step of training, in parts and over ranks
    trainer.py         epochs of slices with validation, and how far they have come
    training.py        a run with its checkpoints and history, resumed where it stopped
    ensemble.py        several seeds trained by one command

Predictions and their scores
    cleaning.py        of each structure its largest piece
    inference.py       volume in, codes out; the mean of an ensemble
    reliability.py     whether probabilities mean what they say
    evaluation.py      one tidy table: a row a subject and structure
    intervals.py       means over subjects with their confidence intervals
    summaries.py       means that say what they are over, with intervals
    comparison.py      two models on the same cases

Figures
    styles.py          colours that colour-blind readers can tell apart, a style a group, saving
    pictures.py        slices with their masks, outlines and errors
    cases.py           the worst, median and best case of a split
    figures.py         charts over cases: curves, distributions, success rates, volumes, subjects
    rankings.py        charts over structures: ranking, comparison of two models, confusions

Surfaces
    meshes.py          codes -> closed meshes in mm, distances between them
    pages.py           meshes -> one HTML page that needs no network

Using a model: scans of one's own, reports, sharing
    measuring.py       volume, HU and place of each structure of a scan
    exports.py         a segmentation in the formats of viewers
    predicting.py      scans of one's own: read, segmented, written
    report_page.py     headings, tables and pictures -> one HTML page
    report.py          the files of an evaluation
    model_card.py      what a shared model says of itself
    sharing.py         a trained model as a folder for others

Doors: notebooks and the shell
    progress.py        what a person watches while a network learns
    interactive.py     what lives in a notebook: progress as it grows, the slice browser, NiiVue
    check.py           whether the installation works
    demo.py            both notebooks on phantoms, headless
    __main__.py        python -m segkit VERB

For education and research, not for diagnosis.
"""

import os
import sys

if sys.platform == "darwin":  # read when torch is loaded: what Apple's GPUs lack is computed by the CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__version__ = "0.1.0"
