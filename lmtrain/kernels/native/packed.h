// Products of rows with packed weights: sums (row, vector, lane) = operand (rows, k) · weights.
// Included once for each instruction set, inside its namespace; see native.cpp.
//
// Without AMX a tile of rows by vectors is summed in registers, over a part of the depth whose
// weights stay in the first-level cache until all rows have used them. Meanwhile the next part is
// prefetched: weights that do not fit into the second-level cache then arrive as fast as the rows
// use them.

// Consecutive k that packed weights interleave: bf16 dot products take pairs.
template <class Num> struct Pairs { static constexpr int K = 1; };
template <> struct Pairs<bf16> { static constexpr int K = 2; };

// The depth (k) of products is padded to a multiple of DEPTH_MULTIPLE, with weights of 0. Up to
// MAX_TILE_VECTORS vectors of weights are interleaved.
#ifdef AMX
constexpr int64_t DEPTH_MULTIPLE = 32;
constexpr int MAX_TILE_VECTORS = 1;
#else
constexpr int64_t DEPTH_MULTIPLE = 2;
constexpr int MAX_TILE_VECTORS = 4;
#endif

// A matrix packed for products, block by block: for each group of up to MAX_TILE_VECTORS vectors,
// for each k (or pair of k), these vectors. A block has `vectors` of them for each k: the gates of
// the product in the forward, one in the backward.
template <class Num> struct PackedWeights {
  Num* data;
  int64_t depth;  // padded
  int vectors;
  Num* block(int64_t index) const { return data + index * depth * vectors * VL; }
};

// Offset of vector n of `vectors` at k, in the packed weights of one block or of adjacent blocks.
template <class Num>
static inline int64_t packed_offset(int64_t k, int n, int64_t vectors, int64_t depth) {
  int group = n / MAX_TILE_VECTORS * MAX_TILE_VECTORS;
  int64_t width = std::min<int64_t>(MAX_TILE_VECTORS, vectors - group);
  return (group * depth + k * width + (n - group) * Pairs<Num>::K) * VL;
}

// Converts n floats to the type of operands.
template <class Num> static inline void convert(Num* to, const float* from, int64_t n) {
  for (; n > 0; n -= VL, to += VL, from += VL) {
    int count = (int)std::min<int64_t>(VL, n);
    store(to, load(from, count), count);
  }
}

#if VL == 16
// Transposes 16 rows of 16 words of 32 bits.
static inline void transpose_words(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // 128-bit lane L of fours[i + j]: column 4·L + j of rows i to i + 3.
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  constexpr int EVEN = 0x88, ODD = 0xdd;  // lanes 0 and 2, or 1 and 3, of each operand
  for (int j = 0; j < 4; ++j) {
    const __m512i even[2] = {_mm512_shuffle_i32x4(fours[j], fours[j + 4], EVEN),
                             _mm512_shuffle_i32x4(fours[j + 8], fours[j + 12], EVEN)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(fours[j], fours[j + 4], ODD),
                            _mm512_shuffle_i32x4(fours[j + 8], fours[j + 12], ODD)};
    rows[j] = _mm512_shuffle_i32x4(even[0], even[1], EVEN);
    rows[j + 4] = _mm512_shuffle_i32x4(odd[0], odd[1], EVEN);
    rows[j + 8] = _mm512_shuffle_i32x4(even[0], even[1], ODD);
    rows[j + 12] = _mm512_shuffle_i32x4(odd[0], odd[1], ODD);
  }
}
#endif

// VL lines of words: a float or a pair of bf16 each.
constexpr int WORDS = 16;
typedef uint32_t Word __attribute__((may_alias));
typedef Word Words[VL][WORDS] __attribute__((aligned(64)));

// Stores the first `count` columns of `words`, column w at address(w).
template <class F> static inline void store_columns(const Words& words, int64_t count, F address) {
#if VL == 16
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(words[i]);
  transpose_words(rows);
  for (int64_t w = 0; w < count; ++w) _mm512_storeu_si512(address(w), rows[w]);
#else
  for (int64_t w = 0; w < count; ++w) {
    Word* column = address(w);
    for (int lane = 0; lane < VL; ++lane) column[lane] = words[lane][w];
  }
#endif
}

// Stores one k, or a pair of k, of VL packed weights.
static inline void interleave(float* to, const vec (&rows)[1]) { store(to, rows[0], VL); }
#ifdef BF16
static inline void interleave(bf16* to, const vec (&rows)[2]) {
  __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)rows[0]));
  __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)rows[1]));
  _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}
#endif

#ifndef AMX
struct TileRows {
  int64_t rows;
  explicit TileRows(int64_t rows) : rows(rows) {}
  void configure() const {}
};

// Bytes of weights in a part of the depth. Chosen by measurement.
constexpr int64_t PART_BYTES = 16 << 10;

// Most rows of a tile with N vectors: as many sums as there are registers for.
constexpr int tile_rows(int N) { return std::min(12, (VL == 16 ? 24 : 12) / N); }

// Keeps either the operands of a k or its weights in registers, whichever are fewer: with the sums
// they take the 16 registers of AVX2.
template <int R, int N>
static inline void accumulate(vec (&sums)[R][N], const float* operand, int64_t stride,
                              const float* weights, int64_t depth, const char* ahead,
                              int64_t ahead_step) {
  for (int64_t k = 0; k < depth; ++k, weights += N * VL, ahead += ahead_step) {
    __builtin_prefetch(ahead, 0, 2);
    if constexpr (R < N) {
      vec x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = splat(operand[r * stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        vec w = load(weights + n * VL);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][n] += x[r] * w;
      }
    } else {
      vec w[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) w[n] = load(weights + n * VL);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        vec x = splat(operand[r * stride + k]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[r][n] += x * w[n];
      }
    }
  }
}

#ifdef BF16
template <int R, int N>
static inline void accumulate(vec (&sums)[R][N], const bf16* operand, int64_t stride,
                              const bf16* weights, int64_t depth, const char* ahead,
                              int64_t ahead_step) {
  for (int64_t k = 0; k < depth; k += 2, ahead += ahead_step) {
    __builtin_prefetch(ahead, 0, 2);
    __m512bh w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      w[n] = (__m512bh)_mm512_loadu_si512(weights + (k * N + n * 2) * VL);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, operand + r * stride + k, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        sums[r][n] = (vec)_mm512_dpbf16_ps((__m512)sums[r][n], x, w[n]);
    }
  }
}
#endif

// A tile of R rows and N vectors, over a part of the depth. For each k (or pair of k) `ahead` is
// prefetched and moves by `ahead_step` bytes. Not inlined: all cells share it.
template <class Num, int R, int N>
[[gnu::noinline]] static void multiply_tile(float* sums, bool is_first, const Num* operand,
                                            int64_t stride, const Num* weights, int64_t depth,
                                            const char* ahead, int64_t ahead_step) {
  vec acc[R][N];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = is_first ? vec{} : load(sums + (r * N + n) * VL);
  accumulate(acc, operand, stride, weights, depth, ahead, ahead_step);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(sums + (r * N + n) * VL, acc[r][n], VL);
}

template <class Num>
using MultiplyTile = void (*)(float*, bool, const Num*, int64_t, const Num*, int64_t, const char*,
                              int64_t);

// The functions for 1 to tile_rows(N) rows.
template <class Num, int N, int... R>
static MultiplyTile<Num> select_tile(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr MultiplyTile<Num> functions[] = {multiply_tile<Num, R + 1, N>...};
  return functions[rows - 1];
}

template <class Num, int N>
static void multiply_vectors(float* sums, int64_t rows, const Num* operand, int64_t stride,
                             const Num* weights, int64_t depth) {
  constexpr int64_t MAX_ROWS = tile_rows(N), K_BYTES = N * VL * sizeof(Num);
  constexpr int64_t PART = PART_BYTES / K_BYTES / 2 * 2;
  const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t k = 0; k < depth; k += PART) {
    const int64_t count = std::min(PART, depth - k), bytes = count * K_BYTES;
    const int64_t steps = tiles * count / Pairs<Num>::K;  // in which the next part is prefetched
    const char* ahead = (const char*)(weights + (k + count) * N * VL);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = rows * tile / tiles, height = rows * (tile + 1) / tiles - row;
      select_tile<Num, N>(height, std::make_integer_sequence<int, MAX_ROWS>{})(
          sums + row * N * VL, k == 0, operand + row * stride + k, stride,
          weights + k * N * VL, count, ahead + bytes * tile / tiles, bytes / steps);
    }
  }
}

// sums (row, vector, lane) = operand · weights for all rows and `vectors` vectors of weights.
template <class Num>
static void multiply_all(float* sums, const TileRows& rows, const Num* operand, int64_t stride,
                         const Num* weights, int64_t vectors, int64_t depth) {
  switch (vectors) {
    case 1: multiply_vectors<Num, 1>(sums, rows.rows, operand, stride, weights, depth); break;
    case 2: multiply_vectors<Num, 2>(sums, rows.rows, operand, stride, weights, depth); break;
    case 3: multiply_vectors<Num, 3>(sums, rows.rows, operand, stride, weights, depth); break;
    default: multiply_vectors<Num, 4>(sums, rows.rows, operand, stride, weights, depth);
  }
}
#endif

#ifdef AMX
// out = operand · weights, or if is_sum the sum of both, for M × N tiles of up to 16 rows by 16 units.
// Tile registers 0 to 3 are accumulators, 4 and 5 operands, 6 and 7 weights. Calls meanwhile() for
// each DEPTH_MULTIPLE of the depth: its instructions run while tiles are multiplied.
template <int M, int N, class F>
static inline void multiply_tiles(float* const (&out)[2], int64_t out_stride,
                                  const bf16* const (&operand)[2], int64_t stride,
                                  const bf16* weights, int64_t depth, bool is_sum, F meanwhile) {
  if (is_sum) {
    _tile_loadd(0, out[0], out_stride * 4);
    if (N == 2) _tile_loadd(1, out[0] + VL, out_stride * 4);
    if (M == 2) _tile_loadd(2, out[1], out_stride * 4);
    if (M == 2 && N == 2) _tile_loadd(3, out[1] + VL, out_stride * 4);
  } else {
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (M == 2) _tile_zero(2);
    if (M == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += DEPTH_MULTIPLE) {
    _tile_loadd(4, operand[0] + k, stride * 2);
    if (M == 2) _tile_loadd(5, operand[1] + k, stride * 2);
    _tile_loadd(6, weights + k * VL, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (M == 2) _tile_dpbf16ps(2, 5, 6);
    if (N == 2) {
      _tile_loadd(7, weights + (depth + k) * VL, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (M == 2) _tile_dpbf16ps(3, 5, 7);
    }
    meanwhile();
  }
  _tile_stored(0, out[0], out_stride * 4);
  if (N == 2) _tile_stored(1, out[0] + VL, out_stride * 4);
  if (M == 2) _tile_stored(2, out[1], out_stride * 4);
  if (M == 2 && N == 2) _tile_stored(3, out[1] + VL, out_stride * 4);
}

// Divides rows into tiles of equal height; the last tile may overlap the one before it.
struct TileRows {
  int64_t tiles, height, rows;
  explicit TileRows(int64_t rows)
      : tiles((rows + 15) / 16), height((rows + tiles - 1) / tiles), rows(rows) {}
  int64_t begin(int64_t tile) const { return std::min(tile * height, rows - height); }
  void configure() const {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.rows[i] = i < 6 ? (uint8_t)height : 16;
    // GCC's _tile_loadconfig reads 8 bytes as far as the optimizer knows: without this it may drop
    // the stores to the others.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
};

// sums (row, vector, lane) = operand · weights for all rows and `vectors` vectors of weights.
static inline void multiply_all(float* sums, const TileRows& rows, const bf16* operand,
                                int64_t stride, const bf16* weights, int64_t vectors,
                                int64_t depth) {
  for (int64_t tile = 0; tile < rows.tiles; tile += 2) {
    bool is_pair = tile + 1 < rows.tiles;
    int64_t first = rows.begin(tile), second = is_pair ? rows.begin(tile + 1) : first;
    const bf16* const operands[2] = {operand + first * stride, operand + second * stride};
    for (int64_t n = 0; n < vectors; n += 2) {
      float* const out[2] = {sums + (first * vectors + n) * VL,
                             sums + (second * vectors + n) * VL};
      const bf16* from = weights + n * depth * VL;
      bool is_wide = n + 1 < vectors;
      const int64_t out_stride = vectors * VL;
      if (is_pair && is_wide)
        multiply_tiles<2, 2>(out, out_stride, operands, stride, from, depth, false, [] {});
      else if (is_pair)
        multiply_tiles<2, 1>(out, out_stride, operands, stride, from, depth, false, [] {});
      else if (is_wide)
        multiply_tiles<1, 2>(out, out_stride, operands, stride, from, depth, false, [] {});
      else
        multiply_tiles<1, 1>(out, out_stride, operands, stride, from, depth, false, [] {});
    }
  }
}
#endif
