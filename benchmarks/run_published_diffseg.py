"""Run the published DiffSeg on saved maps: what `benchmarks/segmentation.py` calls, in the Python that has TensorFlow.

PYTHONPATH=CHECKOUT python benchmarks/run_published_diffseg.py MAPS.npy OUT.npz --thresholds 0.5 --dtype float16
"""

import argparse
import time

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("maps", help="(4096, 64, 64), each of sum 1")
parser.add_argument("out", help="merged maps of each threshold, and seconds of each merge")
parser.add_argument("--thresholds", type=float, nargs="+", required=True)
parser.add_argument("--dtype", choices=["float16", "float64"], default="float16", help="float16 is as shipped")
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()

import tensorflow as tf  # noqa: E402 - after the arguments, as it takes seconds
from diffseg.segmentor import DiffSeg  # noqa: E402 - a checkout of github.com/google/diffseg

tf.config.threading.set_intra_op_parallelism_threads(args.threads)
tf.config.threading.set_inter_op_parallelism_threads(args.threads)
tf.float16 = getattr(tf, args.dtype)  # the type that the published code casts to before it compares

maps = np.load(args.maps).reshape(64, 64, 64, 64).astype(np.double)
results = {}
for threshold in args.thresholds:
    published = DiffSeg([threshold] * 3, False, 16)
    start = time.perf_counter()
    merged = maps
    for i in range(3):
        merged = published.mask_merge(i, merged, published.kl_threshold, published.grid)
    results[f"seconds_{threshold}"] = time.perf_counter() - start
    results[f"merged_{threshold}"] = merged.reshape(-1, 64, 64)
np.savez(args.out, **results)
