"""Compare optimizers, or whole recipes, over batch sizes and seeds, at equal epochs.

    python compare.py --flagfile=flags/comparisons/digits.flags
    python compare.py --recipes=flags/recipes/demo.flags,flags/recipes/demo_geometric.flags --batch_sizes=1024,8192
    nohup python compare.py --flagfile=flags/comparisons/cifar10.flags --data_dir=DIR > cifar10.log &

Each optimizer's learning rate is chosen by successive halving with the same budget, scored on held-out training images.
Then each optimizer trains on all training images, once for each seed, and is scored on the test split. While rates are
chosen, a run that has learned nothing by half of its length is stopped. The same command resumes a comparison that was
stopped or killed. It may add to --optimizer, --batch_sizes, --seeds and --tuning_runs: finished runs are kept. Results:
OUT/compare.json, compare.svg, compare.html, and a folder for each run.
Exit codes: 0 done; 1 a run failed; 2 a bad flag, or a missing file; 75 stopped by a signal.
"""

import running.start  # noqa: F401, I001  (before the first import of TensorFlow)

import sys

from tools.comparison.command import run

if __name__ == "__main__":
    sys.exit(run(sys.argv, __doc__))
