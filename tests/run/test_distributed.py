"""Two processes (gloo): data parallel, FSDP2 and tensor parallel equal one process, weights packed all the while."""

import pytest
import torch

from tests.run import ranks

CHECKS = [name for name in dir(ranks) if name.startswith("check_")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.run, (str(folder / "store"), folder), nprocs=ranks.RANKS)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, results):
    for rank in range(ranks.RANKS):
        outcome = (results / f"{name}-{rank}").read_text()
        assert not outcome, outcome
