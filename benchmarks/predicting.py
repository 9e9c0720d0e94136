"""Seconds and memory of segmenting one large scan and writing it, stage by stage, and what each switch adds.

usage: python benchmarks/predicting.py SUBJECT_DIR OUT_DIR [--steps 90] [--members 1] [--switches mirror largest ...]
                                       [--formats nifti masks ...]
                                       [--threads N] [--device cpu]

SUBJECT_DIR holds a ct.nii.gz and segmentations/ (the real torso of the tests). In OUT_DIR, which keeps them for the
next time, are made: its CT at SHAPE voxels, and a network of the default size (TARGET_SHAPE 256 x 256, 117 structures)
trained on that subject for `--steps` steps, so that what it finds looks like organs and not like noise. An ensemble has
the same network several times. The scan is read, segmented and written in a process of its own, whose seconds and peak
memory are measured as a whole; of each stage the seconds are those spent inside of it.
"""

from __future__ import annotations

import argparse
import functools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from segkit import augment, inference, segmenting
from segkit.checkpoints import load_checkpoints
from segkit.dataset import open_data
from segkit.predicting import predict_scans
from segkit.scans import find_scans
from segkit.settings import Segmenting, TrainSettings
from segkit.training import train

SHAPE = (512, 512, 280)  # i, j, k of the file
SWITCHES = ("mirror", "largest", "uncertainty")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--switches", nargs="*", choices=SWITCHES, default=("largest",))
    parser.add_argument("--formats", nargs="+", default=("nifti",))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        segment(chosen)
        return
    if not (chosen.out_dir / "ct.nii.gz").is_file():
        make_scan(chosen.subject_dir, chosen.out_dir / "ct.nii.gz")
    if not list((chosen.out_dir / "run").glob("checkpoint_*.pth")):
        train_network(chosen)
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--inside"], check=True)
    print(f"| whole process | {time.perf_counter() - start:.1f} |")
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


def make_scan(subject_dir: Path, path: Path) -> None:
    """The subject's CT at SHAPE voxels, linearly interpolated."""
    image = nib.load(subject_dir / "ct.nii.gz")
    factors = np.array(SHAPE) / image.shape
    volume = ndimage.zoom(np.asarray(image.dataobj, np.float32), factors, order=1, grid_mode=True, mode="nearest")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.rint(volume).astype(np.int16), image.affine @ np.diag([*1 / factors, 1])), path)


def train_network(chosen: argparse.Namespace) -> None:
    """One short epoch on the subject, with the settings of the notebook but for the learning rate."""
    data = open_data(chosen.subject_dir.parent, chosen.out_dir / "staged", progress=False)
    settings = TrainSettings(
        epochs=1, learning_rate=2e-3, slices_per_epoch=8 * chosen.steps, validation_slices=16, device=chosen.device
    )
    train(data, settings, chosen.out_dir / "run", progress=False)


def segment(chosen: argparse.Namespace) -> None:
    """Read and segment the scan in this process; print the table of stages."""
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    seconds = {}
    loaded = load_checkpoints(chosen.out_dir / "run")
    predictor = inference.Predictor.of(loaded * chosen.members, batch_size=chosen.batch, device=chosen.device)
    augment.to_network = timed(seconds, "to the network's grid", augment.to_network)
    for model in predictor.models[:1]:  # the same one several times
        model.forward = timed(seconds, "network", model.forward)
    segmenting.Collector.add = timed(seconds, "back to the grid, codes", segmenting.Collector.add)
    inference.keep_largest = timed(seconds, "largest pieces", inference.keep_largest)
    choices = Segmenting(**dict.fromkeys(chosen.switches, True))
    with tempfile.TemporaryDirectory() as scratch:
        sources = find_scans(chosen.out_dir / "ct.nii.gz")
        [done] = predict_scans(predictor, sources, scratch, chosen.formats, choices, progress=False)
    found = done.segmentation
    table = found.codes.codebook
    occurring = [table[np.unique(codes)].any(0).sum() for codes in found.codes.codes]
    print(
        f"{found.codes.codes.shape} voxels on {predictor.device}, {torch.get_num_threads()} threads, batch "
        f"{chosen.batch}, {chosen.members} networks, with {', '.join(chosen.switches) or 'no switch'}, written as "
        f"{', '.join(chosen.formats)}: {len(found.codes.boxes())} structures, {np.mean(occurring):.0f} a slice, "
        f"{len(table)} codes\n"
    )
    print("| | s |\n|---|---|")
    for stage, taken in {**done.seconds, **{f"of it: {name}": taken for name, taken in seconds.items()}}.items():
        print(f"| {stage} | {taken:.1f} |", flush=True)


def timed(seconds: dict[str, float], stage: str, work: Callable) -> Callable:
    """`work`, with the seconds that it takes added to those of the stage."""
    seconds[stage] = 0.0

    @functools.wraps(work)
    def measured(*arguments, **named):
        start = time.perf_counter()
        result = work(*arguments, **named)
        seconds[stage] += time.perf_counter() - start
        return result

    return measured


if __name__ == "__main__":
    main()
