"""Times a converted site's attention against the fastest dense attention, on what the model really computes.

    inputs    q, k, v of one site, recorded on real text; brought to another shape; random ones beside them
    rivals    dense attention by every backend there is, FlexAttention on the same blocks, NSA by fla
    measure   median times, peak memory, and where they were taken
    kernels   time of each kernel on a GPU
    run       correctness check  →  times by length  →  a report
    decoding  times of one token in a CUDA graph
    scaling   times by length    →  the exponent with which they grow
    tuning    times by length    →  dense_until of each site

The cost of a selection depends on the data: queries that stand together choose much the same leaves, independent
random ones do not.
"""

from retrofit.bench.measure import environment
from retrofit.bench.run import BenchmarkReport, Timing, benchmark
from retrofit.bench.tuning import Tuned, TuneReport, tune

__all__ = ["BenchmarkReport", "Timing", "TuneReport", "Tuned", "benchmark", "environment", "tune"]
