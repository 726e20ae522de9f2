// Chooses the kernel for a product of two operands, for linear.cu and conv.cu.
#pragma once

#include "linear_mma.cuh"
#include "linear_simple.cuh"

namespace perexample::cuda {

// Tiles of the portable kernel: (rows, columns, rows and columns of a warp, positions of a block).
// Large tiles read less; small ones are for small matrices, and for gathering loads.
template <Math kMath, bool kVectors, bool kSquares, class X = Strided>
struct Tiles {
  static constexpr bool kHalf = kMath == Math::kBf16 || kMath == Math::kF16;
  static constexpr int kBlock = kHalf ? 32 : 16;
  // Pieces take registers, and so does finding an unfolded x.
  using Large = std::conditional_t<kHalf && !kSquares && std::is_same_v<X, Strided>,
                                   MmaTile<kMath, 128, 128, 64, 32, kBlock, kVectors, kSquares>,
                                   MmaTile<kMath, 128, 64, 32, 32, kBlock, kVectors, kSquares>>;
  using Small = MmaTile<kMath, 64, 64, 32, 32, kBlock, kVectors, kSquares>;
};

// A matrix that fills no more than a row and a column of small tiles wastes most of a large one.
inline bool small(const Matrix& m) { return m.outputs <= 64 || m.inputs <= 64; }

template <Math kMath, bool kSquares, class X>
void launch_product(const Strided& dy, const X& x, int64_t groups, int64_t batch, int64_t positions,
                    const Matrix& out, const Moments& bias, const Device& device) {
  if (!vectors(dy, Tiles<kMath, true, kSquares>::Small::kElement) ||
      !vectors(x, Tiles<kMath, true, kSquares>::Small::kElement)) {
    launch_mma<typename Tiles<kMath, false, kSquares, X>::Small>(dy, x, groups, batch, positions,
                                                                 out, bias, device);
  } else if (small(out)) {
    launch_mma<typename Tiles<kMath, true, kSquares, X>::Small>(dy, x, groups, batch, positions,
                                                                out, bias, device);
  } else {
    launch_mma<typename Tiles<kMath, true, kSquares, X>::Large>(dy, x, groups, batch, positions,
                                                                out, bias, device);
  }
}

// Any dtype; `tf32` is for Strided only. With one position an example, the batch takes the place of
// the positions. Not so with few: over pairs of positions an example would take 4 T (T + 1) / 2
// products, which cost more than what they save from T = 3 on, and at T = 2 leave noise of either
// sign where an example's positions cancel (docs/cuda.md).
// `bias`, null where not wanted or x is not Strided, is added in the same pass, but for float64:
// false then.
template <class X>
bool launch_portable(Strided dy, X x, DType dtype, bool tf32, int64_t groups, int64_t batch,
                     int64_t positions, const Matrix& out, const Moments& bias,
                     const Device& device) {
  if (dtype == DType::f64) {
    launch_simple(dy, x, groups, batch, positions, out, device);
    return false;
  }
  auto product = [&](auto math) {
    constexpr Math kMath = decltype(math)::value;
    if constexpr (std::is_same_v<X, Strided>) {
      if (positions == 1) {
        dy.t_stride = dy.b_stride, x.t_stride = x.b_stride;
        dy.b_stride = x.b_stride = 0;
        return launch_product<kMath, true>(dy, x, groups, 1, batch, out, bias, device);
      }
    }
    launch_product<kMath, false>(dy, x, groups, batch, positions, out, bias, device);
  };
  if (dtype == DType::bf16) {
    product(std::integral_constant<Math, Math::kBf16>{});
  } else if (dtype == DType::f16) {
    product(std::integral_constant<Math, Math::kF16>{});
  } else {
    if constexpr (std::is_same_v<X, Strided>) {
      if (tf32) {
        product(std::integral_constant<Math, Math::kTf32>{});
        return true;
      }
    }
    product(std::integral_constant<Math, Math::kTf32x3>{});
  }
  return true;
}

}  // namespace perexample::cuda
