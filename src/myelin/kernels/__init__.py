"""Kernel templates: functions that return one TIR PrimFunc for given shapes and a CPU level.

All of them keep these rules, which the plan and the enclave rely on:

- Parameters are float32 buffers (labels int32 where said), outputs last. Arguments never overlap.
- Every index is affine in loop variables with constant bounds: no branch and no address depends on
  data.
- Every size works; tails are vectors of exactly the width that is left, so nothing outside a buffer
  is touched.
- The result depends on no thread count: parallel iterations never share an output, and a value that
  two of them write (tiles at an edge overlap) is the same bits in both.
- No library call: transcendental functions are polynomials (`functions`).
"""
