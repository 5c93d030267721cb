"""Quantised formats: how the tensors of a published checkpoint become weights of the engine.

`scheme.py` reads config.json, `grouping.py` finds which tensors make one weight, and each format
has a module with a `StoredWeight` (`engine/weights/entry.py`):

| module          | format                                                                   |
|-----------------|--------------------------------------------------------------------------|
| `scaled.py`     | FP8 with a scale per tensor, per row or per block                         |
| `mxfp4.py`      | two FP4 values per byte, a power of two per 32 of them                    |
| `packed.py`     | int4 and int8 of compressed-tensors                                       |
| `transposed.py` | int4 of AWQ and GPTQ, whose matrices are stored transposed                |

Values are products in float32, rounded once, to the model's dtype.
"""
