"""Mixture-of-experts paging without a model: routing traces, which expert lies in which slot, predictors, replay."""
