"""The six public benchmarks and user-defined probes, one file each, with a common interface (benchmark.py)."""

from avocado_jax.eval.benchmarks import daily_omni, dream1k, probes, ugc_videocap, vdc, video_salmonn2, worldsense

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (video_salmonn2, ugc_videocap, daily_omni, worldsense, vdc, dream1k, probes)
}
