"""Tests: unit, distributed (gloo ranks), models, tools, gpu, cluster; helpers serve them all."""
