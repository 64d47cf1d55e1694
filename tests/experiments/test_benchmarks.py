"""Every benchmark runs; what it measures is for its reader, not for a test."""

import dataclasses

from rollax.experiments import bandpo
from rollax.experiments.benchmarks import band_bounds


def test_band_bounds(monkeypatch):
    monkeypatch.setattr(band_bounds, "REPEATS", 1)
    (config, _) = bandpo.configs_of([])
    lines = band_bounds.measure(dataclasses.replace(config, seeds=1, passes=1, mini_batches=1))
    assert [line[0] for line in lines][-2:] == ["tabular, band_chi2", "tabular, clip"]
    assert all(line[-1].endswith("%") for line in lines)
