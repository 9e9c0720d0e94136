"""How fast and how small the data engine is, beside the loop that people write and beside decompression alone.

usage: python benchmarks/data_engine.py [FOLDER]

FOLDER holds one subject of full size (s0000), as ../shared/data/make_torso_15mm.py writes; without it a phantom of
3 mm stands in and the sizes say so. All sides run in turns in one process and thread, medians of ROUNDS rounds; every
file is read once before, so that the disk takes no part in it.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
from isal import igzip

from segkit.phantom import write_phantoms
from segkit.slices import SliceDataset, batches
from segkit.staging import StagedSubject, stage, stage_subject
from segkit.subjects import Part, find_subjects

ROUNDS = 5
OVERLAPS = 20
SUBJECTS = 100


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if len(sys.argv) > 1:
            data_dir = Path(sys.argv[1])
        else:
            data_dir = scratch / "phantom"
            write_phantoms(data_dir, 1)
        overlapping = scratch / "overlapping"
        plant_overlaps(data_dir / "s0000", overlapping / "s0000")
        for title, folder in (("as it is", data_dir), (f"with {OVERLAPS} overlapping pairs", overlapping)):
            compare_staging(title, folder, scratch)
        staged = stage_subject(find_subjects(overlapping)[0][0], scratch / "store")
        measure_store(staged)
        measure_slices(staged)
        in_new_process("memory", overlapping, scratch)
        in_new_process("many", scratch)


def plant_overlaps(source: Path, target: Path) -> None:
    """A copy of a subject in which OVERLAPS masks reach into the next one."""
    shutil.copytree(source, target)
    files = sorted((target / "segmentations").iterdir())
    images = {path: nib.load(path) for path in files}
    masks = {path: np.asanyarray(image.dataobj).copy() for path, image in images.items()}
    held = [path for path in files if masks[path].any()][: OVERLAPS + 1]
    for first, second in pairwise(held):
        places = np.argwhere(masks[second])[::7]
        masks[first][tuple(places.T)] = 1
        nib.save(nib.Nifti1Image(masks[first], images[first].affine, images[first].header), first)


def compare_staging(title: str, data_dir: Path, scratch: Path) -> None:
    [subject], _ = find_subjects(data_dir)
    files = list(subject.files)

    def staging() -> None:
        shutil.rmtree(scratch / "rounds", ignore_errors=True)
        stage_subject(subject, scratch / "rounds")

    def loop() -> None:
        for path in files:
            nib.load(path).get_fdata() > 0  # noqa: B015  the peer's work, its result is not needed

    def floor() -> None:
        for path in files:
            igzip.decompress(path.read_bytes())

    seconds = in_turns({"segkit": staging, "get_fdata": loop, "isal": floor})
    shape, masks = stage_subject(subject, scratch / "rounds").shape, len(files) - 1
    print(f"staging one subject of {shape} voxels and {masks} masks, {title}:")
    print(
        f"  segkit {seconds['segkit']:.2f} s; nib.load(mask).get_fdata() > 0 {seconds['get_fdata']:.2f} s "
        f"({seconds['get_fdata'] / seconds['segkit']:.1f} times as long); isal decompression alone "
        f"{seconds['isal']:.2f} s (segkit takes {seconds['segkit'] / seconds['isal']:.2f} times as long)"
    )


def in_turns(sides: dict) -> dict[str, float]:
    """Median seconds of each side, all run in turns after one round that warms up."""
    taken = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def measure_store(staged: StagedSubject) -> None:
    sizes = {path.name: path.stat().st_size for path in staged.folder.iterdir()}
    ct, whole = staged.info["ct_bytes"], sum(sizes.values())
    parts = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sorted(sizes.items()))
    print(f"store: {whole / 1e6:.2f} MB ({parts}), {whole / ct:.2f} times the compressed CT alone ({ct / 1e6:.2f} MB)")


def measure_slices(staged: StagedSubject) -> None:
    slices = random.Random(0).choices(range(staged.shape[0]), k=2000)
    label_map = {name: channel for channel, name in enumerate(staged.structures)}
    data = SliceDataset({staged.name: staged}, [Part(staged.name)], label_map)

    def read() -> None:
        for z in slices:
            staged.hu(z)
            staged.labels(z)

    def load() -> None:
        for _ in batches(data, slices, 8):
            pass

    seconds = in_turns({"read": read, "load": load})
    print(
        f"random slices of {staged.shape[1:]}, CT and codes, one process: {2000 / seconds['read']:.0f} a second; as "
        f"batches of 8 through the loader {2000 / seconds['load']:.0f} a second"
    )


def measure_peak_memory(data_dir: Path, scratch: Path) -> None:
    before = peak_mb()
    stage_subject(find_subjects(data_dir)[0][0], scratch / "memory")
    print(f"peak memory of staging it: {peak_mb()} MB, of which {before} MB after the imports")


def measure_many(scratch: Path) -> None:
    """Memory of small phantoms staged with two workers: a tenth of SUBJECTS, then all of them."""
    made = write_phantoms(scratch / "made", 10, detail=0.5, jobs=2)
    for number in range(SUBJECTS):
        shutil.copytree(made[number % 10], scratch / "many" / f"s{number:04d}")
    subjects, _ = find_subjects(scratch / "many")
    for count in (SUBJECTS // 10, SUBJECTS):
        started = time.perf_counter()
        stage(subjects[:count], scratch / "many_staged", jobs=2, progress=False)
        seconds = time.perf_counter() - started
        workers = joblib.Parallel(n_jobs=2)(joblib.delayed(_peak_after_a_pause)() for _ in range(8))
        print(
            f"{count} phantoms with two workers, {seconds:.1f} s: peak of this process {peak_mb()} MB, of the workers "
            f"{sorted(set(workers))} MB"
        )


def _peak_after_a_pause() -> int:
    time.sleep(0.05)  # so that no worker does all of these
    return peak_mb()


def peak_mb() -> int:
    """Highest resident memory of this process since its program started (Linux)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def in_new_process(part: str, *arguments: Path) -> None:
    """Run a part of this file in a process of its own, whose memory is its own."""
    subprocess.run([sys.executable, __file__, f"--{part}", *map(str, arguments)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_peak_memory(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--many"]:
        measure_many(Path(sys.argv[2]))
    else:
        main()
