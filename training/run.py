"""One training run from the folder to the artifact."""

import ctypes
import json
import os
import sys
from dataclasses import asdict

import numpy as np
import torch

from training.cache import load_chips
from training.data import near_duplicate_groups, perceptual_hash, scan, split_samples
from training.loop import train
from training.network import create_network
from training.options import TrainOptions


def run(options: TrainOptions) -> None:
    _keep_freed_memory()
    options.out_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    samples, rejected = scan(options.data_dir)
    samples, train_cache = load_chips(samples, options.size * 5 // 4, options.cache_dir, rejected)
    groups = near_duplicate_groups(
        np.array([perceptual_hash(train_cache.chips[train_cache.rows[s.digest]]) for s in samples])
    )
    splits = split_samples(samples, groups, val_frac=options.val_frac, test_frac=options.test_frac, seed=options.seed)
    by = {name: [s for s, side in zip(samples, splits, strict=True) if side == name] for name in ("train", "val", "test")}
    print(
        {k: len(v) for k, v in by.items()},
        rejected.counts(),
        "groups",
        len(set(groups.tolist())),
        np.bincount(np.bincount(groups))[1:40],
    )
    val, val_cache = load_chips(by["val"], options.size, options.cache_dir, rejected)
    val_chips = val_cache.chips[[val_cache.rows[s.digest] for s in val]]
    (options.out_dir / "options.json").write_text(json.dumps(asdict(options), default=str, indent=1))
    network = create_network(
        options.backbone, pretrained=options.pretrained, dropout=options.dropout, drop_path=options.drop_path
    )
    train(network, by["train"], train_cache, val, val_chips, options, torch.device("cpu"))


def _keep_freed_memory() -> None:
    """Stops glibc from handing big buffers back to the kernel at every step, which costs a fifth of the speed."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
