"""All tolerances of the tests: the largest difference over the largest absolute value of the truth."""

FLOAT32 = 1e-5
"""Sums in float32, against the same in float64."""

BFLOAT16 = 2.0**-8
"""Results rounded to bfloat16, which has 8 significant bits: half a unit, and room for a tie."""

FLOAT16 = 2.0**-10
"""Results rounded to float16, which has 11 significant bits: half a unit, and room for its subnormal numbers."""

FLOAT32_EXP = 2e-7
"""The vectorised exponential: about one unit in the last place of float32."""

# A Fast Weight Layer read in pieces, among padding or beside other rows, against the row read alone; relative, fp32.
FAST_WEIGHT_LAYER = 1e-6

FIFTEEN_BITS = 2.0**-12
"""Products of rows rounded to 15 bits, relative to the largest of 32 (measured: 1e-4 where channels are unlike)."""

EIGHT_BITS = 2.0**-6
"""Likewise to 8 bits, where groups are small among their row's (measured: 7e-3 where all are alike)."""
