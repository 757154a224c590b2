"""Fixtures that the tests of the mathematics, the models and the engines share. Torch is imported only where one is asked for."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: one of them that comes last would run alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def cfg():
    """The embedded default: model=tiny dataset=toy hardware=cpu stage=ppo."""
    from tiny import configured

    return configured()


@pytest.fixture(scope="session")
def alone():
    """A process group of this process only, on the CPU, as a worker of one rank has it. Returns the device."""
    import torch
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from runner import engine, ranks

    torch.set_num_threads(1)
    # These tests compare numbers of the CPU, also on a machine with a GPU
    set_accelerator(CPU_Accelerator())
    engine.skip_cpu_op_builds()
    device = ranks.start("cpu")
    # Processes that other tests start must not take our rank for theirs
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    yield device
    torch.distributed.destroy_process_group()


TEXTS = ["Please describe the river for Ann.", "The river is calm, bright and fresh.", "What do you think of the old house by the lake?"]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level tokenizer with <pad> 0, <s> 1 and </s> 2 that adds no BOS."""
    from runner.models.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder, cfg):
    from runner.models.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_folder), chat_template=cfg.model.chat_template)
