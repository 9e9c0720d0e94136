"""The same calls on a dask cluster give the same results."""

import os

import joblib
import numpy as np
import pytest
import torch

from segkit.dataset import open_data
from segkit.evaluation import evaluate, load_prediction
from segkit.inference import Predictor
from segkit.unet import UNet2D

distributed = pytest.importorskip("distributed", reason="needs the extra 'dask'")


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in the workers: sums of bfloat16 differ between numbers of threads."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cluster(one_thread):
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as local,
        distributed.Client(local) as client,
    ):
        yield client


def test_staging_and_evaluation_on_a_local_cluster(phantom_dir, phantom_data, cluster, tmp_path):
    torch.manual_seed(0)
    model = UNet2D(out_channels=3, features=(4, 8))
    predictor = Predictor(model, {"liver": 0, "aorta": 1, "spleen": 2}, (32, 32), device="cpu")
    everyone = [*phantom_data.split.train, *phantom_data.split.test]
    here = evaluate(predictor, phantom_data.staged, everyone, "all", progress=False).scores
    with joblib.parallel_config(backend="dask"):
        data = open_data(phantom_dir, tmp_path / "staged", jobs=None, progress=False)
        there = evaluate(predictor, data.staged, everyone, "all", tmp_path / "predictions", progress=False).scores
    assert here.equals(there)
    for name, subject in data.staged.items():
        assert np.array_equal(subject.hu(), phantom_data.staged[name].hu())
        assert np.array_equal(subject.labels().codes, phantom_data.staged[name].labels().codes)
    for part in everyone:
        subject = phantom_data.staged[part.subject]
        assert np.array_equal(
            load_prediction(tmp_path / "predictions", subject).codes, predictor.predict(subject).codes
        )
    # the work was done by both processes of the cluster, not by this one
    done = cluster.run(lambda dask_worker: (os.getpid(), dask_worker.state.executed_count))
    assert len(done) == 2 and all(pid != os.getpid() and tasks > 0 for pid, tasks in done.values())
