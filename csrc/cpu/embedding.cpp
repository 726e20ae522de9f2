// Gradient and per-example moments of an embedding, MATHS (6):
//   G_b[v,:] = sum of dy[b,t,:] over the t with indices[b,t] = v;
//   dw = sum_b G_b;   dw_sq = sum_b G_b^2
//
// The occurrences (b, t) are sorted by index; the sort is stable, so the occurrences of one index
// stay in the order of their examples. Then one sweep writes every row of both outputs once: zeros,
// or the sums over the row's occurrences. The sweep is cut into ranges of rows of equal cost; no
// row's arithmetic depends on the cuts.
#include <cstring>

// With AVX-512 (Zen 4) vectors of 32 bytes and lines that nothing asks for before they are written
// take a fifth less than vectors of 64, and these less than lines asked for early. (What vec.h and
// rows.h define has no symbols, so that two widths in one namespace do not meet.)
#if defined(__AVX512F__)
#define PX_VECTOR_BYTES 32
#define PX_FETCH_OUTPUTS 0
#else
#define PX_FETCH_OUTPUTS 1
#endif

#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

constexpr int kDigitBits = 11;          // of one pass of the sort
constexpr int64_t kTaskSize = 1 << 15;  // elements that are worth a task
constexpr int64_t kTasksPerThread = 8;  // so that no thread waits long for another
constexpr int64_t kSplitColumns = 256;  // columns of a task where one row dominates
constexpr int64_t kAhead = 512;         // elements of the outputs whose lines are fetched early
constexpr int64_t kFewRows = 32;        // occurrences of a row whose sums stay in registers
constexpr int64_t kComing = 5;          // occurrences from one to that which is fetched with it

template <class Int>
struct Occurrence {
  Int index, position;  // position: b T + t
};

// The occurrences sorted by index, without those of the padding index. Int holds V and B T.
template <class Int>
const Occurrence<Int>* sort_occurrences(const Embedding& a, int64_t& count) {
  using Item = Occurrence<Int>;
  int64_t bytes = a.B * a.T * static_cast<int64_t>(sizeof(Item));
  Item* from = static_cast<Item*>(scratch(bytes, 0));
  Item* to = static_cast<Item*>(scratch(bytes, 1));
  count = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t t = 0; t < a.T; ++t) {
      int64_t index = a.indices[b * a.index_stride[0] + t * a.index_stride[1]];
      if (index == a.padding_idx) continue;
      from[count++] = {static_cast<Int>(index), static_cast<Int>(b * a.T + t)};
    }
  }
  constexpr int64_t kDigits = int64_t{1} << kDigitBits;
  for (int shift = 0; (a.V - 1) >> shift > 0; shift += kDigitBits) {
    int64_t start[kDigits + 1] = {};
    auto digit = [&](const Item& item) { return (item.index >> shift) & (kDigits - 1); };
    for (int64_t i = 0; i < count; ++i) ++start[digit(from[i]) + 1];
    for (int64_t d = 0; d < kDigits; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < count; ++i) to[start[digit(from[i])]++] = from[i];
    Item* sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

// The first of the sorted occurrences with at least this index.
template <class Int>
int64_t lower_bound(const Occurrence<Int>* sorted, int64_t count, int64_t index) {
  int64_t low = 0, high = count;
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(sorted[middle].index) < index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first row at which rows and occurrences before it number at least `cost`.
template <class Int>
int64_t row_at(const Embedding& a, const Occurrence<Int>* sorted, int64_t count, int64_t cost) {
  int64_t low = 0, high = a.V;
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (middle + lower_bound(sorted, count, middle) < cost) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Columns [column, column + n) of one row: the sums over its occurrences.
template <class T, class Int>
void sum_row(const Embedding& a, const Occurrence<Int>* begin, const Occurrence<Int>* end,
             int64_t row, int64_t column, int64_t n) {
  using A = Accumulator<T>;
  const T* dy = static_cast<const T*>(a.dy) + column * a.dy_stride[2];
  bool unit = a.dy_stride[2] == 1 || n == 1;
  Block<A> block;
  for (int64_t i = 0; i < n; ++i) block.sum[i] = block.sum_sq[i] = 0;
  while (begin < end) {
    int64_t b = begin->position / a.T;
    for (bool first = true, last = false; !last; first = false) {
      const T* rows[kBlockRows];
      T gathered[kBlockRows * kGatheredColumns];
      int64_t count = 0;
      for (; count < kBlockRows && begin < end; ++begin, ++count) {
        int64_t t = begin->position - b * a.T;
        if (t >= a.T) break;
        rows[count] = dy + b * a.dy_stride[0] + t * a.dy_stride[1];
        if (unit) continue;
        T* copy = gathered + count * kGatheredColumns;
        for (int64_t i = 0; i < n; ++i) copy[i] = rows[count][i * a.dy_stride[2]];
        rows[count] = copy;
      }
      last = begin == end || static_cast<int64_t>(begin->position) >= (b + 1) * a.T;
      add_rows<T>(n, count, [&](int64_t r) PX_LAMBDA { return rows[r]; }, first, last, block);
    }
  }
  int64_t at = row * a.D + column;
  with_type(a.grad_dtype,
            [&](auto tag) { narrow_row(n, block.sum, static_cast<decltype(tag)*>(a.dw) + at); });
  narrow_row(n, block.sum_sq, static_cast<A*>(a.dw_sq) + at);
}

// The same for a row of at most kFewRows occurrences, whose sums stay in registers: `rows` points
// to them, `coming` to others that are fetched meanwhile, `last` says which end an example. G is
// the dtype of dw.
template <class T, class G>
void sum_few(const T* const* rows, const T* const* coming, const bool* last, int64_t count,
             int64_t n, G* dw, Accumulator<T>* dw_sq) {
  using A = Accumulator<T>;
  constexpr int64_t L = lanes<A>;
  auto row = [&](int64_t r) PX_LAMBDA { return rows[r]; };
  auto strip = [&](auto vectors, int64_t column, const auto& at) PX_LAMBDA {
    constexpr int V = decltype(vectors)::value;
    Vec<A> g[V] = {}, total[V] = {}, square[V] = {};
    for (int64_t r = 0; r < count; ++r) {
      const T* p = at(r);
      unroll<V>([&](auto v) PX_LAMBDA {
        g[v] += load_wide(p + v * L);
        fetch(coming[r], column + v * L);
      });
      if (!last[r]) continue;
      unroll<V>([&](auto v) PX_LAMBDA {
        total[v] += g[v];
        square[v] += g[v] * g[v];
        g[v] = Vec<A>{};
      });
    }
    unroll<V>([&](auto v) PX_LAMBDA {
      int64_t i = column + v * L;
      if constexpr (PX_FETCH_OUTPUTS) {
        fetch_to_write(dw, i + kAhead);
        fetch_to_write(dw_sq, i + kAhead);
      }
      if (i + L <= n) {
        store_narrow(dw + i, total[v]);
        store(dw_sq + i, square[v]);
      } else {
        store_first(dw + i, total[v], n - i);
        store_first(dw_sq + i, square[v], n - i);
      }
    });
  };
  each_strip<T, kFewRows>(n, count, row, strip);
}

// Columns [column, column + n) of a row of few occurrences; all end at `all_end`.
template <class T, class Int>
void gather_few(const Embedding& a, const Occurrence<Int>* begin, const Occurrence<Int>* end,
                const Occurrence<Int>* all_end, int64_t row, int64_t column, int64_t n) {
  using A = Accumulator<T>;
  const T *rows[kFewRows], *coming[kFewRows];
  bool last[kFewRows];
  int64_t count = end - begin, example_end = 0;
  for (int64_t r = 0; r < count; ++r) {
    auto find = [&](int64_t position, int64_t b) {
      return static_cast<const T*>(a.dy) + b * a.dy_stride[0] +
             (position - b * a.T) * a.dy_stride[1] + column * a.dy_stride[2];
    };
    int64_t position = begin[r].position, b = position / a.T;
    rows[r] = coming[r] = find(position, b);
    if (r > 0) last[r - 1] = position >= example_end;
    example_end = (b + 1) * a.T;
    const Occurrence<Int>* other = begin + r + kComing;
    if (other < all_end) coming[r] = find(other->position, other->position / a.T);
  }
  last[count - 1] = true;
  int64_t at = row * a.D + column;
  A* dw_sq = static_cast<A*>(a.dw_sq) + at;
  if (a.grad_dtype == a.dtype) {
    sum_few<T>(rows, coming, last, count, n, static_cast<T*>(a.dw) + at, dw_sq);
  } else {
    sum_few<T>(rows, coming, last, count, n, static_cast<A*>(a.dw) + at, dw_sq);
  }
}

// Zeros n elements of both outputs.
template <class T>
void clear(const Embedding& a, int64_t at, int64_t n) {
  with_type(a.grad_dtype, [&](auto tag) {
    using G = decltype(tag);
    std::memset(static_cast<G*>(a.dw) + at, 0, n * sizeof(G));
  });
  using A = Accumulator<T>;
  std::memset(static_cast<A*>(a.dw_sq) + at, 0, n * sizeof(A));
}

template <class T, class Int>
void moments(const Embedding& a, const Parallel& parallel) {
  int64_t count = 0;
  const Occurrence<Int>* sorted = sort_occurrences<Int>(a, count);

  int64_t cost = a.V + count;
  int64_t ranges = max_of(1, min_of(parallel.threads * kTasksPerThread, cost * a.D / kTaskSize));
  int64_t most = 0;  // occurrences of one index
  for (int64_t begin = 0, i = 1; i <= count; ++i) {
    if (i < count && sorted[i].index == sorted[begin].index) continue;
    most = max_of(most, i - begin);
    begin = i;
  }
  // Where one row would keep a thread longer than the others, the tasks are cut by columns too.
  bool split = parallel.threads > 1 && most * parallel.threads > cost / 4;
  int64_t width = split ? kSplitColumns : a.D;
  int64_t splits = ceil_div(a.D, width);
  int64_t block = a.dy_stride[2] == 1 ? kBlockColumns : kGatheredColumns;

  bool simple = (a.dy_stride[2] == 1 || a.D == 1) &&
                (a.grad_dtype == a.dtype || (a.grad_dtype == DType::f32 && a.dtype != DType::f64));

  parallel(ranges * splits, [&](int64_t task) {
    int64_t range = task / splits;
    int64_t left = task % splits * width;
    int64_t right = min_of(left + width, a.D);
    int64_t v = row_at(a, sorted, count, cost * range / ranges);
    int64_t v_end =
        range + 1 == ranges ? a.V : row_at(a, sorted, count, cost * (range + 1) / ranges);
    const Occurrence<Int>* next = sorted + lower_bound(sorted, count, v);
    while (v < v_end) {
      int64_t occupied = next < sorted + count ? min_of(next->index, v_end) : v_end;
      if (splits == 1) {
        clear<T>(a, v * a.D, (occupied - v) * a.D);
      } else {
        for (int64_t row = v; row < occupied; ++row) clear<T>(a, row * a.D + left, right - left);
      }
      v = occupied;
      if (v == v_end) break;
      const Occurrence<Int>* end = next;
      while (end < sorted + count && static_cast<int64_t>(end->index) == v) ++end;
      if (end - next <= kFewRows && simple) {
        gather_few<T>(a, next, end, sorted + count, v, left, right - left);
        next = end;
        ++v;
        continue;
      }
      for (int64_t column = left; column < right; column += block) {
        sum_row<T>(a, next, end, v, column, min_of(block, right - column));
      }
      next = end;
      ++v;
    }
  });
}

}  // namespace

void embedding_moments(const Embedding& a, const Parallel& parallel) {
  if (a.V == 0 || a.D == 0) return;
  bool small = a.V <= INT32_MAX && a.B * a.T <= INT32_MAX;
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (small) {
      moments<T, int32_t>(a, parallel);
    } else {
      moments<T, int64_t>(a, parallel);
    }
  });
}

}  // namespace perexample::cpu::PX_CAPABILITY
