"""How far float32 may lead two ways apart that are the same in real numbers, whatever the processor's kernels and the order of their sums."""

ROUNDING = 2.0**-24
"""Of one operation, relative."""

CALL = 1e-4
"""Of one network call with outputs of size one: sums of some thousands of products in some tens of layers, each of which rounds, 1600 x 2^-24."""

SAMPLES = 2e-3
"""Of a short trajectory's images in [-1, 1]: at the noisiest step the predicted image is the prediction over sqrt(abar) >= 1 / 160, which multiplies a
call's error before it is clipped, and later steps take over a tenth of it. What is really different differs by tenths."""
