// Elements of tensors: conversion to and from float, and loads of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace procrustes {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

// So many elements fill 16 bytes.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// `Width` consecutive elements as floats: one load of 16 bytes where Width is kVector<T>, which needs such alignment.
template <typename T, int Width>
struct Pack {
  float value[Width];

  __device__ explicit Pack(T const* from) {
    if constexpr (Width == kVector<T>) {
      uint4 const raw = __ldg(reinterpret_cast<uint4 const*>(from));
      T element[Width];
      memcpy(static_cast<void*>(element), &raw, sizeof(raw));
#pragma unroll
      for (int i = 0; i < Width; ++i) value[i] = to_float(element[i]);
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i) value[i] = to_float(from[i]);
    }
  }
};

}  // namespace procrustes
