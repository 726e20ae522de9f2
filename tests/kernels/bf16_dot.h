// The instruction vdpbf16ps, emulated for vectors of 64 bytes on any processor: kBf16Dot and dot() for gemm_tiles.h.
//
// Each lane takes the second product of its pair, then the first: sums of float32, rounded to nearest; denormal numbers,
// given or resulting, are zeros. A product of two bfloat16 is exact in float32, so it is one whether fused or not.
#pragma once

#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

inline constexpr bool kBf16Dot = true;

PX_INLINE Vec<float> flush(Vec<float> v) {
  Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(v), normal = (bits & 0x7f800000u) != 0;
  return reinterpret_cast<Vec<float>>(bits & (normal | 0x80000000u));
}

PX_INLINE Vec<float> dot(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
  auto half = [](Vec<uint32_t> bits) PX_LAMBDA { return flush(reinterpret_cast<Vec<float>>(bits)); };
  sum = flush(flush(sum) + half(a & 0xffff0000u) * half(b & 0xffff0000u));
  return flush(sum + half(a << 16) * half(b << 16));
}

}  // namespace
}  // namespace perexample::cpu::PX_CAPABILITY
