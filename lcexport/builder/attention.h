// softmax(scale q k^T) v in float32 on a processor, for AOTInductor's packages.
//
// Blocks of keys and values are rearranged, so that tiles of queries read them in order, and a
// tile's scores stay in the nearest cache; its softmax goes on from block to block (FlashAttention,
// arXiv:2205.14135). For AVX2 and AVX-512: torch's vectors of other processors lack what it asks of
// them. lcexport/builder/aoti_attention.py puts this text into what Inductor generates.
#ifndef LCEXPORT_ATTENTION_H
#define LCEXPORT_ATTENTION_H

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>

namespace lcexport {

using Lanes = at::vec::Vectorized<float>;
constexpr int LANES = Lanes::size();
constexpr int COLUMNS = 2 * LANES;  // of a panel
#if defined(CPU_CAPABILITY_AVX2)
constexpr int ROWS = 6;  // 6 x 2 sums fit 16 registers
#else
constexpr int ROWS = 12;
#endif
constexpr int KEYS = 256;    // of a block: with its values 256 KiB for heads of 128
constexpr int CHUNK = 3072;  // queries that one arrangement of the keys serves
static_assert(KEYS % COLUMNS == 0 && CHUNK % ROWS == 0);

// A tensor [batch, head, token, dim] whose dim lies side by side.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, head, token;  // strides

  T* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * batch + h * head + n * token;
  }
};

// c [ROWS, COLUMNS] = a [ROWS, depth] panel [depth, COLUMNS], added to c where ADD.
template <bool ADD>
inline void multiply(const float* a, int lda, const float* panel, int depth, float* c, int ldc) {
  Lanes sums[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      sums[r][j] = ADD ? Lanes::loadu(c + r * ldc + j * LANES) : Lanes(0.f);
  for (int i = 0; i < depth; ++i) {
    const Lanes left = Lanes::loadu(panel + i * COLUMNS);
    const Lanes right = Lanes::loadu(panel + i * COLUMNS + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const Lanes x(a[r * lda + i]);
      sums[r][0] = at::vec::fmadd(x, left, sums[r][0]);
      sums[r][1] = at::vec::fmadd(x, right, sums[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sums[r][j].store(c + r * ldc + j * LANES);
}

// 2^x for x <= 0: Taylor's series of 2^f = exp(f ln 2) to the sixth power about the nearest whole
// number, f at most 1/2 (1.3e-7 of the value), whose exponent is added. Never less than 2^-126,
// which is nothing beside the 1 of the highest score, unless a value is above 1e30.
inline Lanes power_of_two(Lanes x) {
  x = at::vec::clamp_min(x, Lanes(-126.f));
  const Lanes whole = x.round(), f = x - whole;
  Lanes sum(1.5403530e-4f);  // ln(2)^6 / 6!
  sum = at::vec::fmadd(sum, f, Lanes(1.3333558e-3f));
  sum = at::vec::fmadd(sum, f, Lanes(9.6181291e-3f));
  sum = at::vec::fmadd(sum, f, Lanes(5.5504109e-2f));
  sum = at::vec::fmadd(sum, f, Lanes(2.4022651e-1f));
  sum = at::vec::fmadd(sum, f, Lanes(6.9314718e-1f));
  sum = at::vec::fmadd(sum, f, Lanes(1.f));
  const auto exponent =
      at::vec::convert_to_int_of_same_size(whole) << at::vec::Vectorized<int32_t>(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(sum) + exponent);
}

// What one thread needs for a chunk of one head's queries and a block of its keys and values.
template <int D>
class Chunk {
  static_assert(D % COLUMNS == 0);
  // A little more than they hold, so that the rows of a tile do not compete for cache sets.
  static constexpr int QUERY = D + LANES, SCORES = KEYS + LANES;

  alignas(64) float queries[CHUNK * QUERY];
  alignas(64) float sums[CHUNK * D];  // of values, by their shares so far
  alignas(64) float totals[CHUNK * LANES];  // of shares, a query's to be added up
  float highest[CHUNK];                     // score so far
  alignas(64) float keys[KEYS * D];         // [KEYS / COLUMNS, D, COLUMNS]
  alignas(64) float values[KEYS * D];       // [D / COLUMNS, KEYS, COLUMNS]
  alignas(64) float scores[ROWS * SCORES];
  int rows;          // of queries, in whole tiles
  int count, width;  // keys of the block, and in whole panels

 public:
  // So many queries of a head, scaled for powers of two instead of e; zeros fill the last tile.
  void take_queries(const float* q, int64_t stride, int asked, float scale) {
    rows = (asked + ROWS - 1) / ROWS * ROWS;
    const Lanes factor(scale * 1.44269504f);  // log2(e)
    for (int n = 0; n < rows; ++n)
      for (int d = 0; d < D; d += LANES) {
        const Lanes x = n < asked ? Lanes::loadu(q + n * stride + d) * factor : Lanes(0.f);
        x.store(queries + n * QUERY + d);
      }
    std::fill_n(sums, rows * D, 0.f);
    std::fill_n(totals, rows * LANES, 0.f);
    std::fill_n(highest, rows, -std::numeric_limits<float>::infinity());
  }

  // A block of at most KEYS keys and values; zeros fill the last panel.
  void take_keys(const float* k, int64_t k_stride, const float* v, int64_t v_stride, int known) {
    count = known;
    width = (count + COLUMNS - 1) / COLUMNS * COLUMNS;
    if (count < width) std::fill_n(key(width - COLUMNS, 0), COLUMNS * D, 0.f);
    int n = 0;
    for (; n + LANES <= count; n += LANES)
      for (int d = 0; d < D; d += LANES)
        at::vec::transpose_mxn<float, LANES, LANES>(
            k + n * k_stride + d, k_stride, key(n, d), COLUMNS);
    for (; n < count; ++n)
      for (int d = 0; d < D; ++d) *key(n, d) = k[n * k_stride + d];
    for (n = 0; n < width; ++n)
      for (int d = 0; d < D; d += LANES) {
        const Lanes x = n < count ? Lanes::loadu(v + n * v_stride + d) : Lanes(0.f);
        x.store(values + d / COLUMNS * COLUMNS * KEYS + n * COLUMNS + d % COLUMNS);
      }
  }

  void attend() {
    for (int n = 0; n < rows; n += ROWS) {
      for (int first = 0; first < width; first += COLUMNS)
        multiply<false>(queries + n * QUERY, QUERY, key(first, 0), D, scores + first, SCORES);
      weigh(n);
      for (int d = 0; d < D; d += COLUMNS)
        multiply<true>(scores, SCORES, values + d * KEYS, width, sums + n * D + d, D);
    }
  }

  void give(float* out, int64_t stride, int asked) const {
    for (int n = 0; n < asked; ++n) {
      const Lanes share(1.f / Lanes::loadu(totals + n * LANES).reduce_add());
      for (int d = 0; d < D; d += LANES)
        (Lanes::loadu(sums + n * D + d) * share).store(out + n * stride + d);
    }
  }

 private:
  float* key(int n, int d) { return keys + n / COLUMNS * COLUMNS * D + d * COLUMNS + n % COLUMNS; }

  // Scores of the tile at query n become shares; what was summed by a lower highest score shrinks.
  void weigh(int n) {
    alignas(64) float shrunk[(ROWS + LANES - 1) / LANES * LANES] = {};
    for (int r = 0; r < ROWS; ++r) {
      float* row = scores + r * SCORES;
      std::fill(row + count, row + width, -std::numeric_limits<float>::infinity());
      Lanes left(highest[n + r]), right = left;
      for (int i = 0; i < width; i += COLUMNS) {
        left = at::vec::clamp_min(Lanes::loadu(row + i), left);
        right = at::vec::clamp_min(Lanes::loadu(row + i + LANES), right);
      }
      const float now = at::vec::maximum(left, right).reduce_max();
      shrunk[r] = highest[n + r] - now;
      highest[n + r] = now;
    }
    for (int r = 0; r < ROWS; r += LANES) power_of_two(Lanes::loadu(shrunk + r)).store(shrunk + r);
    for (int r = 0; r < ROWS; ++r) {
      float *row = scores + r * SCORES, *total = totals + (n + r) * LANES;
      float* sum = sums + (n + r) * D;
      const Lanes most(highest[n + r]), factor(shrunk[r]);
      // Fetch the next tile's from a cache farther away; after the last, nothing's.
      for (int d = 0; d < D; d += 16) {
        __builtin_prefetch(queries + (n + ROWS + r) * QUERY + d, 0, 2);
        __builtin_prefetch(sum + ROWS * D + d, 1, 2);
      }
      Lanes left = Lanes::loadu(total) * factor, right(0.f);
      for (int i = 0; i < width; i += COLUMNS) {
        const Lanes x = power_of_two(Lanes::loadu(row + i) - most);
        const Lanes y = power_of_two(Lanes::loadu(row + i + LANES) - most);
        x.store(row + i);
        y.store(row + i + LANES);
        left = left + x;
        right = right + y;
      }
      (left + right).store(total);
      for (int d = 0; d < D; d += LANES) (Lanes::loadu(sum + d) * factor).store(sum + d);
    }
  }
};

// out [batch, heads, asked, D] of q, and of k and v [batch, heads, known, D], at least one key.
// Threads share the tiles.
template <int D>
void attention(Heads<const float> q, Heads<const float> k, Heads<const float> v, Heads<float> out,
               int64_t batch, int64_t heads, int64_t asked, int64_t known, float scale) {
  const int64_t tiles = (asked + ROWS - 1) / ROWS;
  at::parallel_for(0, batch * heads * tiles, 1, [&](int64_t begin, int64_t end) {
    auto chunk = std::make_unique_for_overwrite<Chunk<D>>();
    while (begin < end) {
      const int64_t of = begin / tiles, b = of / heads, h = of % heads;
      const int64_t tile = begin % tiles, first = tile * ROWS;
      const int64_t here = std::min({end - begin, tiles - tile, int64_t{CHUNK / ROWS}});
      const int queries = std::min(here * ROWS, asked - first);
      chunk->take_queries(q.at(b, h, first), q.token, queries, scale);
      for (int64_t n = 0; n < known; n += KEYS) {
        const int keys = std::min<int64_t>(KEYS, known - n);
        chunk->take_keys(k.at(b, h, n), k.token, v.at(b, h, n), v.token, keys);
        chunk->attend();
      }
      chunk->give(out.at(b, h, first), out.token, queries);
      begin += here;
    }
  });
}

}  // namespace lcexport

#endif
