"""`cvfm` over the real shapes, this package against its baselines; `python -m bench.run` calls it.

Every round runs all variants once, in an order that rotates, so that what disturbs one disturbs all. Before anything is
timed a variant has to agree with the definition in float64, in its result and in every gradient. pytest-benchmark
drives the rounds and keeps the time of this package's own variant, so that its `--benchmark-save` and
`--benchmark-compare` compare two versions of this package.
"""

import pytest

from bench import measure
from bench.cases import SUITES, Case
from bench.settings import Settings

SETTINGS = Settings.read()
CASES = list(dict.fromkeys(case for suite in SETTINGS.suites() for case in SUITES.get(suite, ())))


@pytest.mark.bench
@pytest.mark.benchmark(timer=measure.own_time)
@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cvfm(benchmark, case: Case, direction: str) -> None:
    if SETTINGS.time_is_up():
        pytest.skip("time is up")
    if not measure.pending(SETTINGS, case, direction):
        pytest.skip("measured before")
    measurement = measure.Measurement(SETTINGS, case, direction)
    measurement.judge()
    red = measurement.red()
    if red:
        measurement.record({})
        pytest.fail(f"{case.name}, {direction}: differs from the definition, so nothing is timed: {'; '.join(red)}")
    measurement.prepare()
    assert measurement.runners, f"{case.name}, {direction}: nothing to time: {measurement.notes}"
    benchmark.pedantic(measurement.round(), rounds=SETTINGS.rounds, warmup_rounds=1)
    # The first round warms up.
    seconds = {name: times[1:] or times for name, times in measurement.seconds.items()}
    measurement.record(seconds)
    medians = {name: measure.records.quantile(times, 0.5) for name, times in seconds.items()}
    benchmark.extra_info.update({f"{name}_ms": median * 1e3 for name, median in medians.items()})
