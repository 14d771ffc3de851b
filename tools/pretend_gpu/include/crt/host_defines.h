// The words that CUDA's headers are written with, for a host compiler. NVIDIA ships this file with nvcc only.
#pragma once
#define __host__
#define __device__
#define __global__
#define __constant__
#define __shared__
#define __managed__
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define __specialization_static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_align__(bytes) __align__(bytes)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __location__(where)
#define __no_return__ __attribute__((noreturn))
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_CB
