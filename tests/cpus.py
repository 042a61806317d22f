"""Flags of known CPUs, as ``/proc/cpuinfo`` lists them (those that count)."""

ZEN3 = "fpu sse sse2 ssse3 fma avx f16c avx2 bmi2 vaes vpclmulqdq"
ICE_LAKE = f"{ZEN3} avx512f avx512bw avx512_vnni"
SAPPHIRE_RAPIDS = f"{ICE_LAKE} avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
ALDER_LAKE = f"{ZEN3} avx_vnni"
OLD = "fpu sse avx"
